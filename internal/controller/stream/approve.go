package stream

import (
	"context"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/approval"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// approve holds the plan back until a person has approved it, where spec asks for that (S5).
func (r *Reconciler) approve(ctx context.Context, sc *scope) error {
	s := sc.stream
	if s.Spec.ChangePolicy != v1alpha1.ChangePlan || len(sc.plan.Steps) == 0 {
		return nil
	}
	waiting := r.proposal(sc, sc.info, sc.plan)
	if sc.info != nil {
		if err := sc.db.Do(ctx, func(ctx context.Context, db pgstream.DB) (err error) {
			waiting.Losses, err = pgstream.StreamLosses(ctx, db, sc.plan)
			return err
		}); err != nil {
			return err
		}
	}
	hash, err := waiting.Hash()
	if err != nil {
		return err
	}
	shown := waiting.Show(hash)
	if err := approval.Decide(s, "stream", shown, s.Status.ApprovedPlan); err != nil {
		s.Status.Plan = shown
		s.Status.Name = ""
		if sc.info != nil {
			r.present(sc)
		}
		return err
	}
	sc.approved = hash
	return nil
}

// proposal is a plan with all that an approval of it is bound to.
func (r *Reconciler) proposal(sc *scope, info *pgstream.StreamInfo, plan pgstream.Plan) approval.Plan {
	p := approval.Plan{Database: sc.db.String(), Spec: specOf(sc.stream, r.owner(sc.stream)), Steps: plan.Steps, Previous: sc.stream.Status.ApprovedPlan}
	if info != nil {
		p.Live = []any{info.ID, info.Spec}
	}
	return p
}
