// Package monitoring tests what the chart has for Prometheus and Grafana with a real Prometheus that scrapes a real manager and a real processor.
package monitoring

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/jackc/pgx/v5"
	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	"sigs.k8s.io/yaml"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller"
	"github.com/millrace-dev/millrace/test/env/apiserver"
	"github.com/millrace-dev/millrace/test/env/postgres"
	"github.com/millrace-dev/millrace/test/env/process"
	"github.com/millrace-dev/millrace/test/env/tools"
)

func TestMain(m *testing.M) {
	ctrl.SetLogger(logr.Discard())
	os.Exit(postgres.Main(m, postgres.Options{}))
}

const (
	root  = "../../"
	files = root + "charts/millrace/files/monitoring/"
)

// resources are named as the runbooks name them: orders, billing and telemetry.
const resources = `
apiVersion: millrace.dev/v1alpha1
kind: Stream
metadata: {name: orders, namespace: default}
spec: {databaseSecretRef: {name: app-db, key: dsn}, partitions: 4}
---
apiVersion: millrace.dev/v1alpha1
kind: Stream
metadata: {name: broken, namespace: default}
spec: {databaseSecretRef: {name: missing, key: dsn}}
---
apiVersion: millrace.dev/v1alpha1
kind: ConsumerGroup
metadata: {name: billing, namespace: default}
spec: {streamRef: {name: orders}, mode: Shared}
---
apiVersion: millrace.dev/v1alpha1
kind: ConsumerGroup
metadata: {name: sink, namespace: default}
spec: {streamRef: {name: orders}, mode: Shared, warningSize: 1000}
---
apiVersion: millrace.dev/v1alpha1
kind: Processor
metadata: {name: telemetry, namespace: default}
spec:
  source: {consumerGroup: {name: sink}}
  mapping:
    columns:
    - {name: order_id, path: order_id, type: text, required: true}
    - {name: amount, path: amount, type: numeric}
  errors: {maxDeliveries: 1}
  sink: {table: {name: sink_orders, key: [order_id], create: IfMissing}}
`

// One installation serves all the questions, because it takes long to start.
func TestARealPrometheusReadsARealInstallation(t *testing.T) {
	w := start(t)
	w.apply(resources)
	for _, o := range []client.Object{&v1alpha1.Stream{}, &v1alpha1.ConsumerGroup{}} {
		w.ready(o, map[bool]string{true: "orders", false: "billing"}[fmt.Sprintf("%T", o) == "*v1alpha1.Stream"])
	}
	w.ready(&v1alpha1.ConsumerGroup{}, "sink")
	processor := w.runProcessor()
	w.exec(`select millrace.publish('orders', jsonb_build_object('order_id', i, 'amount', i)) from generate_series(1, 50) i`)
	w.runPrometheus(w.manager, processor)
	w.eventually("both are scraped", func() error {
		if n := len(w.query(`up == 1`)); n != 2 {
			return fmt.Errorf("%d targets are up", n)
		}
		return nil
	})
	// With Prometheus looking: something fails, and something is set aside.
	w.exec(`select millrace.publish('orders', '{"order_id": null}')`)
	var claim string
	if err := w.db.QueryRow(t.Context(), `select max(claim) from millrace.receive('orders', 'billing', 'worker-1', 10)`).Scan(&claim); err != nil {
		t.Fatal(err)
	}
	w.exec(`select millrace.dead_letter($1, array[1], 'no such customer')`, claim)
	w.exec(`select millrace.nack($1, array[2], 3600, 'the bank is closed')`, claim)

	t.Run("every metric of the manager is documented", w.with((*world).documented))
	t.Run("every query of the dashboard returns series", w.with((*world).dashboard))
	t.Run("every alert can be told from what is exported", w.with((*world).alerts))
	t.Run("every command of the runbooks runs", w.with((*world).runbooks))
}

// world is one installation: an API server without nodes, PostgreSQL, a manager, a processor, Prometheus.
type world struct {
	*testing.T
	dir, bin   string
	kubeconfig string
	kubectl    string
	admin      client.Client
	dsn        string
	db         *pgx.Conn
	manager    string // host:port of its metrics
	prometheus string // base URL
}

// with lets a subtest ask in its own name.
func (w *world) with(ask func(*world)) func(*testing.T) {
	return func(t *testing.T) {
		of := *w
		of.T = t
		ask(&of)
	}
}

func start(t *testing.T) *world {
	t.Helper()
	w := &world{T: t, dir: t.TempDir(), dsn: postgres.NewDatabase(t)}
	w.bin = filepath.Join(w.dir, "bin")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", w.bin+"/", "./cmd/manager", "./cmd/processor")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var err error
	if w.db, err = pgx.Connect(t.Context(), w.dsn); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.db.Close(context.Background()) })

	env, err := apiserver.New(t.Context(), root+"config/crd/bases")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := env.Stop(); err != nil {
			t.Error(err)
		}
	})
	cfg, err := env.Start()
	if err != nil {
		t.Fatal(err)
	}
	if w.admin, err = client.New(cfg, client.Options{Scheme: controller.Scheme()}); err != nil {
		t.Fatal(err)
	}
	user, err := env.AddUser(envtest.User{Name: "admin", Groups: []string{"system:masters"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := user.KubeConfig()
	if err != nil {
		t.Fatal(err)
	}
	w.kubeconfig, w.kubectl = w.write("kubeconfig", string(text)), filepath.Join(env.BinaryAssetsDirectory, "kubectl")
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "app-db"}, StringData: map[string]string{"dsn": w.dsn}}
	if err := w.admin.Create(t.Context(), secret); err != nil {
		t.Fatal(err)
	}
	w.manager = w.address()
	w.run("manager", []string{"KUBECONFIG=" + w.kubeconfig}, filepath.Join(w.bin, "manager"), "--processor-image=docker.io/millrace/processor:test",
		"--leader-elect", "--leader-election-namespace=default", "--metrics-secure=false", "--metrics-bind-address="+w.manager,
		"--health-probe-bind-address="+w.address(), "--lag-interval=1s", "--verify-interval=5s")
	return w
}

// run starts a program that ends with the test. A failed test shows the end of its log.
func (w *world) run(name string, env []string, path string, args ...string) {
	w.Helper()
	log := filepath.Join(w.dir, name+".log")
	p, err := process.Start(process.Command{Path: path, Args: args, Env: env, Log: log})
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := p.Stop(ctx, syscall.SIGTERM); err != nil {
			w.Logf("stop %s: %v", name, err)
		}
		if w.Failed() {
			w.Logf("the log of %s:\n%s", name, process.Tail(log, 4000))
		}
	})
}

func (w *world) address() string {
	w.Helper()
	port, err := process.FreePort("127.0.0.1")
	if err != nil {
		w.Fatal(err)
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
}

func (w *world) write(name, text string) string {
	w.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		w.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		w.Fatal(err)
	}
	return path
}

func (w *world) apply(manifest string) {
	w.Helper()
	cmd := exec.CommandContext(w.Context(), w.kubectl, "--kubeconfig", w.kubeconfig, "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(manifest)
	if out, err := cmd.CombinedOutput(); err != nil {
		w.Fatalf("%v\n%s", err, out)
	}
}

func (w *world) exec(sql string, args ...any) {
	w.Helper()
	if _, err := w.db.Exec(w.Context(), sql, args...); err != nil {
		w.Fatalf("%s: %v", sql, err)
	}
}

// eventually repeats f until it returns nil, for at most ninety seconds.
func (w *world) eventually(what string, f func() error) {
	w.Helper()
	for end := time.Now().Add(90 * time.Second); ; {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			w.Fatalf("%s: %v", what, err)
		}
		<-time.After(100 * time.Millisecond)
	}
}

func (w *world) ready(o client.Object, name string) {
	w.Helper()
	w.eventually(name+" is ready", func() error {
		if err := w.admin.Get(w.Context(), client.ObjectKey{Namespace: "default", Name: name}, o); err != nil {
			return err
		}
		conditions := o.(interface{ GetConditions() []metav1.Condition }).GetConditions()
		if !meta.IsStatusConditionTrue(conditions, v1alpha1.ConditionReady) {
			return fmt.Errorf("%+v", conditions)
		}
		return nil
	})
}

// runProcessor runs a processor with the configuration and Secrets that the manager gave to its pods, and returns the address of its metrics.
func (w *world) runProcessor() string {
	w.Helper()
	var d appsv1.Deployment
	var c corev1.ConfigMap
	w.eventually("the Deployment", func() error {
		var list appsv1.DeploymentList
		if err := w.admin.List(w.Context(), &list, client.InNamespace("default")); err != nil || len(list.Items) != 1 {
			return fmt.Errorf("%d, error %w", len(list.Items), err)
		}
		d = list.Items[0]
		return w.admin.Get(w.Context(), client.ObjectKeyFromObject(&d), &c)
	})
	var config string
	for _, text := range c.Data {
		config = w.write("processor.yaml", text)
	}
	var env []string
	for _, e := range d.Spec.Template.Spec.Containers[0].Env {
		if strings.HasSuffix(e.Name, "_FILE") {
			env = append(env, e.Name+"="+w.write("secrets/"+e.Name, w.dsn))
		}
	}
	address := w.address()
	w.run("processor", env, filepath.Join(w.bin, "processor"), "--config", config, "--listen", address, "--member", "telemetry-1")
	return address
}

// runPrometheus runs Prometheus with the rules of the chart, and with what the chart's PodMonitors say of scraping, in the words of a file.
func (w *world) runPrometheus(manager, processor string) {
	w.Helper()
	monitors := w.monitors()
	rules, err := filepath.Abs(files + "rules.yaml")
	if err != nil {
		w.Fatal(err)
	}
	config := map[string]any{
		"global":     map[string]any{"scrape_interval": "1s", "evaluation_interval": "1s"},
		"rule_files": []string{rules},
		"scrape_configs": []any{
			scrapeConfig(monitors["millrace"], manager, map[string]string{"namespace": "millrace-system", "pod": "millrace-1"}),
			scrapeConfig(monitors["millrace-processors"], processor, map[string]string{
				"namespace": "default", "pod": "telemetry-1", "__meta_kubernetes_pod_label_millrace_dev_processor": "telemetry",
			}),
		},
	}
	text, err := yaml.Marshal(config)
	if err != nil {
		w.Fatal(err)
	}
	address := w.address()
	w.prometheus = "http://" + address
	w.run("prometheus", nil, "/usr/bin/prometheus", "--config.file="+w.write("prometheus.yml", string(text)),
		"--storage.tsdb.path="+filepath.Join(w.dir, "prometheus"), "--web.listen-address="+address)
	w.eventually("Prometheus is ready", func() error {
		resp, err := http.Get(w.prometheus + "/-/ready")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("it says %s", resp.Status)
		}
		return nil
	})
}

// monitors renders the PodMonitors of the chart.
func (w *world) monitors() map[string]*monitoringv1.PodMonitor {
	w.Helper()
	programs, err := tools.Ensure(w.Context(), os.Stderr, "helm")
	if err != nil {
		w.Fatal(err)
	}
	out, err := exec.CommandContext(w.Context(), filepath.Join(programs, "helm"), "template", "millrace", root+"charts/millrace", "--namespace", "millrace-system",
		"--set", "metrics.podMonitor.enabled=true,metrics.secure=false", "--show-only", "templates/podmonitor.yaml").Output()
	if err != nil {
		w.Fatal(err)
	}
	all := map[string]*monitoringv1.PodMonitor{}
	documents := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(out)))
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			w.Fatal(err)
		}
		var m monitoringv1.PodMonitor
		if err := yaml.UnmarshalStrict(document, &m); err != nil {
			w.Fatalf("%v\n%s", err, document)
		}
		all[m.Name] = &m
	}
}

// scrapeConfig is what the Prometheus operator makes of a PodMonitor for one pod.
func scrapeConfig(m *monitoringv1.PodMonitor, address string, labels map[string]string) map[string]any {
	e := m.Spec.PodMetricsEndpoints[0]
	var relabel []map[string]any
	for _, r := range e.RelabelConfigs {
		var from []string
		for _, l := range r.SourceLabels {
			from = append(from, string(l))
		}
		relabel = append(relabel, map[string]any{"action": strings.ToLower(r.Action), "source_labels": from, "target_label": r.TargetLabel})
	}
	return map[string]any{
		"job_name": "millrace-system/" + m.Name, "honor_labels": e.HonorLabels, "metrics_path": e.Path, "scheme": string(*e.Scheme),
		"static_configs": []any{map[string]any{"targets": []string{address}, "labels": labels}}, "relabel_configs": relabel,
	}
}

// series are what a query returns: their labels.
func (w *world) query(expr string) []map[string]string {
	w.Helper()
	var answer struct {
		Data struct {
			Result []struct{ Metric map[string]string }
		}
	}
	w.ask("/api/v1/query?query="+url.QueryEscape(expr), &answer)
	var all []map[string]string
	for _, r := range answer.Data.Result {
		all = append(all, r.Metric)
	}
	return all
}

func (w *world) ask(path string, answer any) {
	w.Helper()
	resp, err := http.Get(w.prometheus + path)
	if err != nil {
		w.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		w.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		w.Fatalf("%s: %s\n%s", path, resp.Status, text)
	}
	if err := json.Unmarshal(text, answer); err != nil {
		w.Fatalf("%s: %v", path, err)
	}
}

// documented compares docs/metrics.md with what the manager exports. What the processor exports is compared in internal/pipeline.
func (w *world) documented() {
	page, err := os.ReadFile(root + "docs/metrics.md")
	if err != nil {
		w.Fatal(err)
	}
	documented := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(millrace_[a-z_]+)(?:\\{([a-z,]+)\\})?`").FindAllStringSubmatch(string(page), -1) {
		if !strings.HasPrefix(m[1], "millrace_processor_") {
			documented[m[1]] = m[2]
		}
	}
	exported := map[string]string{}
	w.eventually("every family is there", func() error {
		resp, err := http.Get("http://" + w.manager + "/metrics")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		for _, m := range regexp.MustCompile(`(?m)^(millrace_\w+)\{([^}]*)\}`).FindAllStringSubmatch(string(text), -1) {
			var labels []string
			for _, l := range regexp.MustCompile(`(\w+)="`).FindAllStringSubmatch(m[2], -1) {
				labels = append(labels, l[1])
			}
			slices.Sort(labels)
			exported[m[1]] = strings.Join(labels, ",")
		}
		for name := range documented {
			if _, ok := exported[name]; !ok {
				return fmt.Errorf("docs/metrics.md has %s, and the manager does not", name)
			}
		}
		return nil
	})
	for name, labels := range exported {
		of, ok := documented[name]
		written := strings.Split(of, ",")
		slices.Sort(written)
		if !ok || strings.Join(written, ",") != labels {
			w.Errorf("%s{%s} is in docs/metrics.md as {%s} (%t)", name, labels, of, ok)
		}
	}
}

func (w *world) dashboard() {
	text, err := os.ReadFile(files + "dashboard.json")
	if err != nil {
		w.Fatal(err)
	}
	var board struct {
		Templating struct {
			List []struct{ Name, Type, Definition string }
		}
		Panels []struct {
			Title   string
			Targets []struct{ Expr, LegendFormat string }
		}
	}
	if err := json.Unmarshal(text, &board); err != nil {
		w.Fatal(err)
	}
	values := strings.NewReplacer("$__rate_interval", "30s", "$namespace", ".*", "$group", ".*", "$processor", ".*")
	for _, v := range board.Templating.List {
		if v.Type != "query" {
			continue
		}
		m := regexp.MustCompile(`^label_values\((.*), (\w+)\)$`).FindStringSubmatch(v.Definition)
		if m == nil {
			w.Fatalf("variable %s: %s", v.Name, v.Definition)
		}
		w.eventually("variable "+v.Name, func() error {
			for _, labels := range w.query(values.Replace(m[1])) {
				if labels[m[2]] != "" {
					return nil
				}
			}
			return fmt.Errorf("%s has no values", v.Definition)
		})
	}
	asked := 0
	for _, p := range board.Panels {
		for _, q := range p.Targets {
			asked++
			w.eventually(p.Title+": "+q.Expr, func() error {
				found := w.query(values.Replace(q.Expr))
				if len(found) == 0 {
					return fmt.Errorf("no series")
				}
				// A legend of labels that are not there shows nothing to tell lines apart.
				for _, l := range regexp.MustCompile(`\{\{(\w+)\}\}`).FindAllStringSubmatch(q.LegendFormat, -1) {
					if found[0][l[1]] == "" {
						return fmt.Errorf("the legend names %s, and the series have %v", l[1], found[0])
					}
				}
				return nil
			})
		}
	}
	if asked < 30 {
		w.Errorf("only %d queries", asked)
	}
}

func (w *world) alerts() {
	type rule struct{ Name, Query, Health, LastError, State string }
	read := func() map[string]rule {
		var answer struct {
			Data struct{ Groups []struct{ Rules []rule } }
		}
		w.ask("/api/v1/rules?type=alert", &answer)
		all := map[string]rule{}
		for _, g := range answer.Data.Groups {
			for _, r := range g.Rules {
				all[r.Name] = r
			}
		}
		return all
	}
	w.eventually("all rules are evaluated", func() error {
		all := read()
		for _, r := range all {
			if r.Health != "ok" {
				return fmt.Errorf("%s is %s: %s", r.Name, r.Health, r.LastError)
			}
		}
		if len(all) < 15 {
			return fmt.Errorf("%d alerts", len(all))
		}
		return nil
	})
	for _, r := range read() {
		for _, name := range regexp.MustCompile(`\b(?:millrace|leader)_\w+`).FindAllString(r.Query, -1) {
			w.eventually(r.Name, func() error {
				if len(w.query(name)) == 0 {
					return fmt.Errorf("nobody exports %s", name)
				}
				return nil
			})
		}
	}
	// What is wrong in this world is told, at once or pending for its time; what is well is not.
	want := map[string]string{
		"MillraceResourceNotReady": "pending", "MillraceProcessorNotReady": "pending", "MillraceDeadLetters": "firing", "MillraceProcessorDeadLetters": "firing",
		"MillraceManagerDown": "inactive", "MillraceDatabaseUnreachable": "inactive", "MillraceGroupLapsed": "inactive", "MillraceBacklogHigh": "inactive", "MillraceHorizonHeld": "inactive",
		"MillraceProcessorBreakerOpen": "inactive", "MillraceMaintenanceFailing": "inactive", "MillraceLagUnknown": "inactive",
	}
	w.eventually("the alerts of this world", func() error {
		all := read()
		for name, state := range want {
			if all[name].State != state {
				return fmt.Errorf("%s is %s, want %s", name, all[name].State, state)
			}
		}
		return nil
	})
}

// runbooks runs what the runbooks tell a person to run, with the same names.
func (w *world) runbooks() {
	pages, err := filepath.Glob(root + "docs/runbooks/*.md")
	if err != nil {
		w.Fatal(err)
	}
	path := "PATH=" + filepath.Dir(w.kubectl) + ":" + os.Getenv("PATH")
	done := map[string]bool{}
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			w.Fatal(err)
		}
		for _, block := range regexp.MustCompile("(?ms)^ *```(sh|sql)\n(.*?)^ *```$").FindAllStringSubmatch(string(text), -1) {
			if done[block[2]] {
				continue
			}
			done[block[2]] = true
			if block[1] == "sql" {
				if _, err := w.db.PgConn().Exec(w.Context(), block[2]).ReadAll(); err != nil {
					w.Errorf("%s:\n%s%v", filepath.Base(page), block[2], err)
				}
				continue
			}
			cmd := exec.CommandContext(w.Context(), "sh", "-e", "-c", block[2])
			cmd.Env = append(os.Environ(), path, "KUBECONFIG="+w.kubeconfig)
			if out, err := cmd.CombinedOutput(); err != nil {
				w.Errorf("%s:\n%s%v\n%s", filepath.Base(page), block[2], err, out)
			}
		}
	}
	if len(done) < 15 {
		w.Errorf("only %d blocks were run", len(done))
	}
}
