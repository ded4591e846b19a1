package docs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/test/env/cluster"
)

// server is the Kubernetes API server of this package's tests; stopKubernetes ends it.
var server *envtest.Environment

// kubernetes starts an API server with our CRDs, once for all tests.
var kubernetes = sync.OnceValues(func() (*rest.Config, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	assets := os.Getenv("KUBEBUILDER_ASSETS")
	if assets == "" {
		var err error
		if assets, err = cluster.Assets(ctx); err != nil {
			return nil, err
		}
	}
	server = &envtest.Environment{
		CRDDirectoryPaths:     []string{filepath.Join("..", "..", "config", "crd", "bases")},
		ErrorIfCRDPathMissing: true,
		BinaryAssetsDirectory: assets,
	}
	return server.Start()
})

func stopKubernetes() error {
	if server == nil {
		return nil
	}
	return server.Stop()
}

// TestEveryManifestIsAccepted gives every manifest that the documentation shows to a real API server with our CRDs, strictly: a field that
// does not exist is an error.
func TestEveryManifestIsAccepted(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	cfg, err := kubernetes()
	if err != nil {
		t.Fatal(err)
	}
	api, err := client.New(cfg, client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	api = client.WithFieldValidation(api, "Strict")

	found := 0
	for _, path := range documents(t) {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, block := range regexp.MustCompile("(?ms)^```yaml\n(.*?)^```$").FindAllSubmatch(text, -1) {
			reader := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(block[1]), 4096)
			for {
				object := &unstructured.Unstructured{}
				if err := reader.Decode(&object.Object); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.Fatalf("%s: %v", filepath.Base(path), err)
				}
				if object.GetKind() == "" {
					continue // a fragment, not a manifest
				}
				if shown.Match(block[0]) && object.GroupVersionKind().Group != v1alpha1.GroupVersion.Group {
					continue // of Argo CD or Flux, whose kinds this API server lacks; the end-to-end tests apply the file
				}
				object.SetNamespace("default")
				if err := api.Create(ctx, object, client.DryRunAll); err != nil {
					t.Errorf("%s: %s %s: %v", filepath.Base(path), object.GetKind(), object.GetName(), err)
				}
				found++
			}
		}
	}
	if found == 0 {
		t.Fatal("found no manifest in the documentation")
	}
}
