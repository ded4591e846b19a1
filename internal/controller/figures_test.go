package controller_test

import (
	"fmt"
	"maps"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// A group becomes Ready, and its first figures come a moment later, when the cache still has the status from before. Writing
// figures on top of that one would take Ready back until the next verification.
func TestFiguresAreNotWrittenOverNewerStatus(t *testing.T) {
	w := newWorld(t)
	g := newGroup("orders-sink", "orders", func(g *v1alpha1.ConsumerGroupSpec) { g.Suspend = true }) // the manager keeps still
	w.create(g)
	w.want(g, v1alpha1.ConditionPaused, metav1.ConditionTrue, v1alpha1.ReasonSuspended)
	cached, ready := g.DeepCopy(), g.DeepCopy()
	phase.Summarize(&ready.Status.Conditions, g.Generation, nil, phase.Ready{Message: "done"})
	if err := phase.WriteStatus(t.Context(), suite.client, suite.client, g, ready); err != nil {
		t.Fatal(err)
	}

	figures := cached.DeepCopy()
	figures.Status.Lag = ptr.To[int64](7)
	if err := phase.WriteFigures(t.Context(), suite.client, cached, figures); !apierrors.IsConflict(err) {
		t.Errorf("writing figures over newer status: %v, want a conflict", err)
	}
	w.want(g, v1alpha1.ConditionReady, metav1.ConditionTrue, v1alpha1.ReasonReady, "done")

	figures = g.DeepCopy()
	figures.Status.Lag = ptr.To[int64](7)
	if err := phase.WriteFigures(t.Context(), suite.client, g, figures); err != nil {
		t.Fatal(err)
	}
	w.want(g, v1alpha1.ConditionReady, metav1.ConditionTrue, v1alpha1.ReasonReady, "done")
	if g.Status.Lag == nil || *g.Status.Lag != 7 {
		t.Errorf("lag is %v, want 7", g.Status.Lag)
	}
}

// A status is written although somebody has changed the resource meanwhile, but never to another one that has its name: a plan, for one, would be approved
// under a hash that is not its own.
func TestStatusIsWrittenToTheResourceThatItIsOf(t *testing.T) {
	w := newWorld(t)
	suspended := func() *v1alpha1.Stream {
		s := newStream("orders", func(s *v1alpha1.StreamSpec) { s.Suspend = true }) // the manager keeps still
		w.create(s)
		w.want(s, v1alpha1.ConditionPaused, metav1.ConditionTrue, v1alpha1.ReasonSuspended)
		return s
	}
	first := suspended()
	cached, planned := first.DeepCopy(), first.DeepCopy()
	planned.Status.Plan = &v1alpha1.PlannedChange{Hash: "one"}
	w.kubectl("annotate", "stream", "orders", "a=b")
	if err := phase.WriteStatus(t.Context(), suite.client, suite.client, cached, planned); err != nil {
		t.Fatal(err)
	}
	if err := suite.client.Get(t.Context(), key(first), first); err != nil {
		t.Fatal(err)
	}
	if p := first.Status.Plan; p == nil || p.Hash != "one" || first.Annotations["a"] != "b" {
		t.Errorf("the plan of %v is %+v", first.Annotations, p)
	}

	if err := suite.client.Delete(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	w.wantGone(first)
	if err := phase.WriteStatus(t.Context(), suite.client, suite.client, cached, planned); err != nil {
		t.Errorf("writing the status of what is gone: %v", err)
	}
	second := suspended()
	if err := phase.WriteStatus(t.Context(), suite.client, suite.client, cached, planned); err != nil {
		t.Errorf("writing the status of what was gone: %v", err)
	}
	if err := suite.client.Get(t.Context(), key(second), second); err != nil {
		t.Fatal(err)
	}
	if p := second.Status.Plan; p != nil {
		t.Errorf("another one has the plan %+v", p)
	}
}

// What a person on call asks of a group: how much waits, since when, who holds what, how often it failed, what it said, and whether it moves.
func TestAGroupAnswersAPersonOnCall(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s, g := newStream("orders", partitions(4)), newGroup("billing", "orders")
	ordered := newGroup("audit", "orders", func(g *v1alpha1.ConsumerGroupSpec) { g.Mode, g.FailurePolicy = v1alpha1.ModeOrdered, "Park" })
	for _, o := range []object{s, g, ordered} {
		w.create(o)
		w.wantReady(o)
	}
	db := w.sql(dsn)
	w.exec(db, `select millrace.publish('orders', to_jsonb(i), 'k' || i) from generate_series(1, 30) i`)
	claim := scalar[string](w, db, `select max(claim) from millrace.receive('orders', 'billing', 'worker-1', 10)`)
	w.exec(db, `select millrace.dead_letter($1, array[1], 'no such customer')`, claim)
	w.exec(db, `select millrace.nack($1, array[2, 3], 3600, 'the bank is closed')`, claim)
	held := scalar[string](w, db, `select max(claim) from millrace.receive('orders', 'audit', 'auditor-1', 5)`)

	w.eventually("the figures of billing", func() error {
		if err := suite.client.Get(t.Context(), key(g), g); err != nil {
			return err
		}
		st := g.Status
		want := v1alpha1.ConsumerGroupStatus{Lag: ptr.To[int64](20), InFlight: ptr.To[int64](7), Retrying: ptr.To[int64](2), DeadLetters: ptr.To[int64](1),
			Deliveries: ptr.To[int32](1), Holders: []v1alpha1.Holder{{Member: "worker-1", Messages: 7}}}
		has := v1alpha1.ConsumerGroupStatus{Lag: st.Lag, InFlight: st.InFlight, Retrying: st.Retrying, DeadLetters: st.DeadLetters, Deliveries: st.Deliveries,
			Holders: st.Holders}
		if !equality.Semantic.DeepEqual(has, want) || st.OldestMessageTime == nil || st.LastError == nil || st.LastError.Message != "the bank is closed" {
			return fmt.Errorf("%+v", st)
		}
		// The messages came after the first reading, so this is their rate.
		if st.PublishedPerMinute == nil || *st.PublishedPerMinute == 0 || st.SettledPerMinute == nil || *st.SettledPerMinute == 0 {
			return fmt.Errorf("rates: %v in, %v out", st.PublishedPerMinute, st.SettledPerMinute)
		}
		return nil
	})
	if age := time.Since(g.Status.LastError.Time.Time); age < -time.Second || age > deadline {
		t.Errorf("the error is %s old", age)
	}
	w.eventually("the figures of audit", func() error {
		if err := suite.client.Get(t.Context(), key(ordered), ordered); err != nil {
			return err
		}
		if h := ordered.Status.Holders; len(h) != 1 || h[0] != (v1alpha1.Holder{Member: "auditor-1", Partitions: "0-3", Messages: 5}) {
			return fmt.Errorf("holders %+v", h)
		}
		return nil
	})
	w.wantEvent(g, v1alpha1.EventDeadLetters, "select * from millrace.dead_letters('orders', 'billing')")
	// audit's messages are held, and nobody acks them: they come again.
	w.want(ordered, v1alpha1.ConditionConsuming, metav1.ConditionTrue, v1alpha1.ReasonMoving)
	w.exec(db, `select millrace.ack($1)`, held)
	for range 5 {
		w.exec(db, `select millrace.nack(claim, array[position], 0, 'not balanced') from millrace.receive('orders', 'audit', 'auditor-1', 1)`)
	}
	w.want(ordered, v1alpha1.ConditionConsuming, metav1.ConditionFalse, v1alpha1.ReasonMessageFails, "handed out again and again", "not balanced")
	w.wantEvent(ordered, v1alpha1.ReasonMessageFails, "not balanced")
	t.Logf("$ kubectl get millrace\n%s", w.kubectl("get", "millrace"))
	t.Logf("$ kubectl get millrace -o wide\n%s", w.kubectl("get", "millrace", "-o", "wide"))
	t.Logf("$ kubectl describe cg billing\n%s", w.kubectl("describe", "cg", "billing"))

	// Settled: nobody holds anything, and the rates end with the traffic.
	w.exec(db, `select millrace.ack($1)`, claim)
	w.want(g, v1alpha1.ConditionConsuming, metav1.ConditionFalse, v1alpha1.ReasonNobodyReceives, "See that the group's consumers run")
	w.wantEvent(g, v1alpha1.ReasonNobodyReceives, "kubectl get processors")
	w.eventually("the end of the traffic", func() error {
		if err := suite.client.Get(t.Context(), key(g), g); err != nil {
			return err
		}
		st := g.Status
		if len(st.Holders) != 0 || *st.InFlight != 0 || *st.PublishedPerMinute != 0 || *st.SettledPerMinute != 0 {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
}

// wantMetrics waits until the manager exports these metrics of a resource with these values.
func (w *world) wantMetrics(o object, want map[string]float64) {
	w.Helper()
	w.eventually("the metrics of "+o.GetName(), func() error {
		families, err := suite.metrics.Gather()
		if err != nil {
			return err
		}
		got := map[string]float64{}
		for _, family := range families {
			for _, m := range family.GetMetric() {
				labels := map[string]string{}
				for _, l := range m.GetLabel() {
					labels[l.GetName()] = l.GetValue()
				}
				if _, asked := want[family.GetName()]; asked && labels["namespace"] == o.GetNamespace() && labels["name"] == o.GetName() {
					got[family.GetName()] = m.GetGauge().GetValue()
				}
			}
		}
		if !maps.Equal(got, want) {
			return fmt.Errorf("%v, want %v", got, want)
		}
		return nil
	})
}

// Messages that nobody handles are kept, counted and told of: a group for unrouted messages with a warning size.
func TestABacklogIsWarnedOfOnce(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders")
	billing := newGroup("billing", "orders", func(g *v1alpha1.ConsumerGroupSpec) {
		g.WarningSize = ptr.To[int64](10)
		g.Filter = &v1alpha1.Filter{Headers: map[string]v1alpha1.HeaderValue{"to": {Raw: []byte(`["billing","invoices"]`)}}, WithoutHeaders: []string{"domain"}}
	})
	nobody := newGroup("nobody", "orders", func(g *v1alpha1.ConsumerGroupSpec) {
		g.WarningSize = ptr.To[int64](1)
		g.Filter = &v1alpha1.Filter{Unrouted: true}
	})
	for _, o := range []object{s, billing, nobody} {
		w.create(o)
		w.wantReady(o)
	}
	w.want(billing, v1alpha1.ConditionBacklogHigh, metav1.ConditionFalse, v1alpha1.ReasonBelowWarningSize)
	db := w.sql(dsn)
	publish := func(to string, n int) {
		w.exec(db, `select millrace.publish('orders', '{}', null, jsonb_build_object('to', $1::text)) from generate_series(1, $2)`, to, n)
	}
	settle := func(n int) {
		w.exec(db, `select millrace.ack(max(claim)) from millrace.receive('orders', 'billing', 'm', $1)`, n)
	}
	queued := func(g *v1alpha1.ConsumerGroup, n int64) {
		t.Helper()
		w.eventually(fmt.Sprintf("%d wait in %s", n, g.Name), func() error {
			if err := suite.client.Get(t.Context(), key(g), g); err != nil {
				return err
			}
			if g.Status.Queued == nil || *g.Status.Queued != n {
				return fmt.Errorf("%+v", g.Status)
			}
			return nil
		})
	}
	publish("billing", 6)
	publish("invoices", 4)
	w.want(billing, v1alpha1.ConditionBacklogHigh, metav1.ConditionTrue, v1alpha1.ReasonAboveWarningSize, "at least as many messages wait as spec.warningSize says, which is 10")
	w.want(billing, v1alpha1.ConditionReady, metav1.ConditionTrue, v1alpha1.ReasonReady)
	w.wantMetrics(billing, map[string]float64{"millrace_group_queued_messages": 10, "millrace_group_backlog_high": 1})
	w.wantMetrics(nobody, map[string]float64{"millrace_group_queued_messages": 0, "millrace_group_backlog_high": 0})
	// It moves around the limit, and nothing is said.
	since := meta.FindStatusCondition(billing.Status.Conditions, v1alpha1.ConditionBacklogHigh).LastTransitionTime
	for range 3 {
		settle(2)
		queued(billing, 8)
		publish("billing", 2)
		queued(billing, 10)
	}
	w.want(billing, v1alpha1.ConditionBacklogHigh, metav1.ConditionTrue, v1alpha1.ReasonAboveWarningSize)
	if now := meta.FindStatusCondition(billing.Status.Conditions, v1alpha1.ConditionBacklogHigh).LastTransitionTime; !now.Equal(&since) {
		t.Errorf("BacklogHigh changed at %s and at %s", since, now)
	}
	w.wantEvent(billing, v1alpha1.ReasonAboveWarningSize, "at least as many messages wait as spec.warningSize says, which is 10")
	if all := w.events(billing, v1alpha1.ReasonAboveWarningSize); len(all) != 1 {
		t.Errorf("events: %q", all)
	}
	settle(3)
	w.want(billing, v1alpha1.ConditionBacklogHigh, metav1.ConditionFalse, v1alpha1.ReasonBelowWarningSize)
	w.wantMetrics(billing, map[string]float64{"millrace_group_queued_messages": 7, "millrace_group_backlog_high": 0})
	// What a member holds is in flight, and waits no more.
	claim := scalar[string](w, db, "select max(claim) from millrace.receive('orders', 'billing', 'm', 1)")
	queued(billing, 6)
	w.wantMetrics(billing, map[string]float64{"millrace_group_queued_messages": 6, "millrace_group_in_flight_messages": 1})
	w.exec(db, "select millrace.ack($1)", claim)
	w.wantMetrics(billing, map[string]float64{"millrace_group_queued_messages": 6, "millrace_group_in_flight_messages": 0})

	w.want(nobody, v1alpha1.ConditionBacklogHigh, metav1.ConditionFalse, v1alpha1.ReasonBelowWarningSize)
	publish("shipping", 2)
	if _, err := pgstream.Maintain(t.Context(), db); err != nil { // the manager does it every half minute
		t.Fatal(err)
	}
	queued(nobody, 2)
	w.want(nobody, v1alpha1.ConditionBacklogHigh, metav1.ConditionTrue, v1alpha1.ReasonAboveWarningSize)
	w.want(nobody, v1alpha1.ConditionReady, metav1.ConditionTrue, v1alpha1.ReasonReady)
}
