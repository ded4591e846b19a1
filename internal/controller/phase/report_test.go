package phase

import (
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// A change is announced once, also to a reconcile whose cache does not show it yet, and again when it comes back.
func TestAChangeIsAnnouncedOnce(t *testing.T) {
	recorder := events.NewFakeRecorder(10)
	a := NewAnnouncer(recorder)
	is := func(reason string) *v1alpha1.Stream {
		s := &v1alpha1.Stream{}
		s.UID = "u"
		Set(&s.Status.Conditions, 1, v1alpha1.ConditionReady, metav1.ConditionFalse, reason, "why")
		return s
	}
	failing, rolling := is(v1alpha1.ReasonPodsFailing), is(v1alpha1.ReasonRollingOut)
	for i, c := range []struct {
		before, after *v1alpha1.Stream
		events        int
	}{
		{rolling, failing, 1}, {rolling, failing, 0}, {failing, failing, 0}, {failing, rolling, 1}, {rolling, failing, 1},
	} {
		a.Announce(c.before, c.after)
		if n := len(recorder.Events); n != c.events {
			t.Errorf("call %d sent %d events, not %d", i, n, c.events)
		}
		for len(recorder.Events) > 0 {
			<-recorder.Events
		}
	}
	a.Forget("u")
	if a.Announce(rolling, failing); len(recorder.Events) != 1 {
		t.Error("what was forgotten is not announced")
	}
}
