package stream

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// remove does what the deletion policy says and then lets the resource go.
func (r *Reconciler) remove(ctx context.Context, sc *scope) error {
	s := sc.stream
	if !controllerutil.ContainsFinalizer(s, v1alpha1.Finalizer) {
		sc.gone = true
		return nil
	}
	kind, reason, note := corev1.EventTypeNormal, "", ""
	if s.Annotations[v1alpha1.AnnotationAbandon] == "true" {
		kind, reason = corev1.EventTypeWarning, v1alpha1.EventAbandoned
		note = fmt.Sprintf("let go by annotation %s; stream %q stays in its database", v1alpha1.AnnotationAbandon, s.DatabaseName())
	} else {
		var err error
		if reason, note, err = r.drop(ctx, s); err != nil {
			return phase.Blocked(err, s.DeletionTimestamp.Time, r.Clock.Now(), r.Patience)
		}
	}
	if err := phase.SetFinalizer(ctx, r.Client, s, false); err != nil {
		return err
	}
	phase.Event(r.Recorder, s, kind, reason, note)
	sc.gone = true
	return nil
}

// drop does in the database what the policy says, and tells what became of the stream.
func (r *Reconciler) drop(ctx context.Context, s *v1alpha1.Stream) (reason, note string, err error) {
	db, err := r.Databases.ResolveForDeletion(ctx, s.Namespace, s.Spec.DatabaseSecretRef)
	if err != nil {
		return "", "", err
	}
	name, self := s.DatabaseName(), r.owner(s)
	what := fmt.Sprintf("stream %q in %s", name, db)
	err = db.Look(ctx, func(ctx context.Context, conn pgstream.DB) error {
		reason, note = v1alpha1.EventDropped, "dropped "+what
		if s.Spec.DeletionPolicy == v1alpha1.DeletionRetain {
			reason, note = v1alpha1.EventRetained, what+" stays, and nobody owns it"
			return pgstream.ReleaseStream(ctx, conn, name, self)
		}
		err := pgstream.DropStream(ctx, conn, name, self, s.Spec.DeletionPolicy == v1alpha1.DeletionDeleteIfEmpty)
		switch {
		case errors.Is(err, pgstream.ErrOwned):
			reason, note = v1alpha1.EventRetained, what+" stays: it belongs to another resource"
			return nil
		case errors.Is(err, pgstream.ErrNotEmpty):
			reason, note = v1alpha1.EventRetained, what+" stays, and nobody owns it: it holds messages and deletionPolicy is DeleteIfEmpty"
			return pgstream.ReleaseStream(ctx, conn, name, self)
		}
		return err
	})
	if errors.Is(err, database.ErrNoSchema) {
		return v1alpha1.EventDropped, what + " never was there, or is gone", nil
	}
	return reason, note, err
}
