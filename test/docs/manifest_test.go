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
	"github.com/millrace-dev/millrace/test/env/apiserver"
)

// server is the Kubernetes API server of this package's tests; stopKubernetes ends it.
var server *envtest.Environment

// kubernetes starts an API server with our CRDs, once for all tests.
var kubernetes = sync.OnceValues(func() (*rest.Config, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	keda, err := kedaModule(ctx)
	if err != nil {
		return nil, err
	}
	server, err = apiserver.New(ctx,
		filepath.Join("..", "..", "config", "crd", "bases"),
		filepath.Join(keda, "config", "crd", "bases", "keda.sh_scaledobjects.yaml"),
		filepath.Join(keda, "config", "crd", "bases", "keda.sh_triggerauthentications.yaml"))
	if err != nil {
		return nil, err
	}
	return server.Start()
})

func stopKubernetes() error {
	if server == nil {
		return nil
	}
	return server.Stop()
}

// TestEveryManifestIsAccepted gives every manifest that the documentation shows, and the samples of scaling, to a real API server with our CRDs and
// KEDA's, strictly: a field that does not exist is an error.
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

	samples, err := filepath.Glob("../../config/samples/scaling/*.yaml")
	if err != nil || len(samples) == 0 {
		t.Fatalf("found samples %v, %v", samples, err)
	}
	found := 0
	for _, path := range append(documents(t), samples...) {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		blocks := regexp.MustCompile("(?ms)^```yaml\n(.*?)^```$").FindAllSubmatch(text, -1)
		if filepath.Ext(path) == ".yaml" {
			blocks = [][][]byte{{nil, text}}
		}
		for _, block := range blocks {
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
