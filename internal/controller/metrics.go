package controller

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/consumergroup"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/controller/processor"
	"github.com/millrace-dev/millrace/internal/controller/stream"
)

var (
	descReady = prometheus.NewDesc("millrace_resource_ready",
		"1 while a resource is Ready, 0 while it is not; reason is that of the condition. A suspended resource has no series.",
		[]string{"kind", "namespace", "name", "reason"}, nil)
	descBacklogHigh = prometheus.NewDesc("millrace_group_backlog_high",
		"1 while at least spec.warningSize messages wait in a ConsumerGroup, and until a fifth less do. A group without spec.warningSize has no series.",
		[]string{"namespace", "name"}, nil)
	descDesired = prometheus.NewDesc("millrace_replicas_desired",
		"Pods that a Processor should have.", []string{"namespace", "name"}, nil)
	descReadyReplicas = prometheus.NewDesc("millrace_replicas_ready",
		"Pods of a Processor that are ready.", []string{"namespace", "name"}, nil)
)

// resources tells of every resource what the cache has, so that an alert needs no other exporter. A manager that stands by tells nothing: the leader does.
type resources struct {
	cache   client.Reader
	elected <-chan struct{}
}

// Describe is prometheus.Collector's.
func (r *resources) Describe(ch chan<- *prometheus.Desc) {
	ch <- descReady
	ch <- descBacklogHigh
	ch <- descDesired
	ch <- descReadyReplicas
}

// collectLimit bounds a scrape: the cache answers at once, or is not there yet.
const collectLimit = 5 * time.Second

// Collect is prometheus.Collector's. It reads the cache and asks nobody.
func (r *resources) Collect(ch chan<- prometheus.Metric) {
	select {
	case <-r.elected:
	default:
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), collectLimit)
	defer cancel()
	var streams v1alpha1.StreamList
	if err := r.cache.List(ctx, &streams, client.UnsafeDisableDeepCopy); err == nil {
		for i := range streams.Items {
			tellReady(ch, stream.Kind, &streams.Items[i], streams.Items[i].Spec.Suspend)
		}
	}
	var groups v1alpha1.ConsumerGroupList
	if err := r.cache.List(ctx, &groups, client.UnsafeDisableDeepCopy); err == nil {
		for i := range groups.Items {
			tellReady(ch, consumergroup.Kind, &groups.Items[i], groups.Items[i].Spec.Suspend)
			tellBacklog(ch, &groups.Items[i])
		}
	}
	var processors v1alpha1.ProcessorList
	if err := r.cache.List(ctx, &processors, client.UnsafeDisableDeepCopy); err == nil {
		for i := range processors.Items {
			p := &processors.Items[i]
			tellReady(ch, processor.Kind, p, p.Spec.Suspend)
			gauge := func(d *prometheus.Desc, n int32) {
				ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(n), p.Namespace, p.Name)
			}
			gauge(descDesired, p.Status.DesiredReplicas)
			gauge(descReadyReplicas, p.Status.ReadyReplicas)
		}
	}
}

func tellBacklog(ch chan<- prometheus.Metric, g *v1alpha1.ConsumerGroup) {
	c := meta.FindStatusCondition(g.Status.Conditions, v1alpha1.ConditionBacklogHigh)
	if c == nil || g.Spec.WarningSize == nil || g.Spec.Suspend {
		return
	}
	value := 0.0
	if c.Status == metav1.ConditionTrue {
		value = 1
	}
	ch <- prometheus.MustNewConstMetric(descBacklogHigh, prometheus.GaugeValue, value, g.Namespace, g.Name)
}

func tellReady(ch chan<- prometheus.Metric, kind string, o phase.Object, suspended bool) {
	c := meta.FindStatusCondition(o.GetConditions(), v1alpha1.ConditionReady)
	if suspended || c == nil || !o.GetDeletionTimestamp().IsZero() && c.Status == metav1.ConditionTrue {
		return
	}
	value := 0.0
	if c.Status == metav1.ConditionTrue {
		value = 1
	}
	ch <- prometheus.MustNewConstMetric(descReady, prometheus.GaugeValue, value, kind, o.GetNamespace(), o.GetName(), c.Reason)
}
