package processor

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/utils/ptr"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
)

// rolloutLook is how often pods are looked at while they are not all ready: what they suffer from changes no Deployment.
const rolloutLook = 5 * time.Second

// podsMax bounds how many pods are read to find out what is wrong.
const podsMax = 20

// observe puts the state of pods and lag into status, and waits until all pods are ready.
func (r *Reconciler) observe(ctx context.Context, sc *scope) error {
	p := sc.processor
	var d appsv1.Deployment
	if err := r.Client.Get(ctx, client.ObjectKey{Namespace: p.Namespace, Name: childName(p)}, &d); err != nil {
		if client.IgnoreNotFound(err) == nil {
			return phase.Waitf(v1alpha1.ReasonRollingOut, rolloutLook, "the Deployment is being created")
		}
		return fmt.Errorf("read Deployment %q: %w", childName(p), err)
	}
	sc.deployment = &d
	if g := sc.inputs.group; g != nil && meta.IsStatusConditionTrue(g.Status.Conditions, v1alpha1.ConditionLapsed) {
		return phase.Stallf(v1alpha1.ReasonLapsed, "ConsumerGroup %q has lapsed and hands out nothing; its status says what to do", g.Name)
	}
	wanted := ptr.Deref(d.Spec.Replicas, 1)
	if sc.inputs.replicas != nil {
		wanted = *sc.inputs.replicas
	}
	sc.wanted = wanted
	// The cache may be older than what apply has just written, and the status of a Deployment older than its spec. Neither says anything about
	// the newest configuration, and who waits for this generation, such as helm --wait, must not be told of the one before.
	current, updated := d.Generation >= sc.written && d.Status.ObservedGeneration >= d.Generation, d.Status.UpdatedReplicas
	if !current {
		updated = 0
	}
	if current && done(&d, wanted) {
		return nil
	}
	message := fmt.Sprintf("%d of %d pods are ready, %d have the newest configuration", d.Status.ReadyReplicas, wanted, updated)
	var pods corev1.PodList
	if err := r.Live.List(ctx, &pods, client.InNamespace(p.Namespace), client.MatchingLabels(selectorLabels(p)), client.Limit(podsMax)); err != nil {
		return fmt.Errorf("read the pods: %w", err)
	}
	if t := diagnose(pods.Items, r.Clock.Now()); t != nil {
		if t.ip != "" {
			if words := whyNotReady(ctx, t.ip); words != "" {
				t.what, t.said = ": runs and is not ready; it says: ", words
			}
		}
		remember(p, t, r.Clock.Now())
		return phase.Waitf(v1alpha1.ReasonPodsFailing, rolloutLook, "%s. %s", message, t)
	}
	if !current {
		return phase.Waitf(v1alpha1.ReasonRollingOut, rolloutLook, "%s", message)
	}
	if refused := condition(&d, appsv1.DeploymentReplicaFailure); refused != nil && refused.Status == corev1.ConditionTrue {
		return phase.Stallf(v1alpha1.ReasonPodsFailing, "%s. Pods cannot be created: %s", message, refused.Message)
	}
	if progress := condition(&d, appsv1.DeploymentProgressing); progress != nil && progress.Status == corev1.ConditionFalse {
		return phase.Stallf(v1alpha1.ReasonPodsFailing, "%s. The rollout stands still: %s", message, progress.Message)
	}
	return phase.Waitf(v1alpha1.ReasonRollingOut, rolloutLook, "%s", message)
}

// remember keeps the trouble in status. What is said again is no news, unless a container has stopped once more.
func remember(p *v1alpha1.Processor, t *trouble, now time.Time) {
	text := t.said
	if text == "" {
		text = strings.TrimLeft(t.what, ":, ")
	}
	at := t.at
	if at.IsZero() {
		at = now
	}
	before := p.Status.LastError
	if before != nil && before.Pod == t.pod && before.Message == text && !t.at.After(before.Time.Time) {
		return
	}
	p.Status.LastError = &v1alpha1.PodError{Time: metav1.NewTime(at.Truncate(time.Second)), Pod: t.pod, Message: text}
}

// done says whether exactly the wanted pods run with the newest template, and are ready.
func done(d *appsv1.Deployment, replicas int32) bool {
	s := d.Status
	return d.Spec.Replicas != nil && *d.Spec.Replicas == replicas &&
		s.UpdatedReplicas == replicas && s.Replicas == replicas && s.AvailableReplicas == replicas
}

func condition(d *appsv1.Deployment, kind appsv1.DeploymentConditionType) *appsv1.DeploymentCondition {
	for i := range d.Status.Conditions {
		if d.Status.Conditions[i].Type == kind {
			return &d.Status.Conditions[i]
		}
	}
	return nil
}

// unreadyAfter is how long a running pod may take to become ready before it counts as trouble.
const unreadyAfter = 30 * time.Second

// normal are the reasons for which a container that just waits is not in trouble.
var normal = map[string]bool{"": true, "ContainerCreating": true, "PodInitializing": true}

// trouble is what keeps one pod from being ready.
type trouble struct {
	pod  string
	what string    // about the pod: for a sentence that begins with its name
	said string    // the pod's own words, or those of Kubernetes
	at   time.Time // when its container stopped; zero when it did not
	ip   string    // of a pod that runs and is not ready: it can be asked why
}

// String is the sentence.
func (t *trouble) String() string {
	if t.said == "" {
		return "Pod " + t.pod + t.what
	}
	return "Pod " + t.pod + t.what + t.said
}

// diagnose says what keeps pods from being ready, of the first that is in trouble; nil when they only need time.
func diagnose(pods []corev1.Pod, now time.Time) *trouble {
	for i := range pods {
		pod := &pods[i]
		if !pod.DeletionTimestamp.IsZero() {
			continue
		}
		for _, c := range pod.Status.Conditions {
			if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse && c.Reason == corev1.PodReasonUnschedulable {
				return &trouble{pod: pod.Name, what: " cannot be scheduled: ", said: c.Message}
			}
		}
		for _, c := range pod.Status.InitContainerStatuses {
			if t := containerTrouble(c, now); t != nil {
				t.pod, t.what = pod.Name, ", container "+c.Name+": "+t.what
				return t
			}
		}
		for _, c := range pod.Status.ContainerStatuses {
			t := containerTrouble(c, now)
			if t == nil {
				t = readyNoMore(pod, c)
			}
			if t != nil {
				t.pod, t.what = pod.Name, ": "+t.what
				if c.State.Running != nil && c.Name == container {
					t.ip = pod.Status.PodIP
				}
				return t
			}
		}
	}
	return nil
}

func containerTrouble(c corev1.ContainerStatus, now time.Time) *trouble {
	last := c.LastTerminationState.Terminated
	if c.State.Terminated != nil {
		last = c.State.Terminated
	}
	at := time.Time{}
	if last != nil {
		at = last.FinishedAt.Time
	}
	switch {
	case c.State.Waiting != nil && !normal[c.State.Waiting.Reason]:
		text := c.State.Waiting.Reason
		if m := said(last); m != "" {
			return &trouble{what: text + "; it said: ", said: m, at: at}
		}
		if c.State.Waiting.Message != "" {
			return &trouble{what: text + ": ", said: c.State.Waiting.Message}
		}
		return &trouble{what: text}
	case !c.Ready && last != nil && last.ExitCode != 0:
		return &trouble{what: fmt.Sprintf("stopped with exit code %d; it said: ", last.ExitCode), said: said(last), at: at}
	case c.State.Running != nil && !c.Ready && now.Sub(c.State.Running.StartedAt.Time) > unreadyAfter:
		return &trouble{what: fmt.Sprintf("runs since %s and is not ready; kubectl logs tells why", c.State.Running.StartedAt.UTC().Format(time.RFC3339))}
	}
	return nil
}

// readyNoMore tells that a container has been ready since it was started and is no more. Such a pod needs no time, and nothing rolls
// out: it lost something that it needs, such as its database.
func readyNoMore(pod *corev1.Pod, c corev1.ContainerStatus) *trouble {
	if c.State.Running == nil || c.Ready {
		return nil
	}
	for _, ready := range pod.Status.Conditions {
		if ready.Type == corev1.PodReady && ready.Status == corev1.ConditionFalse && ready.LastTransitionTime.After(c.State.Running.StartedAt.Time) {
			return &trouble{what: fmt.Sprintf("was ready until %s and is no more; kubectl logs tells why", ready.LastTransitionTime.UTC().Format(time.RFC3339))}
		}
	}
	return nil
}

// saidMax bounds the last words of a pod in a condition.
const saidMax = 400

// said is what the last line of a container's termination message says, which is the end of its log. Of a line in JSON, as
// processors write it, message and error are enough: the time in it would make each crash a new condition.
func said(t *corev1.ContainerStateTerminated) string {
	if t == nil {
		return ""
	}
	text := strings.TrimSpace(t.Message)
	if i := strings.LastIndexByte(text, '\n'); i >= 0 {
		text = text[i+1:]
	}
	var line struct {
		Msg   string `json:"msg"`
		Error string `json:"error"`
	}
	if json.Unmarshal([]byte(text), &line) == nil && line.Msg != "" {
		text = line.Msg
		if line.Error != "" {
			text += ": " + line.Error
		}
	}
	return shorten(text)
}

func shorten(text string) string {
	if len(text) > saidMax {
		text = strings.ToValidUTF8(text[:saidMax], "") + "…"
	}
	return text
}

// showLag copies the figures of the source's group. A Redis source is not measured from here.
func showLag(p *v1alpha1.Processor, group *v1alpha1.ConsumerGroup) {
	set := func(status metav1.ConditionStatus, reason, message string) {
		phase.Set(&p.Status.Conditions, p.Generation, v1alpha1.ConditionLagKnown, status, reason, message)
	}
	switch {
	case p.Spec.Source.Redis != nil:
		p.Status.Lag, p.Status.OldestMessageTime = nil, nil
		set(metav1.ConditionFalse, v1alpha1.ReasonRedisSource, "the manager does not connect to Redis; the metrics of the pods have the lag")
	case group == nil:
		set(metav1.ConditionFalse, v1alpha1.ReasonNotMeasured, "the ConsumerGroup is not known yet")
	default:
		c := meta.FindStatusCondition(group.Status.Conditions, v1alpha1.ConditionLagKnown)
		if c == nil {
			set(metav1.ConditionFalse, v1alpha1.ReasonNotMeasured, "the ConsumerGroup has not been measured yet")
			return
		}
		p.Status.Lag, p.Status.OldestMessageTime = group.Status.Lag, group.Status.OldestMessageTime
		set(c.Status, c.Reason, c.Message)
	}
}
