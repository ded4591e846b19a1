package stream

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/controller/lag"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Kind of the resource.
const Kind = "Stream"

// Reconciler brings Streams to their databases.
type Reconciler struct {
	// Client reads from the cache and writes to the API server.
	Client client.Client
	// Live reads from the API server: for decisions that a stale cache would make wrong.
	Live client.Reader
	// Databases finds the database of a Stream.
	Databases *database.Resolver
	// Poller wakes Streams whose database is lost or found again.
	Poller *lag.Poller
	// Recorder sends events.
	Recorder events.EventRecorder
	// Announcer sends the events of changes of Ready.
	Announcer *phase.Announcer
	// Schedule says when a Stream is compared with its database again.
	Schedule *phase.Schedule
	// Cluster identifies this Kubernetes cluster to the databases.
	Cluster string
	// Patience is how long a deletion waits for its database before it says that a person has to act.
	Patience time.Duration
	// Clock for tests.
	Clock clock.PassiveClock
}

// Reconcile brings one Stream to its spec. It keeps nothing between calls: facts go into the scope, and report is the only
// writer of status, events and the next wake-up.
func (r *Reconciler) Reconcile(ctx context.Context, s *v1alpha1.Stream) (ctrl.Result, error) {
	sc := &scope{stream: s, before: s.DeepCopy()}
	phases := []phase.Func[*scope]{r.connect, r.own, r.plan, r.approve, r.apply, r.observe, r.project}
	switch {
	case !s.DeletionTimestamp.IsZero():
		phases = []phase.Func[*scope]{r.remove}
	case s.Spec.Suspend:
		phases = nil
	}
	return r.report(ctx, sc, phase.Run(ctx, sc, phases))
}

// IndexSecret finds the Streams of a Secret.
const IndexSecret = "spec.databaseSecretRef.name"

// indexName finds the Streams that claim a name in their databases.
const indexName = "databaseName"

// SetupWithManager registers the controller.
func (r *Reconciler) SetupWithManager(ctx context.Context, mgr ctrl.Manager, workers int) error {
	index := mgr.GetFieldIndexer()
	if err := index.IndexField(ctx, &v1alpha1.Stream{}, IndexSecret, func(o client.Object) []string {
		if ref := o.(*v1alpha1.Stream).Spec.DatabaseSecretRef; ref != nil {
			return []string{ref.Name}
		}
		return nil
	}); err != nil {
		return err
	}
	if err := index.IndexField(ctx, &v1alpha1.Stream{}, indexName, func(o client.Object) []string {
		return []string{o.(*v1alpha1.Stream).DatabaseName()}
	}); err != nil {
		return err
	}
	secret := &metav1.PartialObjectMetadata{}
	secret.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Secret"))
	return ctrl.NewControllerManagedBy(mgr).
		For(&v1alpha1.Stream{}, builder.WithPredicates(predicate.Or(predicate.GenerationChangedPredicate{}, predicate.AnnotationChangedPredicate{}))).
		WatchesMetadata(secret, handler.EnqueueRequestsFromMapFunc(r.ofSecret), builder.WithPredicates(predicate.ResourceVersionChangedPredicate{})).
		Watches(&v1alpha1.Stream{}, handler.Funcs{DeleteFunc: r.forget}).
		WatchesRawSource(lag.Source(r.Poller, Kind, r.Schedule)).
		WithOptions(controller.Options{MaxConcurrentReconciles: workers, RateLimiter: phase.Backoff()}).
		Complete(reconcile.AsReconciler(r.Client, r))
}

// forget lets go of what is remembered of a Stream that is gone, whether it had a finalizer or not.
func (r *Reconciler) forget(_ context.Context, e event.DeleteEvent, _ workqueue.TypedRateLimitingInterface[reconcile.Request]) {
	if s, ok := e.Object.(*v1alpha1.Stream); ok {
		r.Poller.Unfollow(r.follower(s))
		r.Schedule.Forget(s.UID)
		r.Announcer.Forget(s.UID)
	}
}

// ofSecret lists the Streams whose Secret changed.
func (r *Reconciler) ofSecret(ctx context.Context, secret client.Object) []reconcile.Request {
	var list v1alpha1.StreamList
	if err := r.Client.List(ctx, &list, client.InNamespace(secret.GetNamespace()), client.MatchingFields{IndexSecret: secret.GetName()}); err != nil {
		return nil
	}
	requests := make([]reconcile.Request, 0, len(list.Items))
	for i := range list.Items {
		requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
	}
	return requests
}

func (r *Reconciler) owner(s *v1alpha1.Stream) pgstream.Owner {
	return pgstream.Owner{Cluster: r.Cluster, Namespace: s.Namespace, Name: s.Name, UID: string(s.UID)}
}

func (r *Reconciler) follower(s *v1alpha1.Stream) lag.Follower {
	return lag.Follower{Kind: Kind, NamespacedName: client.ObjectKeyFromObject(s), UID: s.UID}
}
