package phase

import (
	"time"

	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// The waits between attempts after an error that has no handling of its own. The last is also how long a resource may look broken after its
// cause is gone, which somebody waits for: helm --wait, a sync, a person. The library's own limit is a quarter of an hour.
const (
	backoffFirst = 50 * time.Millisecond
	backoffLast  = 20 * time.Second
)

// Backoff is the rate limiter of a controller's work queue.
func Backoff() workqueue.TypedRateLimiter[reconcile.Request] {
	return workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](backoffFirst, backoffLast)
}
