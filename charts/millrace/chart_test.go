// Package millrace tests the Helm chart.
package millrace

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	"github.com/millrace-dev/millrace/test/env/tools"
)

var update = flag.Bool("update", false, "copy what was generated into the chart")

// The chart holds exact copies of what controller-gen writes. After make generate:
//
//	go test ./charts/millrace -run Generated -update
func TestTheChartHasWhatWasGenerated(t *testing.T) {
	pairs := map[string]string{filepath.Join("files", "role.yaml"): filepath.Join("..", "..", "config", "rbac", "role.yaml")}
	bases, err := filepath.Glob(filepath.Join("..", "..", "config", "crd", "bases", "*.yaml"))
	if err != nil || len(bases) != 3 {
		t.Fatalf("found %v, %v", bases, err)
	}
	for _, base := range bases {
		pairs[filepath.Join("files", "crds", filepath.Base(base))] = base
	}
	for copied, generated := range pairs {
		want, err := os.ReadFile(generated)
		if err != nil {
			t.Fatal(err)
		}
		if *update {
			if err := os.WriteFile(copied, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if has, err := os.ReadFile(copied); err != nil || !bytes.Equal(has, want) {
			t.Errorf("%s differs from %s: run go test ./charts/millrace -run Generated -update (%v)", copied, generated, err)
		}
	}
	crds, err := filepath.Glob(filepath.Join("files", "crds", "*.yaml"))
	if err != nil || len(crds) != len(bases) {
		t.Errorf("the chart has %v, %v", crds, err)
	}
}

// objects are a rendered chart, by kind and name.
type objects map[string][]byte

// helm runs helm, built from the module that the project pins.
func helm(t *testing.T, args ...string) (string, error) {
	t.Helper()
	dir, err := tools.Ensure(t.Context(), os.Stderr, "helm")
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "helm"), args...)
	cmd.Stderr = &stderr
	home := t.TempDir()
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	out, err := cmd.Output()
	if err != nil {
		return "", errors.New(stderr.String())
	}
	return string(out), nil
}

// render renders the chart and decodes every object strictly: a field that Kubernetes does not know fails the test.
func render(t *testing.T, set ...string) objects {
	t.Helper()
	args := []string{"template", "millrace", ".", "--namespace", "millrace-system"}
	for _, s := range set {
		args = append(args, "--set", s)
	}
	text, err := helm(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	found := objects{}
	documents := utilyaml.NewYAMLReader(bufio.NewReader(strings.NewReader(text)))
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		var meta metav1.PartialObjectMetadata
		if err := yaml.Unmarshal(document, &meta); err != nil {
			t.Fatalf("%v in\n%s", err, document)
		}
		if meta.Kind == "" {
			continue
		}
		found[meta.Kind+"/"+meta.Name] = document
		typed := map[string]any{
			"Deployment": &appsv1.Deployment{}, "Service": &corev1.Service{}, "ServiceAccount": &corev1.ServiceAccount{},
			"ClusterRole": &rbacv1.ClusterRole{}, "ClusterRoleBinding": &rbacv1.ClusterRoleBinding{},
			"Role": &rbacv1.Role{}, "RoleBinding": &rbacv1.RoleBinding{},
			"NetworkPolicy": &networkingv1.NetworkPolicy{}, "PodDisruptionBudget": &policyv1.PodDisruptionBudget{},
			"CustomResourceDefinition": &metav1.PartialObjectMetadata{},
		}[meta.Kind]
		if typed == nil {
			t.Errorf("an unexpected kind: %s", meta.Kind)
		} else if err := yaml.UnmarshalStrict(document, typed); err != nil && meta.Kind != "CustomResourceDefinition" {
			t.Errorf("%s %s: %v", meta.Kind, meta.Name, err)
		}
	}
}

// get decodes one object.
func get[T any](t *testing.T, all objects, name string) *T {
	t.Helper()
	document, ok := all[name]
	if !ok {
		t.Fatalf("there is no %s", name)
	}
	o := new(T)
	if err := yaml.UnmarshalStrict(document, o); err != nil {
		t.Fatal(err)
	}
	return o
}

func TestTheChartPassesLint(t *testing.T) {
	if out, err := helm(t, "lint", "--strict", "."); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestDefaultsInstallEverything(t *testing.T) {
	all := render(t)
	d := get[appsv1.Deployment](t, all, "Deployment/millrace")
	pod := d.Spec.Template.Spec
	c := pod.Containers[0]
	if c.Image != "docker.io/millrace/manager:dev" || !has(c.Args, "--processor-image=docker.io/millrace/processor:dev") {
		t.Errorf("image %s, args %v", c.Image, c.Args)
	}
	if !*pod.SecurityContext.RunAsNonRoot || *c.SecurityContext.AllowPrivilegeEscalation || !*c.SecurityContext.ReadOnlyRootFilesystem {
		t.Error("the pod does not meet the restricted standard")
	}
	for name, document := range all {
		if strings.HasPrefix(name, "CustomResourceDefinition/") && !bytes.Contains(document, []byte("\n    helm.sh/resource-policy: keep\n")) {
			t.Errorf("helm uninstall would delete %s, and every resource with it", name)
		}
	}
	get[rbacv1.ClusterRoleBinding](t, all, "ClusterRoleBinding/millrace-manager")
	get[corev1.Service](t, all, "Service/millrace-metrics")
}

// Nothing is lost between the generated role and the roles of the chart, and in namespaced mode nothing is cluster-wide that
// need not be.
func TestTheRolesAreTheGeneratedOneInTwoParts(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("files", "role.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var generated rbacv1.ClusterRole
	if err := yaml.UnmarshalStrict(text, &generated); err != nil {
		t.Fatal(err)
	}
	all := render(t, "namespaces={a,b}")
	wide, narrow := get[rbacv1.ClusterRole](t, all, "ClusterRole/millrace-cluster"), get[rbacv1.ClusterRole](t, all, "ClusterRole/millrace-manager")
	if n := len(wide.Rules) + len(narrow.Rules); n != len(generated.Rules) {
		t.Errorf("%d rules of %d", n, len(generated.Rules))
	}
	for _, r := range wide.Rules {
		if has(r.Resources, "secrets") || has(r.Resources, "deployments") {
			t.Errorf("cluster-wide in namespaced mode: %+v", r)
		}
	}
	if _, ok := all["ClusterRoleBinding/millrace-manager"]; ok {
		t.Error("namespaced mode binds the manager's role in the whole cluster")
	}
	if b := get[rbacv1.RoleBinding](t, all, "RoleBinding/millrace-manager"); b.RoleRef.Name != narrow.Name {
		t.Errorf("bound to %s", b.RoleRef.Name)
	}
	if d := get[appsv1.Deployment](t, all, "Deployment/millrace"); !has(d.Spec.Template.Spec.Containers[0].Args, "--namespaces=a,b") {
		t.Error("the manager is not told its namespaces")
	}
}

func TestValuesReachTheObjects(t *testing.T) {
	digest := "sha256:" + strings.Repeat("a", 64)
	all := render(t, "crds.enabled=false", "metrics.enabled=false", "networkPolicy.enabled=true", "podDisruptionBudget.enabled=true",
		"database.existingSecret=main", "database.secretKey=url", "imagePullSecrets={pull}", "processor.image.registry=registry.local",
		"manager.image.digest="+digest, "manager.image.pullPolicy=Never", "serviceAccount.create=false", "serviceAccount.name=mine")
	pod := get[appsv1.Deployment](t, all, "Deployment/millrace").Spec.Template.Spec
	c := pod.Containers[0]
	if c.Image != "docker.io/millrace/manager@"+digest || c.ImagePullPolicy != corev1.PullNever || pod.ImagePullSecrets[0].Name != "pull" || pod.ServiceAccountName != "mine" {
		t.Errorf("pod: %+v", pod)
	}
	if !has(c.Args, "--processor-image=registry.local/millrace/processor:dev") || !has(c.Args, "--metrics-bind-address=0") {
		t.Errorf("args: %v", c.Args)
	}
	var found bool
	for _, e := range c.Env {
		if e.Name == "MILLRACE_DATABASE_URL" {
			found = e.ValueFrom.SecretKeyRef.Name == "main" && e.ValueFrom.SecretKeyRef.Key == "url"
		}
	}
	if !found {
		t.Errorf("the default database is not there: %+v", c.Env)
	}
	for name := range all {
		for _, kind := range []string{"CustomResourceDefinition/", "Service/", "ServiceAccount/"} {
			if strings.HasPrefix(name, kind) {
				t.Errorf("%s was switched off", name)
			}
		}
	}
	get[networkingv1.NetworkPolicy](t, all, "NetworkPolicy/millrace")
	get[policyv1.PodDisruptionBudget](t, all, "PodDisruptionBudget/millrace")
}

func TestTheSchemaRefusesWhatIsMisspelt(t *testing.T) {
	for _, set := range []string{"manager.replica=2", "manager.logLevel=loud", "manager.verifyInterval=5", "manager.image.digest=sha256:1", "namespaces={A}"} {
		if _, err := helm(t, "template", "millrace", ".", "--set", set); err == nil {
			t.Errorf("--set %s is accepted", set)
		}
	}
}

func has(list []string, s string) bool { return slices.Contains(list, s) }
