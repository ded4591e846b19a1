package millrace

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"
)

const monitoring = "files/monitoring/"

func TestMonitoringIsSwitchedOnPieceByPiece(t *testing.T) {
	for name := range render(t) {
		for _, kind := range []string{"PodMonitor/", "PrometheusRule/", "ConfigMap/", "Secret/"} {
			if strings.HasPrefix(name, kind) {
				t.Errorf("%s is there without being asked for", name)
			}
		}
	}
	all := render(t, "metrics.podMonitor.enabled=true", "metrics.podMonitor.labels.release=prom", "metrics.podMonitor.interval=15s")
	manager, processors := get[monitoringv1.PodMonitor](t, all, "PodMonitor/millrace"), get[monitoringv1.PodMonitor](t, all, "PodMonitor/millrace-processors")
	endpoint := manager.Spec.PodMetricsEndpoints[0]
	if manager.Labels["release"] != "prom" || endpoint.Interval != "15s" || !endpoint.HonorLabels || *endpoint.Scheme != "https" || *endpoint.Port != "metrics" {
		t.Errorf("the manager's: %+v", manager)
	}
	// The token belongs to an account that may read the metrics.
	secret := get[corev1.Secret](t, all, "Secret/"+endpoint.Authorization.Credentials.Name)
	account := get[corev1.ServiceAccount](t, all, "ServiceAccount/"+secret.Annotations[corev1.ServiceAccountNameKey])
	binding := get[rbacv1.ClusterRoleBinding](t, all, "ClusterRoleBinding/millrace-metrics")
	if secret.Type != corev1.SecretTypeServiceAccountToken || binding.Subjects[0].Name != account.Name || binding.RoleRef.Name != "millrace-metrics-reader" {
		t.Errorf("the token: %+v, %+v", secret, binding)
	}
	get[rbacv1.ClusterRole](t, all, "ClusterRole/"+binding.RoleRef.Name)
	if p := processors.Spec; !p.NamespaceSelector.Any || p.Selector.MatchLabels["app.kubernetes.io/name"] != "millrace-processor" || *p.PodMetricsEndpoints[0].Port != "http" {
		t.Errorf("the processors': %+v", p)
	}
	all = render(t, "metrics.podMonitor.enabled=true", "metrics.secure=false", "namespaces={a,b}")
	if e := get[monitoringv1.PodMonitor](t, all, "PodMonitor/millrace").Spec.PodMetricsEndpoints[0]; *e.Scheme != "http" || e.Authorization != nil {
		t.Errorf("without TLS: %+v", e)
	}
	if s := get[monitoringv1.PodMonitor](t, all, "PodMonitor/millrace-processors").Spec.NamespaceSelector; s.Any || len(s.MatchNames) != 2 {
		t.Errorf("in two namespaces: %+v", s)
	}
	if _, ok := all["Secret/millrace-metrics-token"]; ok {
		t.Error("a token that nobody needs")
	}
	all = render(t, "metrics.dashboard.enabled=true", "metrics.dashboard.namespace=grafana")
	board := get[corev1.ConfigMap](t, all, "ConfigMap/grafana/millrace-dashboard")
	text, err := os.ReadFile(monitoring + "dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	if board.Namespace != "grafana" || board.Labels["grafana_dashboard"] != "1" || strings.TrimSpace(board.Data["millrace.json"]) != strings.TrimSpace(string(text)) {
		t.Errorf("the dashboard in the cluster is not the file: %s %v", board.Namespace, board.Labels)
	}
}

// ruleFile is what is read of a file of rules.
type ruleFile struct {
	Groups []struct {
		Rules []struct {
			Alert, Expr         string
			Labels, Annotations map[string]string
		}
	}
}

// Every alert has a runbook with the three parts that a person needs, and there is no runbook without an alert.
func TestEveryAlertHasARunbook(t *testing.T) {
	rule := get[monitoringv1.PrometheusRule](t, render(t, "metrics.prometheusRule.enabled=true", "metrics.prometheusRule.runbooks=https://runbooks.example.com/",
		"metrics.prometheusRule.disabled={MillraceGroupBehind}"), "PrometheusRule/millrace")
	text, err := os.ReadFile(monitoring + "rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file ruleFile
	if err := yaml.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile(monitoring + "rules_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	rendered := rule.Spec.Groups[0].Rules
	if len(rendered) != len(file.Groups[0].Rules)-1 {
		t.Errorf("%d alerts of %d; one is disabled", len(rendered), len(file.Groups[0].Rules))
	}
	for i, r := range rendered {
		if want := "https://runbooks.example.com/" + r.Alert + ".md"; r.Annotations["runbook_url"] != want {
			t.Errorf("%s: %s", r.Alert, r.Annotations["runbook_url"])
		}
		if r.Alert == "MillraceGroupBehind" || r.Annotations["summary"] == "" || r.Labels["severity"] == "" || r.Expr.String() == "" {
			t.Errorf("alert %d: %+v", i, r)
		}
		if strings.Contains(r.Annotations["summary"], "{{") && !strings.Contains(r.Annotations["summary"], "$") {
			t.Errorf("%s: Helm has eaten Prometheus's template: %s", r.Alert, r.Annotations["summary"])
		}
	}
	runbooks := filepath.Join("..", "..", "docs", "runbooks")
	known := map[string]bool{}
	for _, r := range file.Groups[0].Rules {
		known[r.Alert+".md"] = true
		page, err := os.ReadFile(filepath.Join(runbooks, r.Alert+".md"))
		if err != nil {
			t.Errorf("%s has no runbook: %v", r.Alert, err)
			continue
		}
		for _, part := range []string{"# " + r.Alert + "\n", "\n## What it means\n", "\n## How to look\n", "\n## What to do\n"} {
			if !strings.Contains(string(page), part) {
				t.Errorf("the runbook of %s lacks %q", r.Alert, strings.TrimSpace(part))
			}
		}
		if !strings.Contains(string(tests), "- alertname: "+r.Alert+"\n") {
			t.Errorf("%s does not fire in %srules_test.yaml", r.Alert, monitoring)
		}
	}
	pages, err := os.ReadDir(runbooks)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pages {
		if !known[p.Name()] {
			t.Errorf("docs/runbooks/%s belongs to no alert", p.Name())
		}
	}
}

// promtool is Prometheus's own judge of rules.
func TestAlertsFireWhenTheyShould(t *testing.T) {
	for _, args := range [][]string{{"check", "rules", monitoring + "rules.yaml"}, {"test", "rules", monitoring + "rules_test.yaml"}} {
		if out, err := exec.CommandContext(t.Context(), "promtool", args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
}

// What Grafana would show badly: panels that overlap, leave the grid, say nothing of themselves, or have no unit or data source.
func TestTheDashboardIsLaidOut(t *testing.T) {
	text, err := os.ReadFile(monitoring + "dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	type target struct{ RefID, Expr string }
	var board struct {
		Title, UID string
		Templating struct{ List []struct{ Name string } }
		Panels     []struct {
			ID                       int
			Type, Title, Description string
			GridPos                  struct{ X, Y, W, H int }
			Datasource               struct{ UID string }
			FieldConfig              struct{ Defaults struct{ Unit string } }
			Targets                  []target
		}
	}
	if err := json.Unmarshal(text, &board); err != nil {
		t.Fatal(err)
	}
	variables := map[string]bool{"$__rate_interval": true}
	for _, v := range board.Templating.List {
		variables["$"+v.Name] = true
	}
	taken, ids, titles := map[[2]int]string{}, map[int]bool{}, map[string]bool{}
	for _, p := range board.Panels {
		if ids[p.ID] || p.Title == "" || titles[p.Type+p.Title] {
			t.Errorf("panel %d %q is there twice", p.ID, p.Title)
		}
		ids[p.ID], titles[p.Type+p.Title] = true, true
		if p.GridPos.X < 0 || p.GridPos.W < 1 || p.GridPos.X+p.GridPos.W > 24 || p.GridPos.H < 1 {
			t.Errorf("%q leaves the grid: %+v", p.Title, p.GridPos)
		}
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" {
					t.Fatalf("%q lies on %q", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.Description == "" || p.Datasource.UID != "${datasource}" || p.FieldConfig.Defaults.Unit == "" || len(p.Targets) == 0 {
			t.Errorf("%q lacks a description, a unit, a data source or a query", p.Title)
		}
		for _, q := range p.Targets {
			for _, word := range strings.FieldsFunc(q.Expr, func(r rune) bool { return strings.ContainsRune(`"{}[]()=~, `, r) }) {
				if strings.HasPrefix(word, "$") && !variables[word] {
					t.Errorf("%q uses %s, which is no variable", p.Title, word)
				}
			}
		}
	}
	bottom := 0
	for at := range taken {
		bottom = max(bottom, at[1])
	}
	for y := range bottom {
		if taken[[2]int{0, y}] == "" {
			t.Errorf("nothing begins at line %d: %s", y, fmt.Sprint(taken[[2]int{0, y - 1}], " is above"))
		}
	}
}
