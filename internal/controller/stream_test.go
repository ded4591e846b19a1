package controller_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

func TestStreamAppearsInItsDatabase(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders-eu", partitions(4))
	w.create(s)
	if s.Status.ObservedGeneration != -1 {
		t.Errorf("a new resource has observedGeneration %d, and kubectl wait would believe it", s.Status.ObservedGeneration)
	}
	w.wantReady(s)

	if s.Status.Name != "orders_eu" || *s.Status.Partitions != 4 || *s.Status.Segments != 4 || s.Status.ObservedGeneration != s.Generation {
		t.Errorf("status: %+v", s.Status)
	}
	w.want(s, v1alpha1.ConditionSchemaApplied, metav1.ConditionTrue, v1alpha1.ReasonApplied)
	w.want(s, v1alpha1.ConditionDrifted, metav1.ConditionFalse, v1alpha1.ReasonInSync)
	w.want(s, v1alpha1.ConditionPaused, metav1.ConditionFalse, v1alpha1.ReasonActive)
	if len(s.Finalizers) > 0 {
		t.Errorf("deletionPolicy Retain has finalizers %v", s.Finalizers)
	}
	info, err := pgstream.DescribeStream(t.Context(), w.sql(dsn), "orders_eu")
	if err != nil {
		t.Fatal(err)
	}
	if want := (pgstream.Owner{Cluster: suite.cluster, Namespace: w.namespace, Name: s.Name, UID: string(s.UID)}); info.Spec.Owner != want {
		t.Errorf("the owner is %+v, not %+v", info.Spec.Owner, want)
	}
	w.wantEvent(s, v1alpha1.ReasonReady, "orders_eu")
	w.wantNoLeak(password(t, dsn))
}

func TestStreamFollowsItsSpec(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders", partitions(4))
	w.create(s)
	w.wantReady(s)
	update(w, s, func(s *v1alpha1.Stream) {
		s.Spec.Partitions = 8
		s.Spec.Retention.MaxMessages = ptr.To[int64](1000)
	})
	w.wantReady(s)
	info, err := pgstream.DescribeStream(t.Context(), w.sql(dsn), "orders")
	if err != nil {
		t.Fatal(err)
	}
	if info.Spec.Partitions != 8 || info.Spec.Retention.MaxMessages != 1000 || *s.Status.Partitions != 8 {
		t.Errorf("the database has %+v, status %+v", info.Spec, s.Status)
	}
	if n := w.events(s, v1alpha1.EventDriftRepaired); len(n) > 0 {
		t.Errorf("a change of spec is called drift: %v", n)
	}
}

func TestStreamHasADedupeWindowAndPriorities(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders")
	w.create(s)
	w.wantReady(s)
	conn := w.sql(dsn)
	spec := func() pgstream.StreamSpec {
		t.Helper()
		info, err := pgstream.DescribeStream(t.Context(), conn, "orders")
		if err != nil {
			t.Fatal(err)
		}
		return info.Spec
	}
	if has := spec(); has.DedupeWindow != 2*time.Minute || has.Priorities != 1 || *s.Status.Priorities != 1 {
		t.Errorf("by default it is %+v, status %+v", has, s.Status)
	}
	update(w, s, func(s *v1alpha1.Stream) {
		s.Spec.DedupeWindow = &metav1.Duration{Duration: 0}
		s.Spec.Priorities = 3
	})
	w.wantReady(s)
	if has := spec(); has.DedupeWindow != pgstream.NoDedupe || has.Priorities != 3 || *s.Status.Priorities != 3 {
		t.Errorf("it is %+v, status %+v", has, s.Status)
	}
	w.exec(conn, `select millrace.publish('orders', '1', p_priority => 2)`)
	if _, err := conn.Exec(t.Context(), `select millrace.publish('orders', '1', p_dedupe_key => 'a')`); err == nil {
		t.Error("a dedupe key is taken by a stream that remembers none")
	}
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.DedupeWindow = &metav1.Duration{Duration: 1500 * time.Millisecond} })
	w.wantReady(s)
	if has := spec(); has.DedupeWindow != 2*time.Second {
		t.Errorf("the window is %s", has.DedupeWindow)
	}
	w.eventually("status holds what the stream holds", func() error {
		if err := suite.client.Get(t.Context(), key(s), s); err != nil {
			return err
		}
		if s.Status.Messages == nil || *s.Status.Messages != 1 || *s.Status.Bytes < 8192 {
			return fmt.Errorf("%+v", s.Status)
		}
		return nil
	})
	if n := w.events(s, v1alpha1.EventDriftRepaired); len(n) > 0 {
		t.Errorf("a setting differs from itself: %v", n)
	}

	// A Stream that is made anew and knows nothing of the priorities may not take them away.
	if err := suite.client.Delete(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	w.wantGone(s)
	again := newStream("orders")
	w.create(again)
	w.wantNotReady(again, v1alpha1.ReasonChangeRefused, "has 3 priorities", "Keep 3 or more")
}

// A transaction that was left open after it had published is named, with the way to end it, and forgotten when it ends.
func TestStreamNamesWhatHoldsItUp(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders")
	w.create(s)
	w.wantReady(s)
	w.want(s, v1alpha1.ConditionHorizonHeld, metav1.ConditionFalse, v1alpha1.ReasonMoving)
	conn := w.sql(dsn)
	w.exec(conn, "begin")
	w.exec(conn, `select millrace.publish('orders', '1')`)
	way := fmt.Sprintf("select pg_terminate_backend(%d)", conn.PgConn().PID())
	w.want(s, v1alpha1.ConditionHorizonHeld, metav1.ConditionTrue, v1alpha1.ReasonOpenTransaction, way)
	w.wantEvent(s, v1alpha1.ReasonOpenTransaction, way)
	w.wantReady(s)
	w.exec(conn, "commit")
	w.want(s, v1alpha1.ConditionHorizonHeld, metav1.ConditionFalse, v1alpha1.ReasonMoving)
}

// What someone changes or drops in the database is noticed on the interval, reported and repaired.
func TestStreamRepairsDrift(t *testing.T) {
	for name, harm := range map[string]string{
		"a dropped index":   `drop index millrace_engine.segment_%d_0_position_idx`,
		"a dropped trigger": `drop trigger publish_guard on millrace.orders -- %d`,
		"a changed setting": `update millrace_engine.stream set max_messages = 5 where id = %d`,
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			dsn := postgres.NewDatabase(t)
			w.secret(appDB.Name, appDB.Key, dsn)
			s := newStream("orders")
			w.create(s)
			w.wantReady(s)
			conn := w.sql(dsn)
			id := scalar[int](w, conn, "select id from millrace_engine.stream where name = 'orders'")
			w.exec(conn, fmt.Sprintf(harm, id))
			w.want(s, v1alpha1.ConditionDrifted, metav1.ConditionFalse, v1alpha1.ReasonRepaired, "repaired: ")
			w.wantEvent(s, v1alpha1.EventDriftRepaired)
			plan, err := pgstream.PlanStream(t.Context(), conn, pgstream.StreamSpec{
				Name: "orders", Owner: pgstream.Owner{Cluster: suite.cluster, Namespace: w.namespace, Name: s.Name, UID: string(s.UID)},
			})
			if err != nil || len(plan.Steps) > 0 {
				t.Errorf("still to repair: %v, %v", plan.Steps, err)
			}
		})
	}
}

func TestStreamsOfOneNameConflictAndTheOlderWins(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	older, younger := newStream("older"), newStream("younger")
	older.Spec.Name, younger.Spec.Name = "orders", "orders"
	w.create(older)
	// The database is unknown until both exist, so that the work queue's order cannot decide.
	w.wantNotReady(older, v1alpha1.ReasonSecretMissing)
	w.eventually("a second passes", func() error {
		younger := younger.DeepCopy()
		younger.Namespace = w.namespace
		if err := suite.client.Create(t.Context(), younger, client.DryRunAll); err != nil {
			return err
		}
		if !older.CreationTimestamp.Before(&younger.CreationTimestamp) {
			return fmt.Errorf("both would have the same age")
		}
		return nil
	})
	w.create(younger)
	w.secret(appDB.Name, appDB.Key, dsn)
	w.wantReady(older)
	w.wantNotReady(younger, v1alpha1.ReasonConflict, w.namespace+"/older")
	w.want(younger, v1alpha1.ConditionStalled, metav1.ConditionTrue, v1alpha1.ReasonConflict)

	// With its owner gone the stream is an orphan, and the other takes it over with what is in it.
	conn := w.sql(dsn)
	w.exec(conn, `select millrace.publish('orders', '{"n": 1}', 'k')`)
	if err := suite.client.Delete(t.Context(), older); err != nil {
		t.Fatal(err)
	}
	w.wantReady(younger)
	w.wantEvent(younger, v1alpha1.EventAdopted, "older")
	if n := scalar[int](w, conn, "select count(*) from millrace.orders"); n != 1 {
		t.Errorf("there are %d messages after the adoption", n)
	}
}

// An older Stream that cannot have its stream yet, because its spec does not fit, is not passed over.
func TestAYoungerStreamDoesNotPassAnOlderOne(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	first := newStream("first")
	w.create(first) // brings the schema
	w.wantReady(first)
	conn := w.sql(dsn)
	if err := pgstream.ApplyStream(t.Context(), conn, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", Partitions: 8}}); err != nil {
		t.Fatal(err)
	}
	older, younger := newStream("older", partitions(4)), newStream("younger", partitions(8))
	older.Spec.Name, younger.Spec.Name = "orders", "orders"
	w.create(older)
	w.wantNotReady(older, v1alpha1.ReasonPartitionsLowered)
	w.eventually("a second passes", func() error {
		if time.Since(older.CreationTimestamp.Time) < 2*time.Second {
			return fmt.Errorf("both would have the same age")
		}
		return nil
	})
	w.create(younger)
	w.wantNotReady(younger, v1alpha1.ReasonConflict, w.namespace+"/older, which is older")
	update(w, older, func(s *v1alpha1.Stream) { s.Spec.Partitions = 8 })
	w.wantReady(older)
	w.wantNotReady(younger, v1alpha1.ReasonConflict, w.namespace+"/older")
}

func TestStreamMadeAgainFindsItsMessages(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders")
	w.create(s)
	w.wantReady(s)
	conn := w.sql(dsn)
	w.exec(conn, `select millrace.publish('orders', '{"n": 1}', 'k')`)
	if err := suite.client.Delete(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	w.wantGone(s)

	again := newStream("orders", neverAdopt)
	w.create(again)
	w.wantNotReady(again, v1alpha1.ReasonAdoptionRefused, "adoptionPolicy")
	update(w, again, func(s *v1alpha1.Stream) { s.Spec.AdoptionPolicy = v1alpha1.AdoptionIfUnowned })
	w.wantReady(again)
	if n := scalar[int](w, conn, "select count(*) from millrace.orders"); n != 1 {
		t.Errorf("there are %d messages", n)
	}
}

func TestStreamOfAnotherClusterIsLeftAlone(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	first := newStream("orders")
	w.create(first)
	w.wantReady(first)
	if err := suite.client.Delete(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	w.wantGone(first)
	conn := w.sql(dsn)
	w.exec(conn, `update millrace_engine.stream set owner = owner || '{"cluster": "elsewhere"}'`)

	s := newStream("orders")
	w.create(s)
	w.wantNotReady(s, v1alpha1.ReasonConflict, "elsewhere", v1alpha1.AnnotationAdoptFrom)
	update(w, s, func(s *v1alpha1.Stream) {
		s.Annotations = map[string]string{v1alpha1.AnnotationAdoptFrom: "elsewhere"}
	})
	w.wantReady(s)
}

func TestStreamDeletionPolicies(t *testing.T) {
	exists := func(w *world, dsn string) bool {
		return scalar[bool](w, w.sql(dsn), "select to_regclass('millrace.orders') is not null")
	}
	for _, c := range []struct {
		name    string
		policy  v1alpha1.DeletionPolicy
		message bool
		remains bool
		event   string
	}{
		{"Retain leaves the stream", v1alpha1.DeletionRetain, true, true, ""},
		{"Delete drops it with its messages", v1alpha1.DeletionDelete, true, false, v1alpha1.EventDropped},
		{"DeleteIfEmpty drops an empty one", v1alpha1.DeletionDeleteIfEmpty, false, false, v1alpha1.EventDropped},
		{"DeleteIfEmpty leaves one with messages", v1alpha1.DeletionDeleteIfEmpty, true, true, v1alpha1.EventRetained},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			dsn := postgres.NewDatabase(t)
			w.secret(appDB.Name, appDB.Key, dsn)
			s := newStream("orders", streamDeletion(c.policy))
			w.create(s)
			w.wantReady(s)
			if c.message {
				w.exec(w.sql(dsn), `select millrace.publish('orders', '{"n": 1}', 'k')`)
			}
			if err := suite.client.Delete(t.Context(), s); err != nil {
				t.Fatal(err)
			}
			w.wantGone(s)
			if got := exists(w, dsn); got != c.remains {
				t.Errorf("the table exists: %t", got)
			}
			if c.event != "" {
				w.wantEvent(s, c.event)
			}
		})
	}
}

// A deletion that its database holds up says so, then calls for a person, and lets go by annotation only.
func TestStreamDeletionWaitsForItsDatabase(t *testing.T) {
	w := newWorld(t)
	server := postgres.NewServer(t, postgres.Options{})
	w.secret(appDB.Name, appDB.Key, server.DSN("postgres"))
	s := newStream("orders", streamDeletion(v1alpha1.DeletionDelete))
	w.create(s)
	w.wantReady(s)
	if err := server.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := suite.client.Delete(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	w.wantNotReady(s, v1alpha1.ReasonDeletionBlocked, "cannot reach database", v1alpha1.AnnotationAbandon)
	w.want(s, v1alpha1.ConditionStalled, metav1.ConditionTrue, v1alpha1.ReasonDeletionBlocked)
	w.wantEvent(s, v1alpha1.ReasonDeletionBlocked)
	w.abandon(t.Context(), s)
	w.wantGone(s)
	w.wantEvent(s, v1alpha1.EventAbandoned)
}

func TestStreamThatNeverReachedItsDatabaseCanBeDeleted(t *testing.T) {
	w := newWorld(t)
	s := newStream("orders", streamDeletion(v1alpha1.DeletionDelete))
	w.create(s)
	w.wantNotReady(s, v1alpha1.ReasonSecretMissing)
	if err := suite.client.Delete(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	w.wantGone(s)
}

// When a namespace is deleted its Secrets may go first.
func TestStreamIsDroppedAfterItsSecret(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders", streamDeletion(v1alpha1.DeletionDelete))
	w.create(s)
	w.wantReady(s)
	w.kubectl("delete", "secret", appDB.Name)
	if err := suite.client.Delete(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	w.wantGone(s)
	if scalar[bool](w, w.sql(dsn), "select to_regclass('millrace.orders') is not null") {
		t.Error("the table is still there")
	}
}

func TestSuspendedStreamIsLeftAsItIs(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders", partitions(4))
	w.create(s)
	w.wantReady(s)
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.Suspend, s.Spec.Partitions = true, 8 })
	w.want(s, v1alpha1.ConditionPaused, metav1.ConditionTrue, v1alpha1.ReasonSuspended)
	conn := w.sql(dsn)
	if n := scalar[int](w, conn, "select partitions from millrace_engine.stream"); n != 4 {
		t.Errorf("a suspended Stream was changed to %d partitions", n)
	}
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.Suspend = false })
	w.wantReady(s)
	if n := scalar[int](w, conn, "select partitions from millrace_engine.stream"); n != 8 {
		t.Errorf("there are %d partitions after suspend was lifted", n)
	}
}

// A Secret that is corrected or rotated wakes the Stream; nobody has to touch it.
func TestStreamNoticesANewSecret(t *testing.T) {
	w := newWorld(t)
	s := newStream("orders")
	w.create(s)
	w.wantNotReady(s, v1alpha1.ReasonSecretMissing)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.wantReady(s)
	second := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, second)
	conn := w.sql(second)
	w.eventually("the stream is in the second database", func() error {
		if !scalar[bool](w, conn, "select to_regclass('millrace.orders') is not null") {
			return fmt.Errorf("it is not there")
		}
		return nil
	})
	w.wantReady(s)
}

func TestTheSpecIsNeverWritten(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.readyDeployments()
	s, g, p := newStream("orders", streamDeletion(v1alpha1.DeletionDelete)), newGroup("sink", "orders"), newProcessor("sink", "sink")
	for _, o := range []object{s, g, p} {
		w.create(o)
	}
	for _, o := range []object{s, g, p} {
		w.wantReady(o)
		if o.GetGeneration() != 1 {
			t.Errorf("%s has generation %d", o.GetName(), o.GetGeneration())
		}
		for _, f := range o.GetManagedFields() {
			if f.Manager == "millrace" && f.Subresource == "" && f.FieldsV1 != nil && containsSpec(f.FieldsV1.GetRawBytes()) {
				t.Errorf("the manager owns fields of the spec of %s: %s", o.GetName(), f.FieldsV1.GetRawBytes())
			}
		}
	}
}

// Rule 6: of our own kinds the manager writes status, and metadata for the finalizer; nothing else, and nothing under another name.
func TestTheManagerWritesStatusAndFinalizersOnly(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.readyDeployments()
	s, g, p := newStream("orders", streamDeletion(v1alpha1.DeletionDelete)), newGroup("sink", "orders", groupDeletion(v1alpha1.DeletionDelete)), newProcessor("sink", "sink")
	for _, o := range []object{s, g, p} {
		w.create(o)
	}
	for _, o := range []object{s, g, p} {
		w.wantReady(o)
		for _, f := range o.GetManagedFields() {
			if f.Manager != "millrace" && f.Subresource != "" {
				t.Errorf("%s wrote %s of %s", f.Manager, f.Subresource, o.GetName())
			}
		}
	}
	for _, o := range []object{p, g, s} {
		if err := suite.client.Delete(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		w.wantGone(o)
	}
	var writes []write
	w.eventually("all writes are answered", func() error { // what they did is seen before
		writes = suite.writes.in(w.namespace)
		for _, x := range writes {
			if x.status == 0 {
				return errors.New(x.path)
			}
		}
		return nil
	})
	var finalizers []string
	for _, x := range writes {
		if !strings.Contains(x.path, "/apis/millrace.dev/") || strings.HasSuffix(x.path, "/status") {
			continue
		}
		if x.status == http.StatusOK { // and not refused, because the manager had an older version in mind
			finalizers = append(finalizers, x.path+" "+x.body)
		}
		var patch map[string]map[string]any
		if err := json.Unmarshal([]byte(x.body), &patch); err != nil || x.method != http.MethodPatch || len(patch) != 1 {
			t.Errorf("%s %s: %s", x.method, x.path, x.body)
		}
		if fields := slices.Sorted(maps.Keys(patch["metadata"])); !slices.Equal(fields, []string{"finalizers", "resourceVersion"}) {
			t.Errorf("the manager writes %v of %s", fields, x.path)
		}
	}
	if len(finalizers) != 4 {
		t.Errorf("writes of finalizers, of which we want two of each:\n%s", strings.Join(finalizers, "\n"))
	}
}

func containsSpec(fields []byte) bool { return bytes.Contains(fields, []byte("f:spec")) }

// A Stream takes frames from now on, and their settings change.
func TestStreamGetsFrames(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	conn := w.sql(dsn)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("runs")
	w.create(s)
	w.wantReady(s)
	w.exec(conn, `select millrace.publish('runs', '{}', 'run-1')`)
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.Frames = &v1alpha1.Frames{} })
	w.wantReady(s)
	w.exec(conn, `select millrace.append_frame('runs', 'run-1', '{}')`)
	settings := func() string {
		return scalar[string](w, conn, "select frames::text from millrace_engine.stream where name = 'runs'")
	}
	if got := settings(); got != `{"alpha": 0.2, "max_length": 16384, "min_length": 64, "ttl_seconds": 10, "summary_ttl_seconds": 604800}` {
		t.Errorf("the defaults are %s", got)
	}
	update(w, s, func(s *v1alpha1.Stream) {
		s.Spec.Frames = &v1alpha1.Frames{
			BestEffort: v1alpha1.BestEffortFrames{TTL: &metav1.Duration{Duration: 1500 * time.Millisecond}, MinLength: 8, MaxLength: 32, Alpha: "0.5"},
			SummaryTTL: &metav1.Duration{},
		}
	})
	w.wantReady(s)
	if got := settings(); got != `{"alpha": 0.5, "max_length": 32, "min_length": 8, "ttl_seconds": 1.5, "summary_ttl_seconds": 0}` {
		t.Errorf("the settings are %s", got)
	}
	if n := w.events(s, v1alpha1.EventDriftRepaired); len(n) > 0 {
		t.Errorf("a setting differs from itself: %v", n)
	}
}

// A Stream becomes an event store, with messages in it.
func TestStreamGetsVersions(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	conn := w.sql(dsn)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("accounts")
	w.create(s)
	w.wantReady(s)
	w.exec(conn, `select millrace.publish('accounts', '{}', 'alice')`)
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.Versions = true })
	w.wantReady(s)
	w.exec(conn, `select millrace.append('accounts', 'alice', array['{}'::jsonb], 0)`)
	if n := w.events(s, v1alpha1.EventDriftRepaired); len(n) > 0 {
		t.Errorf("a setting differs from itself: %v", n)
	}
}
