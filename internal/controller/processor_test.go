package controller_test

import (
	"fmt"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

const redisURL = "redis://default:redis-password-1234@redis:6379/0"

func key(o client.Object) client.ObjectKey { return client.ObjectKeyFromObject(o) }

// deployment waits for the Deployment of a Processor.
func (w *world) deployment(p *v1alpha1.Processor) *appsv1.Deployment {
	w.Helper()
	d := &appsv1.Deployment{}
	w.eventually("the Deployment exists", func() error {
		return suite.client.Get(w.Context(), types.NamespacedName{Namespace: w.namespace, Name: p.Name + "-processor"}, d)
	})
	return d
}

func TestProcessorFromGroupToTable(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	w.readyDeployments()
	p := newProcessor("orders-sink", "sink", func(p *v1alpha1.ProcessorSpec) { p.Replicas = ptr.To[int32](2) })
	w.create(p) // before what it refers to
	w.wantNotReady(p, v1alpha1.ReasonConsumerGroupMissing, `ConsumerGroup "sink"`)
	w.create(newGroup("sink", "orders"))
	w.create(newStream("orders"))
	w.wantReady(p)
	if p.Status.Replicas != 2 || p.Status.ReadyReplicas != 2 || p.Status.Selector == "" {
		t.Errorf("status: %+v", p.Status)
	}

	var cm corev1.ConfigMap
	if err := suite.client.Get(t.Context(), types.NamespacedName{Namespace: w.namespace, Name: "orders-sink-processor"}, &cm); err != nil {
		t.Fatal(err)
	}
	c, err := config.Parse([]byte(cm.Data["processor.yaml"]))
	if err != nil {
		t.Fatalf("the processor would refuse its file: %v\n%s", err, cm.Data["processor.yaml"])
	}
	if g := c.Source.ConsumerGroup; g.Stream != "orders" || g.Group != "sink" || g.Mode != config.ModeShared {
		t.Errorf("the source is %+v", g)
	}

	d := w.deployment(p)
	if !metav1.IsControlledBy(d, p) {
		t.Error("the Deployment would stay behind when the Processor is deleted")
	}
	pod := d.Spec.Template.Spec
	env := map[string]string{}
	for _, e := range pod.Containers[0].Env {
		env[e.Name] = e.Value
	}
	// The same file for both ends: the ack joins the sink's transaction.
	const file = "/run/millrace/secrets/app-db/dsn"
	if env[config.EnvSourceDatabaseURL+"_FILE"] != file || env[config.EnvSinkDatabaseURL+"_FILE"] != file || len(env) != 2 {
		t.Errorf("the environment is %v", env)
	}
	if drain := int64(15); *pod.TerminationGracePeriodSeconds <= drain {
		t.Errorf("the grace period of %ds is not longer than the drain of %ds", *pod.TerminationGracePeriodSeconds, drain)
	}
	if u := d.Spec.Strategy.RollingUpdate; u.MaxSurge.IntValue() != 1 || u.MaxUnavailable.IntValue() != 0 {
		t.Errorf("rolling update: %+v", u)
	}
	if pod.Containers[0].Image != processorImage || pod.Containers[0].ImagePullPolicy != corev1.PullNever {
		t.Errorf("image %s, pull policy %s", pod.Containers[0].Image, pod.Containers[0].ImagePullPolicy)
	}
	var account corev1.ServiceAccount
	if err := suite.client.Get(t.Context(), types.NamespacedName{Namespace: w.namespace, Name: "orders-sink-processor"}, &account); err != nil {
		t.Error(err)
	}
	var budget policyv1.PodDisruptionBudget
	if err := suite.client.Get(t.Context(), types.NamespacedName{Namespace: w.namespace, Name: "orders-sink-processor"}, &budget); err != nil {
		t.Error(err)
	}
	w.wantNoLeak(password(t, dsn))
}

// The API server itself says whether a pod meets the restricted Pod Security Standard.
func TestProcessorPodsMeetTheRestrictedStandard(t *testing.T) {
	w := newWorld(t)
	w.kubectl("label", "namespace", w.namespace, "pod-security.kubernetes.io/enforce=restricted")
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.secret("telemetry-redis", "url", redisURL)
	p := newProcessor("telemetry", "", fromRedis)
	w.create(p)
	d := w.deployment(p)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "probe", Labels: d.Spec.Template.Labels, Annotations: d.Spec.Template.Annotations},
		Spec:       d.Spec.Template.Spec,
	}
	w.create(pod)
	bad := pod.DeepCopy()
	bad.ObjectMeta = metav1.ObjectMeta{Name: "bad", Namespace: w.namespace}
	bad.Spec.Containers[0].SecurityContext.AllowPrivilegeEscalation = ptr.To(true)
	if err := suite.client.Create(t.Context(), bad); err == nil {
		t.Error("the standard is not enforced, so this test says nothing")
	}
}

func TestProcessorFromRedisNeedsItsOwnDatabaseSecret(t *testing.T) {
	w := newWorld(t)
	w.secret("telemetry-redis", "url", redisURL)
	p := newProcessor("telemetry", "", fromRedis, func(p *v1alpha1.ProcessorSpec) { p.Sink.Table.DatabaseSecretRef = nil })
	w.create(p)
	w.wantNotReady(p, v1alpha1.ReasonDatabaseSecretRefRequired, "spec.sink.table.databaseSecretRef")
	update(w, p, func(p *v1alpha1.Processor) { p.Spec.Sink.Table.DatabaseSecretRef = ptr.To(appDB) })
	w.wantNotReady(p, v1alpha1.ReasonSecretMissing, appDB.Name)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.readyDeployments()
	w.wantReady(p)
	w.want(p, v1alpha1.ConditionLagKnown, metav1.ConditionFalse, v1alpha1.ReasonRedisSource)
	w.wantNoLeak("redis-password-1234")
}

func TestProcessorScales(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.secret("telemetry-redis", "url", redisURL)
	w.readyDeployments()
	p := newProcessor("telemetry", "", fromRedis)
	w.create(p)
	w.wantReady(p)
	if d := w.deployment(p); *d.Spec.Replicas != 1 {
		t.Errorf("without spec.replicas there are %d pods", *d.Spec.Replicas)
	}
	w.kubectl("scale", "prc/telemetry", "--replicas=3")
	w.eventually("three pods", func() error {
		if n := *w.deployment(p).Spec.Replicas; n != 3 {
			return fmt.Errorf("there are %d", n)
		}
		return nil
	})
	w.wantReady(p)
	w.kubectl("scale", "prc/telemetry", "--replicas=0")
	w.want(p, v1alpha1.ConditionReady, metav1.ConditionTrue, v1alpha1.ReasonScaledToZero)
}

// Pods read a rotated password from its file, so only where a Secret leads is a reason to roll.
func TestProcessorRollsWhenASecretLeadsElsewhere(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.secret("telemetry-redis", "url", redisURL)
	w.readyDeployments()
	p := newProcessor("telemetry", "", fromRedis)
	w.create(p)
	w.wantReady(p)
	before := w.deployment(p)
	w.secret("telemetry-redis", "url", strings.Replace(redisURL, "1234", "5678", 1))
	w.secret("telemetry-redis", "url", strings.Replace(redisURL, "@redis:", "@elsewhere:", 1))
	w.eventually("the pods roll", func() error {
		after := w.deployment(p)
		if after.Spec.Template.Annotations[v1alpha1.AnnotationSecretHash] == before.Spec.Template.Annotations[v1alpha1.AnnotationSecretHash] {
			return fmt.Errorf("the annotation is as it was")
		}
		if after.Spec.Template.Annotations[v1alpha1.AnnotationConfigHash] != before.Spec.Template.Annotations[v1alpha1.AnnotationConfigHash] {
			return fmt.Errorf("the configuration changed with the Secret")
		}
		if after.Generation != before.Generation+1 {
			return fmt.Errorf("the Deployment changed %d times; a password is no reason", after.Generation-before.Generation)
		}
		return nil
	})
	w.wantNoLeak("redis-password-1234", "redis-password-5678")
}

// What someone changes in our fields comes back; what others own stays.
func TestProcessorOwnsItsFieldsAndNoOthers(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.secret("telemetry-redis", "url", redisURL)
	w.readyDeployments()
	p := newProcessor("telemetry", "", fromRedis)
	w.create(p)
	w.wantReady(p)
	d := w.deployment(p)
	update(w, d, func(d *appsv1.Deployment) {
		d.Annotations = map[string]string{"someone": "else"}
		d.Spec.Template.Spec.Containers[0].Image = "docker.io/evil/image:1"
	})
	w.eventually("the image is ours again", func() error {
		if image := w.deployment(p).Spec.Template.Spec.Containers[0].Image; image != processorImage {
			return fmt.Errorf("it is %s", image)
		}
		return nil
	})
	if d := w.deployment(p); d.Annotations["someone"] != "else" {
		t.Errorf("the annotation of someone else is gone: %v", d.Annotations)
	}
}

func TestProcessorLeavesAForeignDeploymentAlone(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.secret("telemetry-redis", "url", redisURL)
	labels := map[string]string{"app": "mine"}
	foreign := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "telemetry-processor"},
		Spec: appsv1.DeploymentSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "mine", Image: "docker.io/my/image:1"}}},
			},
		},
	}
	w.create(foreign)
	p := newProcessor("telemetry", "", fromRedis)
	w.create(p)
	w.wantNotReady(p, v1alpha1.ReasonNameTaken, "telemetry-processor")
	if d := w.deployment(p); d.Spec.Template.Spec.Containers[0].Image != "docker.io/my/image:1" || d.Generation != 1 {
		t.Errorf("the Deployment of someone else was changed: %+v", d.Spec.Template.Spec.Containers)
	}
}

// The last good configuration goes on running while spec holds a bad one.
func TestProcessorKeepsTheLastGoodConfiguration(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.secret("telemetry-redis", "url", redisURL)
	w.readyDeployments()
	p := newProcessor("telemetry", "", fromRedis)
	w.create(p)
	w.wantReady(p)
	before := w.deployment(p)
	update(w, p, func(p *v1alpha1.Processor) { p.Spec.Mapping.Columns[1].Type = "monney" })
	w.wantNotReady(p, v1alpha1.ReasonInvalidConfiguration, "spec.mapping.columns[1].type", "monney")
	if after := w.deployment(p); after.Generation != before.Generation {
		t.Error("a bad configuration reached the Deployment")
	}
	if p.Status.ReadyReplicas != 1 {
		t.Errorf("status forgets the pods that run: %+v", p.Status)
	}
}

// A pod that fails is quoted, so that the person on call needs no second command.
func TestProcessorTellsWhyItsPodsFail(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.secret("telemetry-redis", "url", redisURL)
	p := newProcessor("telemetry", "", fromRedis)
	w.create(p)
	w.wantNotReady(p, v1alpha1.ReasonRollingOut, "0 of 1 pods are ready")
	d := w.deployment(p)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "telemetry-1", Labels: d.Spec.Template.Labels},
		Spec:       d.Spec.Template.Spec,
	}
	w.create(pod)
	pod.Status = corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{{
		Name: "processor", RestartCount: 3,
		State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff", Message: "back-off 40s"}},
		LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{
			ExitCode: 1, Message: "starting\ntable public.orders has no column amount",
		}},
	}}}
	if err := suite.client.Status().Update(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	w.wantNotReady(p, v1alpha1.ReasonPodsFailing, "CrashLoopBackOff", "table public.orders has no column amount")
}

func TestProcessorShowsTheLagOfItsGroup(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	w.readyDeployments()
	p := newProcessor("sink", "sink")
	w.create(newStream("orders"))
	w.create(newGroup("sink", "orders"))
	w.create(p)
	w.wantReady(p)
	w.exec(w.sql(dsn), `select millrace.publish('orders', to_jsonb(i)) from generate_series(1, 7) i`)
	w.eventually("lag is 7", func() error {
		if err := suite.client.Get(t.Context(), key(p), p); err != nil {
			return err
		}
		if p.Status.Lag == nil || *p.Status.Lag != 7 {
			return fmt.Errorf("it is %v", p.Status.Lag)
		}
		return nil
	})
}
