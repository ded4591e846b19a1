package processor

import (
	"context"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
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
	"github.com/millrace-dev/millrace/internal/controller/consumergroup"
	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/controller/lag"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/controller/stream"
)

// Kind of the resource.
const Kind = "Processor"

// Reconciler turns Processors into workloads.
type Reconciler struct {
	// Client reads from the cache and writes to the API server.
	Client client.Client
	// Live reads Secrets and pods from the API server: they are never cached.
	Live client.Reader
	// Databases finds the database of the source's Stream, to ask for its connections.
	Databases *database.Resolver
	// Poller has the figures of the source's group.
	Poller *lag.Poller
	// Recorder sends events.
	Recorder events.EventRecorder
	// Announcer sends the events of changes of Ready.
	Announcer *phase.Announcer
	// Schedule says when a Processor is looked at although nothing changed.
	Schedule *phase.Schedule
	// Image of the pods, unless spec names one.
	Image string
	// ImagePullPolicy of the pods; empty leaves it to Kubernetes.
	ImagePullPolicy string
	// ImagePullSecrets of the pods, by name, unless spec names some.
	ImagePullSecrets []string
	// Clock for tests.
	Clock clock.PassiveClock

	memory  memory
	secrets secrets
}

// Reconcile brings one Processor to its spec. Facts go into the scope, and report is the only writer of status,
// events and the next wake-up. What is kept between calls is what the autoscaler remembers, and where Secrets lead.
func (r *Reconciler) Reconcile(ctx context.Context, p *v1alpha1.Processor) (ctrl.Result, error) {
	sc := &scope{processor: p, before: p.DeepCopy()}
	phases := []phase.Func[*scope]{r.resolve, r.scale, r.renderObjects, r.preferIdle, r.apply, r.announceScale, r.observe}
	if !p.DeletionTimestamp.IsZero() || p.Spec.Suspend {
		phases = nil
	}
	return r.report(ctx, sc, phase.Run(ctx, sc, phases))
}

// Fields by which Processors are found.
const (
	indexSecret = "secretRefs"
	indexGroup  = "spec.source.consumerGroup.name"
)

// SetupWithManager registers the controller.
func (r *Reconciler) SetupWithManager(ctx context.Context, mgr ctrl.Manager, workers int) error {
	index := mgr.GetFieldIndexer()
	if err := index.IndexField(ctx, &v1alpha1.Processor{}, indexSecret, func(o client.Object) []string {
		return secretNames(o.(*v1alpha1.Processor))
	}); err != nil {
		return err
	}
	if err := index.IndexField(ctx, &v1alpha1.Processor{}, indexGroup, func(o client.Object) []string {
		if g := o.(*v1alpha1.Processor).Spec.Source.ConsumerGroup; g != nil {
			return []string{g.Name}
		}
		return nil
	}); err != nil {
		return err
	}
	secret := &metav1.PartialObjectMetadata{}
	secret.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Secret"))
	return ctrl.NewControllerManagedBy(mgr).
		For(&v1alpha1.Processor{}, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Owns(&appsv1.Deployment{}).
		Owns(&corev1.ConfigMap{}).
		Owns(&corev1.ServiceAccount{}).
		Owns(&policyv1.PodDisruptionBudget{}, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		// Every change: Processors show the figures of their group.
		Watches(&v1alpha1.ConsumerGroup{}, handler.EnqueueRequestsFromMapFunc(r.ofGroup), builder.WithPredicates(predicate.ResourceVersionChangedPredicate{})).
		Watches(&v1alpha1.Stream{}, handler.EnqueueRequestsFromMapFunc(r.ofStream), builder.WithPredicates(phase.Changed(v1alpha1.ConditionSchemaApplied))).
		WatchesMetadata(secret, handler.EnqueueRequestsFromMapFunc(r.ofSecret), builder.WithPredicates(predicate.ResourceVersionChangedPredicate{})).
		Watches(&v1alpha1.Processor{}, handler.Funcs{DeleteFunc: r.forget}).
		WatchesMetadata(secret, handler.Funcs{DeleteFunc: r.forget}).
		WithOptions(controller.Options{MaxConcurrentReconciles: workers, RateLimiter: phase.Backoff()}).
		Complete(reconcile.AsReconciler(r.Client, r))
}

// secretNames lists the Secrets that a Processor names itself. That of its Stream arrives by ofSecret.
func secretNames(p *v1alpha1.Processor) []string {
	var names []string
	add := func(refs ...*v1alpha1.SecretKeyReference) {
		for _, ref := range refs {
			if ref != nil {
				names = append(names, ref.Name)
			}
		}
	}
	if s := p.Spec.Source.Redis; s != nil {
		add(&s.URLSecretRef)
		if s.TLSSecretRef != nil {
			names = append(names, s.TLSSecretRef.Name)
		}
	}
	if s := p.Spec.Source.ConsumerGroup; s != nil {
		add(s.DatabaseSecretRef, s.ListenSecretRef)
	}
	for _, d := range databaseRefs(p) {
		add(d.ref)
	}
	for _, h := range httpSinks(p) {
		add(h.URLSecretRef, h.AuthorizationSecretRef, h.SigningKeySecretRef)
	}
	return names
}

func (r *Reconciler) ofGroup(ctx context.Context, group client.Object) []reconcile.Request {
	return r.list(ctx, group.GetNamespace(), client.MatchingFields{indexGroup: group.GetName()})
}

func (r *Reconciler) ofStream(ctx context.Context, s client.Object) []reconcile.Request {
	var groups v1alpha1.ConsumerGroupList
	if err := r.Client.List(ctx, &groups, client.InNamespace(s.GetNamespace()), client.MatchingFields{consumergroup.IndexStream: s.GetName()}); err != nil {
		return nil
	}
	var requests []reconcile.Request
	for i := range groups.Items {
		requests = append(requests, r.ofGroup(ctx, &groups.Items[i])...)
	}
	return requests
}

func (r *Reconciler) ofSecret(ctx context.Context, secret client.Object) []reconcile.Request {
	requests := r.list(ctx, secret.GetNamespace(), client.MatchingFields{indexSecret: secret.GetName()})
	var streams v1alpha1.StreamList
	if err := r.Client.List(ctx, &streams, client.InNamespace(secret.GetNamespace()), client.MatchingFields{stream.IndexSecret: secret.GetName()}); err != nil {
		return requests
	}
	for i := range streams.Items {
		requests = append(requests, r.ofStream(ctx, &streams.Items[i])...)
	}
	return requests
}

func (r *Reconciler) list(ctx context.Context, namespace string, fields client.MatchingFields) []reconcile.Request {
	var list v1alpha1.ProcessorList
	if err := r.Client.List(ctx, &list, client.InNamespace(namespace), fields); err != nil {
		return nil
	}
	requests := make([]reconcile.Request, 0, len(list.Items))
	for i := range list.Items {
		requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
	}
	return requests
}

// forget lets go of what is remembered of a Processor or a Secret that is gone.
func (r *Reconciler) forget(_ context.Context, e event.DeleteEvent, _ workqueue.TypedRateLimitingInterface[reconcile.Request]) {
	switch o := e.Object.(type) {
	case *v1alpha1.Processor:
		r.Schedule.Forget(o.UID)
		r.Announcer.Forget(o.UID)
		r.memory.forget(o.UID)
	case *metav1.PartialObjectMetadata:
		r.secrets.forget(client.ObjectKeyFromObject(o))
	}
}
