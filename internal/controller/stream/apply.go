package stream

import (
	"context"
	"errors"

	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// apply runs what the plan says, and only that.
func (r *Reconciler) apply(ctx context.Context, sc *scope) error {
	if len(sc.plan.Steps) == 0 {
		sc.applied = true
		return nil
	}
	if err := phase.SetFinalizer(ctx, r.Client, sc.stream, wantsFinalizer(sc.stream)); err != nil {
		return err
	}
	err := sc.db.Alter(ctx, func(ctx context.Context, db pgstream.DB) error {
		if err := r.carryOut(ctx, db, sc); err != nil {
			return err
		}
		sc.applied = true
		if sc.approved != "" {
			sc.stream.Status.ApprovedPlan = sc.approved
		}
		// On this connection: while one waits for another turn, nobody is told what was done.
		info, err := pgstream.StreamSettings(ctx, db, sc.plan.Spec.Name)
		if err != nil {
			return err
		}
		created := sc.info == nil
		sc.info = &info
		if !created {
			return nil
		}
		// Of a thousand Streams that are made together, none needs a second status for its figures.
		unused, bytes, err := pgstream.UnusedStream(ctx, db, sc.plan.Spec.Name)
		if unused {
			r.Poller.StreamCreated(r.follower(sc.stream), pgstream.StreamStats{Bytes: bytes, Segments: info.Spec.Segments})
		}
		return err
	})
	if err != nil && !sc.applied {
		return refusal(err)
	}
	return err
}

// carryOut makes the plan true, as long as it is the one that was approved, where somebody has to.
func (r *Reconciler) carryOut(ctx context.Context, db pgstream.DB, sc *scope) error {
	if sc.approved == "" {
		return r.change(ctx, db, sc)
	}
	return pgstream.Exclusively(ctx, db, sc.plan.Spec.Name, func(tx pgstream.DB) error {
		if err := r.unchanged(ctx, tx, sc); err != nil {
			return err
		}
		return r.change(ctx, tx, sc)
	})
}

// change makes the plan true.
func (r *Reconciler) change(ctx context.Context, db pgstream.DB, sc *scope) error {
	if sc.predecessor != (pgstream.Owner{}) {
		if err := pgstream.ReleaseStream(ctx, db, sc.plan.Spec.Name, sc.predecessor); err != nil {
			return err
		}
	}
	return pgstream.ApplyStream(ctx, db, sc.plan)
}

// unchanged makes sure that the plan is still the one that was approved. tx keeps others from changing what it depends on.
func (r *Reconciler) unchanged(ctx context.Context, tx pgstream.DB, sc *scope) error {
	var now *pgstream.StreamInfo
	info, err := pgstream.StreamSettings(ctx, tx, sc.plan.Spec.Name)
	switch {
	case err == nil:
		now = &info
	case !errors.Is(err, pgstream.ErrNotFound):
		return err
	}
	plan, err := r.compare(ctx, tx, sc)
	if err != nil {
		return err
	}
	again := r.proposal(sc, now, plan)
	if now != nil {
		if again.Losses, err = pgstream.StreamLosses(ctx, tx, plan); err != nil {
			return err
		}
	}
	return again.Confirm(sc.approved)
}
