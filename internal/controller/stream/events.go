package stream

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
)

// events speaks of what happened once: adoption, repair, an approved plan, a transaction that holds the stream up, and a change of Ready.
func (r *Reconciler) events(sc *scope) {
	if sc.adopted != "" && sc.applied {
		phase.Event(r.Recorder, sc.stream, corev1.EventTypeNormal, v1alpha1.EventAdopted, sc.adopted)
	}
	if sc.drift && sc.applied {
		phase.Event(r.Recorder, sc.stream, corev1.EventTypeWarning, v1alpha1.EventDriftRepaired, "repaired: "+strings.Join(summaries(sc), "; "))
	}
	if sc.approved != "" && sc.applied {
		phase.Event(r.Recorder, sc.stream, corev1.EventTypeNormal, v1alpha1.EventPlanApplied, "carried out plan "+sc.approved+": "+strings.Join(summaries(sc), "; "))
	}
	if held := meta.FindStatusCondition(sc.stream.Status.Conditions, v1alpha1.ConditionHorizonHeld); held != nil && held.Status == metav1.ConditionTrue &&
		!meta.IsStatusConditionTrue(sc.before.Status.Conditions, v1alpha1.ConditionHorizonHeld) {
		phase.Event(r.Recorder, sc.stream, corev1.EventTypeWarning, held.Reason, held.Message)
	}
	r.Announcer.Announce(sc.before, sc.stream)
}
