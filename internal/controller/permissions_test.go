package controller_test

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/endpoints/request"
)

// permission is one verb on one resource, as a role names them.
type permission struct{ group, resource, verb string }

// permissions are what the manager under test asked of the API server, so that its role can be compared with what it needs.
type permissions struct {
	mu      sync.Mutex
	used    map[permission]bool
	refused []string
}

var requests = request.RequestInfoFactory{APIPrefixes: sets.NewString("api", "apis"), GrouplessAPIPrefixes: sets.NewString("api")}

// note is a round tripper that notes every request on its way to the API server.
func (p *permissions) note(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(req *http.Request) (*http.Response, error) {
		info, err := requests.NewRequestInfo(req)
		if err != nil {
			return nil, err
		}
		resource := info.Resource
		if info.Subresource != "" {
			resource += "/" + info.Subresource
		}
		resp, err := next.RoundTrip(req)
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.used == nil {
			p.used = map[permission]bool{}
		}
		p.used[permission{info.APIGroup, resource, info.Verb}] = true
		if req.Header.Get("Content-Type") == string(types.ApplyPatchType) {
			p.used[permission{info.APIGroup, resource, "create"}] = true // asked of who applies what is not there
		}
		if info.Verb == "watch" {
			p.used[permission{info.APIGroup, resource, "list"}] = true // asked by clients whose API server streams no lists
		}
		if err == nil && resp.StatusCode == http.StatusForbidden {
			var text bytes.Buffer
			_, _ = text.ReadFrom(resp.Body)
			_ = resp.Body.Close()
			resp.Body = io.NopCloser(&text)
			// A namespace that is being deleted answers Forbidden as well.
			if strings.Contains(text.String(), " cannot "+info.Verb+" ") {
				p.refused = append(p.refused, text.String())
			}
		}
		return resp, err
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// notAsked are permissions that the controllers need and no request of theirs shows.
var notAsked = map[permission]string{
	{"authentication.k8s.io", "tokenreviews", "create"}:        "the metrics, in cmd/manager",
	{"authorization.k8s.io", "subjectaccessreviews", "create"}: "the metrics, in cmd/manager",
	{"", "namespaces", "get"}:                                  "the id of the cluster, in cmd/manager",
	{"", "events", "create"}:                                   "API servers without events.k8s.io",
	{"", "events", "patch"}:                                    "API servers without events.k8s.io",
	{"millrace.dev", "processors/finalizers", "update"}:        "owner references, where the plug-in OwnerReferencesPermissionEnforcement is on",
}

// check says what the role lacks and, after all tests have run, what it has too much.
func (p *permissions) check(role *rbacv1.ClusterRole, allRan bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.refused) > 0 {
		return fmt.Errorf("the role of the manager lacks permissions: %s", strings.Join(p.refused, "\n"))
	}
	if !allRan {
		return nil
	}
	unused := map[string]bool{}
	for _, rule := range role.Rules {
		for _, group := range rule.APIGroups {
			for _, resource := range rule.Resources {
				for _, verb := range rule.Verbs {
					if x := (permission{group, resource, verb}); !p.used[x] && notAsked[x] == "" {
						unused[fmt.Sprintf("%s %s.%s", verb, resource, group)] = true
					}
				}
			}
		}
	}
	if len(unused) > 0 {
		return fmt.Errorf("no test needs these permissions of the manager's role; take them from the markers in setup.go: %s",
			strings.Join(slices.Sorted(maps.Keys(unused)), ", "))
	}
	return nil
}

// The pull secrets of the installation are those of every Processor's pods, unless it names some. A sidecar changes nothing
// about the restricted Pod Security Standard.
func TestProcessorPodsHavePullSecrets(t *testing.T) {
	w := newWorld(t)
	w.kubectl("label", "namespace", w.namespace, "pod-security.kubernetes.io/enforce=restricted")
	w.secret("telemetry-redis", "url", redisURL)
	const rest = `
  errors: {policy: Pending}
  source: {redis: {urlSecretRef: {name: telemetry-redis, key: url}, streams: [telemetry:t]}}
  sink: {http: {type: t, sidecar: {image: docker.io/team/receiver:1, port: 9000}}}
`
	for want, pod := range map[string]string{"registry": "", "own": "  pod: {imagePullSecrets: [{name: own}]}"} {
		d := w.deployment(w.processor("with-"+want, rest+pod))
		if s := d.Spec.Template.Spec.ImagePullSecrets; len(s) != 1 || s[0].Name != want {
			t.Errorf("%s: pull secrets %v", want, s)
		}
		w.create(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: want, Labels: d.Spec.Template.Labels}, Spec: d.Spec.Template.Spec})
	}
}
