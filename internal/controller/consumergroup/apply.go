package consumergroup

import (
	"context"
	"errors"
	"time"

	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// streamRetry is how soon a group looks again for a stream that vanished from the database.
const streamRetry = 10 * time.Second

// apply brings the group to its spec when the plan found a difference, and has it measured when it was not.
func (r *Reconciler) apply(ctx context.Context, sc *scope) error {
	if len(sc.steps) > 0 {
		if err := phase.SetFinalizer(ctx, r.Client, sc.group, wantsFinalizer(sc.group)); err != nil {
			return err
		}
		if err := sc.db.Do(ctx, func(ctx context.Context, db pgstream.DB) error {
			change := r.change
			if sc.approved != "" {
				change = r.changeApproved
			}
			if err := change(ctx, db, sc); err != nil || sc.info != nil {
				return err
			}
			// Of a thousand groups that are made with their streams, none needs a reading of its own.
			unused, _, err := pgstream.UnusedStream(ctx, db, sc.stream.DatabaseName())
			if unused {
				r.Poller.GroupCreated(r.follower(sc.group), pgstream.GroupReport{GroupStats: pgstream.GroupStats{Paused: sc.group.Spec.Paused}})
			}
			return err
		}); err != nil {
			return refusal(err)
		}
	}
	if !r.Poller.Figures(r.follower(sc.group)).Known {
		r.Poller.Now(sc.db)
	}
	sc.applied = true
	if sc.approved != "" {
		sc.group.Status.ApprovedPlan = sc.approved
	}
	sc.group.Status.Name = sc.group.DatabaseName()
	sc.group.Status.Stream = sc.stream.DatabaseName()
	return nil
}

// changeApproved is change for a plan that a person has approved, if it still holds.
func (r *Reconciler) changeApproved(ctx context.Context, db pgstream.DB, sc *scope) error {
	return pgstream.Exclusively(ctx, db, sc.stream.DatabaseName(), func(tx pgstream.DB) error {
		if err := r.unchanged(ctx, tx, sc); err != nil {
			return err
		}
		return r.change(ctx, tx, sc)
	})
}

// change makes the plan true.
func (r *Reconciler) change(ctx context.Context, db pgstream.DB, sc *scope) error {
	if sc.predecessor != (pgstream.Owner{}) {
		if err := pgstream.ReleaseGroup(ctx, db, sc.stream.DatabaseName(), sc.group.DatabaseName(), sc.predecessor); err != nil {
			return err
		}
	}
	return pgstream.ApplyGroup(ctx, db, specOf(sc.group, sc.stream, r.owner(sc.group)))
}

// unchanged makes sure that the plan is still the one that was approved. tx keeps others from changing what it depends on.
func (r *Reconciler) unchanged(ctx context.Context, tx pgstream.DB, sc *scope) error {
	var now *pgstream.GroupInfo
	info, err := pgstream.DescribeGroup(ctx, tx, sc.stream.DatabaseName(), sc.group.DatabaseName())
	switch {
	case err == nil:
		now = &info
	case !errors.Is(err, pgstream.ErrNotFound):
		return err
	}
	steps, err := r.compare(ctx, tx, sc)
	if err != nil {
		return err
	}
	again := r.proposal(sc, now, steps)
	if now != nil {
		if again.Losses, err = pgstream.GroupLosses(ctx, tx, specOf(sc.group, sc.stream, r.owner(sc.group))); err != nil {
			return err
		}
	}
	return again.Confirm(sc.approved)
}
