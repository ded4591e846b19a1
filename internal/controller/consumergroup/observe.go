package consumergroup

import (
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/lag"
	"github.com/millrace-dev/millrace/internal/controller/phase"
)

// show writes figures into status, whatever became of the phases: a database that is lost has no figures either. Those that
// are not a measurement leave status as it is (G3).
func show(g *v1alpha1.ConsumerGroup, f lag.Figures) {
	status := &g.Status
	switch {
	case !f.Known && f.Err == nil && meta.FindStatusCondition(status.Conditions, v1alpha1.ConditionLagKnown) != nil:
		return // the manager has just started; what the one before it knew is a few seconds old
	case !f.Known:
		reason, message := v1alpha1.ReasonNotMeasured, "no lag has been read since the manager started"
		if f.Err != nil {
			reason, message = phase.Reason(f.Err, v1alpha1.ReasonFailed), f.Err.Error()
		}
		phase.Set(&status.Conditions, g.Generation, v1alpha1.ConditionLagKnown, metav1.ConditionFalse, reason, message)
		return
	}
	status.Queued = ptr.To(f.Queued)
	status.Lag, status.InFlight = ptr.To(f.Lag), ptr.To(f.InFlight)
	status.Retrying, status.DeadLetters = ptr.To(f.Retrying), ptr.To(f.DeadLetters)
	// Members of a Shared group come and go without joining: nothing knows their number.
	status.Members = nil
	if g.Spec.Mode == v1alpha1.ModeOrdered {
		status.Members = ptr.To(f.Members)
	}
	status.Deliveries = nil
	if f.Deliveries > 0 {
		status.Deliveries = ptr.To(f.Deliveries)
	}
	// That nothing moves in a group in which nothing ever did is no news, and would be one more write for each of them.
	if f.Rates != nil && (status.PublishedPerMinute != nil || *f.Rates != (lag.Rates{})) {
		status.PublishedPerMinute = ptr.To(lag.PerMinute(f.Rates.Published, status.PublishedPerMinute))
		status.SettledPerMinute = ptr.To(lag.PerMinute(f.Rates.Settled, status.SettledPerMinute))
	}
	status.Holders = nil
	for _, h := range f.Holders {
		status.Holders = append(status.Holders, v1alpha1.Holder{Member: h.Name, Partitions: h.Partitions, Messages: h.Messages})
	}
	status.LastError = nil
	if f.LastError != "" {
		status.LastError = &v1alpha1.MessageError{Time: metav1.NewTime(f.LastErrorAt.Truncate(time.Second)), Message: f.LastError}
	}
	status.OldestMessageTime = nil
	if !f.Oldest.IsZero() {
		status.OldestMessageTime = ptr.To(metav1.NewTime(f.Oldest))
	}
	consuming, reason, message := metav1.ConditionTrue, v1alpha1.ReasonMoving, ""
	if f.Trouble != "" {
		consuming, reason, message = metav1.ConditionFalse, string(f.Trouble), troubleMessage(g, f)
	}
	phase.Set(&status.Conditions, g.Generation, v1alpha1.ConditionConsuming, consuming, reason, message)
	showBacklog(g, f.Queued)
	phase.Set(&status.Conditions, g.Generation, v1alpha1.ConditionLagKnown, metav1.ConditionTrue, v1alpha1.ReasonMeasured, "")
}

// showBacklog says whether as many messages wait as spec warns of. It takes a fifth less to end the warning than to begin it: a number that moves around the limit
// does not change the condition each time. Its message has no number in it: that is in status, and moves.
func showBacklog(g *v1alpha1.ConsumerGroup, queued int64) {
	if g.Spec.WarningSize == nil {
		meta.RemoveStatusCondition(&g.Status.Conditions, v1alpha1.ConditionBacklogHigh)
		return
	}
	size := *g.Spec.WarningSize
	if meta.IsStatusConditionTrue(g.Status.Conditions, v1alpha1.ConditionBacklogHigh) && queued*5 >= size*4 || queued >= size {
		message := fmt.Sprintf("at least as many messages wait as spec.warningSize says, which is %d; status.queued has the number", size)
		phase.Set(&g.Status.Conditions, g.Generation, v1alpha1.ConditionBacklogHigh, metav1.ConditionTrue, v1alpha1.ReasonAboveWarningSize, message)
		return
	}
	phase.Set(&g.Status.Conditions, g.Generation, v1alpha1.ConditionBacklogHigh, metav1.ConditionFalse, v1alpha1.ReasonBelowWarningSize, "")
}

// troubleMessage says what to look at. It has no number in it: those are in status, and move.
func troubleMessage(g *v1alpha1.ConsumerGroup, f lag.Figures) string {
	if f.Trouble == lag.NobodyReceives {
		return "messages wait, and for a minute nobody has received or settled one. See that the group's consumers run: the Processors that name it " +
			"(kubectl get processors), or your own that call millrace.receive"
	}
	text := "a message has been handed out again and again, and no member settles it (status.deliveries)"
	if g.Spec.Mode == v1alpha1.ModeOrdered && (g.Spec.FailurePolicy == "" || g.Spec.FailurePolicy == v1alpha1.FailureBlock) {
		text += ". failurePolicy is Block: nothing behind it in its partition is delivered; Park lets the other keys go on"
	}
	if f.LastError != "" {
		return text + ". The newest error: " + f.LastError
	}
	return text + ". The log of the members that hold it tells why"
}
