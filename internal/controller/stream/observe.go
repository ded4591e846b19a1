package stream

import (
	"context"

	"k8s.io/utils/ptr"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// observe reads back what the database has now, and puts into status what does not move with the traffic.
func (r *Reconciler) observe(ctx context.Context, sc *scope) error {
	if len(sc.plan.Steps) > 0 || sc.info == nil {
		if err := sc.db.Do(ctx, func(ctx context.Context, db pgstream.DB) error {
			info, err := pgstream.DescribeStream(ctx, db, sc.stream.DatabaseName())
			sc.info = &info
			return err
		}); err != nil {
			return err
		}
	}
	status := &sc.stream.Status
	status.Name = sc.info.Spec.Name
	status.Partitions = ptr.To(int32(sc.info.Spec.Partitions))
	status.Segments = ptr.To(int32(sc.info.Spec.Segments))
	return nil
}
