package stream

import (
	"context"
	"errors"
	"fmt"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/controller/owner"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// own makes sure that this Stream may change what is in the database, before anything is changed (S1).
func (r *Reconciler) own(ctx context.Context, sc *scope) error {
	s := sc.stream
	name := s.DatabaseName()
	call := sc.db.Do
	if s.Spec.ChangePolicy == v1alpha1.ChangePlan {
		call = sc.db.Look // nobody has approved that anything is made
	}
	err := call(ctx, func(ctx context.Context, db pgstream.DB) error {
		info, err := pgstream.StreamSettings(ctx, db, name)
		if errors.Is(err, pgstream.ErrNotFound) {
			return nil
		}
		if err == nil {
			sc.info = &info
		}
		return err
	})
	if errors.Is(err, database.ErrNoSchema) {
		sc.noSchema, err = true, nil
	}
	if err != nil {
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
	switch {
	case verdict == owner.Succeed:
		sc.predecessor = sc.info.Spec.Owner
		sc.adopted = fmt.Sprintf("took over %s from %s/%s, which is gone", what, sc.predecessor.Namespace, sc.predecessor.Name)
	case verdict == owner.Adopt && sc.info != nil:
		sc.adopted = fmt.Sprintf("took over %s, which nobody owned", what)
	}
	if verdict == owner.Mine || !wantsFinalizer(s) {
		return phase.SetFinalizer(ctx, r.Client, s, wantsFinalizer(s))
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

// wantsFinalizer says whether the deletion policy needs one (S3). What is owned has it from then on; what is not owned yet, when it is made or
// taken over.
func wantsFinalizer(s *v1alpha1.Stream) bool {
	return s.Spec.DeletionPolicy == v1alpha1.DeletionDelete || s.Spec.DeletionPolicy == v1alpha1.DeletionDeleteIfEmpty
}
