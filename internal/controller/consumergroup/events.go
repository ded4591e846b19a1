package consumergroup

import (
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
)

// events speaks of what happened once: adoption, repair, an approved plan, and a change of Ready.
func (r *Reconciler) events(sc *scope) {
	if sc.adopted != "" && sc.applied {
		phase.Event(r.Recorder, sc.group, corev1.EventTypeNormal, v1alpha1.EventAdopted, sc.adopted)
	}
	if sc.drift && sc.applied {
		phase.Event(r.Recorder, sc.group, corev1.EventTypeWarning, v1alpha1.EventDriftRepaired, "repaired: "+strings.Join(summaries(sc), "; "))
	}
	if sc.approved != "" && sc.applied {
		phase.Event(r.Recorder, sc.group, corev1.EventTypeNormal, v1alpha1.EventPlanApplied, "carried out plan "+sc.approved+": "+strings.Join(summaries(sc), "; "))
	}
	r.figureEvents(sc)
	r.Announcer.Announce(sc.before, sc.group)
}

// figureEvents speaks of what figures tell once: that a group which consumed does so no longer, that as many messages wait as spec warns of, and that
// a group without dead letters has some.
func (r *Reconciler) figureEvents(sc *scope) {
	if c := meta.FindStatusCondition(sc.group.Status.Conditions, v1alpha1.ConditionConsuming); c != nil && c.Status == metav1.ConditionFalse {
		if was := meta.FindStatusCondition(sc.before.Status.Conditions, v1alpha1.ConditionConsuming); was == nil || was.Reason != c.Reason {
			phase.Event(r.Recorder, sc.group, corev1.EventTypeWarning, c.Reason, c.Message)
		}
	}
	if c := meta.FindStatusCondition(sc.group.Status.Conditions, v1alpha1.ConditionBacklogHigh); c != nil && c.Status == metav1.ConditionTrue &&
		!meta.IsStatusConditionTrue(sc.before.Status.Conditions, v1alpha1.ConditionBacklogHigh) {
		phase.Event(r.Recorder, sc.group, corev1.EventTypeWarning, c.Reason, c.Message)
	}
	before, now := sc.before.Status.DeadLetters, sc.group.Status
	if now.DeadLetters != nil && *now.DeadLetters > 0 && (before == nil || *before == 0) {
		note := fmt.Sprintf("messages were set aside. To see them, run in the database: select * from millrace.dead_letters('%s', '%s'); once the cause is gone, "+
			"millrace.redrive('%[1]s', '%[2]s') delivers them again", now.Stream, now.Name)
		if now.LastError != nil {
			note += ". The newest error: " + now.LastError.Message
		}
		phase.Event(r.Recorder, sc.group, corev1.EventTypeWarning, v1alpha1.EventDeadLetters, note)
	}
}

// summaries are the steps of the plan for a person.
func summaries(sc *scope) []string {
	list := make([]string, 0, len(sc.steps))
	for _, step := range sc.steps {
		list = append(list, step.Summary)
	}
	return list
}

func readyMessage(sc *scope) string {
	if sc.stream == nil {
		return ""
	}
	return fmt.Sprintf("consumer group %q reads stream %q in %s", sc.group.DatabaseName(), sc.stream.DatabaseName(), sc.db)
}

// verified records a comparison that succeeded and returns the time until the next; a failed one leaves the group due.
func (r *Reconciler) verified(g *v1alpha1.ConsumerGroup, outcome error) time.Duration {
	wait := r.Schedule.Done(g.UID, g.Generation)
	if outcome != nil {
		r.Schedule.Forget(g.UID)
	}
	return wait
}
