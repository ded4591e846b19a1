package pgstream_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

// later publishes a message with a number that is due after some seconds.
func (e *engine) later(db pgstream.DB, stream string, number, seconds int) {
	e.t.Helper()
	exec(e, db, "select millrace.publish($1, to_jsonb($2::int), p_delay_seconds => $3)", stream, number, seconds)
}

// moveDue moves up to n messages and returns the ids of the streams that got some.
func (e *engine) moveDue(db pgstream.DB, n int) []int32 {
	e.t.Helper()
	var moved []int32
	must(e.t, db.QueryRow(e.ctx, "select millrace_engine.move_due($1)", n).Scan(&moved))
	return moved
}

// numbers are the payloads of a stream in position order.
func (e *engine) numbers(stream string) []int64 {
	e.t.Helper()
	return e.positions(fmt.Sprintf("select payload::bigint from millrace.%s order by position", pgx.Identifier{stream}.Sanitize()))
}

func (e *engine) delayed() int {
	e.t.Helper()
	return one[int](e, "select count(*) from millrace_engine.delayed")
}

func TestADelayedMessageComesWhenItIsDue(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.run("select millrace.create_stream('raw', p_payload_type => 'Bytes')")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	for _, sql := range []string{
		`select millrace.publish('orders', '30', 'k', '{"h": 1}', p_delay_seconds => 30)`,
		`select millrace.publish('orders', '10', p_deliver_at => millrace_engine.clock() + interval '10 seconds')`,
		`select millrace.publish_batch('orders', array['20', '21']::jsonb[], array['a', 'b'], p_delay_seconds => 20)`,
		`select millrace.publish_bytes('raw', '\x00ff', 'k', p_delay_seconds => 20)`,
		`select millrace.publish_batch_bytes('raw', array['\x01']::bytea[], p_deliver_at => millrace_engine.clock() + interval '20 seconds')`,
	} {
		for _, p := range e.positions(sql) {
			if p != 0 {
				t.Errorf("%s returned position %d, want null", sql, p)
			}
		}
	}
	tx := e.begin()
	e.later(tx, "orders", 15, 15)
	rollback(e, tx)
	if at := e.positions(`select millrace.publish('orders', '0', p_deliver_at => millrace_engine.clock() - interval '1 second')
		union all select millrace.publish('orders', '0', p_delay_seconds => 0)`); at[0] == 0 || at[1] == 0 {
		t.Errorf("positions %v: what is due already was delayed", at)
	}

	e.jump(10*time.Second - time.Millisecond)
	if moved := e.moveDue(e, 100); len(moved) != 0 {
		t.Errorf("streams %v got messages before they were due", moved)
	}
	e.jump(time.Millisecond)
	same(t, "streams that got messages", e.moveDue(e, 100), []int32{1})
	same(t, "delivered", drain(e, c), []int64{1, 2, 3})
	e.jump(10 * time.Second)
	moved := e.moveDue(e, 100)
	slices.Sort(moved)
	same(t, "streams that got messages", moved, []int32{1, 2})
	if moved := e.moveDue(e, 100); len(moved) != 0 {
		t.Errorf("streams %v got messages again", moved)
	}
	e.jump(10 * time.Second)
	e.moveDue(e, 100)
	same(t, "payloads", e.numbers("orders"), []int64{0, 0, 10, 20, 21, 30})
	same(t, "the rest", drain(e, c), []int64{4, 5, 6})
	if !one[bool](e, `select key = 'k' and headers = '{"h": 1}' from millrace.orders where payload = '30'`) {
		t.Error("a delayed message lost its key or headers")
	}
	if got := one[string](e, `select string_agg(encode(payload, 'hex') || coalesce(key, '-'), ' ' order by position) from millrace.raw`); got != "00ffk 01-" {
		t.Errorf("bytes %q", got)
	}
	if n := e.delayed(); n != 0 {
		t.Errorf("%d messages are still delayed", n)
	}
}

func TestDelaysThatCannotBeAreRefused(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", MaxMessageBytes: 1000}}))
	large := `"` + strings.Repeat("x", 2000) + `"`
	for _, c := range []struct{ name, arguments, hint string }{
		{"both a delay and a time", `'{}', p_delay_seconds => 1, p_deliver_at => now()`, "or p_deliver_at"},
		{"a negative delay", `'{}', p_delay_seconds => -0.001`, "0 or more"},
		{"a delay that is no number", `'{}', p_delay_seconds => 'NaN'`, "0 or more"},
		{"an endless delay", `'{}', p_delay_seconds => 'Infinity'`, "0 or more"},
		{"a time that never comes", `'{}', p_deliver_at => 'infinity'`, "Pass a time"},
		{"a delay with serialize", `'{}', 'k', p_delay_seconds => 1, p_serialize => true`, "without"},
		{"a payload that is too large", `'` + large + `', p_delay_seconds => 1`, "maxMessageBytes"},
		{"a null payload", `null, p_delay_seconds => 1`, "'null'::jsonb"},
		{"headers that are no object", `'{}', null, '[]', p_delay_seconds => 1`, "object"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := e.Exec(e.ctx, "select millrace.publish('orders', "+c.arguments+")"); sqlState(err) != "MR004" || !strings.Contains(hint(err), c.hint) {
				t.Errorf("%v (hint %q); want MR004 and %q in the hint", err, hint(err), c.hint)
			}
		})
	}
	for _, arguments := range []string{`array['` + large + `']::jsonb[], p_delay_seconds => 1`, `array[null]::jsonb[], p_delay_seconds => 1`,
		`array_fill('1'::jsonb, array[100001]), p_delay_seconds => 1`, `array['1']::jsonb[], p_delay_seconds => -1`,
		`array['1']::jsonb[], p_headers => array['1']::jsonb[], p_delay_seconds => 1`} {
		if _, err := e.Exec(e.ctx, "select millrace.publish_batch('orders', "+arguments+")"); sqlState(err) != "MR004" {
			t.Errorf("a batch of %.60s…: %v, want MR004", arguments, err)
		}
	}
	if n := e.delayed() + e.length("orders"); n != 0 {
		t.Errorf("%d messages were stored all the same", n)
	}
}

func TestADelayedDedupeKeyIsRememberedFromItsPublish(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	publish := `select millrace.publish('orders', '1', p_dedupe_key => 'a', p_delay_seconds => 60)`
	same(t, "positions", e.positions(publish), []int64{0})
	same(t, "again", e.positions(publish), []int64{0})
	same(t, "without a delay", e.positions(`select millrace.publish('orders', '2', p_dedupe_key => 'a')`), []int64{0})
	same(t, "in a batch", e.positions(`select millrace.publish_batch('orders', array['3', '4', '5']::jsonb[], p_dedupe_keys => array['a', 'b', 'b'],
		p_delay_seconds => 61)`), []int64{0, 0, 0})
	e.jump(70 * time.Second)
	e.moveDue(e, 10)
	same(t, "stored", e.numbers("orders"), []int64{1, 4})
	same(t, "after it was moved", e.positions(`select millrace.publish('orders', '6', p_dedupe_key => 'a')`), []int64{0})
	e.jump(50 * time.Second)
	same(t, "after the window", e.positions(`select millrace.publish('orders', '7', p_dedupe_key => 'a')`), []int64{3})
}

// Messages of a stream are moved in the order of their due times, a few at a time, however they were published.
func TestDueMessagesAreMovedInTheOrderOfTheirTimes(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.stream("other")
	r := random(t)
	var want []int64
	for _, i := range r.Perm(50) {
		e.later(e, "orders", i, 1+i)
		if i%5 == 0 {
			e.later(e, "other", i, 1+i)
		}
	}
	for i := range 50 {
		want = append(want, int64(i))
	}
	e.jump(time.Minute)
	for calls := 0; e.delayed() > 0; calls++ {
		before := e.delayed()
		e.moveDue(e, 7)
		if moved := before - e.delayed(); moved < 1 || moved > 7 {
			t.Fatalf("a call moved %d messages, want 1 to 7", moved)
		}
	}
	same(t, "order", e.numbers("orders"), want)
	same(t, "order in the other stream", e.numbers("other"), []int64{0, 5, 10, 15, 20, 25, 30, 35, 40, 45})
}

// overtake has one caller take the oldest messages and fail while another one moves: the order of positions shows whether it passed the first.
func overtake(e *engine) []int64 {
	e.t.Helper()
	e.stopClock()
	e.stream("orders")
	for i := range 10 {
		e.later(e, "orders", i, 1+i)
	}
	e.jump(time.Minute)
	tx := e.begin()
	e.moveDue(tx, 5)
	e.moveDue(e, 10)
	rollback(e, tx)
	e.moveDue(e, 10)
	return e.numbers("orders")
}

func TestNobodyOvertakesACallerThatMovesDueMessages(t *testing.T) {
	t.Parallel()
	same(t, "order", overtake(newEngine(t)), []int64{0, 1, 2, 3, 4, 5, 6, 7, 8, 9})
}

func TestOvertakingIsSeenWithoutTheStreamsLock(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.mutate("millrace_engine.move_due", "pg_try_advisory_xact_lock(1836019572, next_.stream_id)", "true")
	if got := overtake(e); slices.IsSorted(got) {
		t.Errorf("the check is blind: order %v", got)
	}
}

func TestACallerThatIsKilledMovesNothing(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	for i := range 5 {
		e.later(e, "orders", i, 1+i)
	}
	e.jump(time.Minute)
	tx := e.begin()
	same(t, "streams", e.moveDue(tx, 3), []int32{1})
	if n := e.length("orders"); n != 0 {
		t.Fatalf("%d messages are visible before the commit", n)
	}
	e.run("select pg_terminate_backend($1)", pid(tx))
	e.eventually("the killed caller has let go", func() bool { return len(e.moveDue(e, 100)) > 0 })
	same(t, "order", e.numbers("orders"), []int64{0, 1, 2, 3, 4})
	if n := e.delayed(); n != 0 {
		t.Errorf("%d messages are left", n)
	}
}

func TestABusyStreamKeepsNoOtherStreamsDueMessagesWaiting(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("busy")
	e.stream("orders")
	for i := range 5 {
		e.later(e, "busy", i, 1) // the oldest, and more than a call takes
	}
	e.later(e, "orders", 7, 2)
	e.jump(time.Minute)
	tx := e.begin()
	exec(e, tx, "lock table millrace.busy in access exclusive mode")
	same(t, "streams", e.moveDue(e, 3), []int32{2})
	if _, err := e.Exec(e.ctx, "select millrace_engine.move_due(3)"); sqlState(err) != "55P03" {
		t.Errorf("with nothing else to move: %v, want 55P03", err)
	}

	t.Run("and a statement timeout loses none", func(t *testing.T) {
		conn := e.connect()
		exec(e, conn, "set statement_timeout = '50ms'")
		if _, err := conn.Exec(e.ctx, "select millrace_engine.move_due(3)"); sqlState(err) != "57014" {
			t.Errorf("%v, want 57014", err)
		}
	})
	rollback(e, tx)

	tx = e.begin()
	exec(e, tx, "select 1 from millrace_engine.delayed where payload = '1' for update")
	same(t, "streams", e.moveDue(e, 10), []int32{1})
	same(t, "without the row that somebody has locked", e.numbers("busy"), []int64{0, 2, 3, 4})
	rollback(e, tx)
	e.moveDue(e, 10)
	same(t, "afterwards", e.numbers("busy"), []int64{0, 2, 3, 4, 1})

	t.Run("nor does a broken one", func(t *testing.T) {
		e.later(e, "busy", 8, 1)
		e.later(e, "orders", 9, 2)
		e.jump(time.Minute)
		e.run("alter table millrace.busy rename to gone")
		same(t, "streams", e.moveDue(e, 10), []int32{2})
		if _, err := e.Exec(e.ctx, "select millrace_engine.move_due(3)"); sqlState(err) != "42P01" {
			t.Errorf("with nothing else to move: %v, want 42P01", err)
		}
		e.run("alter table millrace.gone rename to busy")
		same(t, "streams", e.moveDue(e, 10), []int32{1})
	})
}

func TestTheDelayedMessagesOfAStreamGoWithIt(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.stream("other")
	e.later(e, "orders", 1, 1)
	e.later(e, "other", 2, 1)
	e.run("select millrace.publish('orders', '1', p_dedupe_key => 'a')")
	e.run("select millrace_engine.drop_stream('orders')")
	e.jump(time.Minute)
	same(t, "streams", e.moveDue(e, 10), []int32{2})
	if n := e.delayed() + one[int](e, "select count(*) from millrace_engine.dedupe"); n != 0 {
		t.Errorf("%d rows of a dropped stream are left", n)
	}
}

func TestADelayedMessageOfAPreparedTransactionWaitsForItsCommit(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	tx := e.begin()
	e.later(tx, "orders", 1, 1)
	name := fmt.Sprintf("'delayed_%d'", pid(tx))
	exec(e, tx, "prepare transaction "+name)
	t.Cleanup(func() { _, _ = e.Exec(context.Background(), "rollback prepared "+name) })
	e.jump(time.Minute)
	if moved := e.moveDue(e, 10); len(moved) != 0 {
		t.Fatalf("streams %v got messages of an open transaction", moved)
	}
	e.run("commit prepared " + name)
	same(t, "streams", e.moveDue(e, 10), []int32{1})
	same(t, "stored", e.numbers("orders"), []int64{1})
}

// Many publishers of delayed messages and many callers of move_due at once, some of which are killed: each message that was committed is
// stored exactly once.
func TestEveryDelayedMessageIsMovedExactlyOnce(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	for i := range 3 {
		e.stream(fmt.Sprint("s", i))
	}
	r := random(t)
	stop := make(chan struct{})
	var publishers, movers sync.WaitGroup
	var mu sync.Mutex
	want := 0
	for range 2 {
		own, conn := newRand(r), e.connect()
		publishers.Go(func() {
			for range 60 {
				tx, err := conn.Begin(e.ctx)
				if err != nil {
					t.Error(err)
					return
				}
				n := 1 + own.IntN(5)
				if _, err := tx.Exec(e.ctx, "select millrace.publish_batch($1, array_fill('1'::jsonb, array[$2::int]), p_delay_seconds => $3)",
					fmt.Sprint("s", own.IntN(3)), n, own.Float64()/5); err != nil {
					t.Error(err)
					return
				}
				if own.IntN(4) == 0 {
					err = tx.Rollback(e.ctx)
				} else if err = tx.Commit(e.ctx); err == nil {
					mu.Lock()
					want += n
					mu.Unlock()
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 3 {
		own := newRand(r)
		movers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				conn, err := pgx.Connect(e.ctx, e.dsn)
				if err != nil {
					t.Error(err)
					return
				}
				tx, err := conn.Begin(e.ctx)
				if err == nil {
					_, err = tx.Exec(e.ctx, "select millrace_engine.move_due($1)", 1+own.IntN(10))
				}
				switch {
				case err != nil:
					t.Error(err)
				case own.IntN(4) == 0: // dies before its commit
				default:
					if err := tx.Commit(e.ctx); err != nil {
						t.Error(err)
					}
				}
				_ = conn.Close(e.ctx)
			}
		})
	}
	publishers.Wait()
	e.eventually("everything is due and moved", func() bool { return e.delayed() == 0 })
	close(stop)
	movers.Wait()
	if got := e.length("s0") + e.length("s1") + e.length("s2"); got != want {
		t.Errorf("%d messages were stored, want each of %d once", got, want)
	}
}

func TestTheRuntimeRoleMayUseEveryOption(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	role := "publisher_of_" + one[string](e, "select current_database()")
	e.run("create role " + pgx.Identifier{role}.Sanitize())
	t.Cleanup(func() {
		for _, sql := range []string{"drop owned by ", "drop role "} {
			if _, err := e.Exec(context.Background(), sql+pgx.Identifier{role}.Sanitize()); err != nil {
				t.Error(err)
			}
		}
	})
	_, err := schema.Migrate(e.ctx, e.connect(), schema.Options{RuntimeRole: role})
	must(t, err)
	e.stopClock()
	e.run("grant select on public.test_clock to " + pgx.Identifier{role}.Sanitize())
	e.stream("orders")
	tx := e.begin()
	exec(e, tx, "set local role "+pgx.Identifier{role}.Sanitize())
	exec(e, tx, "select millrace.publish('orders', '1', 'k', p_dedupe_key => 'a', p_serialize => true)")
	exec(e, tx, "select millrace.publish_batch('orders', array['2', '3']::jsonb[], p_dedupe_keys => array['a', 'b'])")
	e.later(tx, "orders", 4, 1)
	commit(e, tx)
	e.jump(time.Hour)
	tx = e.begin()
	exec(e, tx, "set local role "+pgx.Identifier{role}.Sanitize())
	same(t, "streams", e.moveDue(tx, 10), []int32{1})
	exec(e, tx, "select millrace_engine.purge_dedupe(10)")
	commit(e, tx)
	same(t, "stored", e.numbers("orders"), []int64{1, 3, 4})
	if n := one[int](e, "select count(*) from millrace_engine.dedupe"); n != 0 {
		t.Errorf("%d keys are left", n)
	}
}
