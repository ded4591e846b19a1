// Package millrace tests the Helm chart.
package millrace

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
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

// The chart holds exact copies of what controller-gen writes.
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
		if has, err := os.ReadFile(copied); err != nil || !bytes.Equal(has, want) {
			t.Errorf("%s differs from %s: run make generate (%v)", copied, generated, err)
		}
	}
	crds, err := filepath.Glob(filepath.Join("files", "crds", "*.yaml"))
	if err != nil || len(crds) != len(bases) {
		t.Errorf("the chart has %v, %v", crds, err)
	}
}

// objects are a rendered chart, by kind and name, and the namespace between them when it is not that of the release.
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
	return decode(t, text)
}

// decode splits manifests and decodes them strictly.
func decode(t *testing.T, text string) objects {
	t.Helper()
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
		name := meta.Kind + "/" + meta.Name
		if meta.Namespace != "" && meta.Namespace != "millrace-system" {
			name = meta.Kind + "/" + meta.Namespace + "/" + meta.Name
		}
		found[name] = document
		typed := map[string]any{
			"Deployment": &appsv1.Deployment{}, "Service": &corev1.Service{}, "Pod": &corev1.Pod{}, "ServiceAccount": &corev1.ServiceAccount{},
			"ClusterRole": &rbacv1.ClusterRole{}, "ClusterRoleBinding": &rbacv1.ClusterRoleBinding{},
			"Role": &rbacv1.Role{}, "RoleBinding": &rbacv1.RoleBinding{},
			"NetworkPolicy": &networkingv1.NetworkPolicy{}, "PodDisruptionBudget": &policyv1.PodDisruptionBudget{},
			"Namespace":                &corev1.Namespace{},
			"CustomResourceDefinition": &metav1.PartialObjectMetadata{}, "ConfigMap": &corev1.ConfigMap{}, "Secret": &corev1.Secret{},
			"PodMonitor": &monitoringv1.PodMonitor{}, "PrometheusRule": &monitoringv1.PrometheusRule{},
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
	t.Parallel()
	text, err := os.ReadFile(filepath.Join("files", "role.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var generated rbacv1.ClusterRole
	if err := yaml.UnmarshalStrict(text, &generated); err != nil {
		t.Fatal(err)
	}
	complete := func(t *testing.T, wide, narrow []rbacv1.PolicyRule) {
		t.Helper()
		if n := len(wide) + len(narrow); n != len(generated.Rules) {
			t.Errorf("%d rules of %d", n, len(generated.Rules))
		}
		for _, r := range wide {
			if !has(r.APIGroups, "authentication.k8s.io") && !has(r.APIGroups, "authorization.k8s.io") && !slices.Equal(r.ResourceNames, []string{"kube-system"}) {
				t.Errorf("cluster-wide in every mode: %+v", r)
			}
		}
	}
	t.Run("all namespaces", func(t *testing.T) {
		all := render(t)
		complete(t, get[rbacv1.ClusterRole](t, all, "ClusterRole/millrace-cluster").Rules, get[rbacv1.ClusterRole](t, all, "ClusterRole/millrace-manager").Rules)
		if b := get[rbacv1.ClusterRoleBinding](t, all, "ClusterRoleBinding/millrace-manager"); b.RoleRef.Name != "millrace-manager" || b.Subjects[0].Namespace != "millrace-system" {
			t.Errorf("%+v", b)
		}
	})
	t.Run("some namespaces", func(t *testing.T) {
		all := render(t, "namespaces={a,b}")
		for _, ns := range []string{"a", "b"} {
			complete(t, get[rbacv1.ClusterRole](t, all, "ClusterRole/millrace-cluster").Rules, get[rbacv1.Role](t, all, "Role/"+ns+"/millrace-namespace").Rules)
			if b := get[rbacv1.RoleBinding](t, all, "RoleBinding/"+ns+"/millrace-namespace"); b.RoleRef.Kind != "Role" || b.Subjects[0].Namespace != "millrace-system" {
				t.Errorf("%+v", b)
			}
		}
		for _, name := range []string{"ClusterRole/millrace-manager", "ClusterRoleBinding/millrace-manager"} {
			if _, ok := all[name]; ok {
				t.Errorf("%s is there in namespaced mode", name)
			}
		}
		if d := get[appsv1.Deployment](t, all, "Deployment/millrace"); !has(d.Spec.Template.Spec.Containers[0].Args, "--namespaces=a,b") {
			t.Error("the manager is not told its namespaces")
		}
	})
	// Who may make nothing cluster-wide can install with these values.
	t.Run("nothing cluster-wide", func(t *testing.T) {
		for name := range render(t, "namespaces={a}", "crds.enabled=false", "manager.clusterID=c", "metrics.secure=false", "rbac.aggregate=false") {
			if strings.HasPrefix(name, "Cluster") || strings.HasPrefix(name, "CustomResourceDefinition") {
				t.Error(name)
			}
		}
	})
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

// One registry for everything, with secrets for it: what a cluster without a way to the internet needs.
func TestOneRegistryForEveryImage(t *testing.T) {
	t.Parallel()
	digest := "sha256:" + strings.Repeat("b", 64)
	all := render(t, "global.imageRegistry=mirror.local:5000/apps/", "global.imagePullSecrets={mirror}", "imagePullSecrets={own,mirror}",
		"processor.imagePullSecrets={team}", "processor.image.digest="+digest, "manager.image.tag=v9")
	names := func(refs []corev1.LocalObjectReference) (list []string) {
		for _, r := range refs {
			list = append(list, r.Name)
		}
		return list
	}
	pod := get[appsv1.Deployment](t, all, "Deployment/millrace").Spec.Template.Spec
	test := get[corev1.Pod](t, all, "Pod/millrace-test").Spec
	for what, spec := range map[string]corev1.PodSpec{"the manager": pod, "the test": test} {
		if image := spec.Containers[0].Image; image != "mirror.local:5000/apps/millrace/manager:v9" {
			t.Errorf("%s has image %s", what, image)
		}
		if got := names(spec.ImagePullSecrets); !slices.Equal(got, []string{"mirror", "own"}) {
			t.Errorf("%s has pull secrets %v", what, got)
		}
	}
	for _, arg := range []string{"--processor-image=mirror.local:5000/apps/millrace/processor@" + digest, "--processor-image-pull-secrets=mirror,team"} {
		if !has(pod.Containers[0].Args, arg) {
			t.Errorf("%s is missing in %v", arg, pod.Containers[0].Args)
		}
	}
	for name, document := range all {
		if bytes.Contains(document, []byte("docker.io")) && !strings.HasPrefix(name, "CustomResourceDefinition/") {
			t.Errorf("%s leads to docker.io", name)
		}
	}
}

func TestTheNetworkPolicyLetsInReadersOfMetricsOnly(t *testing.T) {
	t.Parallel()
	policy := func(set ...string) networkingv1.NetworkPolicySpec {
		return get[networkingv1.NetworkPolicy](t, render(t, append(set, "networkPolicy.enabled=true")...), "NetworkPolicy/millrace").Spec
	}
	all := render(t)
	if _, ok := all["NetworkPolicy/millrace"]; ok {
		t.Error("there is one by default")
	}
	p := policy()
	labels := get[appsv1.Deployment](t, all, "Deployment/millrace").Spec.Template.Labels
	for k, v := range p.PodSelector.MatchLabels {
		if labels[k] != v {
			t.Errorf("it selects pods with %s=%s, and the manager's have %v", k, v, labels)
		}
	}
	if !slices.Equal(p.PolicyTypes, []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}) || len(p.Ingress) != 1 ||
		len(p.Ingress[0].Ports) != 1 || p.Ingress[0].Ports[0].Port.StrVal != "metrics" || p.Ingress[0].From != nil {
		t.Errorf("by itself: %+v", p)
	}
	if p := policy("metrics.enabled=false"); len(p.Ingress) != 0 || len(p.PolicyTypes) != 1 {
		t.Errorf("without metrics: %+v", p)
	}
	p = policy("networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.team=observers", "networkPolicy.egress[0].ports[0].port=5432")
	if from := p.Ingress[0].From; len(from) != 1 || from[0].NamespaceSelector.MatchLabels["team"] != "observers" {
		t.Errorf("from %+v", from)
	}
	if len(p.PolicyTypes) != 2 || len(p.Egress) != 1 || p.Egress[0].Ports[0].Port.IntVal != 5432 {
		t.Errorf("egress: %+v", p)
	}
	// The Service leads to the port that the policy opens.
	if port := get[corev1.Service](t, all, "Service/millrace-metrics").Spec.Ports[0]; port.TargetPort.StrVal != "metrics" || port.Port != 8443 {
		t.Errorf("service: %+v", port)
	}
}

func TestMetricsCanHaveACertificate(t *testing.T) {
	t.Parallel()
	pod := get[appsv1.Deployment](t, render(t, "metrics.certSecret=metrics-tls"), "Deployment/millrace").Spec.Template.Spec
	mounted := slices.ContainsFunc(pod.Containers[0].VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == "/etc/millrace/metrics-tls" })
	found := slices.ContainsFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Secret != nil && v.Secret.SecretName == "metrics-tls" })
	if !mounted || !found || !has(pod.Containers[0].Args, "--metrics-cert-dir=/etc/millrace/metrics-tls") {
		t.Errorf("%+v", pod)
	}
}

// What is misspelt or of another type is refused, and the error names the value and what is wrong with it.
func TestTheSchemaSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	for set, want := range map[string][]string{
		"manager.replica=2":                         {"/manager", "'replica' not allowed"},
		"replicas=2":                                {"'replicas' not allowed"},
		"manager.replicas=two":                      {"/manager/replicas", "want integer"},
		"manager.logLevel=loud":                     {"/manager/logLevel", "'debug', 'info', 'warn', 'error'"},
		"manager.verifyInterval=5":                  {"/manager/verifyInterval", "want string"},
		"manager.lagInterval=5x":                    {"/manager/lagInterval", "does not match pattern"},
		"manager.workers=0":                         {"/manager/workers", "minimum"},
		"manager.image.digest=sha256:1":             {"/manager/image/digest", "does not match pattern"},
		"manager.image.pullPolicy=Sometimes":        {"/manager/image/pullPolicy", "'Always', 'IfNotPresent', 'Never'"},
		"manager.resources.limit.memory=1Gi":        {"/manager/resources", "'limit' not allowed"},
		"manager.podAnnotations.port=1":             {"/manager/podAnnotations/port", "want string"},
		"manager.tolerations.key=x":                 {"/manager/tolerations", "want array"},
		"namespaces={A}":                            {"/namespaces/0", "does not match pattern"},
		"namespaces=a":                              {"/namespaces", "want array"},
		"namespaces={a,a}":                          {"/namespaces", "equal"},
		"database.secret=x":                         {"/database", "'secret' not allowed"},
		"database.secretKey=":                       {"/database/secretKey", "minLength"},
		"global.imageRegistry=https://mirror.local": {"/global/imageRegistry", "does not match pattern"},
		"imagePullSecrets[0].name=x":                {"/imagePullSecrets/0", "want string"},
		"metrics.port=0":                            {"/metrics/port", "minimum"},
		"podDisruptionBudget.maxUnavailable=half":   {"/podDisruptionBudget/maxUnavailable"},
		"crds.keep=maybe":                           {"/crds/keep", "want boolean"},
		"networkPolicy.metricsFrom.podSelector=":    {"/networkPolicy/metricsFrom", "want array"},
		"serviceAccount.create=false":               {"write the name of a service account that exists"},
	} {
		_, err := helm(t, "template", "millrace", ".", "--set", set)
		if err == nil {
			t.Errorf("--set %s is accepted", set)
			continue
		}
		for _, text := range want {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("--set %s: the error lacks %q: %v", set, text, err)
			}
		}
	}
}

// Every value has a description in the schema and a default in values.yaml, and neither has one that the other lacks.
func TestTheSchemaAndTheValuesAreTheSame(t *testing.T) {
	t.Parallel()
	type schema struct {
		Description          string             `json:"description"`
		Properties           map[string]*schema `json:"properties"`
		AdditionalProperties any                `json:"additionalProperties"`
	}
	var s schema
	var values map[string]any
	for file, into := range map[string]any{"values.schema.json": &s, "values.yaml": &values} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := yaml.Unmarshal(text, into); err != nil {
			t.Fatal(err)
		}
	}
	var compare func(path string, s *schema, value any)
	compare = func(path string, s *schema, value any) {
		if s.Description == "" && path != "" {
			t.Errorf("%s has no description in the schema", path)
		}
		children, isMap := value.(map[string]any)
		if !isMap || len(s.Properties) == 0 || path == ".manager.resources" {
			return
		}
		if s.AdditionalProperties != false && path != ".global" {
			t.Errorf("%s lets misspelt values through", path)
		}
		for name, child := range children {
			if s.Properties[name] == nil {
				t.Errorf("%s.%s is missing in the schema", path, name)
				continue
			}
			compare(path+"."+name, s.Properties[name], child)
		}
		for name := range s.Properties {
			if _, ok := children[name]; !ok {
				t.Errorf("%s.%s has no default in values.yaml", path, name)
			}
		}
	}
	compare("", &s, values)
}

func has(list []string, s string) bool { return slices.Contains(list, s) }
