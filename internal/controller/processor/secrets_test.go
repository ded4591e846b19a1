package processor

import (
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
)

// What was learnt of a Secret goes with it, in all its uses; that of another with the same name stays.
func TestWhatWasLearntOfASecretGoesWithIt(t *testing.T) {
	r := &Reconciler{}
	uses := []secretUse{{"dsn", "SOURCE"}, {"dsn", "SINK"}, {"url", "REDIS"}}
	for _, namespace := range []string{"shop", "other"} {
		for _, use := range uses {
			r.secrets.put(client.ObjectKey{Namespace: namespace, Name: "db"}, use, learnt{version: namespace + use.key})
		}
	}
	gone := &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db"}}
	r.forget(t.Context(), event.DeleteEvent{Object: gone}, nil)
	for _, use := range uses {
		if l := r.secrets.get(client.ObjectKeyFromObject(gone), use); l != (learnt{}) {
			t.Errorf("%+v of the Secret that is gone: %+v", use, l)
		}
		if l := r.secrets.get(client.ObjectKey{Namespace: "other", Name: "db"}, use); l.version != "other"+use.key {
			t.Errorf("%+v of the other: %+v", use, l)
		}
	}
	if n := len(r.secrets.known); n != 1 {
		t.Errorf("%d Secrets are remembered", n)
	}
}
