package processor

import (
	"context"
	"math"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	coreac "k8s.io/client-go/applyconfigurations/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	logf "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/millrace-dev/millrace/internal/controller/lag"
	"github.com/millrace-dev/millrace/internal/controller/phase"
)

// preferIdle is the phase before fewer pods are applied: it tells Kubernetes to remove those that hold least, because the others cost more to
// delete. A pod gives back what it holds when it drains, so a cost that cannot be written is no reason not to scale.
func (r *Reconciler) preferIdle(ctx context.Context, sc *scope) error {
	if sc.scaled == nil || sc.scaled.to > sc.scaled.from {
		return nil
	}
	p, cost := sc.processor, deletionCosts(sc.figures.Holders)
	list := &metav1.PartialObjectMetadataList{}
	list.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("PodList"))
	if err := r.Live.List(ctx, list, client.InNamespace(p.Namespace), client.MatchingLabels(selectorLabels(p))); err != nil {
		logf.FromContext(ctx).Error(err, "pods are removed without regard to what they hold")
		return nil
	}
	for i := range list.Items {
		if err := r.setDeletionCost(ctx, &list.Items[i], cost[list.Items[i].Name]); err != nil {
			logf.FromContext(ctx).Error(err, "a pod may be removed although others hold less", "pod", list.Items[i].Name)
		}
	}
	return nil
}

// deletionCosts is what each pod costs to remove, by its name. Those that are not named cost nothing.
func deletionCosts(holders []lag.Holder) map[string]int64 {
	cost := make(map[string]int64, len(holders))
	for _, h := range holders {
		cost[h.Name] = h.Messages
		if h.Partitions != "" {
			cost[h.Name]++ // they would have to move
		}
	}
	return cost
}

// setDeletionCost writes what it costs to remove a pod, unless that is so already. A pod that is gone is success.
func (r *Reconciler) setDeletionCost(ctx context.Context, pod *metav1.PartialObjectMetadata, cost int64) error {
	text := strconv.FormatInt(min(cost, math.MaxInt32), 10)
	has := pod.Annotations[corev1.PodDeletionCost]
	if !pod.DeletionTimestamp.IsZero() || has == text || has == "" && cost == 0 {
		return nil
	}
	// With its UID the pod cannot be made anew.
	want := coreac.Pod(pod.Name, pod.Namespace).WithUID(pod.UID).WithAnnotations(map[string]string{corev1.PodDeletionCost: text})
	err := r.Client.Apply(ctx, want, phase.FieldOwner, client.ForceOwnership)
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	return err
}
