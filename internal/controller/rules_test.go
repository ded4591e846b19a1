package controller_test

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// The rules of docs/design/operator.md that no other file of this package is about.

// Rule 1: every setting of a Stream that may change does what it says from then on, without harm to what is there.
func TestEveryChangeOfAStreamIsApplied(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders", partitions(4))
	w.create(s)
	w.wantReady(s)
	conn := w.sql(dsn)
	w.fill(conn)

	update(w, s, func(s *v1alpha1.Stream) {
		s.Spec.Partitions, s.Spec.Retention.Segments = 16, 6
		s.Spec.MaxMessageBytes = ptr.To(resource.MustParse("100"))
		s.Spec.DedupeWindow = &metav1.Duration{Duration: time.Hour}
	})
	w.wantReady(s)
	if *s.Status.Partitions != 16 || *s.Status.Segments != 6 {
		t.Errorf("status is %+v", s.Status)
	}
	if n := scalar[int](w, conn, "select count(*) from pg_inherits where inhparent = 'millrace.orders'::regclass"); n != 6 {
		t.Errorf("the table has %d segments", n)
	}
	if n := scalar[int](w, conn, "select count(*) from millrace.orders"); n != 300 {
		t.Errorf("%d messages are left of 300", n)
	}
	if _, err := conn.Exec(t.Context(), `select millrace.publish('orders', to_jsonb(repeat('x', 101)))`); err == nil {
		t.Error("a message above the limit is taken")
	}
	w.exec(conn, `select millrace.publish('orders', '1', p_dedupe_key => 'a')`)
	w.exec(conn, `select millrace.publish('orders', '2', p_dedupe_key => 'a')`)
	if n := scalar[int](w, conn, "select count(*) from millrace.orders"); n != 301 {
		t.Errorf("%d messages with a key published twice", n)
	}
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.Retention.MaxMessages = ptr.To[int64](50) })
	w.wantReady(s)
	w.eventually("retention follows", func() error {
		if n := scalar[int](w, conn, "select count(*) from millrace.orders"); n >= 300 {
			return fmt.Errorf("%d messages", n)
		}
		return nil
	})
	if n := w.events(s, v1alpha1.EventDriftRepaired); len(n) > 0 {
		t.Errorf("a change of spec is called drift: %v", n)
	}
}

// Rule 1: what the API server cannot see, because the database has it and no former spec, the engine refuses with the way to do it.
func TestChangesThatTheDatabaseRefusesSayWhatToDo(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	first := newStream("first")
	w.create(first) // brings the schema
	w.wantReady(first)
	conn := w.sql(dsn)
	w.exec(conn, "select millrace.create_stream('orders', p_partitions => 8, p_payload_type => 'Bytes', p_segments => 6)")
	w.exec(conn, "select millrace.create_group('orders', 'sink', 'Ordered', 'Latest')")
	w.exec(conn, "select millrace.create_group('orders', 'other')")

	s := newStream("orders", func(s *v1alpha1.StreamSpec) {
		s.PayloadType, s.Retention.Segments, s.Retention.Policy = v1alpha1.PayloadBytes, 5, v1alpha1.RetentionWorkQueue
	})
	w.create(s)
	w.wantNotReady(s, v1alpha1.ReasonChangeRefused, "has 6 segments", "Keep 6 or more")
	w.want(s, v1alpha1.ConditionStalled, metav1.ConditionTrue, v1alpha1.ReasonChangeRefused)
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.Retention.Segments = 6 })
	w.wantNotReady(s, v1alpha1.ReasonChangeRefused, "retention WorkQueue allows one", "use retention Interest")
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.Retention.Policy = v1alpha1.RetentionInterest })
	w.wantReady(s)
	w.wantEvent(s, v1alpha1.EventAdopted, "which nobody owned")

	g := newGroup("sink", "orders", func(g *v1alpha1.ConsumerGroupSpec) { g.Mode = v1alpha1.ModeOrdered })
	w.create(g)
	w.wantNotReady(g, v1alpha1.ReasonChangeRefused, "the start of consumer group", "Create another group with that start")

	text := newStream("text")
	text.Spec.Name = "orders"
	w.create(text)
	w.wantNotReady(text, v1alpha1.ReasonConflict)
}

// Rule 2: a deletion that its database holds up goes on by itself when the database answers, also that of a group, and does not hold up
// the deletions of another database.
func TestADeletionGoesOnWhenItsDatabaseAnswers(t *testing.T) {
	w := newWorld(t)
	server := postgres.NewServer(t, postgres.Options{})
	w.secret("dead-db", appDB.Key, server.DSN("postgres"))
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	s, g := newStream("orders", streamDeletion(v1alpha1.DeletionDelete)), newGroup("sink", "orders", groupDeletion(v1alpha1.DeletionDelete))
	s.Spec.DatabaseSecretRef.Name = "dead-db"
	abandoned := newGroup("abandoned", "orders", groupDeletion(v1alpha1.DeletionDelete))
	alive := newStream("alive", streamDeletion(v1alpha1.DeletionDelete))
	for _, o := range []object{s, g, abandoned, alive} {
		w.create(o)
	}
	for _, o := range []object{s, g, abandoned, alive} {
		w.wantReady(o)
	}
	if err := server.Pause(); err != nil {
		t.Fatal(err)
	}
	for _, o := range []object{g, abandoned, alive} {
		if err := suite.client.Delete(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	w.wantGone(alive)
	w.wantNotReady(g, v1alpha1.ReasonDeletionBlocked, v1alpha1.AnnotationAbandon)
	w.want(abandoned, v1alpha1.ConditionStalled, metav1.ConditionTrue, v1alpha1.ReasonDeletionBlocked)
	w.abandon(t.Context(), abandoned)
	w.wantGone(abandoned)
	w.wantEvent(abandoned, v1alpha1.EventAbandoned, "stays in its database")
	if err := server.Resume(); err != nil {
		t.Fatal(err)
	}
	w.wantGone(g)
	w.wantEvent(g, v1alpha1.EventDropped)
	conn := w.sql(server.DSN("postgres"))
	if names := scalar[string](w, conn, "select string_agg(name, ', ') from millrace_engine.consumer_group"); names != "abandoned" {
		t.Errorf("the database has the groups %s", names)
	}
}

// Rule 3: a stream that was made by hand is taken over with what is in it, unless spec forbids it, and so is a group.
func TestWhatWasMadeByHandIsAdopted(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	first := newStream("first")
	w.create(first) // brings the schema
	w.wantReady(first)
	conn := w.sql(dsn)
	w.exec(conn, "select millrace.create_stream('orders')")
	w.exec(conn, "select millrace.create_group('orders', 'sink', p_max_attempts => 3)")
	w.exec(conn, `select millrace.publish('orders', '1')`)

	s := newStream("orders", neverAdopt)
	w.create(s)
	w.wantNotReady(s, v1alpha1.ReasonAdoptionRefused, "exists already and adoptionPolicy is Never")
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.AdoptionPolicy = v1alpha1.AdoptionIfUnowned })
	w.wantReady(s)
	w.wantEvent(s, v1alpha1.EventAdopted, "which nobody owned")
	g := newGroup("sink", "orders", func(g *v1alpha1.ConsumerGroupSpec) { g.AdoptionPolicy = v1alpha1.AdoptionNever })
	w.create(g)
	w.wantNotReady(g, v1alpha1.ReasonAdoptionRefused)
	if n := scalar[int](w, conn, "select max_attempts from millrace_engine.consumer_group"); n != 3 {
		t.Errorf("a group that was not adopted has max_attempts %d", n)
	}
	update(w, g, func(g *v1alpha1.ConsumerGroup) { g.Spec.AdoptionPolicy = v1alpha1.AdoptionIfUnowned })
	w.wantReady(g)
	w.wantEvent(g, v1alpha1.EventAdopted, "which nobody owned")
	w.eventually("the backlog is there", func() error {
		if err := suite.client.Get(t.Context(), key(g), g); err != nil {
			return err
		}
		if g.Status.Lag == nil || *g.Status.Lag != 1 {
			return fmt.Errorf("lag is %v", g.Status.Lag)
		}
		return nil
	})
}

// Rule 3: a refused Stream that owns nothing drops nothing, whatever its policy says.
func TestARefusedStreamDropsNothing(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	first := newStream("first")
	w.create(first) // brings the schema
	w.wantReady(first)
	conn := w.sql(dsn)
	w.exec(conn, "select millrace.create_stream('orders', p_partitions => 16)")
	s := newStream("orders", partitions(8), streamDeletion(v1alpha1.DeletionDelete))
	w.create(s)
	w.wantNotReady(s, v1alpha1.ReasonPartitionsLowered)
	if err := suite.client.Delete(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	w.wantGone(s)
	if !scalar[bool](w, conn, "select to_regclass('millrace.orders') is not null") {
		t.Error("a stream that somebody else had made is gone")
	}
}

// Rule 3: one name in one database belongs to one resource, in whatever namespace, and an orphan can be adopted from another one.
func TestStreamsConflictAcrossNamespaces(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders")
	w.create(s)
	w.wantReady(s)
	w.exec(w.sql(dsn), `select millrace.publish('orders', '1')`)

	other := w.another()
	other.secret(appDB.Name, appDB.Key, dsn)
	same := newStream("orders")
	other.create(same)
	other.wantNotReady(same, v1alpha1.ReasonConflict, w.namespace+"/orders", "Choose another name")
	if err := suite.client.Delete(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	other.wantReady(same)
	other.wantEvent(same, v1alpha1.EventAdopted, w.namespace+"/orders")
	if n := scalar[int](w, w.sql(dsn), "select count(*) from millrace.orders"); n != 1 {
		t.Errorf("%d messages after the adoption", n)
	}
}

// another makes a second namespace for the test.
func (w *world) another() *world {
	w.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "test-"}}
	if err := suite.client.Create(w.Context(), ns); err != nil {
		w.Fatal(err)
	}
	other := &world{w.T, ns.Name}
	w.Cleanup(other.clean)
	return other
}

// Rule 4: whatever part of a stream is gone comes back, with what is left in the others.
func TestLostPartsAreMadeAgain(t *testing.T) {
	for name, harm := range map[string]string{
		"a missing segment":      `drop table millrace_engine.segment_%d_2`,
		"a missing function":     `drop function millrace_engine.receive_%d`,
		"a missing sequence":     `drop sequence millrace_engine.notified_%d`,
		"a missing lane's table": `drop table millrace."orders.p1" -- %d`,
		"a disabled guard":       `alter table millrace.orders disable trigger publish_guard -- %d`,
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			dsn := postgres.NewDatabase(t)
			w.secret(appDB.Name, appDB.Key, dsn)
			s := newStream("orders", func(s *v1alpha1.StreamSpec) { s.Priorities = 2 })
			w.create(s)
			w.wantReady(s)
			conn := w.sql(dsn)
			w.exec(conn, `select millrace.publish('orders', '1')`)
			id := scalar[int](w, conn, "select id from millrace_engine.stream where name = 'orders'")
			w.exec(conn, fmt.Sprintf(harm, id))
			w.want(s, v1alpha1.ConditionDrifted, metav1.ConditionFalse, v1alpha1.ReasonRepaired, "repaired: ")
			w.wantEvent(s, v1alpha1.EventDriftRepaired)
			w.wantReady(s)
			if n := scalar[int](w, conn, "select count(*) from millrace_engine.stream_repairs($1)", id); n > 0 {
				t.Errorf("%d repairs are left", n)
			}
			w.exec(conn, `select millrace.publish('orders', '2', p_priority => 1)`)
			if n := scalar[int](w, conn, "select count(*) from millrace.orders"); n != 1 {
				t.Errorf("%d messages of priority 0", n)
			}
		})
	}
}

// Rule 4: a stream or group that somebody removed is made again, empty, and nobody is told that nothing happened.
func TestWhatWasDroppedBehindOurBackIsMadeAgain(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s, g := newStream("orders"), newGroup("sink", "orders")
	w.create(s)
	w.create(g)
	w.wantReady(g)
	conn := w.sql(dsn)
	// Whoever drops what the manager reads at that moment may be the one of the two who has to try again.
	drop := func(sql string) {
		t.Helper()
		w.eventually(sql, func() error {
			_, err := conn.Exec(t.Context(), sql)
			if pg, ok := errors.AsType[*pgconn.PgError](err); err != nil && (!ok || pg.Code != "40P01") {
				t.Fatalf("%s: %v", sql, err)
			}
			return err
		})
	}
	drop("select millrace_engine.drop_group('orders', 'sink')")
	w.wantEvent(g, v1alpha1.EventDriftRepaired, "create Shared consumer group")
	w.wantReady(g)
	drop("select millrace_engine.drop_stream('orders')")
	w.wantEvent(s, v1alpha1.EventDriftRepaired)
	w.wantReady(s)
	w.eventually("the group is there again", func() error {
		if n := scalar[int](w, conn, "select count(*) from millrace_engine.consumer_group"); n != 1 {
			return fmt.Errorf("%d groups", n)
		}
		return nil
	})
	// The whole schema, as after a restore of an older backup.
	drop("drop schema millrace, millrace_engine cascade")
	w.eventually("the engine is there again", func() error {
		if !scalar[bool](w, conn, "select to_regclass('millrace.orders') is not null") {
			return errors.New("it is not")
		}
		return nil
	})
	w.wantReady(s)
	w.wantReady(g)
}

// Rule 4: a repair is told although the first look at the damage, or the first try to repair it, has failed.
func TestARepairThatDidNotSucceedAtOnceIsTold(t *testing.T) {
	const advisory = "select pg_advisory_xact_lock(1836019570, 1)" // of every change of structure
	for _, c := range []struct{ name, lock, before, after string }{
		{"a look that fails", "lock table millrace_engine.setting", "", "select millrace_engine.drop_stream('orders')"},
		{"a try that fails", advisory, "update millrace_engine.stream set max_message_bytes = 77", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			dsn := postgres.NewDatabase(t)
			w.secret(appDB.Name, appDB.Key, dsn)
			s := newStream("orders")
			w.create(s)
			w.wantReady(s)
			conn, other := w.sql(dsn), w.sql(dsn)
			w.exec(conn, "begin")
			w.exec(conn, c.lock)
			w.exec(other, c.before)
			w.wantNotReady(s, v1alpha1.ReasonProgressing, "a lock did not come within")
			w.exec(conn, c.after)
			w.exec(conn, "commit")
			w.wantEvent(s, v1alpha1.EventDriftRepaired, "repaired: ")
			w.wantReady(s)
			w.want(s, v1alpha1.ConditionDrifted, metav1.ConditionFalse, v1alpha1.ReasonRepaired, "repaired: ")
		})
	}
}

// Rule 4: a repair that is needed again and again is one event with a count, and not one each time.
func TestTheSameRepairAgainIsCountedByItsEvent(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders")
	w.create(s)
	w.wantReady(s)
	conn := w.sql(dsn)
	w.eventually("an event with a count", func() error {
		w.exec(conn, "update millrace_engine.stream set max_message_bytes = 77")
		w.eventually("it is repaired", func() error {
			if n := scalar[int](w, conn, "select max_message_bytes from millrace_engine.stream"); n == 77 {
				return errors.New("it is not")
			}
			return nil
		})
		var events eventsv1.EventList
		if err := suite.client.List(w.Context(), &events, client.InNamespace(w.namespace)); err != nil {
			t.Fatal(err)
		}
		for _, e := range events.Items {
			if e.Reason == v1alpha1.EventDriftRepaired && e.Series != nil && e.Series.Count > 1 {
				return nil
			}
		}
		return fmt.Errorf("%d events, none with a count", len(events.Items))
	})
}

// Suspended resources are left alone by everything: no repair, and what their deletion policy says is done all the same.
func TestASuspendedGroupIsLeftAsItIs(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s, g := newStream("orders"), newGroup("sink", "orders", groupDeletion(v1alpha1.DeletionDelete))
	w.create(s)
	w.create(g)
	w.wantReady(g)
	update(w, g, func(g *v1alpha1.ConsumerGroup) { g.Spec.Suspend, g.Spec.MaxAttempts = true, ptr.To[int32](3) })
	w.want(g, v1alpha1.ConditionPaused, metav1.ConditionTrue, v1alpha1.ReasonSuspended)
	conn := w.sql(dsn)
	w.exec(conn, "update millrace_engine.consumer_group set ack_wait_ms = 77")
	// The Stream is compared with its database on the same interval, so its repair says that a comparison has passed.
	id := scalar[int](w, conn, "select id from millrace_engine.stream where name = 'orders'")
	w.exec(conn, fmt.Sprintf("drop index millrace_engine.segment_%d_0_position_idx", id))
	w.wantEvent(s, v1alpha1.EventDriftRepaired)
	if text := scalar[string](w, conn, "select ack_wait_ms || ' ' || max_attempts from millrace_engine.consumer_group"); text != "77 10" {
		t.Errorf("a suspended group was changed to %s", text)
	}
	if err := suite.client.Delete(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	w.wantGone(g)
	if n := scalar[int](w, conn, "select count(*) from millrace_engine.consumer_group"); n != 0 {
		t.Error("a suspended group that was deleted is still in the database")
	}
}

// Rule 9: a password that is rotated, and a Secret under another name, lead to the same database, and nothing there is made twice or lost.
func TestRotatedAndRenamedSecretsChangeNothingInTheDatabase(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	conn := w.sql(dsn)
	role := "app_" + strings.ReplaceAll(w.namespace, "-", "_")
	w.exec(conn, "create role "+role+" login superuser password 'first-first-first'")
	t.Cleanup(func() {
		c := postgresCleanup(t, dsn)
		_, _ = c.Exec(cleanupContext(), "reassign owned by "+role+" to postgres")
		_, _ = c.Exec(cleanupContext(), "drop owned by "+role)
		_, _ = c.Exec(cleanupContext(), "drop role "+role)
		_ = c.Close(cleanupContext())
	})
	as := func(password string) string {
		u, err := url.Parse(dsn)
		if err != nil {
			t.Fatal(err)
		}
		u.User = url.UserPassword(role, password)
		return u.String()
	}
	w.secret(appDB.Name, appDB.Key, as("first-first-first"))
	s, g := newStream("orders"), newGroup("sink", "orders")
	w.create(s)
	w.create(g)
	w.wantReady(g)
	w.exec(conn, `select millrace.publish('orders', '1')`)
	id := scalar[int](w, conn, "select id from millrace_engine.stream where name = 'orders'")

	// The password changes in the database first: until the Secret follows, what is connected stays so, and what connects anew is told why not.
	w.exec(conn, "alter role "+role+" password 'second-second-second'")
	w.exec(conn, "select pg_terminate_backend(pid) from pg_stat_activity where usename = $1", role)
	w.wantNotReady(s, v1alpha1.ReasonAuthenticationFailed, "Correct user and password in the Secret")
	w.secret(appDB.Name, appDB.Key, as("second-second-second"))
	w.wantReady(s)
	w.wantReady(g)

	w.secret("renamed-db", "url", as("second-second-second"))
	update(w, s, func(s *v1alpha1.Stream) {
		s.Spec.DatabaseSecretRef = &v1alpha1.SecretKeyReference{Name: "renamed-db", Key: "url"}
	})
	w.kubectl("delete", "secret", appDB.Name)
	w.wantReady(s)
	w.wantReady(g)
	if now := scalar[int](w, conn, "select id from millrace_engine.stream where name = 'orders'"); now != id {
		t.Errorf("the stream was made again: %d, and was %d", now, id)
	}
	if n := scalar[int](w, conn, "select count(*) from millrace.orders"); n != 1 {
		t.Errorf("%d messages", n)
	}
	w.wantNoLeak("first-first-first", "second-second-second")
}

// Rule 9: of Secrets the manager lists and watches metadata only; their values are read one by one.
func TestSecretsAreNeverListedWithTheirValues(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	s := newStream("orders")
	w.create(s)
	w.wantReady(s)
	lists := suite.writes.reads(func(r read) bool { return strings.HasSuffix(r.path, "/secrets") })
	if len(lists) == 0 {
		t.Fatal("the manager did not look for Secrets at all")
	}
	for _, r := range lists {
		if !strings.Contains(r.accept, "as=PartialObjectMetadata") {
			t.Errorf("%s asks for %s", r.path, r.accept)
		}
	}
	if one := suite.writes.reads(func(r read) bool { return strings.HasSuffix(r.path, w.namespace+"/secrets/"+appDB.Name) }); len(one) == 0 {
		t.Error("nobody read the Secret")
	}
}

// Rule 2, 10: a database that takes no writes, as after a failover that went to the wrong side, says so, changes nothing, and is used again
// when it does.
func TestAReadOnlyDatabaseIsWaitedFor(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	conn := w.sql(dsn)
	name := scalar[string](w, conn, "select quote_ident(current_database())")
	setting := func(value string) {
		w.exec(conn, "set default_transaction_read_only = off")
		w.exec(conn, "alter database "+name+" set default_transaction_read_only = "+value)
		w.exec(conn, "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and application_name = 'millrace-manager'")
	}
	setting("on")
	s := newStream("orders")
	w.create(s)
	w.wantNotReady(s, v1alpha1.ReasonDatabaseReadOnly, "is read-only, perhaps a standby", "Point the Secret at the primary")
	w.want(s, v1alpha1.ConditionReconciling, metav1.ConditionTrue, v1alpha1.ReasonDatabaseReadOnly)
	setting("off")
	w.wantReady(s)
	// One that exists says so when there is something to do.
	setting("on")
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.Partitions = 16 })
	w.wantNotReady(s, v1alpha1.ReasonDatabaseReadOnly)
	setting("off")
	w.wantReady(s)
	if *s.Status.Partitions != 16 {
		t.Errorf("status is %+v", s.Status)
	}
}

// The same with a standby of a real pair, and its promotion.
func TestAStandbyIsWaitedFor(t *testing.T) {
	w := newWorld(t)
	primary := postgres.NewServer(t, postgres.Options{})
	w.secret(appDB.Name, appDB.Key, primary.DSN("postgres"))
	s := newStream("orders")
	w.create(s)
	w.wantReady(s)
	standby, err := primary.Standby(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := standby.Stop(cleanupContext()); err != nil {
			t.Error(err)
		}
	})
	w.secret(appDB.Name, appDB.Key, standby.DSN("postgres"))
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.Partitions = 16 })
	w.wantNotReady(s, v1alpha1.ReasonDatabaseReadOnly, "perhaps a standby")
	if err := standby.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.wantReady(s)
	if *s.Status.Partitions != 16 {
		t.Errorf("status is %+v", s.Status)
	}
}

// Rule 10: a lock that an application holds ends the attempt, not the application: the manager says so, lets others pass, and tries again.
func TestALockThatDoesNotComeIsTriedAgain(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s, other := newStream("orders"), newStream("other")
	w.create(s)
	w.create(other)
	w.wantReady(s)
	w.wantReady(other)
	conn := w.sql(dsn)
	w.exec(conn, "begin")
	w.exec(conn, "lock table millrace.orders in share mode") // whoever reads goes on, whoever changes the table waits
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.Retention.Segments = 6 })
	w.wantNotReady(s, v1alpha1.ReasonProgressing, "a lock did not come within")
	update(w, other, func(s *v1alpha1.Stream) { s.Spec.MaxMessageBytes = ptr.To(resource.MustParse("64Ki")) })
	w.wantReady(other)
	w.exec(conn, "commit")
	w.wantReady(s)
	if *s.Status.Segments != 6 {
		t.Errorf("status is %+v", s.Status)
	}
	if n := w.events(s, v1alpha1.EventDriftRepaired); len(n) > 0 {
		t.Errorf("what was tried again is called drift: %v", n)
	}
}
