package consumergroup

import (
	"context"
	"errors"
	"fmt"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/owner"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// own makes sure that this ConsumerGroup may change what is in the database, before anything is changed (G1).
func (r *Reconciler) own(ctx context.Context, sc *scope) error {
	g := sc.group
	stream, name := sc.stream.DatabaseName(), g.DatabaseName()
	what := fmt.Sprintf("consumer group %q of stream %q in %s", name, stream, sc.db)

	if err := sc.db.Do(ctx, func(ctx context.Context, db pgstream.DB) error {
		info, err := pgstream.DescribeGroup(ctx, db, stream, name)
		if errors.Is(err, pgstream.ErrNotFound) {
			return nil
		}
		if err == nil {
			sc.info = &info
		}
		return err
	}); err != nil {
		return err
	}
	var present pgstream.Owner
	verdict := owner.Adopt
	if sc.info != nil {
		present = sc.info.Spec.Owner
		claim := owner.Claim{
			What: what, Self: r.owner(g), Present: present, Policy: g.Spec.AdoptionPolicy,
			AdoptFrom: g.Annotations[v1alpha1.AnnotationAdoptFrom],
		}
		var err error
		if present != claim.Self && present != (pgstream.Owner{}) && present.Cluster == r.Cluster {
			if claim.Alive, err = owner.Alive(ctx, r.Live, present, &v1alpha1.ConsumerGroup{}); err != nil {
				return err
			}
		}
		if verdict, err = owner.Decide(claim); err != nil {
			return err
		}
	}
	switch {
	case verdict == owner.Succeed:
		sc.predecessor = present
		sc.adopted = fmt.Sprintf("took over %s from %s/%s, which is gone", what, present.Namespace, present.Name)
	case verdict == owner.Adopt && sc.info != nil:
		sc.adopted = fmt.Sprintf("took over %s, which nobody owned", what)
	}
	if verdict == owner.Mine || !wantsFinalizer(g) {
		return phase.SetFinalizer(ctx, r.Client, g, wantsFinalizer(g))
	}
	return nil
}

// wantsFinalizer says whether the deletion policy needs one (G4). What is owned has it from then on; what is not owned yet, when it is made or
// taken over.
func wantsFinalizer(g *v1alpha1.ConsumerGroup) bool {
	return g.Spec.DeletionPolicy == v1alpha1.DeletionDelete || g.Spec.DeletionPolicy == v1alpha1.DeletionDeleteIfEmpty
}
