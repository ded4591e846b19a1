package millrace

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/millrace-dev/millrace/test/env/tools"
)

// kustomize renders config/default, of which make install-yaml makes install.yaml.
func kustomize(t *testing.T) (string, objects) {
	t.Helper()
	dir, err := tools.Ensure(t.Context(), os.Stderr, "kubectl")
	must(t, err)
	out, err := exec.CommandContext(t.Context(), filepath.Join(dir, "kubectl"), "kustomize", filepath.Join("..", "..", "config", "default")).Output()
	must(t, err)
	return string(out), decode(t, string(out))
}

// comparable strips what differs by nature: labels and annotations that name the tool, and names.
func comparable(t *testing.T, o metav1.Object, rename ...string) string {
	t.Helper()
	o.SetName("")
	o.SetLabels(nil)
	o.SetAnnotations(nil)
	text, err := json.MarshalIndent(o, "", " ")
	must(t, err)
	return strings.NewReplacer(rename...).Replace(string(text))
}

// config/default installs what the chart installs by default.
func TestKustomizeIsEqualToTheChart(t *testing.T) {
	t.Parallel()
	_, k := kustomize(t)
	chart := render(t, "database.existingSecret=millrace-database")

	// A name of config/default on the left, the chart's on the right. The chart's role is in two parts.
	names := map[string]string{
		"Deployment/millrace-manager": "Deployment/millrace", "ServiceAccount/millrace-manager": "ServiceAccount/millrace",
		"Service/millrace-metrics":                             "Service/millrace-metrics",
		"Role/millrace-leader-election":                        "Role/millrace-leader-election",
		"RoleBinding/millrace-leader-election":                 "RoleBinding/millrace-leader-election",
		"ClusterRole/millrace-manager":                         "ClusterRole/millrace-manager",
		"ClusterRoleBinding/millrace-manager":                  "ClusterRoleBinding/millrace-manager",
		"ClusterRole/millrace-metrics-reader":                  "ClusterRole/millrace-metrics-reader",
		"ClusterRole/millrace-view":                            "ClusterRole/millrace-view",
		"ClusterRole/millrace-edit":                            "ClusterRole/millrace-edit",
		"Namespace/millrace-system":                            "", // helm --create-namespace
		"CustomResourceDefinition/streams.millrace.dev":        "CustomResourceDefinition/streams.millrace.dev",
		"CustomResourceDefinition/consumergroups.millrace.dev": "CustomResourceDefinition/consumergroups.millrace.dev",
		"CustomResourceDefinition/processors.millrace.dev":     "CustomResourceDefinition/processors.millrace.dev",
	}
	used := map[string]bool{"ClusterRole/millrace-cluster": true, "ClusterRoleBinding/millrace-cluster": true, "Pod/millrace-test": true}
	for name := range k {
		if _, known := names[name]; !known {
			t.Errorf("config/default has %s, and this test does not know its pair", name)
		}
	}
	for of, to := range names {
		used[to] = true
		if k[of] == nil || to != "" && chart[to] == nil {
			t.Errorf("%s and %s: one is missing", of, to)
		}
	}
	for name := range chart {
		if !used[name] {
			t.Errorf("the chart has %s, and config/default has nothing like it", name)
		}
	}
	if t.Failed() {
		return
	}
	same := func(what string, a, b metav1.Object) {
		t.Helper()
		rename := []string{"millrace-manager", "millrace"} // what refers to the service account and to roles
		if x, y := comparable(t, a, rename...), comparable(t, b, rename...); x != y {
			t.Errorf("%s: config/default has\n%s\nand the chart\n%s", what, x, y)
		}
	}
	same("service account", get[corev1.ServiceAccount](t, k, "ServiceAccount/millrace-manager"), get[corev1.ServiceAccount](t, chart, "ServiceAccount/millrace"))
	same("leader election", get[rbacv1.Role](t, k, "Role/millrace-leader-election"), get[rbacv1.Role](t, chart, "Role/millrace-leader-election"))
	same("its binding", get[rbacv1.RoleBinding](t, k, "RoleBinding/millrace-leader-election"), get[rbacv1.RoleBinding](t, chart, "RoleBinding/millrace-leader-election"))
	same("binding", get[rbacv1.ClusterRoleBinding](t, k, "ClusterRoleBinding/millrace-manager"), get[rbacv1.ClusterRoleBinding](t, chart, "ClusterRoleBinding/millrace-manager"))
	for _, name := range []string{"metrics-reader", "view", "edit"} {
		a, b := get[rbacv1.ClusterRole](t, k, "ClusterRole/millrace-"+name), get[rbacv1.ClusterRole](t, chart, "ClusterRole/millrace-"+name)
		for _, aggregate := range []string{"view", "edit", "admin"} {
			label := "rbac.authorization.k8s.io/aggregate-to-" + aggregate
			if a.Labels[label] != b.Labels[label] {
				t.Errorf("%s: %s is %q and %q", name, label, a.Labels[label], b.Labels[label])
			}
		}
		same(name, a, b)
	}

	role, parts := get[rbacv1.ClusterRole](t, k, "ClusterRole/millrace-manager"), get[rbacv1.ClusterRole](t, chart, "ClusterRole/millrace-manager")
	parts.Rules = append(parts.Rules, get[rbacv1.ClusterRole](t, chart, "ClusterRole/millrace-cluster").Rules...)
	for _, r := range []*rbacv1.ClusterRole{role, parts} {
		slices.SortFunc(r.Rules, func(a, b rbacv1.PolicyRule) int { return strings.Compare(a.String(), b.String()) })
	}
	same("the manager's role", role, parts)

	services := []*corev1.Service{get[corev1.Service](t, k, "Service/millrace-metrics"), get[corev1.Service](t, chart, "Service/millrace-metrics")}
	deployments := []*appsv1.Deployment{get[appsv1.Deployment](t, k, "Deployment/millrace-manager"), get[appsv1.Deployment](t, chart, "Deployment/millrace")}
	for i, d := range deployments {
		for key, value := range services[i].Spec.Selector {
			if d.Spec.Template.Labels[key] != value {
				t.Errorf("the Service of the metrics selects %s=%s, and pods have %v", key, value, d.Spec.Template.Labels)
			}
		}
		services[i].Spec.Selector = nil
		// What names the release, and what only an optional Secret can say.
		d.Spec.Selector, d.Spec.Template.Labels = nil, nil
		c := &d.Spec.Template.Spec.Containers[0]
		if !has(c.Args, "--leader-election-namespace="+[]string{"$(POD_NAMESPACE)", "millrace-system"}[i]) {
			t.Errorf("the Lease is elsewhere: %v", c.Args)
		}
		c.Args = slices.DeleteFunc(c.Args, func(arg string) bool { return strings.HasPrefix(arg, "--leader-election-namespace=") })
		c.Env = slices.DeleteFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == "POD_NAMESPACE" })
		for j := range c.Env {
			if from := c.Env[j].ValueFrom; from != nil && from.SecretKeyRef != nil {
				from.SecretKeyRef.Optional = nil
			}
		}
	}
	same("metrics", services[0], services[1])
	same("deployment", deployments[0], deployments[1])

	for name := range k {
		if strings.HasPrefix(name, "CustomResourceDefinition/") && specOf(t, k[name]) != specOf(t, chart[name]) {
			t.Errorf("%s differs", name)
		}
	}
	if ns := get[corev1.Namespace](t, k, "Namespace/millrace-system"); ns.Labels["pod-security.kubernetes.io/enforce"] != "restricted" {
		t.Errorf("the namespace does not enforce the restricted standard: %v", ns.Labels)
	}
}

func specOf(t *testing.T, document []byte) string {
	t.Helper()
	var crd struct {
		Spec any `json:"spec"`
	}
	must(t, yaml.Unmarshal(document, &crd))
	text, err := json.Marshal(crd.Spec)
	must(t, err)
	return string(text)
}

// PROJECT tells kubebuilder of every kind, and of nothing that is not there.
func TestProjectNamesEveryKind(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(filepath.Join("..", "..", "PROJECT"))
	must(t, err)
	var project struct {
		Domain, ProjectName, Repo, Version string
		Layout                             []string
		Resources                          []struct {
			API struct {
				CRDVersion string
				Namespaced bool
			}
			Controller                                 bool
			Domain, Group, Kind, Path, Version, Plural string
		}
	}
	must(t, yaml.UnmarshalStrict(text, &project))
	var kinds []string
	for _, r := range project.Resources {
		crd := filepath.Join("..", "..", "config", "crd", "bases", r.Group+"."+r.Domain+"_"+strings.ToLower(r.Kind)+"s.yaml")
		if _, err := os.Stat(crd); err != nil || !r.Controller || !r.API.Namespaced {
			t.Errorf("%s: %v", r.Kind, err)
		}
		kinds = append(kinds, r.Kind)
		if _, err := os.Stat(filepath.Join("..", "..", strings.TrimPrefix(r.Path, project.Repo))); err != nil {
			t.Error(err)
		}
	}
	if want := []string{"Stream", "ConsumerGroup", "Processor"}; !slices.Equal(kinds, want) {
		t.Errorf("PROJECT names %v, not %v", kinds, want)
	}
}
