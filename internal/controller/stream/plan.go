package stream

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

// plan compares spec with the database and writes nothing.
func (r *Reconciler) plan(ctx context.Context, sc *scope) error {
	spec := specOf(sc.stream, r.owner(sc.stream))
	if sc.info != nil && sc.info.Spec.Partitions > spec.Partitions {
		sc.planned = true
		has := sc.info.Spec.Partitions
		return phase.Stallf(v1alpha1.ReasonPartitionsLowered,
			"stream %q has %d partitions in %s and spec.partitions is %d: partitions only grow, because the order of keys in flight "+
				"would be lost. Set spec.partitions to %d or more; for fewer, create another Stream and move its consumers",
			spec.Name, has, sc.db, spec.Partitions, has)
	}
	if sc.noSchema {
		sc.planned = true
		sc.plan = withSchema(sc, pgstream.NewStreamPlan(spec))
		return nil
	}
	var err error
	if sc.info == nil {
		sc.plan = pgstream.NewStreamPlan(spec) // own has just looked, and the engine looks again when it makes it
	} else {
		err = sc.db.Do(ctx, func(ctx context.Context, db pgstream.DB) (err error) {
			sc.plan, err = r.compare(ctx, db, sc)
			return err
		})
	}
	sc.planned = err == nil || refused(err)
	if err != nil {
		return refusal(err)
	}
	// A projection may have waited for its function since it was declared, so it has drifted only from what was ready.
	sc.drift = sc.plan.Drift || sc.adopted == "" && appliedBefore(sc.before) && (len(sc.plan.Steps) > sc.plan.Projections ||
		len(sc.plan.Steps) > 0 && meta.IsStatusConditionTrue(sc.before.Status.Conditions, v1alpha1.ConditionReady))
	return nil
}

// compare is the plan against the database as it is at this moment.
func (r *Reconciler) compare(ctx context.Context, db pgstream.DB, sc *scope) (pgstream.Plan, error) {
	self := r.owner(sc.stream)
	spec := specOf(sc.stream, self)
	if sc.predecessor == (pgstream.Owner{}) {
		plan, err := pgstream.PlanStream(ctx, db, spec)
		return withSchema(sc, plan), err
	}
	// What differs apart from the owner, and then the change of the owner.
	spec.Owner = sc.predecessor
	plan, err := pgstream.PlanStream(ctx, db, spec)
	if err != nil {
		return plan, err
	}
	plan.Spec.Owner = self
	plan.Steps = append([]pgstream.Step{{
		Summary: fmt.Sprintf("become the owner after %s/%s", sc.predecessor.Namespace, sc.predecessor.Name), SQL: pgstream.CallApplyStream(plan.Spec),
	}}, plan.Steps...)
	return plan, nil
}

// withSchema puts the installation of the engine in front, when that comes first.
func withSchema(sc *scope, plan pgstream.Plan) pgstream.Plan {
	if sc.noSchema {
		plan.Steps = append([]pgstream.Step{{
			Summary: fmt.Sprintf("install the schemas millrace and millrace_engine, version %d", schema.Version()),
			SQL:     "-- what the command manager schema print writes",
		}}, plan.Steps...)
	}
	return plan
}

// refused says whether the engine has looked and answered with a refusal. Of any other error it is not known what it means for the database.
func refused(err error) bool {
	return errors.Is(err, pgstream.ErrOwned) || errors.Is(err, pgstream.ErrRefused)
}

// refusal turns the engine's refusals into stalls: repeating the call changes nothing.
func refusal(err error) error {
	switch {
	case errors.Is(err, pgstream.ErrOwned):
		return phase.Stall(v1alpha1.ReasonConflict, err)
	case errors.Is(err, pgstream.ErrRefused):
		return phase.Stall(v1alpha1.ReasonChangeRefused, err)
	}
	return err
}

// appliedBefore says whether this generation has been applied before, so that a difference now was made by someone else.
func appliedBefore(s *v1alpha1.Stream) bool {
	return phase.AppliedBefore(s.Status.Conditions, s.Generation)
}

// specOf turns a Stream into the engine's terms.
func specOf(s *v1alpha1.Stream, owner pgstream.Owner) pgstream.StreamSpec {
	spec := pgstream.StreamSpec{
		Name:        s.DatabaseName(),
		Partitions:  int(s.Spec.Partitions),
		PayloadType: pgstream.PayloadType(s.Spec.PayloadType),
		Segments:    int(s.Spec.Retention.Segments),
		Priorities:  int(s.Spec.Priorities),
		Versions:    s.Spec.Versions,
		Tenants:     s.Spec.Tenants,
		Retention:   pgstream.Retention{Policy: pgstream.RetentionPolicy(s.Spec.Retention.Policy)},
		Owner:       owner,
	}
	if d := s.Spec.DedupeWindow; d != nil {
		spec.DedupeWindow = d.Duration
		if d.Duration == 0 {
			spec.DedupeWindow = pgstream.NoDedupe
		}
	}
	if q := s.Spec.MaxMessageBytes; q != nil {
		spec.MaxMessageBytes = int(q.Value())
	}
	if d := s.Spec.Retention.MaxAge; d != nil {
		spec.Retention.MaxAge = d.Duration
	}
	if q := s.Spec.Retention.MaxBytes; q != nil {
		spec.Retention.MaxBytes = q.Value()
	}
	if n := s.Spec.Retention.MaxMessages; n != nil {
		spec.Retention.MaxMessages = *n
	}
	if f := s.Spec.Frames; f != nil {
		spec.Frames = framesOf(f)
	}
	for _, p := range s.Spec.Projections {
		spec.Projections = append(spec.Projections, pgstream.ProjectionSpec{
			Name: p.Name, Function: p.Function, Documents: p.Documents, DocumentID: p.DocumentID, Group: p.Group, Revision: p.Revision,
		})
	}
	return spec
}

// framesOf turns spec.frames into the engine's terms. What is missing takes the engine's defaults, which are those of the resource.
func framesOf(f *v1alpha1.Frames) pgstream.Frames {
	frames := pgstream.DefaultFrames
	if d := f.BestEffort.TTL; d != nil {
		frames.TTL = d.Duration
	}
	if n := f.BestEffort.MinLength; n != 0 {
		frames.MinLength = int(n)
	}
	if n := f.BestEffort.MaxLength; n != 0 {
		frames.MaxLength = int(n)
	}
	if alpha, err := strconv.ParseFloat(f.BestEffort.Alpha, 64); err == nil { // the API server lets no other text pass
		frames.Alpha = alpha
	}
	if d := f.SummaryTTL; d != nil {
		frames.SummaryTTL = d.Duration
		if d.Duration == 0 {
			frames.SummaryTTL = pgstream.KeepSummaries
		}
	}
	return frames
}
