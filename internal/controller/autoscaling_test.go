package controller_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// autoscaled lets a Processor follow a backlog of ten messages for each pod, with short windows.
func autoscaled(least, most int32, options ...func(*v1alpha1.Autoscaling)) func(*v1alpha1.ProcessorSpec) {
	return func(p *v1alpha1.ProcessorSpec) {
		p.Autoscaling = &v1alpha1.Autoscaling{
			MinReplicas: &least, MaxReplicas: most, BacklogPerReplica: ptr.To[int64](10),
			StabilizationWindow: &metav1.Duration{Duration: time.Second}, Cooldown: &metav1.Duration{Duration: time.Second},
		}
		for _, o := range options {
			o(p.Autoscaling)
		}
	}
}

// orders makes a Stream and a ConsumerGroup on a database, and returns a connection to it.
func (w *world) orders(dsn string, options ...func(*v1alpha1.ConsumerGroupSpec)) *pgx.Conn {
	w.Helper()
	w.secret(appDB.Name, appDB.Key, dsn)
	w.create(newStream("orders", partitions(2)))
	g := newGroup("sink", "orders", options...)
	w.create(g)
	w.wantReady(g)
	w.want(g, v1alpha1.ConditionLagKnown, metav1.ConditionTrue, v1alpha1.ReasonMeasured)
	return w.sql(dsn)
}

func (w *world) publish(conn *pgx.Conn, n int) {
	w.Helper()
	w.exec(conn, `select millrace.publish('orders', to_jsonb(i), i::text) from generate_series(1, $1::int) i`, n)
}

// receive lets a member take messages, and returns its claim.
func (w *world) receive(conn *pgx.Conn, member string, n int) string {
	w.Helper()
	return scalar[string](w, conn, `select claim::text from millrace.receive('orders', 'sink', $1, $2, 600) limit 1`, member, n)
}

// wantPods waits until the Deployment of a Processor asks for that many pods.
func (w *world) wantPods(p *v1alpha1.Processor, n int32) {
	w.Helper()
	w.eventually(fmt.Sprintf("%d pods", n), func() error {
		if has := *w.deployment(p).Spec.Replicas; has != n {
			_ = suite.client.Get(w.Context(), key(p), p)
			return fmt.Errorf("the Deployment asks for %d; status: %+v", has, p.Status)
		}
		return nil
	})
}

func (w *world) wantScaling(p *v1alpha1.Processor, reason string, texts ...string) {
	w.Helper()
	status := metav1.ConditionTrue
	if reason == v1alpha1.ReasonLagUnknown {
		status = metav1.ConditionFalse
	}
	w.want(p, v1alpha1.ConditionAutoscalingActive, status, reason, texts...)
}

func (w *world) wantLimited(p *v1alpha1.Processor, reason string, texts ...string) {
	w.Helper()
	status := metav1.ConditionTrue
	if reason == v1alpha1.ReasonNotLimited {
		status = metav1.ConditionFalse
	}
	w.want(p, v1alpha1.ConditionScalingLimited, status, reason, texts...)
}

// Up with the backlog at once, to the maximum and no further, and down again when it is gone; all of it without a write to anything but the
// Deployment and status (rules 7 and 8).
func TestAutoscalerFollowsTheBacklog(t *testing.T) {
	w := newWorld(t)
	conn := w.orders(postgres.NewDatabase(t))
	w.readyDeployments()
	p := newProcessor("sink", "sink", autoscaled(1, 5))
	w.create(p)
	w.wantReady(p)
	w.wantScaling(p, v1alpha1.ReasonIdle)
	w.publish(conn, 35)
	w.wantPods(p, 4)
	w.wantScaling(p, v1alpha1.ReasonBacklog, "35 messages", "enough for 10")
	w.wantLimited(p, v1alpha1.ReasonNotLimited)
	w.wantEvent(p, v1alpha1.EventScaled, "from 1 to 4 pods: 35 messages")
	w.wantReady(p)
	if s := p.Status; s.DesiredReplicas != 4 || s.Replicas != 4 || s.Autoscaling == nil || s.Autoscaling.LastScaleTime.IsZero() {
		t.Errorf("status: %+v", s)
	}
	if out := w.kubectl("get", "prc", "sink", "-o", "wide"); !strings.Contains(out, "DESIRED") || !strings.Contains(out, "SCALING") || !strings.Contains(out, "Backlog") {
		t.Errorf("a person sees\n%s", out)
	}
	claim := w.receive(conn, "a", 30) // what is in flight counts
	w.publish(conn, 35)
	w.wantPods(p, 5)
	w.wantLimited(p, v1alpha1.ReasonMaxReplicas, "maxReplicas is 5")
	w.exec(conn, `select millrace.ack($1)`, claim)
	w.wantScaling(p, v1alpha1.ReasonBacklog, "40 messages")
	w.exec(conn, `select millrace.reset_group('orders', 'sink', 'Latest')`)
	w.wantPods(p, 1)
	w.wantLimited(p, v1alpha1.ReasonNotLimited)
	w.wantReady(p)

	if p.Generation != 1 {
		t.Errorf("the generation is %d: somebody wrote the spec", p.Generation)
	}
	for _, f := range p.ManagedFields {
		if f.Manager == "millrace" && f.Subresource != "status" {
			t.Errorf("the controller owns fields of the resource itself: %s", f.FieldsV1)
		}
	}
	for _, x := range suite.writes.in(w.namespace) {
		if strings.HasSuffix(x.path, "/processors/sink") || strings.HasSuffix(x.path, "/scale") {
			t.Errorf("a write to the resource: %s %s", x.method, x.path)
		}
	}
}

// The age of what waits brings pods although no figure changes: twice as many at most, and the next when the target has passed again.
func TestAutoscalerFollowsTheAge(t *testing.T) {
	w := newWorld(t)
	conn := w.orders(postgres.NewDatabase(t))
	w.readyDeployments()
	p := newProcessor("sink", "sink", autoscaled(1, 4, func(a *v1alpha1.Autoscaling) {
		a.BacklogPerReplica, a.MaxAge = nil, &metav1.Duration{Duration: time.Second}
	}))
	w.create(p)
	w.wantReady(p)
	w.publish(conn, 3)
	w.wantPods(p, 4)
	w.wantScaling(p, v1alpha1.ReasonAge)
	w.wantEvent(p, v1alpha1.EventScaled, "from 1 to 2 pods", "from 2 to 4 pods")
	// The version of the Deployment tells them apart, whichever version of the Processor the manager's cache showed each time.
	var events eventsv1.EventList
	if err := suite.client.List(t.Context(), &events, client.InNamespace(w.namespace)); err != nil {
		t.Fatal(err)
	}
	for _, e := range events.Items {
		if e.Reason == v1alpha1.EventScaled && (e.Related == nil || e.Related.Kind != "Deployment" || e.Related.ResourceVersion == "") {
			t.Errorf("%q is about %+v", e.Note, e.Related)
		}
	}
	w.exec(conn, `select millrace.reset_group('orders', 'sink', 'Latest')`)
	w.wantPods(p, 1)
}

func TestAutoscalerFollowsTheRate(t *testing.T) {
	w := newWorld(t)
	conn := w.orders(postgres.NewDatabase(t))
	w.readyDeployments()
	p := newProcessor("sink", "sink", autoscaled(1, 4, func(a *v1alpha1.Autoscaling) { a.BacklogPerReplica, a.RatePerReplica = nil, ptr.To[int64](1) }))
	w.create(p)
	w.wantReady(p)
	w.publish(conn, 1000)
	w.wantPods(p, 4)
	w.wantScaling(p, v1alpha1.ReasonRate)
	w.wantPods(p, 1) // the rate is that of the last readings
}

// Each partition of an Ordered group has one pod; more would have nothing to do.
func TestAutoscalerIsLimitedByPartitions(t *testing.T) {
	w := newWorld(t)
	conn := w.orders(postgres.NewDatabase(t), func(g *v1alpha1.ConsumerGroupSpec) { g.Mode = v1alpha1.ModeOrdered })
	w.readyDeployments()
	p := newProcessor("sink", "sink", autoscaled(1, 9))
	w.create(p)
	w.wantReady(p)
	w.publish(conn, 100)
	w.wantPods(p, 2)
	w.wantLimited(p, v1alpha1.ReasonPartitions, `Stream "orders" has 2 partitions`)
	w.wantEvent(p, v1alpha1.ReasonPartitions, "2 partitions")
	update(w, &v1alpha1.Stream{ObjectMeta: metav1.ObjectMeta{Name: "orders", Namespace: w.namespace}}, func(s *v1alpha1.Stream) { s.Spec.Partitions = 3 })
	w.wantPods(p, 3)
}

// The database says how many connections it has left, or the user does.
func TestAutoscalerIsLimitedByConnections(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	conn := w.orders(dsn)
	// A pod may open 7: two writers, four more, and one that listens. Five pods fit beside the connections of this test and of the manager,
	// of which there are one to five, and one of the five is for rolling updates.
	w.exec(conn, fmt.Sprintf(`alter database %q connection limit %d`, conn.Config().Database, 5*7+5))
	w.readyDeployments()
	p := newProcessor("sink", "sink", autoscaled(1, 9))
	w.create(p)
	w.wantReady(p)
	w.publish(conn, 1000)
	w.wantPods(p, 4)
	w.wantLimited(p, v1alpha1.ReasonConnections, "the limit of the database", "a pod may open 7")
	w.wantEvent(p, v1alpha1.ReasonConnections)
	update(w, p, func(p *v1alpha1.Processor) { p.Spec.Autoscaling.MaxConnections = ptr.To[int32](60) })
	w.wantPods(p, 8)
	w.wantLimited(p, v1alpha1.ReasonConnections, "maxConnections is 60")
}

// Without figures nothing moves, whatever was known before; what spec says is obeyed all the same.
func TestAutoscalerHoldsWhileTheLagIsUnknown(t *testing.T) {
	w := newWorld(t)
	server := postgres.NewServer(t, postgres.Options{})
	conn := w.orders(server.DSN("postgres"))
	w.readyDeployments()
	p := newProcessor("sink", "sink", autoscaled(0, 9))
	w.create(p)
	w.publish(conn, 30)
	w.wantPods(p, 3)
	w.wantReady(p)
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	w.wantScaling(p, v1alpha1.ReasonLagUnknown, "3 pods stay until the lag is known")
	w.wantEvent(p, v1alpha1.ReasonLagUnknown)
	update(w, p, func(p *v1alpha1.Processor) { p.Spec.Autoscaling.MaxReplicas = 8 }) // a reconcile, after every window
	w.wantScaling(p, v1alpha1.ReasonLagUnknown)
	w.wantPods(p, 3)
	update(w, p, func(p *v1alpha1.Processor) { p.Spec.Autoscaling.MaxReplicas = 2 })
	w.wantPods(p, 2)
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.wantScaling(p, v1alpha1.ReasonBacklog)
	w.wantLimited(p, v1alpha1.ReasonMaxReplicas)
	w.wantPods(p, 2)
}

// To zero when nothing is waiting, held or due for a retry for the whole cooldown, and back with the first message.
func TestAutoscalerScalesToZeroAndBack(t *testing.T) {
	w := newWorld(t)
	conn := w.orders(postgres.NewDatabase(t))
	w.readyDeployments()
	p := newProcessor("sink", "sink", autoscaled(0, 5))
	w.create(p)
	w.want(p, v1alpha1.ConditionReady, metav1.ConditionTrue, v1alpha1.ReasonScaledToZero, "the next message brings one")
	w.wantPods(p, 0)
	start := time.Now()
	w.publish(conn, 1)
	w.wantPods(p, 1)
	t.Logf("the first message brought a pod after %s", time.Since(start).Round(time.Millisecond))
	claim := w.receive(conn, "a", 1)
	w.exec(conn, `select millrace.nack($1, array[1], 3600, 'later')`, claim)
	w.eventually("the retry is known", func() error {
		var g v1alpha1.ConsumerGroup
		if err := suite.client.Get(t.Context(), clientKey(w, "sink"), &g); err != nil || ptr.Deref(g.Status.Retrying, 0) != 1 {
			return fmt.Errorf("status %+v, error %w", g.Status, err)
		}
		return nil
	})
	// What waits for another delivery keeps the last pod, for longer than the cooldown.
	update(w, p, func(p *v1alpha1.Processor) { p.Spec.Autoscaling.MaxReplicas = 6 })
	w.wantScaling(p, v1alpha1.ReasonIdle, "something waits")
	end := time.Now().Add(2 * time.Second)
	w.eventually("the cooldown is over", func() error {
		if n := *w.deployment(p).Spec.Replicas; n != 1 {
			t.Fatalf("%d pods while a message waits for a retry", n)
		}
		if time.Now().Before(end) {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	w.exec(conn, `select millrace.reset_group('orders', 'sink', 'Latest')`)
	w.wantPods(p, 0)
	w.wantEvent(p, v1alpha1.EventScaled, "from 0 to 1 pod", "from 1 to 0 pods: nothing has been waiting for 1s")
	w.want(p, v1alpha1.ConditionReady, metav1.ConditionTrue, v1alpha1.ReasonScaledToZero)
}

// While pods have the old template nobody knows what the new ones will do.
func TestAutoscalerHoldsDuringARollout(t *testing.T) {
	w := newWorld(t)
	conn := w.orders(postgres.NewDatabase(t))
	p := newProcessor("sink", "sink", autoscaled(2, 9))
	w.create(p)
	status := func(s appsv1.DeploymentStatus) {
		t.Helper()
		w.eventually("status", func() error {
			d := w.deployment(p)
			s.ObservedGeneration = d.Generation
			d.Status = s
			return suite.client.Status().Update(t.Context(), d)
		})
	}
	w.wantPods(p, 2)
	status(appsv1.DeploymentStatus{Replicas: 3, UpdatedReplicas: 1, ReadyReplicas: 2, AvailableReplicas: 2})
	w.publish(conn, 90)
	w.wantScaling(p, v1alpha1.ReasonHeldByRollout, "newest configuration")
	status(appsv1.DeploymentStatus{Replicas: 2, UpdatedReplicas: 2, ReadyReplicas: 1, AvailableReplicas: 1})
	w.wantScaling(p, v1alpha1.ReasonHeldByRollout, "until all of them are available, then there will be 9")
	w.wantPods(p, 2)
	w.readyDeployments() // again and again: other tests may have taken connections, so that it goes in two steps
	w.wantPods(p, 9)
}

// Kubernetes removes the pods with the lowest cost first: those that hold nothing.
func TestAutoscalerRemovesIdlePodsFirst(t *testing.T) {
	w := newWorld(t)
	conn := w.orders(postgres.NewDatabase(t))
	w.readyDeployments()
	p := newProcessor("sink", "sink", autoscaled(1, 9))
	w.create(p)
	w.publish(conn, 40)
	w.wantPods(p, 4)
	template := w.deployment(p).Spec.Template
	for _, name := range []string{"idle", "busy", "little", "stale"} {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: template.Labels}, Spec: template.Spec}
		if name == "stale" {
			pod.Annotations = map[string]string{corev1.PodDeletionCost: "99"}
		}
		w.create(pod)
	}
	claims := []string{w.receive(conn, "busy", 8), w.receive(conn, "little", 2), w.receive(conn, "idle", 30)}
	w.exec(conn, `select millrace.ack($1)`, claims[2])
	w.wantPods(p, 1)
	for name, want := range map[string]string{"idle": "", "busy": "8", "little": "2", "stale": "0"} {
		var pod corev1.Pod
		if err := suite.client.Get(t.Context(), clientKey(w, name), &pod); err != nil {
			t.Fatal(err)
		}
		if has := pod.Annotations[corev1.PodDeletionCost]; has != want {
			t.Errorf("pod %s costs %q to remove, want %q", name, has, want)
		}
	}
}

// Without replicas and autoscaling the number of pods belongs to whoever scales the Deployment, such as an HPA.
func TestTheDeploymentMayBeScaledByOthers(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.secret("telemetry-redis", "url", redisURL)
	w.readyDeployments()
	p := newProcessor("telemetry", "", fromRedis)
	w.create(p)
	w.wantReady(p)
	w.wantPods(p, 1)
	w.kubectl("scale", "deployment/telemetry-processor", "--replicas=3")
	w.want(p, v1alpha1.ConditionReady, metav1.ConditionTrue, v1alpha1.ReasonReady, "3 of 3 pods are ready")
	update(w, p, func(p *v1alpha1.Processor) { p.Spec.Batch.MaxRows = 7 }) // an apply of everything that is ours
	w.eventually("the pods have the new configuration", func() error {
		d := w.deployment(p)
		for _, f := range d.ManagedFields {
			if f.Manager == "millrace" && strings.Contains(f.FieldsV1.String(), "f:replicas") && f.Subresource == "" {
				return fmt.Errorf("the controller owns replicas: %s", f.FieldsV1)
			}
		}
		if d.Generation < 3 {
			return fmt.Errorf("generation %d", d.Generation)
		}
		return nil
	})
	w.wantPods(p, 3)
	if p.Status.DesiredReplicas != 3 {
		t.Errorf("status: %+v", p.Status)
	}
	if meta.FindStatusCondition(p.Status.Conditions, v1alpha1.ConditionAutoscalingActive) != nil {
		t.Error("a condition of the autoscaler, which does nothing here")
	}
	// A number in spec wins.
	update(w, p, func(p *v1alpha1.Processor) { p.Spec.Replicas = ptr.To[int32](2) })
	w.wantPods(p, 2)
}

// What an HPA does to a Processor: it reads the scale, and writes it. A Processor that scales itself refuses.
func TestTheScaleSubresourceIsForOthers(t *testing.T) {
	w := newWorld(t)
	w.orders(postgres.NewDatabase(t))
	w.readyDeployments()
	p := newProcessor("sink", "sink", func(p *v1alpha1.ProcessorSpec) { p.Replicas = ptr.To[int32](1) })
	w.create(p)
	w.wantReady(p)
	scale := w.kubectl("get", "--raw", "/apis/millrace.dev/v1alpha1/namespaces/"+w.namespace+"/processors/sink/scale")
	for _, text := range []string{`"spec":{"replicas":1}`, `"selector":"app.kubernetes.io/name=millrace-processor,millrace.dev/processor=sink"`} {
		if !strings.Contains(scale, text) {
			t.Errorf("the scale lacks %s: %s", text, scale)
		}
	}
	w.kubectl("scale", "prc/sink", "--replicas=3")
	w.wantPods(p, 3)
	update(w, p, func(p *v1alpha1.Processor) {
		p.Spec.Replicas = nil
		autoscaled(1, 3)(&p.Spec)
	})
	w.wantScaling(p, v1alpha1.ReasonIdle)
	w.wantPods(p, 1)
	stdout, stderr, err := suite.kubectl.Run("--namespace", w.namespace, "scale", "prc/sink", "--replicas=2")
	if err == nil {
		t.Errorf("kubectl scale of an autoscaled Processor succeeds: %v", stdout)
	}
	text := make([]byte, 4096)
	n, _ := stderr.Read(text)
	if !strings.Contains(string(text[:n]), "write replicas or autoscaling, not both") {
		t.Errorf("the API server says: %s", text[:n])
	}
	if events := w.events(p, v1alpha1.EventScaled); !slices.ContainsFunc(events, func(e string) bool { return strings.Contains(e, "from 3 to") }) {
		t.Errorf("the autoscaler did not begin with the pods that it found: %v", events)
	}
}

// A suspended Processor keeps its pods, whatever waits.
func TestAutoscalerOfASuspendedProcessorKeepsStill(t *testing.T) {
	w := newWorld(t)
	conn := w.orders(postgres.NewDatabase(t))
	w.readyDeployments()
	p := newProcessor("sink", "sink", autoscaled(1, 9))
	w.create(p)
	w.wantReady(p)
	update(w, p, func(p *v1alpha1.Processor) { p.Spec.Suspend = true })
	w.want(p, v1alpha1.ConditionAutoscalingActive, metav1.ConditionFalse, v1alpha1.ReasonSuspended)
	w.publish(conn, 90)
	w.eventually("the lag is known", func() error {
		var g v1alpha1.ConsumerGroup
		if err := suite.client.Get(t.Context(), clientKey(w, "sink"), &g); err != nil || ptr.Deref(g.Status.Lag, 0) != 90 {
			return fmt.Errorf("status %+v, error %w", g.Status, err)
		}
		return nil
	})
	w.wantPods(p, 1)
	update(w, p, func(p *v1alpha1.Processor) { p.Spec.Suspend = false })
	w.wantPods(p, 9)
}
