package stream

import (
	"context"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	logf "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
)

// report turns the outcome of a reconcile into status, events and the next wake-up.
func (r *Reconciler) report(ctx context.Context, sc *scope, outcome error) (ctrl.Result, error) {
	s := sc.stream
	if sc.gone {
		return ctrl.Result{}, nil
	}
	if apierrors.IsConflict(outcome) {
		return ctrl.Result{}, outcome // our reading was stale: the work queue repeats it, and status keeps quiet
	}
	if phase.IsAgain(outcome) {
		after, _ := phase.Requeue(outcome, 0)
		if !sc.applied || len(sc.plan.Steps) == 0 {
			return ctrl.Result{RequeueAfter: after}, nil
		}
		outcome = phase.Wait(v1alpha1.ReasonProgressing, after, outcome) // what was done is told now: the next reconcile finds it done
	}

	s.Status.ObservedGeneration = s.Generation
	if sc.planned && (sc.approved != "" || len(sc.plan.Steps) == 0 || s.Spec.ChangePolicy != v1alpha1.ChangePlan) {
		s.Status.Plan = nil // it was carried out, or does not hold any more
	}
	conditions := &s.Status.Conditions
	if s.Spec.Suspend && s.DeletionTimestamp.IsZero() {
		phase.Suspended(conditions, s.Generation)
	} else {
		phase.Set(conditions, s.Generation, v1alpha1.ConditionPaused, metav1.ConditionFalse, v1alpha1.ReasonActive, "")
		phase.Schema(conditions, s.Generation, phase.SchemaFacts{
			Planned: sc.planned, Applied: sc.applied, Drift: sc.drift, Steps: summaries(sc), Outcome: outcome,
		})
		phase.Summarize(conditions, s.Generation, outcome, phase.Ready{Message: r.readyMessage(sc)})
	}
	phase.Sort(*conditions)

	r.events(sc)
	if err := phase.WriteStatus(ctx, r.Client, r.Live, sc.before, s); err != nil {
		return ctrl.Result{}, err
	}
	if s.Spec.Suspend && outcome == nil {
		return ctrl.Result{}, nil
	}
	after, transient := phase.Requeue(outcome, r.Schedule.Done(s.UID, s.Generation))
	if transient {
		return ctrl.Result{}, outcome
	}
	if outcome != nil {
		logf.FromContext(ctx).Info("not ready", "reason", phase.Reason(outcome, ""), "message", outcome.Error(), "again", after.String())
	}
	return ctrl.Result{RequeueAfter: after}, nil
}

func (r *Reconciler) readyMessage(sc *scope) string {
	if sc.info == nil {
		return ""
	}
	return fmt.Sprintf("stream %q is in %s with %d partitions", sc.info.Spec.Name, sc.db, sc.info.Spec.Partitions)
}

// summaries are the steps of the plan for a person.
func summaries(sc *scope) []string {
	list := make([]string, 0, len(sc.plan.Steps))
	for _, step := range sc.plan.Steps {
		list = append(list, step.Summary)
	}
	return list
}
