package consumergroup

import (
	"context"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/approval"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// approve holds the plan back until a person has approved it, where spec asks for that (G5). That the group has lapsed is told before.
func (r *Reconciler) approve(ctx context.Context, sc *scope) error {
	g := sc.group
	if g.Spec.ChangePolicy != v1alpha1.ChangePlan || len(sc.steps) == 0 {
		return nil
	}
	waiting := r.proposal(sc, sc.info, sc.steps)
	if sc.info != nil {
		if err := sc.db.Do(ctx, func(ctx context.Context, db pgstream.DB) (err error) {
			waiting.Losses, err = pgstream.GroupLosses(ctx, db, specOf(g, sc.stream, r.owner(g)))
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
	if err := approval.Decide(g, "consumergroup", shown, g.Status.ApprovedPlan); err != nil {
		g.Status.Plan = shown
		g.Status.Name, g.Status.Stream = "", ""
		if sc.info != nil {
			g.Status.Name, g.Status.Stream = g.DatabaseName(), sc.stream.DatabaseName()
			if err := r.lapse(ctx, sc); err != nil {
				return err
			}
		}
		return err
	}
	sc.approved = hash
	return nil
}

// proposal is a plan with all that an approval of it is bound to.
func (r *Reconciler) proposal(sc *scope, info *pgstream.GroupInfo, steps []pgstream.Step) approval.Plan {
	p := approval.Plan{
		Database: sc.db.String(), Spec: specOf(sc.group, sc.stream, r.owner(sc.group)), Steps: steps, Previous: sc.group.Status.ApprovedPlan,
	}
	if info != nil {
		p.Live = info.Spec
	}
	return p
}
