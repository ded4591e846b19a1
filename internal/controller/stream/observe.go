package stream

import (
	"context"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/lag"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// observe shows what the database has now: what apply has read back, or own, unless another manager made it after that.
func (r *Reconciler) observe(ctx context.Context, sc *scope) error {
	if sc.info == nil {
		if err := sc.db.Do(ctx, func(ctx context.Context, db pgstream.DB) error {
			info, err := pgstream.StreamSettings(ctx, db, sc.stream.DatabaseName())
			sc.info = &info
			return err
		}); err != nil {
			return err
		}
	}
	if sc.stream.Status.Messages == nil {
		r.Poller.Await(r.follower(sc.stream)) // unless apply has just made it
	}
	r.present(sc)
	return nil
}

// present puts what the database has into status, with the poller's last figures.
func (r *Reconciler) present(sc *scope) {
	status := &sc.stream.Status
	status.Name = sc.info.Spec.Name
	status.Partitions = ptr.To(int32(sc.info.Spec.Partitions))
	status.Segments = ptr.To(int32(sc.info.Spec.Segments))
	status.Priorities = ptr.To(int32(sc.info.Spec.Priorities))
	show(sc.stream, r.Poller.StreamFigures(r.follower(sc.stream)))
}

// show puts the poller's last figures into status, unless there are none yet.
func show(s *v1alpha1.Stream, f lag.StreamFigures) {
	if !f.Known {
		return
	}
	s.Status.Messages, s.Status.Bytes = ptr.To(f.Messages), ptr.To(f.Bytes)
	held, reason, message := metav1.ConditionFalse, v1alpha1.ReasonMoving, ""
	if f.HeldBy != "" {
		held, reason, message = metav1.ConditionTrue, v1alpha1.ReasonOpenTransaction, heldMessage(f.HeldBy)
	}
	phase.Set(&s.Status.Conditions, s.Generation, v1alpha1.ConditionHorizonHeld, held, reason, message)
}

func heldMessage(by string) string {
	text := by + " has published to this stream and keeps its transaction open: consumers get nothing that was published after it until it ends. "
	if pid, ok := strings.CutPrefix(by, "pid "); ok {
		return text + "If it does not end by itself, run in the database: select pg_terminate_backend(" + pid + "), which rolls it back"
	}
	return text + "If nobody will end it, run COMMIT PREPARED or ROLLBACK PREPARED in the database"
}
