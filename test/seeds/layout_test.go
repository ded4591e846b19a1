package seeds

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/test/env/source"
)

// The repository is laid out as one that kubebuilder made, with the parts where a newcomer looks for them, and built with what operators are built with.
func TestSeed_D04_Layout(t *testing.T) {
	t.Parallel()
	root, err := source.Root()
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{
		"api/v1alpha1/stream_types.go", "api/v1alpha1/consumergroup_types.go", "api/v1alpha1/processor_types.go",
		"internal/controller", "internal/pgstream", "cmd/manager/main.go", "cmd/processor/main.go", "config/crd/bases/millrace.dev_streams.yaml",
		"config/rbac/role.yaml", "charts/millrace/Chart.yaml", "PROJECT", "go.mod", "Makefile",
	} {
		if _, err := os.Stat(filepath.Join(root, filepath.FromSlash(path))); err != nil {
			t.Error(err)
		}
	}
	for file, modules := range map[string][]string{
		"go.mod": {"sigs.k8s.io/controller-runtime", "k8s.io/client-go", "k8s.io/apimachinery", "github.com/jackc/pgx/v5", "github.com/onsi/ginkgo/v2"},
		// Tools have a module of their own, so that they are no dependency of the product.
		"tools/dev/go.mod": {"sigs.k8s.io/controller-tools"},
	} {
		text, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(file)))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range modules {
			if !strings.Contains(string(text), "\t"+m+" v") {
				t.Errorf("%s does not ask for %s", file, m)
			}
		}
	}
	project, err := os.ReadFile(filepath.Join(root, "PROJECT"))
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"Stream", "ConsumerGroup", "Processor"} {
		if !strings.Contains(string(project), "kind: "+kind+"\n") {
			t.Errorf("PROJECT does not know %s", kind)
		}
	}
}
