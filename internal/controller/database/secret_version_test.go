package database

import (
	"context"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// secretReader serves one Secret, or its metadata, and counts how often it is asked.
type secretReader struct {
	client.Reader
	version, url string
	asked        int
}

func (s *secretReader) Get(_ context.Context, _ client.ObjectKey, o client.Object, _ ...client.GetOption) error {
	s.asked++
	o.SetResourceVersion(s.version)
	if secret, ok := o.(*corev1.Secret); ok {
		secret.Data = map[string][]byte{"url": []byte(s.url)}
	}
	return nil
}

func (s *secretReader) changed(version, url string) { s.version, s.url = version, url }

// A Secret is read once for each of its versions, however many resources name it.
func TestASecretThatHasNotChangedIsNotReadAgain(t *testing.T) {
	live, cached := &secretReader{}, &secretReader{}
	registry := NewRegistry(Options{})
	r := &Resolver{Reader: live, Metadata: cached, Registry: registry}
	resolve := func(want string, reads int) {
		t.Helper()
		d, err := r.Resolve(t.Context(), "ns", &v1alpha1.SecretKeyReference{Name: "db", Key: "url"})
		if err != nil {
			t.Fatal(err)
		}
		if d.name != want || live.asked != reads {
			t.Errorf("it leads to %s after %d reads, want %s after %d", d.name, live.asked, want, reads)
		}
	}
	live.changed("1", "postgres://u:p@h/one")
	cached.changed("1", "")
	resolve("one", 1)
	resolve("one", 1)
	live.changed("2", "postgres://u:p@h/two")
	resolve("one", 1) // the watch is late, and will wake whom it concerns
	cached.changed("2", "")
	resolve("two", 2)
	resolve("two", 2)
	cached.changed("1", "") // an older cache than what was read: read again
	resolve("two", 3)
	cached.changed("2", "")

	// A pool that was let go of is opened again by what the Secret says.
	registry.mu.Lock()
	clear(registry.databases)
	registry.mu.Unlock()
	resolve("two", 4)
	resolve("two", 4)
}
