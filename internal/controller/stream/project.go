package stream

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Bounds of a rebuild.
const (
	rebuildMessages = 200             // of one step, which is one transaction and has to end before its statement's timeout, whatever the function does
	rebuildTurn     = 2 * time.Second // of one reconcile, so that other Streams get their turn
	rebuildPause    = 10 * time.Millisecond
	projectionWait  = 10 * time.Second // for a function or a group, whose coming wakes nobody
)

// project brings the projections of spec further: those that could not be planned because the stream did not exist yet, and rebuilds. The stream works without them, so
// this comes last, and what keeps a projection from being as spec says is told in Ready.
func (r *Reconciler) project(ctx context.Context, sc *scope) error {
	if len(sc.stream.Spec.Projections) == 0 {
		return nil
	}
	name := sc.stream.DatabaseName()
	var problems []pgstream.ProjectionProblem
	var all []pgstream.ProjectionInfo
	look := func(ctx context.Context, db pgstream.DB) (err error) {
		var steps []pgstream.Step
		if steps, problems, err = pgstream.PlanProjections(ctx, db, name, specOf(sc.stream, r.owner(sc.stream)).Projections); err != nil {
			return err
		}
		if s := sc.stream; s.Spec.ChangePolicy != v1alpha1.ChangePlan || sc.approved != "" {
			if err := pgstream.ApplyProjections(ctx, db, name, steps); err != nil {
				return err
			}
		}
		all, err = pgstream.Projections(ctx, db, name)
		return err
	}
	if err := sc.db.Do(ctx, look); err != nil {
		return refusal(err)
	}
	var rebuilding []string
	for _, p := range all {
		if p.Rebuilt == nil || !p.Declared {
			continue
		}
		finished, err := r.rebuild(ctx, sc, p.Name)
		switch said, failed := pgstream.IsFunctionError(err); {
		case failed:
			problems = append(problems, pgstream.ProjectionProblem{Name: p.Name, Text: "its function failed while the documents were made anew: " + said})
		case errors.Is(err, pgstream.ErrRefused):
			problems = append(problems, pgstream.ProjectionProblem{Name: p.Name, Text: err.Error()})
		case err != nil:
			return err
		case !finished:
			rebuilding = append(rebuilding, fmt.Sprintf("%s (%d of %d)", p.Name, *p.Rebuilt, p.LastPosition))
		}
	}
	if len(problems) > 0 {
		reason, texts := v1alpha1.ReasonConsumerGroupMissing, make([]string, 0, len(problems))
		for _, p := range problems {
			if !p.Missing {
				reason = v1alpha1.ReasonProjectionFailed
			}
			texts = append(texts, fmt.Sprintf("projection %q: %s", p.Name, p.Text))
		}
		return phase.Waitf(reason, projectionWait, "%s", strings.Join(texts, "; "))
	}
	if len(rebuilding) > 0 {
		return phase.Waitf(v1alpha1.ReasonRebuilding, rebuildPause, "documents are made anew beside those that are live: %s", strings.Join(rebuilding, ", "))
	}
	return nil
}

// rebuild takes steps of a rebuild until it has finished or its turn is over.
func (r *Reconciler) rebuild(ctx context.Context, sc *scope, projection string) (finished bool, err error) {
	for began := r.Clock.Now(); !finished && err == nil && r.Clock.Since(began) < rebuildTurn; {
		err = sc.db.Do(ctx, func(ctx context.Context, db pgstream.DB) (err error) {
			finished, err = pgstream.RebuildStep(ctx, db, sc.stream.DatabaseName(), projection, rebuildMessages)
			return err
		})
	}
	return finished, err
}
