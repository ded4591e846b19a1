package pgstream_test

import (
	"context"
	"net/url"
	"os"
	osexec "os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

// look is one look of the scout in SQL, as a leader does it.
type look struct {
	seen     string
	notified []int32
	waiting  int
	due      bool
	next     *float64
}

func (e *engine) look(before *look, full bool) *look {
	e.t.Helper()
	var seen *string
	if before != nil {
		seen = &before.seen
	}
	l := &look{}
	must(e.t, e.QueryRow(e.ctx, "select seen::text, notified, waiting, due, next_seconds from millrace_engine.scout($1::text::jsonb, $2)", seen, full).
		Scan(&l.seen, &l.notified, &l.waiting, &l.due, &l.next))
	return l
}

// sees is a look that must notify these streams and no others.
func (e *engine) sees(what string, before *look, full bool, want ...int32) *look {
	e.t.Helper()
	l := e.look(before, full)
	same(e.t, what, l.notified, want)
	return l
}

// await registers interest in streams for ten seconds, as a consumer that waits does.
func (e *engine) await(streams ...int32) {
	e.t.Helper()
	e.run("select millrace_engine.wait_for($1)", streams)
}

func TestTheScoutsTakeTurnsWithoutAGapAndNeverWait(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	lease := func(db pgstream.DB, holder string) (leads bool, epoch int64) {
		t.Helper()
		var again float64
		must(t, db.QueryRow(e.ctx, "select * from millrace_engine.scout_lease($1, 10, 60)", holder).Scan(&leads, &epoch, &again))
		if again <= 0 || again > 60 {
			t.Errorf("%s is to ask again after %v seconds", holder, again)
		}
		return leads, epoch
	}
	mustLead := func(what, holder string, want bool, wantEpoch int64) {
		t.Helper()
		if leads, epoch := lease(e, holder); leads != want || epoch != wantEpoch {
			t.Errorf("%s: %s leads: %v in epoch %d; want %v in %d", what, holder, leads, epoch, want, wantEpoch)
		}
	}
	mustLead("free", "a", true, 1)
	mustLead("taken", "b", false, 1)
	mustLead("held", "a", true, 1)
	e.jump(6 * time.Second)
	mustLead("renewed when half used up", "a", true, 1)
	e.jump(6 * time.Second)
	mustLead("renewed", "b", false, 1)
	e.jump(5 * time.Second)
	mustLead("expired", "b", true, 2)
	mustLead("lost", "a", false, 2)
	for range 9 {
		e.jump(6 * time.Second)
		mustLead("within its term", "b", true, 2)
	}
	e.jump(7 * time.Second)
	mustLead("a term that is over, with nobody else there", "b", true, 2)
	mustLead("a term that is over", "a", true, 3)
	mustLead("its turn is over", "b", false, 3)
	e.run("select millrace_engine.scout_leave('b')")
	mustLead("left by another", "b", false, 3)
	e.run("select millrace_engine.scout_leave('a')")

	// Two ask at once: the row of the one that asked first is not waited for.
	tx := e.begin()
	if leads, _ := lease(tx, "a"); !leads {
		t.Fatal("the lease was not free")
	}
	ctx, cancel := context.WithTimeout(e.ctx, patience)
	defer cancel()
	var leads bool
	if err := e.QueryRow(ctx, "select leads from millrace_engine.scout_lease('b', 10, 60)").Scan(&leads); err != nil || leads {
		t.Errorf("while another takes the lease: %v, %v", leads, err)
	}
	rollback(e, tx)
	mustLead("that one failed", "b", true, 4)
}

// A rollback and a late commit release messages of others, and no sequence moves and no trigger fires.
func TestTheScoutSeesAHorizonThatMovesWithoutItsSequence(t *testing.T) {
	t.Parallel()
	for _, end := range []struct {
		name string
		of   func(*engine, pgx.Tx)
	}{{"rollback", rollback}, {"commit", commit}} {
		t.Run(end.name, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stream("orders")
			e.stream("quiet")
			e.stream("alone")
			e.publish("alone", 1) // nobody waits for it
			e.await(1, 2)
			open := e.begin()
			publishIn(e, open, "orders")
			e.publish("orders", 1) // held back
			first := e.sees("a first look at what cannot be read yet", nil, true)
			if first.waiting != 2 {
				t.Errorf("%d streams are waited for, want 2", first.waiting)
			}
			held := e.sees("the publisher is still open", first, false)
			end.of(e, open)
			moved := e.sees("the publisher has ended", held, false, 1)
			again := e.sees("told once", moved, false)
			e.sees("a new scout tells what it may have missed", nil, false, 1)
			e.publish("orders", 1)
			e.sees("a position was added", again, false, 1)
		})
	}
}

func TestTheScoutIsSeenBlindWithoutThePublishersLocks(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.mutate("millrace_engine.horizons", "k.mode = 'ShareLock'", "k.mode = 'none'")
	e.await(1)
	open := e.begin()
	publishIn(e, open, "orders")
	e.publish("orders", 1)
	first := e.look(nil, true)
	rollback(e, open)
	if l := e.look(first, false); len(l.notified) > 0 {
		t.Error("the end of the publisher was noticed without its lock")
	}
}

func TestTheScoutNotifiesTheParentOfAPriorityLane(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.stream("urgent")
	e.run("update millrace_engine.stream set name = 'orders.p1', parent_id = 1, priority = 1 where id = 2")
	e.await(1)
	open := e.begin()
	exec(e, open, "insert into millrace.urgent (payload) values ('{}')")
	first := e.sees("nothing to read", nil, true)
	commit(e, open)
	e.sees("the lane's publisher has ended", first, false, 1)
}

func TestTheScoutSeesWhatBecomesDue(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", AckWait: 30 * time.Second})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "o", Mode: pgstream.ModeOrdered, AckWait: 30 * time.Second})
	g := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 2})
	o := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "o", MaxMessages: 2, Member: "m"})
	e.publish("orders", 2)
	e.await(1)
	l := e.sees("what is there already", nil, true, 1)
	l = e.sees("nothing more", l, true)

	// A retry.
	claim := mustReceive(e, g)
	must(t, g.Nack(e.ctx, claim.Token, []int64{1}, 5*time.Second, ""))
	must(t, g.AckMessages(e.ctx, claim.Token, []int64{2}))
	l = e.sees("a retry that is not due", l, true)
	if l.next == nil || *l.next > 5 || *l.next < 4 {
		t.Errorf("the next thing is due in %v seconds, want 5", l.next)
	}
	e.jump(4900 * time.Millisecond)
	l = e.sees("not quite", l, false)
	e.jump(200 * time.Millisecond)
	l = e.sees("a retry that is due, foreseen", l, false, 1)
	l = e.sees("told once", l, false)
	e.jump(11 * time.Second)
	l = e.sees("told again for ten seconds, to whoever might have missed it", l, true, 1)
	l = e.sees("nobody wants it", l, true)

	// A claim of a Shared group that expires; its end is moved once.
	must(t, g.Ack(e.ctx, mustReceive(e, g).Token))
	e.publish("orders", 1)
	l = e.sees("a message", l, true, 1)
	claim = mustReceive(e, g)
	e.jump(20 * time.Second)
	if _, err := g.Extend(e.ctx, claim.Token, 30*time.Second); err != nil {
		t.Fatal(err)
	}
	l = e.sees("held", l, true)
	e.jump(11 * time.Second)
	l = e.sees("extended", l, true)
	e.jump(20 * time.Second)
	l = e.sees("a claim that has expired", l, true, 1)
	must(t, g.Ack(e.ctx, mustReceive(e, g).Token))
	e.jump(time.Minute)
	l = e.sees("a group at rest", l, true)
	l = e.sees("a group at rest, later", l, true)

	// An Ordered group: a claim given back for later, and then one whose member has died.
	claim = mustReceive(e, o)
	must(t, o.Nack(e.ctx, claim.Token, positions(claim), 5*time.Second, ""))
	e.jump(6 * time.Second)
	l = e.sees("a partition that is due again", l, true, 1)
	claim = mustReceive(e, o)
	must(t, o.Ack(e.ctx, claim.Token))
	l = e.sees("told once", l, true)
	e.jump(time.Minute)
	l = e.sees("a member that has died", l, true, 1)
	l = e.sees("told once", l, true)

	// A paused group has nothing due.
	e.publish("orders", 1)
	l = e.sees("a message", l, true, 1)
	mustReceive(e, g)
	e.jump(time.Minute)
	e.run("update millrace_engine.consumer_group set paused = true")
	e.sees("paused", l, true)
	e.run("update millrace_engine.consumer_group set paused = false")
	e.sees("not paused", l, true, 1)
}

// A nack names a time and commits when it likes, maybe after it.
func TestTheScoutSeesARetryThatWasCommittedLate(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	g := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	e.publish("orders", 1)
	e.await(1)
	l := e.look(nil, true)
	claim := mustReceive(e, g)
	tx := e.begin()
	exec(e, tx, "select millrace.nack($1, array[1], 1, 'late')", claim.Token)
	e.jump(2 * time.Second)
	l = e.sees("not committed", l, true)
	commit(e, tx)
	e.sees("committed after it was due", l, true, 1)
}

func TestTheScoutMovesDelayedMessagesAndTheirConsumerWakes(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.scout(pgstream.ScoutConfig{})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", PollInterval: never, Listener: e.listener()})
	done := e.waiting(c)
	if p := one[*int64](e, "select millrace.publish('orders', '{}', p_delay_seconds => 0.3)"); p != nil {
		t.Errorf("a delayed message has position %d", *p)
	}
	claim := e.mustWake(done)
	same(t, "delayed", positions(claim), []int64{1})
}

// scout runs a scout until the test ends.
func (e *engine) scout(cfg pgstream.ScoutConfig) {
	e.t.Helper()
	e.scoutOn(e.Pool, cfg, func(err error) { e.t.Errorf("the scout reports: %v", err) })
}

func (e *engine) scoutOn(db pgstream.DB, cfg pgstream.ScoutConfig, report func(error)) (stop func()) {
	ctx, cancel := context.WithCancel(e.ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		pgstream.RunScout(ctx, db, cfg, report)
	}()
	stop = func() {
		cancel()
		<-done
	}
	e.t.Cleanup(stop)
	return stop
}

func (e *engine) holder() string {
	return one[string](e, "select coalesce((select holder from millrace_engine.scout where expires_at > millrace_engine.clock()), '')")
}

func TestRunningScoutsRotate(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	names := []string{"a", "b", "c"}
	for _, name := range names {
		e.scout(pgstream.ScoutConfig{Holder: name, Interval: 5 * time.Millisecond, IdleInterval: 5 * time.Millisecond, FollowInterval: 5 * time.Millisecond,
			Lease: 100 * time.Millisecond, Term: 50 * time.Millisecond})
	}
	led := map[string]bool{}
	e.eventually("each has led", func() bool {
		led[e.holder()] = true
		for _, name := range names {
			if !led[name] {
				return false
			}
		}
		return true
	})
}

func TestAScoutThatStopsLeavesItsPlaceAtOnce(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	stop := e.scoutOn(e.Pool, pgstream.ScoutConfig{Holder: "a", Lease: time.Hour, Term: 2 * time.Hour}, nil)
	e.eventually("a leads", func() bool { return e.holder() == "a" })
	e.scout(pgstream.ScoutConfig{Holder: "b", FollowInterval: 10 * time.Millisecond})
	stop()
	e.eventually("b leads", func() bool { return e.holder() == "b" })
}

// The test runs itself as another process, and freezes it.
func TestAFrozenScoutIsReplacedAndDoesNoHarmWhenItWakes(t *testing.T) {
	t.Parallel()
	if dsn := os.Getenv("MILLRACE_TEST_SCOUT"); dsn != "" {
		pool, err := pgxpool.New(t.Context(), dsn)
		must(t, err)
		pgstream.RunScout(t.Context(), pool, pgstream.ScoutConfig{Holder: "frozen", Lease: 500 * time.Millisecond, Term: time.Hour}, nil)
		return
	}
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	self, err := os.Executable()
	must(t, err)
	other := osexec.Command(self, "-test.run=^"+t.Name()+"$")
	other.Env = append(os.Environ(), "MILLRACE_TEST_SCOUT="+e.dsn, "MILLRACE_TEST_POSTGRES="+e.dsn)
	must(t, other.Start())
	t.Cleanup(func() {
		_ = other.Process.Kill()
		_ = other.Wait()
	})
	e.eventually("the other process leads", func() bool { return e.holder() == "frozen" })
	must(t, other.Process.Signal(syscall.SIGSTOP))
	e.scout(pgstream.ScoutConfig{Holder: "b", FollowInterval: 10 * time.Millisecond, Lease: 500 * time.Millisecond, Term: 200 * time.Millisecond})
	e.eventually("its place is taken", func() bool { return e.holder() == "b" })

	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", PollInterval: never, Listener: e.listener()})
	must(t, other.Process.Signal(syscall.SIGCONT))
	for range 20 {
		e.run("select millrace.publish('orders', '{}', p_delay_seconds => 0.02)")
	}
	got := map[int64]bool{}
	for len(got) < 20 {
		claim, err := c.Receive(e.ctx)
		must(t, err)
		for _, p := range positions(claim) {
			if got[p] {
				t.Errorf("position %d was delivered twice", p)
			}
			got[p] = true
		}
		must(t, c.Ack(e.ctx, claim.Token))
	}
	if n := one[int](e, "select count(*) from millrace.orders"); n != 20 {
		t.Errorf("%d messages were moved, want 20", n)
	}
}

// A scout reports what people should know, and goes on after an error.
func TestAScoutGoesOnAfterAnError(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	def := one[string](e, "select pg_get_functiondef('millrace_engine.scout'::regproc)")
	e.mutate("millrace_engine.scout", "    perform pg_notify(", "    perform 1 / 0;\n    perform pg_notify(")
	var mu sync.Mutex
	var reports []error
	e.scoutOn(e.Pool, pgstream.ScoutConfig{Interval: time.Millisecond, IdleInterval: time.Millisecond, FollowInterval: time.Millisecond}, func(err error) {
		mu.Lock()
		defer mu.Unlock()
		reports = append(reports, err)
	})
	e.eventually("it reports", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(reports) > 0 && sqlState(reports[0]) == "22012"
	})
	e.run(def)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.await(1)
	conn := e.connect()
	exec(e, conn, "listen millrace")
	open := e.begin()
	publishIn(e, open, "orders")
	e.publish("orders", 1)
	ctx, cancel := context.WithTimeout(e.ctx, patience)
	defer cancel()
	rollback(e, open) // with it, the one notification that both had: the scout's is left
	n, err := conn.WaitForNotification(ctx)
	must(t, err)
	if n.Payload != "1" {
		t.Errorf("a notification of %q", n.Payload)
	}
}

// Processors have the runtime role, and any of them may be the scout.
func TestTheRuntimeRoleMayScout(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	role := "run_" + e.database()[:20]
	e.run(`create role "` + role + `" login password 'x'`)
	_, err := schema.Migrate(e.ctx, e.connect(), schema.Options{RuntimeRole: role})
	must(t, err)
	e.stream("orders")
	e.await(1)
	e.run("select millrace.publish('orders', '{}', p_delay_seconds => 0.01)")
	u, err := url.Parse(e.dsn)
	must(t, err)
	u.User = url.UserPassword(role, "x")
	pool, err := pgxpool.New(e.ctx, u.String())
	must(t, err)
	t.Cleanup(func() {
		pool.Close()
		e.run(`drop owned by "` + role + `"`)
		e.run(`drop role "` + role + `"`)
	})
	s := pgstream.NewScout(pgstream.ScoutConfig{}, func(err error) { t.Errorf("the scout reports: %v", err) })
	e.eventually("the message is moved", func() bool {
		_, err := s.Round(e.ctx, pool)
		must(t, err)
		return one[int](e, "select count(*) from millrace.orders") == 1
	})
	if !s.Leads() {
		t.Error("it does not lead")
	}
	s.Leave(e.ctx, pool)
	if h := e.holder(); h != "" {
		t.Errorf("the lease is still held by %s", h)
	}
}
