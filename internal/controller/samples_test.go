package controller_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

var samples = filepath.Join("..", "..", "config", "samples")

// kubectl apply -f config/samples, with Secrets that lead somewhere, gives Ready resources.
func TestSeed_D03_KubectlApply(t *testing.T) {
	w := newWorld(t)
	w.secret("app-db", "dsn", postgres.NewDatabase(t))
	w.secret("telemetry-redis", "url", redisURL)
	w.readyDeployments()
	t.Log(w.kubectl("apply", "-f", samples))
	at := func(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: w.namespace, Name: name} }
	for _, o := range []object{
		&v1alpha1.Stream{ObjectMeta: at("orders")}, &v1alpha1.ConsumerGroup{ObjectMeta: at("orders-sink")}, &v1alpha1.ConsumerGroup{ObjectMeta: at("orders-audit")},
		&v1alpha1.Processor{ObjectMeta: at("orders-sink")}, &v1alpha1.Processor{ObjectMeta: at("telemetry")},
	} {
		w.wantReady(o)
	}
	t.Log(w.kubectl("get", "millrace"))
	t.Log(w.kubectl("get", "millrace", "-o", "wide"))
	if out := w.kubectl("apply", "-f", samples); strings.Contains(out, "configured") || strings.Contains(out, "created") {
		t.Errorf("applying the samples again changes something:\n%s", out)
	}
}

// The samples of other sinks become Ready as well, each applied by itself.
func TestSinkSamplesBecomeReady(t *testing.T) {
	w := newWorld(t)
	w.kubectl("apply", "-f", filepath.Join(samples, "secrets"))
	w.secret("app-db", "dsn", postgres.NewDatabase(t))
	w.readyDeployments()
	w.kubectl("apply", "-f", filepath.Join(samples, "stream_orders.yaml"))
	files, err := filepath.Glob(filepath.Join(samples, "sinks", "*.yaml"))
	if err != nil || len(files) != 4 {
		t.Fatalf("found %v, %v", files, err)
	}
	for _, f := range files {
		w.kubectl("apply", "-f", f)
	}
	for _, name := range []string{"latest-positions", "orders-webhook", "orders-import", "orders-totals"} {
		w.wantReady(&v1alpha1.Processor{ObjectMeta: metav1.ObjectMeta{Namespace: w.namespace, Name: name}})
	}
}

// The sample that scales itself has no pod until something waits.
func TestScalingSampleBecomesReady(t *testing.T) {
	w := newWorld(t)
	w.secret("app-db", "dsn", postgres.NewDatabase(t))
	w.readyDeployments()
	for _, f := range []string{"stream_orders.yaml", "consumergroup_orders-sink.yaml", filepath.Join("scaling", "autoscaling.yaml")} {
		w.kubectl("apply", "-f", filepath.Join(samples, f))
	}
	p := &v1alpha1.Processor{ObjectMeta: metav1.ObjectMeta{Namespace: w.namespace, Name: "orders-scaled"}}
	w.want(p, v1alpha1.ConditionReady, metav1.ConditionTrue, v1alpha1.ReasonScaledToZero)
}

// The placeholders in the sample Secrets have the keys that the samples name, and are well formed.
func TestSampleSecretsFitTheSamples(t *testing.T) {
	w := newWorld(t)
	w.kubectl("apply", "-f", filepath.Join(samples, "secrets"))
	for name, key := range map[string]string{"app-db": "dsn", "telemetry-redis": "url", "orders-webhook": "signing-key"} {
		var s corev1.Secret
		if err := suite.client.Get(t.Context(), clientKey(w, name), &s); err != nil {
			t.Fatal(err)
		}
		if len(s.Data[key]) == 0 {
			t.Errorf("Secret %s has no key %s", name, key)
		}
	}
	files, err := filepath.Glob(filepath.Join(samples, "*.yaml"))
	more, _ := filepath.Glob(filepath.Join(samples, "sinks", "*.yaml"))
	if files = append(files, more...); err != nil || len(files) < 8 {
		t.Fatalf("found %v, %v", files, err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(string(text), "# ") {
			t.Errorf("%s does not begin by saying what it shows", f)
		}
		var meta metav1.TypeMeta
		if err := yaml.Unmarshal(text, &meta); err != nil || meta.APIVersion != v1alpha1.GroupVersion.String() {
			t.Errorf("%s holds a %s of %s (%v)", f, meta.Kind, meta.APIVersion, err)
		}
	}
}
