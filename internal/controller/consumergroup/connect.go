package consumergroup

import (
	"context"
	"errors"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
)

// connect finds the Stream and its database. A Stream that is not in its database yet wakes this group when it is.
func (r *Reconciler) connect(ctx context.Context, sc *scope) error {
	g := sc.group
	var stream v1alpha1.Stream
	err := r.Client.Get(ctx, client.ObjectKey{Namespace: g.Namespace, Name: g.Spec.StreamRef.Name}, &stream)
	if apierrors.IsNotFound(err) {
		return phase.Waitf(v1alpha1.ReasonStreamMissing, 0,
			"Stream %q does not exist in namespace %q. Create it; spec.streamRef cannot change", g.Spec.StreamRef.Name, g.Namespace)
	}
	if err != nil {
		return fmt.Errorf("read Stream %q: %w", g.Spec.StreamRef.Name, err)
	}
	if phase.New(&stream, r.Clock.Now()) {
		return phase.Again(phase.NewFor, errors.New("the Stream has not been looked at yet")) // its first status wakes this group
	}
	if !stream.InDatabase() {
		return phase.Waitf(v1alpha1.ReasonStreamNotReady, 0, "%s", notReady(&stream))
	}
	db, err := r.Databases.Resolve(ctx, stream.Namespace, stream.Spec.DatabaseSecretRef)
	if err != nil {
		return err
	}
	sc.stream, sc.db = &stream, db
	r.Poller.Follow(r.follower(g), db, stream.DatabaseName(), g.DatabaseName())
	return nil
}

// notReady repeats the Stream's own reason, so that the answer is found here as well.
func notReady(stream *v1alpha1.Stream) string {
	text := fmt.Sprintf("Stream %q is not in its database yet", stream.Name)
	if c := meta.FindStatusCondition(stream.Status.Conditions, v1alpha1.ConditionReady); c != nil && c.Message != "" {
		text += fmt.Sprintf(" (%s: %s)", c.Reason, c.Message)
	}
	return text
}
