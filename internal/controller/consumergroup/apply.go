package consumergroup

import (
	"context"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// streamRetry is how soon a group looks again for a stream that vanished from the database.
const streamRetry = 10 * time.Second

// apply brings the group to its spec when the plan found a difference.
func (r *Reconciler) apply(ctx context.Context, sc *scope) error {
	if len(sc.steps) > 0 {
		spec := specOf(sc.group, sc.stream, r.owner(sc.group))
		if err := sc.db.Do(ctx, func(ctx context.Context, db pgstream.DB) error {
			return pgstream.ApplyGroup(ctx, db, spec)
		}); err != nil {
			return refusal(err)
		}
	}
	sc.applied = true
	sc.group.Status.Name = sc.group.DatabaseName()
	sc.group.Status.Stream = sc.stream.DatabaseName()
	return nil
}
