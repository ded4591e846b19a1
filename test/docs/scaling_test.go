package docs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
)

// scaling is the document that TestScaling runs.
const scaling = "scaling.md"

// keda is the version whose definitions and triggers the document's manifests have to fit.
const keda = "github.com/kedacore/keda/v2@v2.21.0"

// kedaModule is the directory of KEDA's sources. Nothing of them is built.
func kedaModule(ctx context.Context) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "mod", "download", "-json", keda)
	cmd.Dir, cmd.Stderr = os.TempDir(), os.Stderr
	cmd.Env = append(os.Environ(), "GOWORK=off")
	out, err := cmd.Output()
	var module struct{ Dir, Error string }
	if jsonErr := json.Unmarshal(out, &module); err != nil || jsonErr != nil || module.Error != "" {
		return "", errors.Join(fmt.Errorf("download %s: %s", keda, module.Error), err, jsonErr)
	}
	return module.Dir, nil
}

// TestScaling does what the document says, from top to bottom, as TestPipelines does. No pod runs: this test plays the Deployment controller, whose pods are
// all ready at once, and does what pods would have done where a comment in the document says so.
func TestScaling(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "scaling", 500*time.Millisecond)
	w.kubectl()
	w.readyDeployments()
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", scaling))
	must(t, err)
	psql := func(body string) func() *exec.Cmd {
		return func() *exec.Cmd {
			cmd := exec.Command("psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", w.dsn)
			cmd.Stdin = strings.NewReader(body)
			return cmd
		}
	}
	blocks := regexp.MustCompile("(?ms)^```(\\w+)\n(.*?)^```$|^<!-- play: (.*?) -->$").FindAllStringSubmatch(string(text), -1)
	for i, b := range blocks {
		kind, body, play := b[1], b[2], b[3]
		shows := ""
		if i+1 < len(blocks) && blocks[i+1][1] == "text" {
			shows = blocks[i+1][2]
		}
		switch {
		case play != "":
			w.run(play, "", psql(play))
		case kind == "yaml":
			w.apply(body)
		case kind == "sh":
			w.run(body, shows, func() *exec.Cmd { return exec.Command("bash", "-euo", "pipefail", "-c", body) })
		case kind == "sql":
			w.run(body, shows, psql(body))
		case kind != "text":
			t.Errorf("a block of %q that nobody runs:\n%s", kind, body)
		}
	}
	w.wantTriggers(string(text))
	samples, err := os.ReadFile(filepath.Join("..", "..", "config", "samples", "scaling", "keda.yaml"))
	must(t, err)
	w.wantTriggers(string(samples))

	documented, err := os.ReadFile(filepath.Join("..", "..", "docs", "metrics.md"))
	must(t, err)
	for _, name := range regexp.MustCompile(`millrace_processor_[a-z_]+`).FindAllString(string(text), -1) {
		if !bytes.Contains(documented, []byte("`"+name)) {
			t.Errorf("metrics.md has no metric %s of a processor", name)
		}
	}
	families, err := w.metrics.Gather()
	must(t, err)
	known := map[string]bool{}
	for _, f := range families {
		known[f.GetName()] = true
	}
	for _, name := range regexp.MustCompile(`millrace_group_[a-z_]+`).FindAllString(string(text), -1) {
		if !known[name] {
			t.Errorf("the manager has no metric %s", name)
		}
	}
}

// kubectl lets the document's commands use the test's API server and namespace.
func (w *world) kubectl() {
	w.Helper()
	user, err := server.AddUser(envtest.User{Name: "reader", Groups: []string{"system:masters"}}, nil)
	must(w, err)
	config, err := user.KubeConfig()
	must(w, err)
	file := filepath.Join(w.bin, "kubeconfig")
	must(w, os.WriteFile(file, config, 0o600))
	program := filepath.Join(filepath.Dir(server.ControlPlane.GetAPIServer().Path), "kubectl")
	script := fmt.Sprintf("#!/bin/sh\nexec %q --kubeconfig %q --namespace %q \"$@\"\n", program, file, w.namespace)
	must(w, os.WriteFile(filepath.Join(w.bin, "kubectl"), []byte(script), 0o700))
}

// readyDeployments makes all pods of every Deployment of the namespace ready, until the test ends.
func (w *world) readyDeployments() {
	stop, done := make(chan struct{}), make(chan struct{})
	w.Cleanup(func() { close(stop); <-done })
	go func() {
		defer close(done)
		for {
			var list appsv1.DeploymentList
			if err := w.api.List(w.ctx, &list, client.InNamespace(w.namespace)); err == nil {
				for i := range list.Items {
					d := &list.Items[i]
					n := *d.Spec.Replicas
					want := appsv1.DeploymentStatus{ObservedGeneration: d.Generation, Replicas: n, UpdatedReplicas: n, ReadyReplicas: n, AvailableReplicas: n}
					if d.Status.ObservedGeneration != want.ObservedGeneration || d.Status.AvailableReplicas != n {
						d.Status = want
						_ = w.api.Status().Update(w.ctx, d) // a conflict is tried again at the next turn
					}
				}
			}
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
}

// wantTriggers fails when a trigger has a setting that KEDA does not know, or a query that the database does not answer with one number.
func (w *world) wantTriggers(text string) {
	w.Helper()
	module, err := kedaModule(w.ctx)
	must(w, err)
	conn, err := pgx.Connect(w.ctx, w.dsn)
	must(w, err)
	defer conn.Close(context.WithoutCancel(w.ctx))
	found := 0
	for _, block := range append(regexp.MustCompile("(?ms)^```yaml\n(.*?)^```$").FindAllStringSubmatch(text, -1), []string{"", text}) {
		reader := yaml.NewYAMLOrJSONDecoder(bytes.NewReader([]byte(block[1])), 4096)
		for {
			o := map[string]any{}
			if err := reader.Decode(&o); err != nil {
				if !errors.Is(err, io.EOF) && block[0] != "" {
					w.Fatal(err)
				}
				break
			}
			triggers, ok, _ := unstructured.NestedSlice(o, "spec", "triggers")
			if !ok {
				triggers, _, _ = unstructured.NestedSlice(o, "triggers") // a fragment
			}
			for _, trigger := range triggers {
				found++
				w.wantTrigger(module, conn, trigger.(map[string]any))
			}
		}
	}
	if found == 0 {
		w.Error("found no trigger")
	}
}

func (w *world) wantTrigger(module string, conn *pgx.Conn, trigger map[string]any) {
	w.Helper()
	kind := trigger["type"].(string)
	source, err := os.ReadFile(filepath.Join(module, "pkg", "scalers", strings.ReplaceAll(kind, "-", "_")+"_scaler.go"))
	must(w, err)
	settings := trigger["metadata"].(map[string]any)
	for name := range settings {
		if !regexp.MustCompile(`keda:"name=` + name + `[,;]`).Match(source) {
			w.Errorf("KEDA's trigger %s has no setting %s", kind, name)
		}
	}
	if kind != "postgresql" {
		return
	}
	var n float64
	if err := conn.QueryRow(w.ctx, settings["query"].(string)).Scan(&n); err != nil {
		w.Errorf("%s: %v", settings["query"], err)
	}
}
