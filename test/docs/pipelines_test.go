package docs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller"
	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/test/env/postgres"
	"github.com/millrace-dev/millrace/test/env/redis"
)

// pipelines is the document that TestPipelines runs.
const pipelines = "pipelines.md"

// patience is how long something that the document says may take to come true, on a machine with much else to do.
const patience = time.Minute

// TestPipelines does what the document says, from top to bottom: manifests are applied to a Kubernetes API server with the real manager, and this test plays
// the node that runs the pods, with the real processor. Commands and queries are run as they stand. What a text block shows has to come true.
func TestPipelines(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "pipelines", 0)
	w.pods = true
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", pipelines))
	if err != nil {
		t.Fatal(err)
	}
	wantMetrics(t, string(text))
	document := strings.NewReplacer("https://hooks.example.com/", "http://127.0.0.1:"+w.port+"/", " 9000 ", " "+w.port+" ").Replace(string(text))
	blocks := regexp.MustCompile("(?ms)^```(\\w+)\n(.*?)^```$").FindAllStringSubmatch(document, -1)
	for i, b := range blocks {
		kind, body := b[1], b[2]
		shows := ""
		if i+1 < len(blocks) && blocks[i+1][1] == "text" {
			shows = blocks[i+1][2]
		}
		switch name := fileName(body); {
		case name != "":
			if err := os.WriteFile(filepath.Join(w.dir, name), []byte(body), 0o600); err != nil {
				t.Fatal(err)
			}
		case kind == "yaml":
			w.apply(body)
		case kind == "sh":
			w.run(body, shows, func() *exec.Cmd { return exec.Command("bash", "-euo", "pipefail", "-c", body) })
		case kind == "sql":
			w.run(body, shows, func() *exec.Cmd {
				cmd := exec.Command("psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", w.dsn)
				cmd.Stdin = strings.NewReader(body)
				return cmd
			})
		case kind != "text":
			t.Errorf("a block of %q that nobody runs:\n%s", kind, body)
		}
		if t.Failed() {
			return
		}
	}
	w.stopProcessors()
}

// wantMetrics fails when the document names a metric that processors do not have.
func wantMetrics(t *testing.T, text string) {
	t.Helper()
	families, err := pipeline.NewMetrics().Gatherer().Gather()
	must(t, err)
	known := map[string]bool{}
	for _, f := range families {
		known[f.GetName()] = true
	}
	for _, name := range regexp.MustCompile(`millrace_processor_[a-z_]+`).FindAllString(text, -1) {
		if !known[name] {
			t.Errorf("no processor has the metric %s", name)
		}
	}
}

// fileName is the name that the first line of a block gives it, as in "# receiver.py".
func fileName(body string) string {
	if m := regexp.MustCompile(`^# ([a-z]+\.(?:py|yaml))\n`).FindStringSubmatch(body); m != nil {
		return m[1]
	}
	return ""
}

// world is where the document's commands run.
type world struct {
	*testing.T
	ctx        context.Context
	api        client.Client
	namespace  string
	dir        string // of files that the document makes
	bin        string // of the processor
	dsn        string
	redis      *redis.Server
	metrics    *prometheus.Registry // of the manager
	port       string               // that a receiver can listen on
	pods       bool                 // whether Processors get processors
	processors []*processor
}

// newWorld starts a manager for a namespace of its own. lagInterval zero is the manager's default.
func newWorld(t *testing.T, namespace string, lagInterval time.Duration) *world {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel)
	cfg, err := kubernetes()
	must(t, err)
	w := &world{T: t, ctx: ctx, dir: t.TempDir(), bin: t.TempDir(), dsn: postgres.NewDatabase(t), namespace: namespace, metrics: prometheus.NewRegistry()}
	w.api, err = client.New(cfg, client.Options{Scheme: controller.Scheme()})
	must(t, err)
	w.redis, err = redis.Start(ctx, redis.Options{})
	must(t, err)
	t.Cleanup(func() { must(t, w.redis.Stop(context.Background())) })
	w.startManager(cfg, lagInterval)

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	_, w.port, _ = net.SplitHostPort(listener.Addr().String())
	must(t, listener.Close())

	build := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(w.bin, "processor"), "../../cmd/processor")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the processor: %v\n%s", err, out)
	}
	must(t, w.api.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: w.namespace}}))
	for name, data := range map[string]map[string]string{
		"app-db": {"dsn": w.dsn}, "telemetry-redis": {"url": w.redis.URL()}, "orders-webhook": {"signing-key": "change-me"},
	} {
		must(t, w.api.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: w.namespace, Name: name}, StringData: data}))
	}
	return w
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// startManager runs every controller until the test ends.
func (w *world) startManager(cfg *rest.Config, lagInterval time.Duration) {
	w.Helper()
	ctrl.SetLogger(logr.Discard())
	ctx, cancel := context.WithCancel(w.ctx)
	mgr, err := ctrl.NewManager(cfg, ctrl.Options{
		Scheme: controller.Scheme(), Cache: controller.CacheOptions([]string{w.namespace}),
		Metrics: metricsserver.Options{BindAddress: "0"}, HealthProbeBindAddress: "0",
		Controller: config.Controller{SkipNameValidation: ptr.To(true)}, // each document has its manager
	})
	must(w, err)
	id, err := controller.ClusterID(ctx, w.api)
	must(w, err)
	must(w, controller.Setup(ctx, mgr, controller.Options{
		Cluster: id, ProcessorImage: "docker.io/millrace/processor:test", Metrics: w.metrics, LagInterval: lagInterval,
		Database: database.Options{ConnectTimeout: 2 * time.Second, CallTimeout: 10 * time.Second},
	}))
	stopped := make(chan error, 1)
	go func() { stopped <- mgr.Start(ctx) }()
	w.Cleanup(func() {
		cancel()
		if err := <-stopped; err != nil {
			w.Error(err)
		}
	})
}

// eventually repeats f until it returns nil.
func (w *world) eventually(what string, f func() error) {
	w.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			for _, p := range w.processors {
				w.Logf("log of %s ends with:\n%s", p.name, p.tail())
			}
			w.Fatalf("%s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// run does what a block says, and compares the output with the text block that follows it, again and again until they are the same. A block that shows
// nothing is run once.
func (w *world) run(body, shows string, command func() *exec.Cmd) {
	w.Helper()
	once := func() error {
		out, err := os.CreateTemp(w.TempDir(), "output")
		must(w, err)
		defer out.Close()
		cmd := command()
		// Not a pipe: what a block leaves in the background would keep it open.
		cmd.Dir, cmd.Stdout, cmd.Stderr = w.dir, out, out
		cmd.Env = append(os.Environ(), "PATH="+w.bin+":"+os.Getenv("PATH"), "PGTZ=UTC", "MILLRACE_REDIS_URL="+w.redis.URL(), "DATABASE_URL="+w.dsn)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		must(w, cmd.Start())
		group := cmd.Process.Pid
		w.Cleanup(func() { _ = syscall.Kill(-group, syscall.SIGKILL) })
		err = cmd.Wait()
		text, _ := os.ReadFile(out.Name())
		if err != nil {
			return fmt.Errorf("%w:\n%s", err, text)
		}
		if shows != "" && plain(string(text)) != plain(shows) {
			return fmt.Errorf("it shows\n%s\nand should show\n%s", plain(string(text)), plain(shows))
		}
		return nil
	}
	if shows == "" {
		if err := once(); err != nil {
			w.Fatalf("%s\n%v", body, err)
		}
		return
	}
	w.eventually(body, once)
}

// plain is output without what is only for the eye: widths of columns, lines under headers, and the number of rows. An age at the end of a line is any.
func plain(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		line = strings.Join(strings.Fields(line), " ")
		line = regexp.MustCompile(` \d+(s|m|m\d+s)$`).ReplaceAllString(line, " <age>")
		if line == "" || strings.Trim(line, "-+") == "" || regexp.MustCompile(`^\(\d+ rows?\)$`).MatchString(line) {
			continue
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

// apply creates the manifests of a block, and waits until what they say is there. A block without a kind is a fragment.
func (w *world) apply(body string) {
	w.Helper()
	strict := client.WithFieldValidation(w.api, metav1.FieldValidationStrict)
	reader := yaml.NewYAMLOrJSONDecoder(bytes.NewReader([]byte(body)), 4096)
	for {
		o := &unstructured.Unstructured{}
		if err := reader.Decode(&o.Object); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			w.Fatalf("%v in\n%s", err, body)
		}
		if o.GetKind() == "" {
			return
		}
		o.SetNamespace(w.namespace)
		if err := strict.Create(w.ctx, o); err != nil {
			w.Fatalf("%v in\n%s", err, body)
		}
		switch {
		case o.GroupVersionKind().Group != v1alpha1.GroupVersion.Group:
			continue
		case o.GetKind() == "Processor" && w.pods:
			w.start(o.GetName())
			continue
		}
		w.eventually(o.GetKind()+" "+o.GetName()+" is ready", func() error {
			if err := w.api.Get(w.ctx, client.ObjectKeyFromObject(o), o); err != nil {
				return err
			}
			conditions, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
			for _, c := range conditions {
				if c := c.(map[string]any); c["type"] == v1alpha1.ConditionReady && c["status"] == "True" {
					return nil
				}
			}
			return fmt.Errorf("conditions: %v", conditions)
		})
	}
}

// start plays the node for a Processor: it writes the files that the pod mounts, and runs its container's command.
func (w *world) start(name string) {
	w.Helper()
	var d appsv1.Deployment
	var settings corev1.ConfigMap
	w.eventually("Processor "+name+" becomes a Deployment", func() error {
		key := client.ObjectKey{Namespace: w.namespace, Name: name + "-processor"}
		if err := w.api.Get(w.ctx, key, &d); apierrors.IsNotFound(err) {
			var p v1alpha1.Processor
			if err := w.api.Get(w.ctx, client.ObjectKey{Namespace: w.namespace, Name: name}, &p); err != nil {
				return err
			}
			return fmt.Errorf("conditions: %v", p.Status.Conditions)
		} else if err != nil {
			return err
		}
		return w.api.Get(w.ctx, key, &settings)
	})
	pod := w.TempDir()
	file := filepath.Join(pod, "processor.yaml")
	must(w, os.WriteFile(file, []byte(settings.Data["processor.yaml"]), 0o600))
	container := d.Spec.Template.Spec.Containers[0]
	var env []string
	for _, e := range container.Env {
		if _, ok := strings.CutSuffix(e.Name, "_FILE"); !ok {
			w.Fatalf("nobody plays the variable %s", e.Name)
		}
		// …/<Secret>/<key>
		parts := strings.Split(e.Value, "/")
		var secret corev1.Secret
		must(w, w.api.Get(w.ctx, client.ObjectKey{Namespace: w.namespace, Name: parts[len(parts)-2]}, &secret))
		path := filepath.Join(pod, parts[len(parts)-2]+"-"+parts[len(parts)-1])
		must(w, os.WriteFile(path, secret.Data[parts[len(parts)-1]], 0o600))
		env = append(env, e.Name+"="+path)
	}
	log, err := os.Create(filepath.Join(pod, "log"))
	must(w, err)
	w.Cleanup(func() { log.Close() })
	p := &processor{name: name, log: log.Name(), exited: make(chan struct{})}
	p.cmd = exec.Command(filepath.Join(w.bin, "processor"), "--config", file, "--listen", "127.0.0.1:0", "--member", name+"-1")
	p.cmd.Env, p.cmd.Stderr = env, log
	must(w, p.cmd.Start())
	go func() { _ = p.cmd.Wait(); close(p.exited) }()
	w.Cleanup(func() { _ = p.cmd.Process.Kill(); <-p.exited })
	w.processors = append(w.processors, p)
	w.eventually("the processor "+name+" is ready", func() error {
		select {
		case <-p.exited:
			w.Fatalf("the processor %s ended:\n%s", name, p.tail())
		default:
		}
		if !strings.Contains(p.tail(), `"processor ready"`) {
			return errors.New("it has not said so")
		}
		return nil
	})
}

// processor is a running pod.
type processor struct {
	name   string
	cmd    *exec.Cmd
	log    string
	exited chan struct{}
}

// tail is the end of the processor's log.
func (p *processor) tail() string {
	text, _ := os.ReadFile(p.log)
	return string(text[max(0, len(text)-4000):])
}

// stopProcessors ends every processor as Kubernetes does, and wants it to end well.
func (w *world) stopProcessors() {
	w.Helper()
	for _, p := range w.processors {
		must(w, p.cmd.Process.Signal(syscall.SIGTERM))
	}
	for _, p := range w.processors {
		select {
		case <-p.exited:
			if code := p.cmd.ProcessState.ExitCode(); code != 0 {
				w.Errorf("the processor %s ended with %d:\n%s", p.name, code, p.tail())
			}
		case <-time.After(patience):
			w.Errorf("the processor %s does not end:\n%s", p.name, p.tail())
		}
	}
}
