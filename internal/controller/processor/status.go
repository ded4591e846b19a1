package processor

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
	p := sc.processor
	if !p.DeletionTimestamp.IsZero() {
		return ctrl.Result{}, nil // owner references let the garbage collector do the rest
	}
	if apierrors.IsConflict(outcome) {
		return ctrl.Result{}, outcome // our reading was stale: the work queue repeats it, and status keeps quiet
	}
	if phase.IsAgain(outcome) {
		after, _ := phase.Requeue(outcome, 0)
		return ctrl.Result{RequeueAfter: after}, nil
	}

	p.Status.ObservedGeneration = p.Generation
	p.Status.Selector = selector(p)
	if d := sc.deployment; d != nil {
		p.Status.Replicas, p.Status.ReadyReplicas, p.Status.UpdatedReplicas = d.Status.Replicas, d.Status.ReadyReplicas, d.Status.UpdatedReplicas
	}
	r.recallScale(p)
	showScaling(sc)
	conditions := &p.Status.Conditions
	if p.Spec.Suspend {
		phase.Suspended(conditions, p.Generation)
	} else {
		phase.Set(conditions, p.Generation, v1alpha1.ConditionPaused, metav1.ConditionFalse, v1alpha1.ReasonActive, "")
		showLag(p, sc.inputs.group)
		phase.Summarize(conditions, p.Generation, outcome, ready(sc))
	}
	phase.Sort(*conditions)

	r.Announcer.Announce(sc.before, p)
	r.announceScaling(sc.before, p)
	if err := phase.WriteStatus(ctx, r.Client, r.Live, sc.before, p); err != nil {
		return ctrl.Result{}, err
	}
	if p.Spec.Suspend {
		return ctrl.Result{}, nil
	}
	after, transient := phase.Requeue(outcome, r.Schedule.Done(p.UID, p.Generation))
	if transient {
		return ctrl.Result{}, outcome
	}
	if sc.decision != nil {
		after = sooner(after, sc.decision.after)
	}
	if outcome != nil {
		logf.FromContext(ctx).V(1).Info("not ready", "reason", phase.Reason(outcome, ""), "message", outcome.Error(), "again", after.String())
	}
	return ctrl.Result{RequeueAfter: after}, nil
}

func ready(sc *scope) phase.Ready {
	p := sc.processor
	switch {
	case sc.wanted > 0:
		return phase.Ready{Message: fmt.Sprintf("%d of %d pods are ready", p.Status.ReadyReplicas, sc.wanted)}
	case p.Spec.Autoscaling != nil:
		return phase.Ready{Reason: v1alpha1.ReasonScaledToZero, Message: "nothing waits, and no pod runs; the next message brings one"}
	case p.Spec.Replicas != nil:
		return phase.Ready{Reason: v1alpha1.ReasonScaledToZero, Message: "spec.replicas is 0: nothing is processed"}
	}
	return phase.Ready{Reason: v1alpha1.ReasonScaledToZero, Message: "the Deployment was scaled to 0: nothing is processed"}
}
