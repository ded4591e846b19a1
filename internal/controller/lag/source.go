package lag

import (
	"context"

	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/millrace-dev/millrace/internal/controller/phase"
)

// Source enqueues the followers of a kind that the poller wakes. One whose database was lost or found again is made due in
// the schedule first.
func Source(p *Poller, kind string, schedule *phase.Schedule) source.Source {
	return source.Func(func(_ context.Context, queue workqueue.TypedRateLimitingInterface[reconcile.Request]) error {
		p.OnWake(kind, func(f Follower, verify bool) {
			if verify {
				schedule.Forget(f.UID)
			}
			queue.Add(reconcile.Request{NamespacedName: f.NamespacedName})
		})
		return nil
	})
}
