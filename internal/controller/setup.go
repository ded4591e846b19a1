// Package controller registers every controller of the manager, and what they share. This file is its table of contents.
package controller

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	k8slabels "k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	logf "sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/consumergroup"
	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/controller/lag"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/controller/processor"
	"github.com/millrace-dev/millrace/internal/controller/stream"
)

// Our own kinds. patch on the resources themselves is for finalizers only; nothing writes a spec.
// +kubebuilder:rbac:groups=millrace.dev,resources=streams;consumergroups,verbs=get;list;watch;patch
// +kubebuilder:rbac:groups=millrace.dev,resources=processors,verbs=list;watch
// +kubebuilder:rbac:groups=millrace.dev,resources=streams/status;consumergroups/status;processors/status,verbs=patch
// For ownerReferences with blockOwnerDeletion, where the API server checks them.
// +kubebuilder:rbac:groups=millrace.dev,resources=processors/finalizers,verbs=update
// What a Processor becomes. The garbage collector deletes it.
// +kubebuilder:rbac:groups="",resources=configmaps;serviceaccounts,verbs=get;list;watch;create;patch
// +kubebuilder:rbac:groups=apps,resources=deployments,verbs=get;list;watch;create;patch
// +kubebuilder:rbac:groups=policy,resources=poddisruptionbudgets,verbs=get;list;watch;create;patch
// Connection strings are read one by one; list and watch serve metadata.
// +kubebuilder:rbac:groups="",resources=secrets,verbs=get;list;watch
// To tell why pods are not ready, and which of them cost more to remove.
// +kubebuilder:rbac:groups="",resources=pods,verbs=list;patch
// +kubebuilder:rbac:groups="";events.k8s.io,resources=events,verbs=create;patch
// The UID of kube-system identifies the cluster to the databases.
// +kubebuilder:rbac:groups="",resources=namespaces,resourceNames=kube-system,verbs=get
// For authentication and authorisation of the metrics.
// +kubebuilder:rbac:groups=authentication.k8s.io,resources=tokenreviews,verbs=create
// +kubebuilder:rbac:groups=authorization.k8s.io,resources=subjectaccessreviews,verbs=create

// Options of Setup. Zero values mean the defaults named here.
type Options struct {
	// Cluster identifies this Kubernetes cluster to the databases: ClusterID. Required.
	Cluster string
	// DefaultDatabase is the connection string for Streams that name no Secret; empty when there is none.
	DefaultDatabase string
	// ProcessorImage of the pods. Required.
	ProcessorImage string
	// ProcessorImagePullPolicy of the pods; empty leaves it to Kubernetes.
	ProcessorImagePullPolicy string
	// ProcessorImagePullSecrets of the pods, by name, unless a Processor names its own.
	ProcessorImagePullSecrets []string
	// VerifyInterval between two comparisons of a resource with its database. Default 5m.
	VerifyInterval time.Duration
	// LagInterval between two readings of lag. Default 10s.
	LagInterval time.Duration
	// MaintenanceInterval between two rounds of upkeep in each database. Default 30s.
	MaintenanceInterval time.Duration
	// DeletionPatience is how long a deletion waits for its database before it says that a person has to act. Default 5m.
	DeletionPatience time.Duration
	// Workers per controller. Default 16: calls to one database are bounded by its connections, and the rest is for the others.
	Workers int
	// Database holds the bounds of pools and calls.
	Database database.Options
	// Metrics to register with. Default: the manager's.
	Metrics metrics.RegistererGatherer
}

// Setup registers the controllers with the manager.
func Setup(ctx context.Context, mgr ctrl.Manager, o Options) error {
	setDefault(&o.VerifyInterval, 5*time.Minute)
	setDefault(&o.LagInterval, 10*time.Second)
	setDefault(&o.MaintenanceInterval, 30*time.Second)
	setDefault(&o.DeletionPatience, 5*time.Minute)
	setDefault(&o.Workers, 16)
	if o.Metrics == nil {
		o.Metrics = metrics.Registry
	}
	// A database in use is asked for at least once per verification.
	setDefault(&o.Database.IdleAfter, 3*o.VerifyInterval)
	o.Database.Migrated = func(d *database.Database, versions []int) {
		logf.Log.WithName("database").Info("migrated", "database", d.String(), "versions", versions)
	}

	c, live := mgr.GetClient(), mgr.GetAPIReader()
	poller := lag.NewPoller(o.LagInterval)
	o.Database.Changed = poller.Now
	registry := database.NewRegistry(o.Database)
	databases := &database.Resolver{Reader: live, Metadata: c, Registry: registry, Default: o.DefaultDatabase}
	for _, collector := range []prometheus.Collector{poller, registry, &resources{cache: c, elected: mgr.Elected()}} {
		if err := o.Metrics.Register(collector); err != nil {
			return fmt.Errorf("register the metrics: %w", err)
		}
	}
	maintainer := &database.Maintainer{Registry: registry, Interval: o.MaintenanceInterval}
	scouts := &database.Scouts{Registry: registry}
	for _, run := range []manager.RunnableFunc{registry.Run, poller.Run, maintainer.Run, scouts.Run} {
		if err := mgr.Add(run); err != nil {
			return err
		}
	}

	real := clock.RealClock{}
	schedule := func() *phase.Schedule { return phase.NewSchedule(real, o.VerifyInterval) }
	recorder := mgr.GetEventRecorder("millrace")
	controllers := []interface {
		SetupWithManager(ctx context.Context, mgr ctrl.Manager, workers int) error
	}{
		&stream.Reconciler{
			Client: c, Live: live, Databases: databases, Poller: poller, Recorder: recorder, Announcer: phase.NewAnnouncer(recorder), Schedule: schedule(),
			Cluster: o.Cluster, Patience: o.DeletionPatience, Clock: real,
		},
		&consumergroup.Reconciler{
			Client: c, Live: live, Databases: databases, Poller: poller, Recorder: recorder, Announcer: phase.NewAnnouncer(recorder), Schedule: schedule(),
			Cluster: o.Cluster, Patience: o.DeletionPatience, Clock: real,
		},
		&processor.Reconciler{
			Client: c, Live: live, Databases: databases, Poller: poller, Recorder: recorder, Announcer: phase.NewAnnouncer(recorder), Schedule: schedule(),
			Image: o.ProcessorImage, ImagePullPolicy: o.ProcessorImagePullPolicy, ImagePullSecrets: o.ProcessorImagePullSecrets, Clock: real,
		},
	}
	for _, x := range controllers {
		if err := x.SetupWithManager(ctx, mgr, o.Workers); err != nil {
			return fmt.Errorf("set up %T: %w", x, err)
		}
	}
	return nil
}

func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// Scheme returns the types that the controllers read and write.
func Scheme() *runtime.Scheme {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			panic("controller: " + err.Error()) // two types under one name: a mistake in this program
		}
	}
	return scheme
}

// CacheOptions bound what the manager keeps in memory: of the built-in kinds only what is labelled as ours, of Secrets
// no more than their names and versions, and of nothing who owns which field, unless it is ours to compare. namespaces limits everything to some namespaces; empty means all.
func CacheOptions(namespaces []string) cache.Options {
	ours := cache.ByObject{Label: k8slabels.SelectorFromSet(k8slabels.Set{"app.kubernetes.io/managed-by": "millrace"})}
	o := cache.Options{
		ByObject: map[client.Object]cache.ByObject{
			&appsv1.Deployment{}: ours, &corev1.ConfigMap{}: ours, &corev1.ServiceAccount{}: ours, &policyv1.PodDisruptionBudget{}: ours,
		},
		DefaultTransform: slim,
	}
	if len(namespaces) > 0 {
		o.DefaultNamespaces = map[string]cache.Config{}
		for _, n := range namespaces {
			o.DefaultNamespaces[n] = cache.Config{}
		}
	}
	return o
}

// slim removes what nobody here reads before an object is kept. The fields that the manager owns in its Deployments and the like are compared with
// what it wants (package processor); those of others, and all of our own kinds, are half of an object's size.
func slim(o any) (any, error) {
	switch o := o.(type) {
	case *metav1.PartialObjectMetadata:
		o.Annotations, o.Labels, o.ManagedFields, o.OwnerReferences = nil, nil, nil, nil
	case phase.Object:
		o.SetManagedFields(nil)
	case metav1.Object:
		o.SetManagedFields(slices.DeleteFunc(o.GetManagedFields(), func(f metav1.ManagedFieldsEntry) bool { return f.Manager != string(phase.FieldOwner) }))
	}
	return o, nil
}

// ClusterID identifies this Kubernetes cluster: the UID of its kube-system namespace, which lives as long as the cluster.
func ClusterID(ctx context.Context, live client.Reader) (string, error) {
	var ns corev1.Namespace
	if err := live.Get(ctx, client.ObjectKey{Name: metav1.NamespaceSystem}, &ns); err != nil {
		return "", fmt.Errorf("read the id of the cluster from namespace %s: %w", metav1.NamespaceSystem, err)
	}
	return string(ns.UID), nil
}
