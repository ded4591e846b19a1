package consumergroup

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
	"github.com/millrace-dev/millrace/internal/controller/stream"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Kind of the resource.
const Kind = "ConsumerGroup"

// Reconciler brings ConsumerGroups to their databases.
type Reconciler struct {
	// Client reads from the cache and writes to the API server.
	Client client.Client
	// Live reads from the API server: for decisions that a stale cache would make wrong.
	Live client.Reader
	// Databases finds the database of the group's Stream.
	Databases *database.Resolver
	// Poller has the figures.
	Poller *lag.Poller
	// Recorder sends events.
	Recorder events.EventRecorder
	// Announcer sends the events of changes of Ready.
	Announcer *phase.Announcer
	// Schedule says when a group is compared with its database again.
	Schedule *phase.Schedule
	// Cluster identifies this Kubernetes cluster to the databases.
	Cluster string
	// Patience is how long a deletion waits for its database before it says that a person has to act.
	Patience time.Duration
	// Clock for tests.
	Clock clock.PassiveClock
}

// Reconcile brings one ConsumerGroup to its spec. It keeps nothing between calls: facts go into the scope, and report is the
// only writer of status, events and the next wake-up.
func (r *Reconciler) Reconcile(ctx context.Context, g *v1alpha1.ConsumerGroup) (ctrl.Result, error) {
	sc := &scope{group: g, before: g.DeepCopy()}
	phases := []phase.Func[*scope]{r.connect, r.own, r.plan, r.approve, r.apply, r.lapse}
	switch {
	case !g.DeletionTimestamp.IsZero():
		phases = []phase.Func[*scope]{r.remove}
	case g.Spec.Suspend:
		phases = nil
	case !r.Schedule.Due(g.UID, g.Generation):
		sc.figuresOnly = true
		phases = nil
	}
	return r.report(ctx, sc, phase.Run(ctx, sc, phases))
}

// IndexStream finds the groups of a Stream.
const IndexStream = "spec.streamRef.name"

// SetupWithManager registers the controller.
func (r *Reconciler) SetupWithManager(ctx context.Context, mgr ctrl.Manager, workers int) error {
	if err := mgr.GetFieldIndexer().IndexField(ctx, &v1alpha1.ConsumerGroup{}, IndexStream, func(o client.Object) []string {
		return []string{o.(*v1alpha1.ConsumerGroup).Spec.StreamRef.Name}
	}); err != nil {
		return err
	}
	secret := &metav1.PartialObjectMetadata{}
	secret.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Secret"))
	return ctrl.NewControllerManagedBy(mgr).
		For(&v1alpha1.ConsumerGroup{}, builder.WithPredicates(predicate.Or(predicate.GenerationChangedPredicate{}, predicate.AnnotationChangedPredicate{}))).
		Watches(&v1alpha1.Stream{}, handler.EnqueueRequestsFromMapFunc(r.ofStream), builder.WithPredicates(phase.Changed(v1alpha1.ConditionReady, v1alpha1.ConditionSchemaApplied))).
		WatchesMetadata(secret, handler.EnqueueRequestsFromMapFunc(r.ofSecret), builder.WithPredicates(predicate.ResourceVersionChangedPredicate{})).
		Watches(&v1alpha1.ConsumerGroup{}, handler.Funcs{DeleteFunc: r.forget}).
		WatchesRawSource(lag.Source(r.Poller, Kind, r.Schedule)).
		WithOptions(controller.Options{MaxConcurrentReconciles: workers, RateLimiter: phase.Backoff()}).
		Complete(reconcile.AsReconciler(r.Client, r))
}

// ofStream lists the groups of a Stream that changed, and makes them due.
func (r *Reconciler) ofStream(ctx context.Context, s client.Object) []reconcile.Request {
	var list v1alpha1.ConsumerGroupList
	if err := r.Client.List(ctx, &list, client.InNamespace(s.GetNamespace()), client.MatchingFields{IndexStream: s.GetName()}); err != nil {
		return nil
	}
	requests := make([]reconcile.Request, 0, len(list.Items))
	for i := range list.Items {
		r.Schedule.Forget(list.Items[i].UID)
		requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
	}
	return requests
}

// ofSecret lists the groups whose Stream names a Secret that changed.
func (r *Reconciler) ofSecret(ctx context.Context, secret client.Object) []reconcile.Request {
	var streams v1alpha1.StreamList
	if err := r.Client.List(ctx, &streams, client.InNamespace(secret.GetNamespace()), client.MatchingFields{stream.IndexSecret: secret.GetName()}); err != nil {
		return nil
	}
	var requests []reconcile.Request
	for i := range streams.Items {
		requests = append(requests, r.ofStream(ctx, &streams.Items[i])...)
	}
	return requests
}

// forget lets go of what is remembered of a group that is gone, whether it had a finalizer or not.
func (r *Reconciler) forget(_ context.Context, e event.DeleteEvent, _ workqueue.TypedRateLimitingInterface[reconcile.Request]) {
	if g, ok := e.Object.(*v1alpha1.ConsumerGroup); ok {
		r.Poller.Unfollow(r.follower(g))
		r.Schedule.Forget(g.UID)
		r.Announcer.Forget(g.UID)
	}
}

func (r *Reconciler) owner(g *v1alpha1.ConsumerGroup) pgstream.Owner {
	return pgstream.Owner{Cluster: r.Cluster, Namespace: g.Namespace, Name: g.Name, UID: string(g.UID)}
}

func (r *Reconciler) follower(g *v1alpha1.ConsumerGroup) lag.Follower {
	return lag.Follower{Kind: Kind, NamespacedName: client.ObjectKeyFromObject(g), UID: g.UID}
}
