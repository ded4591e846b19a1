package processor

import (
	"context"
	"fmt"
	"math"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	appsac "k8s.io/client-go/applyconfigurations/apps/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/consumergroup"
	"github.com/millrace-dev/millrace/internal/controller/lag"
	"github.com/millrace-dev/millrace/internal/controller/phase"
)

// scaled is one change of the number of pods by the autoscaler.
type scaled struct{ from, to int32 }

// memory is what the autoscaler keeps between reconciles. Losing it costs one stabilisation window and no mistake.
type memory struct {
	mu        sync.Mutex
	histories map[types.UID]history
	claims    map[types.UID]claim
}

func (m *memory) history(uid types.UID) history {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.histories[uid]
}

// keep remembers a decision: its history, and how many connections the pods may come to open.
func (m *memory) keep(uid types.UID, h history, connections int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.histories == nil {
		m.histories = map[types.UID]history{}
	}
	m.histories[uid] = h
	if c, ok := m.claims[uid]; ok {
		c.connections = connections
		m.claims[uid] = c
	}
}

func (m *memory) forget(uid types.UID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.histories, uid)
	delete(m.claims, uid)
}

// scale is the phase that chooses the number of pods: what spec.replicas says, what the autoscaler decides, or nothing, which leaves it
// to whoever scales the Deployment.
func (r *Reconciler) scale(ctx context.Context, sc *scope) error {
	p := sc.processor
	if p.Spec.Autoscaling == nil {
		r.memory.forget(p.UID)
		sc.inputs.replicas = p.Spec.Replicas
		return nil
	}
	d, err := r.decide(ctx, sc, r.Client)
	if err != nil {
		return err
	}
	if sc.scaled != nil {
		// The cache may not know yet what this process wrote a moment ago. Before a change the API server is asked.
		if d, err = r.decide(ctx, sc, r.Live); err != nil {
			return err
		}
	}
	r.memory.keep(p.UID, d.history, int64(d.replicas)*sc.inputs.connections(p))
	sc.decision, sc.inputs.replicas = d, ptr.To(d.replicas)
	return nil
}

// decide reads everything that a decision depends on, and makes it. Pods are taken from reader.
func (r *Reconciler) decide(ctx context.Context, sc *scope, reader client.Reader) (*decision, error) {
	p, now := sc.processor, r.Clock.Now()
	sc.scaled = nil
	w := workload{replicas: minReplicas(p.Spec.Autoscaling)} // a beginning
	var d appsv1.Deployment
	err := reader.Get(ctx, client.ObjectKey{Namespace: p.Namespace, Name: childName(p)}, &d)
	exists := err == nil && metav1.IsControlledBy(&d, p)
	switch {
	case exists:
		w = workloadOf(&d)
	case client.IgnoreNotFound(err) != nil:
		return nil, fmt.Errorf("read Deployment %q: %w", childName(p), err)
	}
	g := sc.inputs.group
	sc.figures = r.Poller.Figures(lag.Follower{Kind: consumergroup.Kind, NamespacedName: client.ObjectKeyFromObject(g), UID: g.UID})
	reading := readingOf(sc.figures, now)

	limits, err := r.limits(ctx, sc)
	if err != nil {
		return nil, err
	}
	h := r.memory.history(p.UID)
	made := decide(now, p.Spec.Autoscaling, reading, w, limits, h)
	if made.replicas > w.replicas && p.Spec.Autoscaling.MaxConnections == nil {
		made = decide(now, p.Spec.Autoscaling, reading, w, append(limits, r.room(ctx, sc, w.replicas)), h)
	}
	if exists && made.replicas != w.replicas {
		sc.scaled = &scaled{w.replicas, made.replicas}
	}
	return &made, nil
}

func workloadOf(d *appsv1.Deployment) workload {
	n := ptr.Deref(d.Spec.Replicas, 1)
	return workload{replicas: n, rolling: d.Status.Replicas > d.Status.UpdatedReplicas, starting: d.Status.AvailableReplicas < n}
}

// readingOf turns figures into what a decision needs.
func readingOf(f lag.Figures, now time.Time) reading {
	if !f.Known {
		r := reading{unknown: "it has not been measured yet"}
		if f.Err != nil {
			r.unknown = f.Err.Error()
		}
		return r
	}
	r := reading{paused: f.Paused || f.Lapsed != "", lag: f.Lag, inFlight: f.InFlight, retrying: f.Retrying, idle: f.At.Sub(f.Active)}
	if f.Rates != nil {
		r.rate = f.Rates.Published
	}
	if !f.Oldest.IsZero() {
		r.age = max(now.Sub(f.Oldest), 0)
	}
	if f.Retrying > 0 || f.Deliveries > 1 {
		// The oldest may be one that fails again and again, which no pod makes younger. What waits came in at the present rate, or is
		// as old as that.
		if r.rate > 0 {
			r.age = min(r.age, time.Duration(min(float64(f.Lag)/r.rate, math.MaxInt32)*float64(time.Second)))
		}
	}
	return r
}

// limits that are known without asking a server.
func (r *Reconciler) limits(ctx context.Context, sc *scope) ([]limit, error) {
	var limits []limit
	g, spec := sc.inputs.group, sc.processor.Spec.Autoscaling
	if g.Spec.Mode == v1alpha1.ModeOrdered {
		stream, err := r.streamOf(ctx, g)
		if err != nil {
			return nil, err
		}
		if n := ptr.Deref(stream.Status.Partitions, stream.Spec.Partitions); n > 0 {
			limits = append(limits, limit{replicas: n, reason: v1alpha1.ReasonPartitions,
				message: fmt.Sprintf("Stream %q has %d partitions, and in an Ordered group each has one pod at a time", stream.Name, n)})
		}
	}
	if spec.MaxConnections != nil {
		perPod := sc.inputs.connections(sc.processor)
		limits = append(limits, limit{replicas: int32(int64(*spec.MaxConnections) / perPod), reason: v1alpha1.ReasonConnections,
			message: fmt.Sprintf("maxConnections is %d, and a pod may open %d", *spec.MaxConnections, perPod)})
	}
	return limits, nil
}

// announceScale is the phase after apply: what the autoscaler decided is done, and said once.
func (r *Reconciler) announceScale(_ context.Context, sc *scope) error {
	sc.applied = true
	if s := sc.scaled; s != nil {
		sc.processor.Status.Autoscaling = &v1alpha1.AutoscalingStatus{LastScaleTime: ptr.To(metav1.NewTime(r.Clock.Now()))}
		phase.EventWith(r.Recorder, sc.processor, referenceTo(sc.objects.deployment), corev1.EventTypeNormal, v1alpha1.EventScaled,
			fmt.Sprintf("from %d to %s: %s", s.from, pods(s.to), sc.decision.message))
	}
	return nil
}

// referenceTo names a Deployment in the version that the API server has answered with.
func referenceTo(d *appsac.DeploymentApplyConfiguration) *corev1.ObjectReference {
	return &corev1.ObjectReference{
		APIVersion: "apps/v1", Kind: "Deployment", Namespace: *d.Namespace, Name: *d.Name,
		UID: ptr.Deref(d.UID, ""), ResourceVersion: ptr.Deref(d.ResourceVersion, ""),
	}
}

// recallScale puts the time of the last change into a status that comes from a cache which has not seen it yet. Else a reconcile right after the change
// would write what was before.
func (r *Reconciler) recallScale(p *v1alpha1.Processor) {
	last := metav1.NewTime(r.memory.history(p.UID).scaled.Truncate(time.Second))
	if s := p.Status.Autoscaling; !last.IsZero() && (s == nil || s.LastScaleTime == nil || s.LastScaleTime.Before(&last)) {
		p.Status.Autoscaling = &v1alpha1.AutoscalingStatus{LastScaleTime: &last}
	}
}

// showScaling puts what the autoscaler decided into status.
func showScaling(sc *scope) {
	p := sc.processor
	conditions := &p.Status.Conditions
	switch n := sc.inputs.replicas; {
	case n != nil && sc.applied:
		p.Status.DesiredReplicas = *n
	case n == nil && sc.deployment != nil:
		p.Status.DesiredReplicas = ptr.Deref(sc.deployment.Spec.Replicas, 1)
	}
	if p.Spec.Autoscaling == nil {
		p.Status.Autoscaling = nil
		meta.RemoveStatusCondition(conditions, v1alpha1.ConditionAutoscalingActive)
		meta.RemoveStatusCondition(conditions, v1alpha1.ConditionScalingLimited)
		return
	}
	set := func(kind string, is bool, reason, message string) {
		status := metav1.ConditionFalse
		if is {
			status = metav1.ConditionTrue
		}
		phase.Set(conditions, p.Generation, kind, status, reason, message)
	}
	switch d := sc.decision; {
	case p.Spec.Suspend:
		set(v1alpha1.ConditionAutoscalingActive, false, v1alpha1.ReasonSuspended, "spec.suspend is true: the number of pods stays")
	case d == nil || !sc.applied:
		set(v1alpha1.ConditionAutoscalingActive, false, v1alpha1.ReasonNotReady, "the number of pods stays until what Ready says is repaired")
	default:
		set(v1alpha1.ConditionAutoscalingActive, d.active, d.reason, d.message)
		if d.limited != nil {
			set(v1alpha1.ConditionScalingLimited, true, d.limited.reason, d.limited.message)
		} else {
			set(v1alpha1.ConditionScalingLimited, false, v1alpha1.ReasonNotLimited, "")
		}
	}
}

// announceScaling sends an event when the autoscaler loses or finds its figures, and when another limit begins to hold it.
func (r *Reconciler) announceScaling(before, after *v1alpha1.Processor) {
	find := func(p *v1alpha1.Processor, kind string) *metav1.Condition {
		return meta.FindStatusCondition(p.Status.Conditions, kind)
	}
	was, is := find(before, v1alpha1.ConditionAutoscalingActive), find(after, v1alpha1.ConditionAutoscalingActive)
	if was != nil && is != nil && was.Status != is.Status {
		kind := corev1.EventTypeNormal
		if is.Reason == v1alpha1.ReasonLagUnknown {
			kind = corev1.EventTypeWarning
		}
		phase.Event(r.Recorder, after, kind, is.Reason, is.Message)
	}
	was, is = find(before, v1alpha1.ConditionScalingLimited), find(after, v1alpha1.ConditionScalingLimited)
	if is != nil && is.Status == metav1.ConditionTrue && (was == nil || was.Reason != is.Reason) {
		kind := corev1.EventTypeNormal
		if is.Reason == v1alpha1.ReasonConnections {
			kind = corev1.EventTypeWarning
		}
		phase.Event(r.Recorder, after, kind, is.Reason, "more pods are asked for than there can be: "+is.Message)
	}
}
