package installation

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/rest"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// property is what this package reads of an OpenAPI schema.
type property struct {
	Properties           map[string]property `json:"properties"`
	Items                *property           `json:"items"`
	AdditionalProperties *property           `json:"additionalProperties"`
}

// MissingFields names the fields of our kinds that the API server does not know, such as Stream.spec.partitions. It drops
// them from what is written, so there are some when the CRDs are older than this program. A missing kind is an error.
func MissingFields(ctx context.Context, cfg *rest.Config) ([]string, error) {
	api, err := discovery.NewDiscoveryClientForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("create a client: %w", err)
	}
	path := "/openapi/v3/apis/" + v1alpha1.GroupVersion.String()
	text, err := api.RESTClient().Get().AbsPath(path).Do(ctx).Raw()
	if err != nil {
		return nil, fmt.Errorf("the API server does not serve %s: install the CRDs: %w", v1alpha1.GroupVersion, err)
	}
	var document struct {
		Components struct {
			Schemas map[string]property `json:"schemas"`
		} `json:"components"`
	}
	if err := json.Unmarshal(text, &document); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	var missing []string
	for _, o := range []runtime.Object{&v1alpha1.Stream{}, &v1alpha1.ConsumerGroup{}, &v1alpha1.Processor{}} {
		t := reflect.TypeOf(o).Elem()
		// The name is the group reversed, the version and the kind.
		served, ok := document.Components.Schemas["dev.millrace."+v1alpha1.GroupVersion.Version+"."+t.Name()]
		if !ok {
			return nil, fmt.Errorf("the API server does not serve %s of %s: install its CRD", t.Name(), v1alpha1.GroupVersion)
		}
		missing = compare(missing, t, served, t.Name())
	}
	return missing, nil
}

// ours is the package whose types are compared. What lies in types of Kubernetes is left to the generator of the CRDs.
var ours = reflect.TypeFor[v1alpha1.Stream]().PkgPath()

// compare appends the paths of t's fields that the schema lacks.
func compare(missing []string, t reflect.Type, schema property, path string) []string {
	switch t.Kind() {
	case reflect.Pointer:
		return compare(missing, t.Elem(), schema, path)
	case reflect.Slice:
		if schema.Items != nil {
			return compare(missing, t.Elem(), *schema.Items, path)
		}
	case reflect.Map:
		if schema.AdditionalProperties != nil {
			return compare(missing, t.Elem(), *schema.AdditionalProperties, path)
		}
	case reflect.Struct:
		if t.PkgPath() != ours || len(schema.Properties) == 0 {
			return missing
		}
		for i := range t.NumField() {
			field := t.Field(i)
			name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
			switch {
			case name == "-" || field.Anonymous && field.Type.PkgPath() != ours:
				continue
			case name == "": // inlined
				missing = compare(missing, field.Type, schema, path)
				continue
			}
			at := path + "." + name
			if inner, known := schema.Properties[name]; known {
				missing = compare(missing, field.Type, inner, at)
			} else {
				missing = append(missing, at)
			}
		}
	}
	return missing
}
