package stream

import (
	"context"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// apply runs what the plan says, and only that.
func (r *Reconciler) apply(ctx context.Context, sc *scope) error {
	if len(sc.plan.Steps) == 0 {
		sc.applied = true
		return nil
	}
	if err := sc.db.Do(ctx, func(ctx context.Context, db pgstream.DB) error {
		return pgstream.ApplyStream(ctx, db, sc.plan)
	}); err != nil {
		return refusal(err)
	}
	sc.applied = true
	return nil
}
