package phase

import (
	"errors"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// messageMax bounds a condition's message. The API server allows 32 KiB; a person reads a few lines.
const messageMax = 2048

// Ready is what a resource without an error says about itself.
type Ready struct {
	Reason  string // default: ReasonReady
	Message string
}

// Summarize derives Ready, Reconciling and Stalled from the outcome of a reconcile, as kstatus reads them: Reconciling and
// Stalled are present only while they are true, and both repeat the reason and message of Ready.
func Summarize(conditions *[]metav1.Condition, generation int64, outcome error, ready Ready) {
	set := func(kind string, status metav1.ConditionStatus, reason, message string) {
		Set(conditions, generation, kind, status, reason, message)
	}
	if outcome == nil {
		if ready.Reason == "" {
			ready.Reason = v1alpha1.ReasonReady
		}
		set(v1alpha1.ConditionReady, metav1.ConditionTrue, ready.Reason, ready.Message)
		meta.RemoveStatusCondition(conditions, v1alpha1.ConditionReconciling)
		meta.RemoveStatusCondition(conditions, v1alpha1.ConditionStalled)
		return
	}
	reason, message := Reason(outcome, v1alpha1.ReasonFailed), outcome.Error()
	set(v1alpha1.ConditionReady, metav1.ConditionFalse, reason, message)
	if IsStalled(outcome) {
		set(v1alpha1.ConditionStalled, metav1.ConditionTrue, reason, message)
		meta.RemoveStatusCondition(conditions, v1alpha1.ConditionReconciling)
		return
	}
	set(v1alpha1.ConditionReconciling, metav1.ConditionTrue, reason, message)
	meta.RemoveStatusCondition(conditions, v1alpha1.ConditionStalled)
}

// Set sets one condition. Its transition time moves only when its status does.
func Set(conditions *[]metav1.Condition, generation int64, kind string, status metav1.ConditionStatus, reason, message string) {
	message = strings.TrimSpace(message)
	if len(message) > messageMax {
		message = strings.ToValidUTF8(message[:messageMax], "") + "…"
	}
	meta.SetStatusCondition(conditions, metav1.Condition{
		Type: kind, Status: status, Reason: reason, Message: message, ObservedGeneration: generation,
	})
}

// Sort orders conditions for a reader: what matters most first.
func Sort(conditions []metav1.Condition) {
	order := []string{
		v1alpha1.ConditionReady, v1alpha1.ConditionStalled, v1alpha1.ConditionReconciling, v1alpha1.ConditionSchemaApplied,
		v1alpha1.ConditionDrifted, v1alpha1.ConditionPaused, v1alpha1.ConditionLapsed, v1alpha1.ConditionConsuming, v1alpha1.ConditionBacklogHigh,
		v1alpha1.ConditionHorizonHeld, v1alpha1.ConditionLagKnown,
	}
	slices.SortStableFunc(conditions, func(a, b metav1.Condition) int {
		return slices.Index(order, a.Type) - slices.Index(order, b.Type)
	})
}

// Requeue says when to look again after an outcome: at the time the error names, else at the next verification. transient
// is true when the error has no handling of its own and belongs to the work queue's backoff.
func Requeue(outcome error, verify time.Duration) (after time.Duration, transient bool) {
	if outcome == nil {
		return verify, false
	}
	f, ok := errors.AsType[*failure](outcome)
	if !ok {
		return 0, true
	}
	if f.after > 0 {
		return f.after, false
	}
	return verify, false
}

// AppliedBefore says whether the conditions tell that this generation was applied to the database, also when a difference was found since then and its
// repair has not succeeded yet.
func AppliedBefore(conditions []metav1.Condition, generation int64) bool {
	for _, kind := range []string{v1alpha1.ConditionSchemaApplied, v1alpha1.ConditionDrifted} {
		if c := meta.FindStatusCondition(conditions, kind); c != nil && c.Status == metav1.ConditionTrue && c.ObservedGeneration == generation {
			return true
		}
	}
	return false
}
