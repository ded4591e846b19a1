package consumergroup

import (
	"context"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	logf "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
)

// staleRetry is how long the cache gets to learn what was written to status a moment ago.
const staleRetry = 200 * time.Millisecond

// report turns the outcome of a reconcile into status, events and the next wake-up.
func (r *Reconciler) report(ctx context.Context, sc *scope, outcome error) (ctrl.Result, error) {
	g := sc.group
	if sc.gone {
		return ctrl.Result{}, nil
	}
	if apierrors.IsConflict(outcome) {
		return ctrl.Result{}, outcome // our reading was stale: the work queue repeats it, and status keeps quiet
	}
	if phase.IsAgain(outcome) {
		after, _ := phase.Requeue(outcome, 0)
		return ctrl.Result{RequeueAfter: after}, nil
	}
	if g.DeletionTimestamp.IsZero() && !g.Spec.Suspend {
		show(g, r.Poller.Figures(r.follower(g)))
	}
	if sc.figuresOnly {
		phase.Sort(g.Status.Conditions)
		err := phase.WriteFigures(ctx, r.Client, sc.before, g)
		if apierrors.IsConflict(err) {
			return ctrl.Result{RequeueAfter: staleRetry}, nil
		}
		if err == nil {
			r.figureEvents(sc)
		}
		return ctrl.Result{RequeueAfter: r.Schedule.Until(g.UID)}, err
	}

	g.Status.ObservedGeneration = g.Generation
	if sc.planned && (sc.approved != "" || len(sc.steps) == 0 || g.Spec.ChangePolicy != v1alpha1.ChangePlan) {
		g.Status.Plan = nil // it was carried out, or does not hold any more
	}
	conditions := &g.Status.Conditions
	suspended := g.Spec.Suspend && g.DeletionTimestamp.IsZero()
	if suspended {
		phase.Suspended(conditions, g.Generation)
	} else {
		paused, reason, message := metav1.ConditionFalse, v1alpha1.ReasonActive, ""
		if g.Spec.Paused {
			paused, reason, message = metav1.ConditionTrue, v1alpha1.ReasonDeliveryPaused, "spec.paused is true: no message is handed out"
		}
		phase.Set(conditions, g.Generation, v1alpha1.ConditionPaused, paused, reason, message)
		phase.Schema(conditions, g.Generation, phase.SchemaFacts{
			Planned: sc.planned, Applied: sc.applied, Drift: sc.drift, Steps: summaries(sc), Outcome: outcome,
		})
		phase.Summarize(conditions, g.Generation, outcome, phase.Ready{Message: readyMessage(sc)})
	}
	phase.Sort(*conditions)

	r.events(sc)
	if err := phase.WriteStatus(ctx, r.Client, r.Live, sc.before, g); err != nil {
		return ctrl.Result{}, err
	}
	if suspended {
		return ctrl.Result{}, nil
	}
	after, transient := phase.Requeue(outcome, r.verified(g, outcome))
	if transient {
		return ctrl.Result{}, outcome
	}
	if outcome != nil {
		logf.FromContext(ctx).Info("not ready", "reason", phase.Reason(outcome, ""), "message", outcome.Error(), "again", after.String())
	}
	return ctrl.Result{RequeueAfter: after}, nil
}
