package pgstream_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Readers that have a horizon from before try the few locks that publishers may hold, where the other tests of the horizon list them.

// freshLocks makes somebody wait for the stream, while nobody publishes.
func freshLocks(e *engine) {
	e.t.Helper()
	e.run("select millrace_engine.wait_for(array[1])")
	if !one[bool](e, "select fresh_locks from millrace_engine.stream where id = 1") {
		e.t.Fatal("the publishers' locks are not known to be recent")
	}
}

// first makes the group receive two messages, one by one, so that it has a horizon from before; the first is followed by a row about its segment.
func first(e *engine, c *pgstream.Consumer) []int64 {
	e.t.Helper()
	for p := range int64(2) {
		publishIn(e, e, "orders")
		same(e.t, "received", drain(e, c), []int64{p + 1})
	}
	return []int64{1, 2}
}

// tried is a stream whose readers try locks, with a group that has received the first messages. Listing the locks is an error from here on.
func tried(t *testing.T, mode pgstream.Mode) (*engine, *pgstream.Consumer) {
	t.Helper()
	e := newEngine(t)
	e.stream("orders")
	freshLocks(e)
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	first(e, c)
	e.mutate("millrace_engine.horizon", "h := coalesce(", "raise 'the locks were listed'; h := coalesce(")
	return e, c
}

func TestReadersTryTheLocksOfPublishers(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, c := tried(t, mode)
		late, gone := e.begin(), e.begin()
		p3 := publishIn(e, late, "orders")
		p4 := publishIn(e, e, "orders")
		publishIn(e, gone, "orders")
		p6 := publishIn(e, e, "orders")
		same(t, "with two open", drain(e, c), nil)
		commit(e, late)
		same(t, "with one open", drain(e, c), []int64{p3, p4})
		rollback(e, gone)
		same(t, "with none open", drain(e, c), []int64{p6})

		// A savepoint lets go of the lock when it is rolled back, and the next message takes it again.
		tx := e.begin()
		exec(e, tx, "savepoint a")
		publishIn(e, tx, "orders")
		exec(e, tx, "rollback to a")
		p8 := publishIn(e, e, "orders")
		same(t, "after a rollback to a savepoint", drain(e, c), []int64{p8})
		p9 := publishIn(e, tx, "orders")
		p10 := publishIn(e, e, "orders")
		same(t, "while it has published again", drain(e, c), nil)
		commit(e, tx)
		same(t, "after its commit", drain(e, c), []int64{p9, p10})

		// A prepared transaction keeps its locks without a session.
		tx = e.begin()
		exec(e, tx, "set local millrace.notify = off")
		p11 := publishIn(e, tx, "orders")
		name := "fresh_locks_" + one[string](e, "select current_database()")
		exec(e, tx, "prepare transaction '"+name+"'")
		p12 := publishIn(e, e, "orders")
		same(t, "while it is prepared", drain(e, c), nil)
		e.run("commit prepared '" + name + "'")
		same(t, "when it is committed", drain(e, c), []int64{p11, p12})

		if n := one[int](e, "select count(*) from pg_locks where locktype = 'advisory' and mode = 'ExclusiveLock' and classid::bigint >> 8 = 1 and objsubid = 1"+
			" and database = (select oid from pg_database where datname = current_database())"); n != 0 {
			t.Errorf("%d locks were left behind", n)
		}
	})
}

func TestReadersThatTryTheSameLocksDoNotFoolEachOther(t *testing.T) {
	t.Parallel()
	e, _ := tried(t, pgstream.ModeShared)
	p := publishIn(e, e, "orders")
	// While another session holds the very lock that a reader tries, the reader stays below it, and never returns less than it knew.
	other := e.begin()
	exec(e, other, "select pg_advisory_xact_lock((1::bigint << 40) | 2)")
	if h := one[int64](e, "select millrace_engine.horizon_from(1, 2)"); h != 2 {
		t.Errorf("horizon %d while the lock is taken, want 2", h)
	}
	rollback(e, other)
	if h := one[int64](e, "select millrace_engine.horizon_from(1, 2)"); h != p {
		t.Errorf("horizon %d, want %d", h, p)
	}
}

// slowPublisher makes a publisher read the last position and stop before it takes its lock. It goes on when the returned function is called, and ends with its transaction.
func slowPublisher(e *engine) (tx pgx.Tx, proceed func() int64) {
	e.t.Helper()
	e.mutate("millrace_engine.publish_guard_1", "if pg_advisory_xact_lock_shared((1::bigint << 40) | (l & 1099511627775)) is null   --",
		"if current_setting('application_name') = 'slow' then "+pauseAt+"end if; if pg_advisory_xact_lock_shared((1::bigint << 40) | (l & 1099511627775)) is null   --")
	stop, tx := e.begin(), e.begin()
	exec(e, stop, "select pg_advisory_xact_lock(77)")
	exec(e, tx, "set application_name = 'slow'")
	published := make(chan int64, 1)
	go func() {
		var p int64
		if err := tx.QueryRow(e.ctx, "insert into millrace.orders (payload) values ('{}') returning position").Scan(&p); err != nil {
			e.t.Errorf("publish: %v", err)
		}
		published <- p
	}()
	e.waitsForLock(pid(tx))
	return tx, func() int64 {
		rollback(e, stop)
		return <-published
	}
}

// begun is a history with the messages of first in it, and their consumer.
func begun(e *engine) (*history, *pgstream.Consumer) {
	e.t.Helper()
	h := newHistory()
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	h.received("g", first(e, c))
	h.published([]int64{1, 2}, true)
	return h, c
}

// stalePublisher is the trap: others publish so many messages, and a reader passes them, before a publisher takes the lock of the position that it has read.
func stalePublisher(n int) func(e *engine) []string {
	return func(e *engine) []string {
		e.t.Helper()
		h, c := begun(e)
		tx, proceed := slowPublisher(e)
		return passed(e, h, c, tx, proceed, n)
	}
}

func passed(e *engine, h *history, c *pgstream.Consumer, tx pgx.Tx, proceed func() int64, n int) []string {
	e.t.Helper()
	h.published(e.publish("orders", n), true)
	h.received("g", drain(e, c))
	low := proceed()
	h.published([]int64{publishIn(e, e, "orders")}, true)
	h.received("g", drain(e, c))
	commit(e, tx)
	h.published([]int64{low}, true)
	h.received("g", drain(e, c))
	return h.broken("g")
}

// oldPublisher is the same trap with a guard that does not make sure, as those of an earlier release, which began before somebody waited.
func oldPublisher(e *engine) []string {
	e.t.Helper()
	h, c := begun(e)
	guard := one[string](e, "select pg_get_functiondef('millrace_engine.publish_guard_1'::regproc)")
	e.run("update millrace_engine.stream set fresh_locks = false")
	e.mutate("millrace_engine.publish_guard_1", "- l > 7 loop", "- l > 7000 loop")
	tx, proceed := slowPublisher(e)
	e.run(guard)
	e.run("select millrace_engine.confirm_fresh_locks(1)")
	return passed(e, h, c, tx, proceed, 20)
}

// ownLock looks at the horizon in the transaction that has published.
func ownLock(e *engine) []string {
	e.t.Helper()
	tx := e.begin()
	p := publishIn(e, tx, "orders")
	publishIn(e, e, "orders")
	var h int64
	must(e.t, tx.QueryRow(e.ctx, "select millrace_engine.horizon_from(1, 0)").Scan(&h))
	if h >= p {
		return []string{fmt.Sprintf("the horizon was %d in the transaction that has published %d", h, p)}
	}
	return nil
}

func TestTryingLocksIsSeenBrokenWithout(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		trap   func(e *engine) []string
		damage func(e *engine)
	}{
		{"a second look at the last position", stalePublisher(20), func(e *engine) {
			e.mutate("millrace_engine.publish_guard_1", "- l > 7 loop", "- l > 7000 loop")
		}},
		{"the locks a little below the horizon known", stalePublisher(5), func(e *engine) {
			e.mutate("millrace_engine.horizon_from", "greatest(-7, -p_known)", "0")
		}},
		{"trying", stalePublisher(20), func(e *engine) {
			e.mutate("millrace_engine.horizon_from", "return greatest(p_known, p_known + i);", "null;")
		}},
		{"the reader's own transaction", ownLock, func(e *engine) {
			e.mutate("millrace_engine.horizon_from", "pg_current_xact_id_if_assigned() is null and", "")
		}},
		{"the end of those that began before", oldPublisher, func(e *engine) {
			e.mutate("millrace_engine.confirm_fresh_locks", "fresh_locks = holders = '{}'", "fresh_locks = true")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			for _, broken := range []bool{false, true} {
				e := newEngine(t)
				e.stream("orders")
				freshLocks(e)
				e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
				if broken {
					c.damage(e)
					mustBeBroken(t, c.trap(e))
				} else {
					mustHold(t, c.trap(e))
				}
			}
		})
	}
}

func TestLocksAreFreshWhenThoseThatBeganBeforeHaveEnded(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	fresh := func() bool {
		e.t.Helper()
		e.run("select millrace_engine.set_state(1, null, clock_timestamp())") // a wait that has to be registered again
		e.run("select millrace_engine.wait_for(array[1])")
		return one[bool](e, "select fresh_locks from millrace_engine.stream where id = 1")
	}
	first, second := e.begin(), e.begin()
	publishIn(e, first, "orders")
	exec(e, second, "set local millrace.notify = off")
	publishIn(e, second, "orders")
	if fresh() {
		t.Error("with two publishers from before")
	}
	later := e.begin()
	publishIn(e, later, "orders")
	commit(e, first)
	name := "fresh_" + one[string](e, "select current_database()")
	exec(e, second, "prepare transaction '"+name+"'")
	if fresh() {
		t.Error("with a prepared publisher from before")
	}
	e.run("commit prepared '" + name + "'")
	if !fresh() {
		t.Error("not with a later publisher only")
	}
	rollback(e, later)
}

func TestAGroupThatBeganAheadOfTheLogAndIsResetMissesNothing(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stream("orders")
		freshLocks(e)
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, StartFrom: pgstream.StartPosition, StartPosition: 1000, AckWait: time.Minute})
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 100})
		all := e.publish("orders", 10)
		same(t, "ahead of the log", drain(e, c), nil)
		e.run("select millrace.reset_group('orders', 'g', 'Position', 1)")
		same(t, "after the reset", drain(e, c), all)
		same(t, "what comes then", drain(e, c), nil)
		more := e.publish("orders", 3)
		same(t, "what was published then", drain(e, c), more)
	})
}

func TestAPublisherHasItsIDBeforeItsLock(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	freshLocks(e)
	tx, proceed := slowPublisher(e)
	// Otherwise a reader could hear that nobody writes, and have a horizon far above the lock, where it does not try.
	if !one[bool](e, "select backend_xid is not null from pg_stat_activity where pid = $1", pid(tx)) {
		t.Error("it takes its lock without an id")
	}
	proceed()
	commit(e, tx)
}
