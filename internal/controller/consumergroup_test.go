package controller_test

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

func TestConsumerGroupAppearsInItsDatabase(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	g := newGroup("orders-sink", "orders", func(g *v1alpha1.ConsumerGroupSpec) {
		g.Mode, g.FailurePolicy = v1alpha1.ModeOrdered, v1alpha1.FailureSkip
	})
	w.create(g) // before its Stream: the order of manifests does not matter
	w.wantNotReady(g, v1alpha1.ReasonStreamMissing, `Stream "orders"`)
	w.create(newStream("orders"))
	w.wantReady(g)
	if g.Status.Name != "orders_sink" || g.Status.Stream != "orders" {
		t.Errorf("status: %+v", g.Status)
	}
	conn := w.sql(dsn)
	if mode := scalar[string](w, conn, "select mode || failure_policy from millrace_engine.consumer_group where name = 'orders_sink'"); mode != "OrderedSkip" {
		t.Errorf("the group is %s", mode)
	}
	w.wantNoLeak(password(t, dsn))
}

func TestConsumerGroupShowsItsLag(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	g := newGroup("sink", "orders")
	w.create(newStream("orders"))
	w.create(g)
	w.wantReady(g)
	w.want(g, v1alpha1.ConditionLagKnown, metav1.ConditionTrue, v1alpha1.ReasonMeasured)
	if g.Status.Lag == nil || *g.Status.Lag != 0 || g.Status.OldestMessageTime != nil {
		t.Errorf("an empty stream has lag %v, oldest %v", g.Status.Lag, g.Status.OldestMessageTime)
	}
	conn := w.sql(dsn)
	w.exec(conn, `select millrace.publish('orders', to_jsonb(i)) from generate_series(1, 25) i`)
	w.eventually("lag is 25", func() error {
		if err := suite.client.Get(t.Context(), key(g), g); err != nil {
			return err
		}
		if *g.Status.Lag != 25 || g.Status.OldestMessageTime == nil {
			return fmt.Errorf("lag %d, oldest %v", *g.Status.Lag, g.Status.OldestMessageTime)
		}
		return nil
	})
	table := w.kubectl("get", "millrace")
	for _, text := range []string{"LAG", "OLDEST", "PARTITIONS", "stream.millrace.dev/orders", "consumergroup.millrace.dev/sink", "25"} {
		if !strings.Contains(table, text) {
			t.Errorf("kubectl get millrace lacks %q:\n%s", text, table)
		}
	}
}

func TestConsumerGroupRepairsDrift(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	g := newGroup("sink", "orders")
	w.create(newStream("orders"))
	w.create(g)
	w.wantReady(g)
	conn := w.sql(dsn)
	w.exec(conn, "update millrace_engine.consumer_group set max_attempts = 99")
	w.want(g, v1alpha1.ConditionDrifted, metav1.ConditionFalse, v1alpha1.ReasonRepaired, "max attempts")
	if n := scalar[int](w, conn, "select max_attempts from millrace_engine.consumer_group"); n != 10 {
		t.Errorf("max_attempts is %d", n)
	}
}

func TestConsumerGroupIsPaused(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	g := newGroup("sink", "orders")
	w.create(newStream("orders"))
	w.create(g)
	w.wantReady(g)
	update(w, g, func(g *v1alpha1.ConsumerGroup) { g.Spec.Paused = true })
	w.want(g, v1alpha1.ConditionPaused, metav1.ConditionTrue, v1alpha1.ReasonDeliveryPaused)
	if !scalar[bool](w, w.sql(dsn), "select paused from millrace_engine.consumer_group") {
		t.Error("the group in the database is not paused")
	}
}

// What spec says of failing, filtering and lapsing is what the engine does, and taking it out ends it.
func TestConsumerGroupParksFiltersAndMayLapse(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	w.create(newStream("orders"))
	if _, err := w.manifest(`{kind: ConsumerGroup, metadata: {name: sink}, spec: {streamRef: {name: orders}, mode: Ordered, failurePolicy: Park,
		filter: {headers: {region: eu, version: 2, urgent: true, weight: 1.5}, keys: [customer-7, customer-8], keyPrefix: customer-},
		lapse: {after: 36h, lag: 1000000}}}`); err != nil {
		t.Fatal(err)
	}
	g := newGroup("sink", "orders")
	g.Namespace = w.namespace
	w.wantReady(g)
	w.want(g, v1alpha1.ConditionLapsed, metav1.ConditionFalse, v1alpha1.ReasonActive)
	conn := w.sql(dsn)
	info, err := pgstream.DescribeGroup(t.Context(), conn, "orders", "sink")
	if err != nil {
		t.Fatal(err)
	}
	want := pgstream.Filter{
		Headers: map[string]any{"region": "eu", "version": 2.0, "urgent": true, "weight": 1.5}, Keys: []string{"customer-7", "customer-8"}, KeyPrefix: "customer-",
	}
	if has := info.Spec; has.FailurePolicy != pgstream.FailurePark || has.LapseAfter != 36*time.Hour || has.LapseLag != 1_000_000 || !reflect.DeepEqual(has.Filter, want) {
		t.Errorf("the group is %+v", has)
	}
	for _, publish := range []string{
		`select millrace.publish('orders', '"passes"', 'customer-7', '{"region": "eu", "version": 2, "urgent": true, "weight": 1.50, "more": 1}')`,
		`select millrace.publish('orders', '"a string is not a number"', 'customer-7', '{"region": "eu", "version": "2", "urgent": true, "weight": 1.5}')`,
		`select millrace.publish('orders', '"another key"', 'customer-9', '{"region": "eu", "version": 2, "urgent": true, "weight": 1.5}')`,
	} {
		w.exec(conn, publish)
	}
	if text := scalar[string](w, conn, `select string_agg(payload #>> '{}', ', ') from millrace.receive('orders', 'sink', 'me')`); text != "passes" {
		t.Errorf("the group received %q", text)
	}

	update(w, g, func(g *v1alpha1.ConsumerGroup) { g.Spec.Filter, g.Spec.Lapse, g.Spec.FailurePolicy = nil, nil, "" })
	w.wantReady(g)
	if info, err = pgstream.DescribeGroup(t.Context(), conn, "orders", "sink"); err != nil {
		t.Fatal(err)
	}
	if has := info.Spec; has.FailurePolicy != pgstream.FailureBlock || has.LapseAfter != 0 || has.LapseLag != 0 || !reflect.DeepEqual(has.Filter, pgstream.Filter{}) {
		t.Errorf("the group is still %+v", has)
	}
	if n := w.events(g, v1alpha1.EventDriftRepaired); len(n) > 0 {
		t.Errorf("the filter differs from itself: %v", n)
	}
}

// The schema has no type for a header's value, so the engine says what one cannot be.
func TestConsumerGroupFiltersByValues(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.create(newStream("orders"))
	if _, err := w.manifest(`{kind: ConsumerGroup, metadata: {name: sink}, spec: {streamRef: {name: orders}, filter: {headers: {region: {not: eu}}}}}`); err != nil {
		t.Fatal(err)
	}
	g := newGroup("sink", "orders")
	g.Namespace = w.namespace
	w.wantNotReady(g, v1alpha1.ReasonChangeRefused, "compares a header with one value, or with a list of 1 to 100 values")
	w.want(g, v1alpha1.ConditionStalled, metav1.ConditionTrue, v1alpha1.ReasonChangeRefused)
}

// A group that lapses says so within a poll, with what to do, and its Processor too; once it was reset all is well.
func TestConsumerGroupLapsesAndIsReset(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	w.readyDeployments()
	g := newGroup("sink", "orders", func(g *v1alpha1.ConsumerGroupSpec) { g.Lapse = &v1alpha1.Lapse{Lag: ptr.To[int64](10)} })
	p := newProcessor("sink", "sink")
	w.create(newStream("orders"))
	w.create(g)
	w.create(p)
	w.wantReady(p)
	w.want(g, v1alpha1.ConditionLapsed, metav1.ConditionFalse, v1alpha1.ReasonActive)
	conn := w.sql(dsn)
	w.exec(conn, `select millrace.publish('orders', to_jsonb(i)) from generate_series(1, 11) i`)

	const way = `select millrace.reset_group('orders', 'sink', 'Earliest')`
	w.wantNotReady(g, v1alpha1.ReasonLapsed, "lag 11 is above the limit of 10", way)
	w.want(g, v1alpha1.ConditionStalled, metav1.ConditionTrue, v1alpha1.ReasonLapsed)
	w.want(g, v1alpha1.ConditionLapsed, metav1.ConditionTrue, v1alpha1.ReasonLapsed, way)
	w.want(g, v1alpha1.ConditionSchemaApplied, metav1.ConditionTrue, v1alpha1.ReasonApplied)
	w.wantEvent(g, v1alpha1.ReasonLapsed, "lag 11 is above the limit of 10", way)
	w.wantNotReady(p, v1alpha1.ReasonLapsed, `ConsumerGroup "sink"`)
	w.describe("cg/sink", "Warning Lapsed", way)
	if n := len(w.events(g, v1alpha1.ReasonLapsed)); n != 1 {
		t.Errorf("%d events", n)
	}

	update(w, g, func(g *v1alpha1.ConsumerGroup) { g.Spec.Lapse.Lag = ptr.To[int64](1000) })
	w.wantNotReady(g, v1alpha1.ReasonLapsed) // another limit brings nothing back that may be gone
	w.exec(conn, way)
	w.wantReady(g)
	w.want(g, v1alpha1.ConditionLapsed, metav1.ConditionFalse, v1alpha1.ReasonActive)
	w.wantReady(p)
}

func TestConsumerGroupsOfOneNameConflict(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	first, second := newGroup("first", "orders"), newGroup("second", "orders")
	first.Spec.Name, second.Spec.Name = "sink", "sink"
	w.create(newStream("orders"))
	w.create(first)
	w.wantReady(first)
	w.create(second)
	w.wantNotReady(second, v1alpha1.ReasonConflict, w.namespace+"/first")
	if err := suite.client.Delete(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	w.wantReady(second)
	w.wantEvent(second, v1alpha1.EventAdopted)
}

func TestConsumerGroupDeletionPolicies(t *testing.T) {
	for _, c := range []struct {
		name    string
		policy  v1alpha1.DeletionPolicy
		message bool
		remains bool
	}{
		{"Retain leaves the group", v1alpha1.DeletionRetain, false, true},
		{"Delete drops it", v1alpha1.DeletionDelete, true, false},
		{"DeleteIfEmpty drops one that nothing waits for", v1alpha1.DeletionDeleteIfEmpty, false, false},
		{"DeleteIfEmpty leaves one with messages", v1alpha1.DeletionDeleteIfEmpty, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			dsn := postgres.NewDatabase(t)
			w.secret(appDB.Name, appDB.Key, dsn)
			g := newGroup("sink", "orders", groupDeletion(c.policy))
			w.create(newStream("orders"))
			w.create(g)
			w.wantReady(g)
			conn := w.sql(dsn)
			if c.message {
				w.exec(conn, `select millrace.publish('orders', '{"n": 1}')`)
			}
			if err := suite.client.Delete(t.Context(), g); err != nil {
				t.Fatal(err)
			}
			w.wantGone(g)
			if n := scalar[int](w, conn, "select count(*) from millrace_engine.consumer_group"); (n == 1) != c.remains {
				t.Errorf("there are %d groups", n)
			}
		})
	}
}

// The engine refuses what CEL cannot see: a group that was made by hand with another mode.
func TestConsumerGroupMadeOtherwiseIsRefused(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders")
	w.create(s)
	w.wantReady(s)
	if err := pgstream.ApplyGroup(t.Context(), w.sql(dsn), pgstream.GroupSpec{Stream: "orders", Name: "sink", Mode: pgstream.ModeOrdered}); err != nil {
		t.Fatal(err)
	}
	g := newGroup("sink", "orders")
	w.create(g)
	w.wantNotReady(g, v1alpha1.ReasonChangeRefused, "Ordered", "Create another group")
}
