package gitops

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/argoproj/argo-cd/gitops-engine/pkg/health"
	"github.com/argoproj/argo-cd/v3/common"
	argocd "github.com/argoproj/argo-cd/v3/pkg/apis/application/v1alpha1"
	"github.com/argoproj/argo-cd/v3/util/lua"
	"github.com/argoproj/argo-cd/v3/util/settings"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes/fake"
	"sigs.k8s.io/yaml"
)

const (
	group          = "millrace.dev"
	configMapFile  = "../../config/argocd/argocd-cm.yaml"
	customizations = "../../config/argocd/resource_customizations/" + group
)

var kinds = []string{"Stream", "ConsumerGroup", "Processor"}

// overrides reads config/argocd/argocd-cm.yaml as Argo CD does.
func overrides(t *testing.T) map[string]argocd.ResourceOverride {
	t.Helper()
	var cm corev1.ConfigMap
	read(t, configMapFile, &cm)
	if cm.Name != common.ArgoCDConfigMapName || cm.Labels["app.kubernetes.io/part-of"] != "argocd" {
		t.Fatalf("%s: Argo CD would not look at a ConfigMap %s with labels %v", configMapFile, cm.Name, cm.Labels)
	}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: common.ArgoCDSecretName, Namespace: cm.Namespace}}
	found, err := settings.NewSettingsManager(t.Context(), fake.NewClientset(&cm, secret), cm.Namespace).GetResourceOverrides()
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestTheConfigMapHoldsTheFiles compares what users apply with the files that are tested below.
func TestTheConfigMapHoldsTheFiles(t *testing.T) {
	t.Parallel()
	inConfigMap := overrides(t)
	dirs, err := filepath.Glob(customizations + "/*")
	if err != nil {
		t.Fatal(err)
	}
	if len(dirs) != len(kinds) {
		t.Errorf("there are %d kinds in %s, and %d are tested", len(dirs), customizations, len(kinds))
	}
	for _, kind := range kinds {
		override, dir := inConfigMap[group+"/"+kind], filepath.Join(customizations, kind)
		if got, want := override.HealthLua, text(t, filepath.Join(dir, "health.lua")); got != want {
			t.Errorf("%s: the health check differs from health.lua; run make generate", kind)
		}
		actions, err := override.GetActions()
		if err != nil {
			t.Errorf("%s: %v", kind, err)
			continue
		}
		if actions.ActionDiscoveryLua != text(t, filepath.Join(dir, "actions", "discovery.lua")) {
			t.Errorf("%s: discovery differs from discovery.lua; run make generate", kind)
		}
		files, err := filepath.Glob(filepath.Join(dir, "actions", "*", "action.lua"))
		if err != nil {
			t.Fatal(err)
		}
		if len(files) != len(actions.Definitions) {
			t.Errorf("%s: %d actions, and %d files; run make generate", kind, len(actions.Definitions), len(files))
		}
		for _, action := range actions.Definitions {
			if action.ActionLua != text(t, filepath.Join(dir, "actions", action.Name, "action.lua")) {
				t.Errorf("%s: action %s differs from its file; run make generate", kind, action.Name)
			}
		}
	}
}

type healthTests struct {
	Tests []struct {
		InputPath    string              `json:"inputPath"`
		HealthStatus health.HealthStatus `json:"healthStatus"`
	} `json:"tests"`
}

// TestSeed_D03_ArgoCDHealth runs health_test.yaml of every kind, as Argo CD's own tests would and as its controller does: the latter without Lua's libraries.
func TestSeed_D03_ArgoCDHealth(t *testing.T) {
	t.Parallel()
	inConfigMap := overrides(t)
	for _, kind := range kinds {
		dir := filepath.Join(customizations, kind)
		var tests healthTests
		read(t, filepath.Join(dir, "health_test.yaml"), &tests)
		tested := map[string]bool{}
		for _, test := range tests.Tests {
			tested[filepath.Base(test.InputPath)] = true
			t.Run(kind+"/"+filepath.Base(test.InputPath), func(t *testing.T) {
				t.Parallel()
				object := object(t, filepath.Join(dir, test.InputPath))
				got, err := lua.ResourceHealthOverrides(inConfigMap).GetResourceHealth(object)
				if err != nil {
					t.Fatal(err)
				}
				if got == nil || *got != test.HealthStatus {
					t.Errorf("by argocd-cm: %+v, want %+v", got, test.HealthStatus)
				}
				got, err = lua.VM{UseOpenLibs: true}.ExecuteHealthLua(object, text(t, filepath.Join(dir, "health.lua")))
				if err != nil {
					t.Fatal(err)
				}
				if *got != test.HealthStatus {
					t.Errorf("built in: %+v, want %+v", got, test.HealthStatus)
				}
			})
		}
		everyFileIsTested(t, filepath.Join(dir, "testdata"), tested)
	}
}

type actionTests struct {
	DiscoveryTests []struct {
		InputPath string                  `json:"inputPath"`
		Result    []argocd.ResourceAction `json:"result"`
	} `json:"discoveryTests"`
	ActionTests []struct {
		Action               string `json:"action"`
		InputPath            string `json:"inputPath"`
		ExpectedOutputPath   string `json:"expectedOutputPath"`
		ExpectedErrorMessage string `json:"expectedErrorMessage"`
	} `json:"actionTests"`
}

// TestActions runs actions/action_test.yaml of every kind. Argo CD runs actions without Lua's libraries.
func TestActions(t *testing.T) {
	t.Parallel()
	vm := lua.VM{ResourceOverrides: overrides(t)}
	for _, kind := range kinds {
		dir := filepath.Join(customizations, kind, "actions")
		var tests actionTests
		read(t, filepath.Join(dir, "action_test.yaml"), &tests)
		testedFiles, testedActions := map[string]bool{}, map[string]bool{}
		for _, test := range tests.DiscoveryTests {
			testedFiles[filepath.Base(test.InputPath)] = true
			t.Run(kind+"/discovery/"+filepath.Base(test.InputPath), func(t *testing.T) {
				t.Parallel()
				object := object(t, filepath.Join(dir, test.InputPath))
				scripts, err := vm.GetResourceActionDiscovery(object)
				if err != nil {
					t.Fatal(err)
				}
				got, err := vm.ExecuteResourceActionDiscovery(object, scripts)
				if err != nil {
					t.Fatal(err)
				}
				byName := func(a, b argocd.ResourceAction) int { return strings.Compare(a.Name, b.Name) }
				slices.SortFunc(got, byName)
				slices.SortFunc(test.Result, byName)
				if !equality.Semantic.DeepEqual(got, test.Result) {
					t.Errorf("found %+v, want %+v", got, test.Result)
				}
			})
		}
		for _, test := range tests.ActionTests {
			testedFiles[filepath.Base(test.InputPath)], testedFiles[filepath.Base(test.ExpectedOutputPath)] = true, true
			testedActions[test.Action] = true
			t.Run(kind+"/"+test.Action+"/"+filepath.Base(test.InputPath), func(t *testing.T) {
				t.Parallel()
				before := object(t, filepath.Join(dir, test.InputPath))
				action, err := vm.GetResourceAction(before, test.Action)
				if err != nil {
					t.Fatal(err)
				}
				began := time.Now().Add(-time.Second) // Lua's clock has whole seconds
				got, err := vm.ExecuteResourceAction(before, action.ActionLua, nil)
				if test.ExpectedErrorMessage != "" {
					if err == nil || !strings.Contains(err.Error(), test.ExpectedErrorMessage) {
						t.Errorf("error %v, want %q", err, test.ExpectedErrorMessage)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if len(got) != 1 || got[0].K8SOperation != lua.PatchOperation {
					t.Fatalf("got %+v, want one patch", got)
				}
				after, want := got[0].UnstructuredObj, object(t, filepath.Join(dir, test.ExpectedOutputPath))
				if test.Action == "restart" {
					replaceTime(t, after, began, "spec", "pod", "annotations", "kubectl.kubernetes.io/restartedAt")
				}
				if g, w := asYAML(t, after), asYAML(t, want); g != w {
					t.Errorf("got\n%s\nwant\n%s", g, w)
				}
			})
		}
		everyFileIsTested(t, filepath.Join(dir, "testdata"), testedFiles)
		for _, path := range glob(t, filepath.Join(dir, "*", "action.lua")) {
			if name := filepath.Base(filepath.Dir(path)); !testedActions[name] {
				t.Errorf("%s: action %s has no test", kind, name)
			}
		}
	}
}

// replaceTime checks that a field holds a time since began, and puts the zero time there, which expected outputs hold.
func replaceTime(t *testing.T, object *unstructured.Unstructured, began time.Time, path ...string) {
	t.Helper()
	value, _, err := unstructured.NestedString(object.Object, path...)
	if err != nil {
		t.Fatal(err)
	}
	at, err := time.Parse(time.RFC3339, value)
	if err != nil || at.Before(began) || at.After(time.Now()) {
		t.Errorf("%v is %q, want the present time (%v)", path, value, err)
	}
	if err := unstructured.SetNestedField(object.Object, "0001-01-01T00:00:00Z", path...); err != nil {
		t.Fatal(err)
	}
}

func everyFileIsTested(t *testing.T, dir string, tested map[string]bool) {
	t.Helper()
	files := glob(t, filepath.Join(dir, "*.yaml"))
	if len(files) == 0 {
		t.Errorf("%s is empty", dir)
	}
	for _, path := range files {
		if !tested[filepath.Base(path)] {
			t.Errorf("no test reads %s", path)
		}
	}
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

func object(t *testing.T, path string) *unstructured.Unstructured {
	t.Helper()
	content, err := yaml.YAMLToJSONStrict([]byte(text(t, path)))
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	o := &unstructured.Unstructured{} // with whole numbers as a client of the API server has them
	if err := o.UnmarshalJSON(content); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return o
}

func read(t *testing.T, path string, into any) {
	t.Helper()
	if err := yaml.UnmarshalStrict([]byte(text(t, path)), into); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

func text(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func asYAML(t *testing.T, object *unstructured.Unstructured) string {
	t.Helper()
	content, err := yaml.Marshal(object.Object)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}
