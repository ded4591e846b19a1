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

	var present pgstream.Owner
	var exists bool
	if err := sc.db.Do(ctx, func(ctx context.Context, db pgstream.DB) error {
		var err error
		present, exists, err = groupOwner(ctx, db, stream, name)
		return err
	}); err != nil {
		return err
	}
	verdict := owner.Mine
	if exists {
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
	want := g.Spec.DeletionPolicy == v1alpha1.DeletionDelete || g.Spec.DeletionPolicy == v1alpha1.DeletionDeleteIfEmpty
	if err := phase.SetFinalizer(ctx, r.Client, g, want); err != nil {
		return err
	}
	switch verdict {
	case owner.Succeed:
		sc.adopted = fmt.Sprintf("took over %s from %s/%s, which is gone", what, present.Namespace, present.Name)
		return sc.db.Do(ctx, func(ctx context.Context, db pgstream.DB) error {
			return pgstream.ReleaseGroup(ctx, db, stream, name, present)
		})
	case owner.Adopt:
		sc.adopted = fmt.Sprintf("took over %s, which nobody owned", what)
	}
	return nil
}

// groupOwner reads the owner of a group; exists is false when there is no such group.
func groupOwner(ctx context.Context, db pgstream.DB, stream, group string) (o pgstream.Owner, exists bool, err error) {
	info, err := pgstream.DescribeGroup(ctx, db, stream, group)
	if errors.Is(err, pgstream.ErrNotFound) {
		return o, false, nil
	}
	return info.Spec.Owner, err == nil, err
}
