package consumergroup

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// plan compares spec with the database and writes nothing.
func (r *Reconciler) plan(ctx context.Context, sc *scope) error {
	err := sc.db.Do(ctx, func(ctx context.Context, db pgstream.DB) error {
		var err error
		sc.steps, err = r.compare(ctx, db, sc)
		return err
	})
	// Of any other error it is not known what it means for the group.
	sc.planned = err == nil || errors.Is(err, pgstream.ErrOwned) || errors.Is(err, pgstream.ErrRefused) || errors.Is(err, pgstream.ErrNotFound)
	if err != nil {
		return refusal(err)
	}
	sc.drift = len(sc.steps) > 0 && sc.adopted == "" && phase.AppliedBefore(sc.before.Status.Conditions, sc.group.Generation)
	return nil
}

// compare is the plan against the database as it is at this moment.
func (r *Reconciler) compare(ctx context.Context, db pgstream.DB, sc *scope) ([]pgstream.Step, error) {
	spec := specOf(sc.group, sc.stream, r.owner(sc.group))
	if sc.predecessor == (pgstream.Owner{}) {
		return pgstream.PlanGroup(ctx, db, spec)
	}
	// What differs apart from the owner, and then the change of the owner.
	become := pgstream.Step{
		Summary: fmt.Sprintf("become the owner after %s/%s", sc.predecessor.Namespace, sc.predecessor.Name), SQL: pgstream.CallApplyGroup(spec),
	}
	spec.Owner = sc.predecessor
	steps, err := pgstream.PlanGroup(ctx, db, spec)
	if err != nil {
		return nil, err
	}
	return append([]pgstream.Step{become}, steps...), nil
}

// refusal turns the engine's refusals into stalls, because repeating the call changes nothing, and a missing stream into
// waiting for its Stream, which repairs it.
func refusal(err error) error {
	switch {
	case errors.Is(err, pgstream.ErrOwned):
		return phase.Stall(v1alpha1.ReasonConflict, err)
	case errors.Is(err, pgstream.ErrRefused):
		return phase.Stall(v1alpha1.ReasonChangeRefused, err)
	case errors.Is(err, pgstream.ErrNotFound):
		return phase.Wait(v1alpha1.ReasonStreamNotReady, streamRetry, err)
	}
	return err
}

// specOf turns a ConsumerGroup into the engine's terms.
func specOf(g *v1alpha1.ConsumerGroup, stream *v1alpha1.Stream, owner pgstream.Owner) pgstream.GroupSpec {
	spec := pgstream.GroupSpec{
		Stream:        stream.DatabaseName(),
		Name:          g.DatabaseName(),
		Mode:          pgstream.Mode(g.Spec.Mode),
		StartFrom:     pgstream.StartFrom(g.Spec.Start.From),
		FailurePolicy: pgstream.FailurePolicy(g.Spec.FailurePolicy),
		QueuePolicy:   pgstream.QueuePolicy(g.Spec.QueuePolicy),
		Paused:        g.Spec.Paused,
		Owner:         owner,
	}
	if p := g.Spec.Start.Position; p != nil {
		spec.StartPosition = *p
	}
	if t := g.Spec.Start.Time; t != nil {
		spec.StartTime = t.Time
	}
	if d := g.Spec.AckWait; d != nil {
		spec.AckWait = d.Duration
	}
	if n := g.Spec.MaxAttempts; n != nil {
		spec.MaxAttempts = int(*n)
	}
	if d := g.Spec.Backoff.Initial; d != nil {
		spec.BackoffInitial = d.Duration
	}
	if d := g.Spec.Backoff.Max; d != nil {
		spec.BackoffMax = d.Duration
	}
	if f := g.Spec.Filter; f != nil {
		spec.Filter = pgstream.Filter{Headers: headers(f), WithoutHeaders: f.WithoutHeaders, Keys: f.Keys, KeyPrefix: f.KeyPrefix, Unrouted: f.Unrouted}
	}
	if l := g.Spec.Lapse; l != nil {
		if l.After != nil {
			spec.LapseAfter = l.After.Duration
		}
		if l.Lag != nil {
			spec.LapseLag = *l.Lag
		}
	}
	return spec
}

// headers are the values of a filter as they were written: a number keeps all its digits.
func headers(f *v1alpha1.Filter) map[string]any {
	values := make(map[string]any, len(f.Headers))
	for name, v := range f.Headers {
		values[name] = json.RawMessage(v.Raw)
	}
	return values
}
