package stream

import (
	"context"
	"errors"
	"fmt"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/owner"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// own makes sure that this Stream may change what is in the database, before anything is changed (S1).
func (r *Reconciler) own(ctx context.Context, sc *scope) error {
	s := sc.stream
	name := s.DatabaseName()
	err := sc.db.Do(ctx, func(ctx context.Context, db pgstream.DB) error {
		info, err := pgstream.DescribeStream(ctx, db, name)
		if errors.Is(err, pgstream.ErrNotFound) {
			return nil
		}
		sc.info = &info
		return err
	})
	if err != nil {
		sc.info = nil
		return err
	}

	what := fmt.Sprintf("stream %q in %s", name, sc.db)
	verdict := owner.Adopt
	if sc.info != nil {
		if verdict, err = r.decide(ctx, sc, what); err != nil {
			return err
		}
	}
	if verdict != owner.Mine {
		if err := r.elders(ctx, sc, what); err != nil {
			return err
		}
	}
	if err := r.finalizer(ctx, s); err != nil {
		return err
	}
	if verdict == owner.Succeed {
		previous := sc.info.Spec.Owner
		if err := sc.db.Do(ctx, func(ctx context.Context, db pgstream.DB) error {
			return pgstream.ReleaseStream(ctx, db, name, previous)
		}); err != nil {
			return err
		}
		sc.info.Spec.Owner = pgstream.Owner{}
		sc.adopted = fmt.Sprintf("took over %s from %s/%s, which is gone", what, previous.Namespace, previous.Name)
	} else if verdict == owner.Adopt && sc.info != nil {
		sc.adopted = fmt.Sprintf("took over %s, which nobody owned", what)
	}
	return nil
}

func (r *Reconciler) decide(ctx context.Context, sc *scope, what string) (owner.Verdict, error) {
	claim := owner.Claim{
		What: what, Self: r.owner(sc.stream), Present: sc.info.Spec.Owner, Policy: sc.stream.Spec.AdoptionPolicy,
		AdoptFrom: sc.stream.Annotations[v1alpha1.AnnotationAdoptFrom],
	}
	if claim.Present != claim.Self && claim.Present != (pgstream.Owner{}) && claim.Present.Cluster == r.Cluster {
		var err error
		if claim.Alive, err = owner.Alive(ctx, r.Live, claim.Present, &v1alpha1.Stream{}); err != nil {
			return 0, err
		}
	}
	return owner.Decide(claim)
}

// elders refuses a first claim while an older Stream wants the same name in the same database: both may have been created
// while no manager ran, and then the work queue's order must not decide.
func (r *Reconciler) elders(ctx context.Context, sc *scope, what string) error {
	var others v1alpha1.StreamList
	if err := r.Client.List(ctx, &others, client.MatchingFields{indexName: sc.stream.DatabaseName()}); err != nil {
		return fmt.Errorf("look for other Streams of that name: %w", err)
	}
	for i := range others.Items {
		o := &others.Items[i]
		if o.UID == sc.stream.UID || !o.DeletionTimestamp.IsZero() || o.Spec.Suspend || !owner.Older(o, sc.stream) {
			continue
		}
		db, err := r.Databases.Resolve(ctx, o.Namespace, o.Spec.DatabaseSecretRef)
		if err != nil || !db.SameAs(sc.db) {
			continue // it does not lead here, or not yet
		}
		return phase.Stallf(v1alpha1.ReasonConflict, "%s belongs to %s/%s, which is older. Choose another name, or delete that resource",
			what, o.Namespace, o.Name)
	}
	return nil
}

// finalizer makes the finalizer agree with the deletion policy (S3).
func (r *Reconciler) finalizer(ctx context.Context, s *v1alpha1.Stream) error {
	want := s.Spec.DeletionPolicy == v1alpha1.DeletionDelete || s.Spec.DeletionPolicy == v1alpha1.DeletionDeleteIfEmpty
	return phase.SetFinalizer(ctx, r.Client, s, want)
}
