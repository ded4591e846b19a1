package millrace

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	"sigs.k8s.io/yaml"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller"
	"github.com/millrace-dev/millrace/internal/controller/installation"
	"github.com/millrace-dev/millrace/test/env/apiserver"
	"github.com/millrace-dev/millrace/test/env/tools"
)

// previous is the chart before this one, as helm package made it.
const previous = "testdata/millrace-0.1.0.tgz"

// kubernetes is an API server without anything of ours, and helm and kubectl for it.
type kubernetes struct {
	*testing.T
	config     *rest.Config
	api        client.Client
	kubeconfig string
	programs   string
}

func newKubernetes(t *testing.T) *kubernetes {
	t.Helper()
	env, err := apiserver.New(t.Context())
	must(t, err)
	// Before Start: one that fails half-way leaves its servers running.
	t.Cleanup(func() { must(t, env.Stop()) })
	k := &kubernetes{T: t}
	k.config, err = env.Start()
	must(t, err)
	k.api, err = client.New(k.config, client.Options{Scheme: controller.Scheme()})
	must(t, err)
	user, err := env.AddUser(envtest.User{Name: "installer", Groups: []string{"system:masters"}}, nil)
	must(t, err)
	text, err := user.KubeConfig()
	must(t, err)
	k.kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	must(t, os.WriteFile(k.kubeconfig, text, 0o600))
	k.programs, err = tools.Ensure(t.Context(), os.Stderr, "helm", "kubectl")
	must(t, err)
	return k
}

// try runs helm or kubectl.
func (k *kubernetes) try(program string, args ...string) (string, error) {
	k.Helper()
	cmd := exec.CommandContext(k.Context(), filepath.Join(k.programs, program), args...)
	home := k.TempDir()
	cmd.Env = append(os.Environ(), "KUBECONFIG="+k.kubeconfig, "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w\n%s", program, strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

func (k *kubernetes) run(program string, args ...string) string {
	k.Helper()
	out, err := k.try(program, args...)
	must(k.T, err)
	return out
}

// eventually repeats f until it returns nil, for at most a minute.
func (k *kubernetes) eventually(f func() error) {
	k.Helper()
	for end := time.Now().Add(time.Minute); ; <-time.After(100 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			k.Fatal(err)
		}
	}
}

// exists says whether an object is there.
func (k *kubernetes) exists(o client.Object, namespace, name string) bool {
	k.Helper()
	err := k.api.Get(k.Context(), client.ObjectKey{Namespace: namespace, Name: name}, o)
	if err != nil && !apierrors.IsNotFound(err) {
		k.Fatal(err)
	}
	return err == nil
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// schemas are the schemas of our CRDs by their names, as the API server has them.
func (k *kubernetes) schemas() map[string]any {
	k.Helper()
	list := &unstructured.UnstructuredList{}
	list.SetGroupVersionKind(schema.GroupVersionKind{Group: "apiextensions.k8s.io", Version: "v1", Kind: "CustomResourceDefinitionList"})
	must(k.T, k.api.List(k.Context(), list))
	found := map[string]any{}
	for _, crd := range list.Items {
		found[crd.GetName()] = schemaOf(k.T, crd.Object)
	}
	return found
}

func schemaOf(t *testing.T, crd map[string]any) any {
	t.Helper()
	versions, _, err := unstructured.NestedSlice(crd, "spec", "versions")
	must(t, err)
	s, _, err := unstructured.NestedFieldNoCopy(versions[0].(map[string]any), "schema", "openAPIV3Schema")
	must(t, err)
	return s
}

// generated are the schemas that controller-gen wrote.
func generated(t *testing.T) map[string]any {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("..", "..", "config", "crd", "bases", "*.yaml"))
	must(t, err)
	found := map[string]any{}
	for _, f := range files {
		text, err := os.ReadFile(f)
		must(t, err)
		text, err = yaml.YAMLToJSON(text)
		must(t, err)
		crd := &unstructured.Unstructured{} // its decoder keeps integers integers, as the client does
		must(t, json.Unmarshal(text, crd))
		found[crd.GetName()] = schemaOf(t, crd.Object)
	}
	return found
}

// resources are our resources in a namespace by kind and name: what identifies them, spec and status.
func (k *kubernetes) resources(namespace string) map[string]map[string]any {
	k.Helper()
	found := map[string]map[string]any{}
	for _, kind := range []string{"Stream", "ConsumerGroup", "Processor"} {
		list := &unstructured.UnstructuredList{}
		list.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind(kind + "List"))
		must(k.T, k.api.List(k.Context(), list, client.InNamespace(namespace)))
		for _, o := range list.Items {
			found[kind+"/"+o.GetName()] = map[string]any{
				"uid": string(o.GetUID()), "generation": o.GetGeneration(), "spec": o.Object["spec"], "status": o.Object["status"],
			}
		}
	}
	if len(found) < 5 {
		k.Fatalf("there are %d resources", len(found))
	}
	return found
}

// contains says whether all of want is in has, or where it is not.
func contains(has, want any) (path string, ok bool) {
	fields, isMap := want.(map[string]any)
	if !isMap {
		return "", reflect.DeepEqual(has, want)
	}
	there, _ := has.(map[string]any)
	for name, value := range fields {
		if path, ok := contains(there[name], value); !ok {
			return "." + name + path, false
		}
	}
	return "", true
}

// A release of the previous chart, in namespaced mode, becomes one of this chart: with new CRDs and other roles, and without
// a change to any resource. What is uninstalled leaves CRDs and resources, and can be installed again.
func TestUpgradeFromThePreviousChart(t *testing.T) {
	t.Parallel()
	k := newKubernetes(t)
	const system, team = "millrace-system", "team-a"
	k.run("kubectl", "create", "namespace", team)
	k.run("helm", "install", "millrace", previous, "--namespace", system, "--create-namespace", "--set", "namespaces={"+team+"}")
	for name := range generated(t) {
		k.run("kubectl", "wait", "--for=condition=Established", "crd/"+name)
	}
	if reflect.DeepEqual(k.schemas(), generated(t)) {
		t.Fatal("the CRDs have not changed since the previous chart, so this test says nothing about them")
	}
	if missing, err := installation.MissingFields(t.Context(), k.config); err != nil || len(missing) == 0 {
		t.Errorf("the old CRDs are not noticed: %v, %v", missing, err)
	}

	k.run("kubectl", "apply", "--namespace", team, "-f", filepath.Join("..", "..", "config", "samples"))
	k.run("kubectl", "patch", "--namespace", team, "stream/orders", "--subresource=status", "--type=merge", "-p", `{"status":{"observedGeneration":1,"messages":42}}`)
	before := k.resources(team)
	if m := before["Stream/orders"]["status"].(map[string]any)["messages"]; m != int64(42) {
		t.Fatalf("status was not written: %v", m)
	}
	same := func(when string) {
		t.Helper()
		for name, old := range before {
			// A new version may have new defaults; what was there stays.
			if path, ok := contains(k.resources(team)[name], old); !ok {
				t.Errorf("%s%s is not what it was after %s", name, path, when)
			}
		}
	}

	k.run("helm", "upgrade", "millrace", ".", "--namespace", system, "--reuse-values")
	if !reflect.DeepEqual(k.schemas(), generated(t)) {
		t.Error("the CRDs are not those of the new chart")
	}
	// The API server publishes what it serves a moment after a CRD has changed.
	k.eventually(func() error {
		missing, err := installation.MissingFields(t.Context(), k.config)
		if err == nil && len(missing) > 0 {
			err = fmt.Errorf("the new CRDs lack %v", missing)
		}
		return err
	})
	same("the upgrade")
	if k.exists(&rbacv1.RoleBinding{}, team, "millrace-manager") || k.exists(&rbacv1.ClusterRole{}, "", "millrace-manager") {
		t.Error("the roles of the previous chart are still there")
	}
	if !k.exists(&rbacv1.RoleBinding{}, team, "millrace-namespace") || !k.exists(&rbacv1.Role{}, team, "millrace-namespace") {
		t.Error("the manager has no role in its namespace")
	}

	// Back is as easy, also for the CRDs: the newer fields are gone from the schema, not from what is stored.
	k.run("helm", "rollback", "millrace", "1", "--namespace", system)
	k.run("helm", "rollback", "millrace", "2", "--namespace", system)
	same("going back and forth")

	k.run("helm", "uninstall", "millrace", "--namespace", system)
	if k.exists(&appsv1.Deployment{}, system, "millrace") {
		t.Error("the manager is still there")
	}
	same("the uninstallation")
	if _, err := k.try("helm", "install", "other", ".", "--namespace", system); err == nil || !strings.Contains(err.Error(), "invalid ownership metadata") {
		t.Errorf("a release of another name takes the CRDs without being told to: %v", err)
	}
	k.run("helm", "install", "other", ".", "--namespace", system, "--take-ownership")
	k.run("helm", "uninstall", "other", "--namespace", system)
	k.run("helm", "install", "millrace", ".", "--namespace", system, "--take-ownership", "--set", "crds.keep=false")
	same("installing again")
	k.run("helm", "uninstall", "millrace", "--namespace", system)
	k.eventually(func() error {
		if n := len(k.schemas()); n > 0 {
			return fmt.Errorf("crds.keep is false, and %d CRDs are still there", n)
		}
		return nil
	})
}

// What the chart installs is let into a namespace that enforces the restricted Pod Security Standard; and the rights over
// two namespaces are enough to install for them.
func TestAnAPIServerTakesEverything(t *testing.T) {
	t.Parallel()
	k := newKubernetes(t)
	k.run("kubectl", "apply", "--server-side", "-f", filepath.Join("..", "..", "config", "crd", "bases"))
	for _, ns := range []string{"restricted", "team"} {
		k.run("kubectl", "create", "namespace", ns)
	}
	k.run("kubectl", "label", "namespace", "restricted", "pod-security.kubernetes.io/enforce=restricted")

	t.Run("restricted pods", func(t *testing.T) {
		all := render(t, "manager.replicas=2", "metrics.certSecret=tls", "database.existingSecret=db", "imagePullSecrets={pull}")
		template := get[appsv1.Deployment](t, all, "Deployment/millrace").Spec.Template
		pods := map[string]*corev1.Pod{
			"manager": {ObjectMeta: metav1.ObjectMeta{Name: "manager", Labels: template.Labels, Annotations: template.Annotations}, Spec: template.Spec},
			"test":    get[corev1.Pod](t, all, "Pod/millrace-test"),
		}
		for what, pod := range pods {
			pod.Namespace = "restricted"
			if err := k.api.Create(t.Context(), pod.DeepCopy(), client.DryRunAll); err != nil {
				t.Errorf("%s: %v", what, err)
			}
			pod.Spec.SecurityContext.RunAsNonRoot = nil
			if err := k.api.Create(t.Context(), pod, client.DryRunAll); err == nil || !strings.Contains(err.Error(), "PodSecurity") {
				t.Errorf("%s: this API server does not enforce the standard: %v", what, err)
			}
		}
	})
	t.Run("everything optional", func(t *testing.T) {
		k.run("helm", "install", "full", ".", "--namespace", "restricted", "--set", "crds.enabled=false,networkPolicy.enabled=true,podDisruptionBudget.enabled=true",
			"--set", "networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.team=observers", "--set", "networkPolicy.egress[0].ports[0].port=5432")
		k.run("helm", "uninstall", "full", "--namespace", "restricted")
	})
	// Who may do everything in two namespaces and nothing in the cluster can install, and can give no rights but those he has.
	t.Run("a tenant installs for his own namespaces", func(t *testing.T) {
		k := &kubernetes{T: t, config: k.config, api: k.api, kubeconfig: k.kubeconfig, programs: k.programs}
		all := []string{"*"}
		role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "tenant"}, Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{"", "apps", "policy", "events.k8s.io", "coordination.k8s.io", rbacv1.GroupName}, Resources: all, Verbs: []string{"get", "list", "watch", "create", "update", "patch", "delete"}},
		}}
		must(t, k.api.Create(t.Context(), role))
		for _, ns := range []string{"restricted", "team"} {
			k.run("kubectl", "create", "rolebinding", "--namespace", ns, "tenant", "--clusterrole=tenant", "--user=tenant")
		}
		tenant := append([]string{"upgrade", "--install", "mine", ".", "--namespace", "restricted", "--kube-as-user", "tenant"}, tenantValues...)
		if _, err := k.try("helm", tenant...); err == nil || !strings.Contains(err.Error(), "attempting to grant RBAC permissions not currently held") {
			t.Errorf("a tenant can give rights that he has not: %v", err)
		}
		role.Rules = append(role.Rules, rbacv1.PolicyRule{APIGroups: []string{"millrace.dev"}, Resources: all, Verbs: all})
		must(t, k.api.Update(t.Context(), role))
		k.eventually(func() error {
			_, err := k.try("helm", tenant...)
			return err
		})
		if !k.exists(&appsv1.Deployment{}, "restricted", "mine-millrace") || !k.exists(&rbacv1.Role{}, "team", "mine-millrace-namespace") {
			t.Error("something is missing")
		}
	})
}

// tenantValues install without anything cluster-wide.
var tenantValues = []string{
	"--set", "namespaces={restricted,team},crds.enabled=false,rbac.aggregate=false",
	"--set", "manager.clusterID=west-1,metrics.secure=false",
}
