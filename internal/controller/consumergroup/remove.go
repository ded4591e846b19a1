package consumergroup

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// remove does what the deletion policy says and then lets the resource go.
func (r *Reconciler) remove(ctx context.Context, sc *scope) error {
	g := sc.group
	if !controllerutil.ContainsFinalizer(g, v1alpha1.Finalizer) {
		sc.gone = true
		return nil
	}
	kind, reason, note := corev1.EventTypeNormal, "", ""
	if g.Annotations[v1alpha1.AnnotationAbandon] == "true" {
		kind, reason = corev1.EventTypeWarning, v1alpha1.EventAbandoned
		note = fmt.Sprintf("let go by annotation %s; consumer group %q stays in its database", v1alpha1.AnnotationAbandon, g.DatabaseName())
	} else {
		var err error
		if reason, note, err = r.drop(ctx, g); err != nil {
			return phase.Blocked(err, g.DeletionTimestamp.Time, r.Clock.Now(), r.Patience)
		}
	}
	if err := phase.SetFinalizer(ctx, r.Client, g, false); err != nil {
		return err
	}
	phase.Event(r.Recorder, g, kind, reason, note)
	sc.gone = true
	return nil
}

// drop does in the database what the policy says, and tells what became of the group.
func (r *Reconciler) drop(ctx context.Context, g *v1alpha1.ConsumerGroup) (reason, note string, err error) {
	db, from, err := r.locate(ctx, g)
	if err != nil {
		return "", "", err
	}
	name, self := g.DatabaseName(), r.owner(g)
	if db == nil {
		// A stream that was dropped took the group with it; one that was retained keeps it, and a group made again adopts it.
		return v1alpha1.EventRetained, fmt.Sprintf("Stream %q is gone; if it was retained, consumer group %q stays in its database",
			g.Spec.StreamRef.Name, name), nil
	}
	what := fmt.Sprintf("consumer group %q of stream %q in %s", name, from, db)
	err = db.Look(ctx, func(ctx context.Context, conn pgstream.DB) error {
		keep := g.Spec.DeletionPolicy == v1alpha1.DeletionRetain
		reason, note = v1alpha1.EventRetained, what+" stays, and nobody owns it"
		if g.Spec.DeletionPolicy == v1alpha1.DeletionDeleteIfEmpty {
			empty, err := isEmpty(ctx, conn, from, name)
			if err != nil {
				return err
			}
			if !empty {
				keep, note = true, note+": messages wait for it and deletionPolicy is DeleteIfEmpty"
			}
		}
		if keep {
			return pgstream.ReleaseGroup(ctx, conn, from, name, self)
		}
		err := pgstream.DropGroup(ctx, conn, from, name, self)
		if errors.Is(err, pgstream.ErrOwned) {
			note = what + " stays: it belongs to another resource"
			return nil
		}
		reason, note = v1alpha1.EventDropped, "dropped "+what
		return err
	})
	if errors.Is(err, database.ErrNoSchema) {
		return v1alpha1.EventDropped, what + " never was there, or is gone", nil
	}
	return reason, note, err
}

// locate finds the group's database, and the stream in it. Who deletes several resources at once, as kubectl, Flux and Helm do, may delete the
// Stream first; then where it led last will do. It returns no database when that is not known either, after a restart for example.
func (r *Reconciler) locate(ctx context.Context, g *v1alpha1.ConsumerGroup) (db *database.Database, stream string, err error) {
	var s v1alpha1.Stream
	err = r.Client.Get(ctx, client.ObjectKey{Namespace: g.Namespace, Name: g.Spec.StreamRef.Name}, &s)
	if apierrors.IsNotFound(err) {
		db, stream = r.Poller.Followed(r.follower(g))
		return db, stream, nil
	}
	if err != nil {
		return nil, "", fmt.Errorf("read Stream %q: %w", g.Spec.StreamRef.Name, err)
	}
	db, err = r.Databases.ResolveForDeletion(ctx, s.Namespace, s.Spec.DatabaseSecretRef)
	return db, s.DatabaseName(), err
}

// isEmpty says whether nothing waits for the group, is in flight or dead. A group that does not exist is empty.
func isEmpty(ctx context.Context, db pgstream.DB, stream, group string) (bool, error) {
	all, err := pgstream.Stats(ctx, db)
	if err != nil {
		return false, err
	}
	for _, s := range all {
		if s.Stream == stream && s.Group == group {
			return s.Lag+s.InFlight+s.Retrying+s.DeadLetters == 0, nil
		}
	}
	return true, nil
}
