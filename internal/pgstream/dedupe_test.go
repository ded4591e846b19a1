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
)

// once publishes with a dedupe key and returns the position.
func (e *engine) once(db pgstream.DB, key string) int64 {
	e.t.Helper()
	position, err := onceIn(e.ctx, db, key)
	must(e.t, err)
	return position
}

func onceIn(ctx context.Context, db pgstream.DB, key string) (position int64, err error) {
	err = db.QueryRow(ctx, "select millrace.publish('orders', '{}', p_dedupe_key => $1)", key).Scan(&position)
	return position, err
}

// answer is what a call in another goroutine returned.
type answer struct {
	positions []int64
	err       error
}

// onceBeside publishes keys on a connection of its own, and returns when it stands at a lock. One key is published singly, several as a batch.
func (e *engine) onceBeside(keys ...string) <-chan answer {
	e.t.Helper()
	conn := e.connect()
	done := make(chan answer, 1)
	go func() {
		if len(keys) == 1 {
			position, err := onceIn(e.ctx, conn, keys[0])
			done <- answer{[]int64{position}, err}
			return
		}
		rows, err := conn.Query(e.ctx, `select * from millrace.publish_batch('orders', array_fill('{}'::jsonb, array[cardinality($1::text[])]),
			p_dedupe_keys => $1)`, keys)
		if err != nil {
			done <- answer{nil, err}
			return
		}
		positions, err := pgx.CollectRows(rows, pgx.RowTo[int64])
		done <- answer{positions, err}
	}()
	e.waitsForLock(conn.PgConn().PID())
	return done
}

func (e *engine) positions(sql string, args ...any) []int64 {
	e.t.Helper()
	rows, err := e.Query(e.ctx, sql, args...)
	must(e.t, err)
	all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (int64, error) {
		var p *int64
		err := row.Scan(&p)
		if p == nil {
			p = new(int64)
		}
		return *p, err
	})
	must(e.t, err)
	return all
}

func (e *engine) length(stream string) int {
	e.t.Helper()
	return one[int](e, "select count(*) from millrace."+stream)
}

func TestADedupeKeyIsPublishedOnceWithinItsWindow(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.stream("other")
	first := e.once(e, "a")
	if again := e.once(e, "a"); again != first {
		t.Errorf("the second publish returned position %d, want the first one's, %d", again, first)
	}
	if b := e.once(e, "b"); b == first {
		t.Error("another key is another message")
	}
	e.run("select millrace.publish('other', '{}', p_dedupe_key => 'a')")
	if n := e.length("other"); n != 1 {
		t.Errorf("another stream has %d messages, want 1", n)
	}
	e.jump(119 * time.Second)
	if again := e.once(e, "a"); again != first {
		t.Errorf("a second before the window's end it returned %d, want %d", again, first)
	}
	e.jump(time.Second)
	second := e.once(e, "a")
	if second == first {
		t.Fatal("after the window the key is still taken")
	}
	if again := e.once(e, "a"); again != second {
		t.Errorf("in the second window it returned %d, want %d", again, second)
	}
	if n := e.length("orders"); n != 3 {
		t.Errorf("%d messages, want 3", n)
	}

	t.Run("a window of 0 keeps no keys", func(t *testing.T) {
		e.run("update millrace_engine.stream set dedupe_window_seconds = 0 where name = 'orders'")
		for _, sql := range []string{`select millrace.publish('orders', '{}', p_dedupe_key => 'c')`,
			`select millrace.publish_batch('orders', array['{}']::jsonb[], p_dedupe_keys => array['c'])`} {
			if _, err := e.Exec(e.ctx, sql); sqlState(err) != "MR004" || !strings.Contains(hint(err), "window") {
				t.Errorf("%s: %v (hint %q)", sql, err, hint(err))
			}
		}
		e.run(`select millrace.publish_batch('orders', array['{}']::jsonb[], p_dedupe_keys => array[null])`)
	})
}

func TestADedupeKeyInABatchIsPublishedOnce(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.run("select millrace.create_stream('raw', p_payload_type => 'Bytes')")
	before := e.once(e, "old") // position 1
	got := e.positions(`select * from millrace.publish_batch('orders', array['0', '1', '2', '3', '4', '5']::jsonb[],
		p_dedupe_keys => array['x', 'old', null, 'x', 'y', null])`)
	same(t, "positions", got, []int64{2, before, 3, 2, 4, 5})
	stored := e.positions(`select payload::bigint from millrace.orders where position > 1 order by position`)
	same(t, "payloads", stored, []int64{0, 2, 4, 5})
	same(t, "all of it again", e.positions(`select * from millrace.publish_batch('orders', array['0', '1', '2', '3', '4', '5']::jsonb[],
		p_dedupe_keys => array['x', 'old', null, 'x', 'y', null])`), []int64{2, before, 6, 2, 4, 7})
	same(t, "nothing new", e.positions(`select * from millrace.publish_batch('orders', array['0', '1']::jsonb[],
		p_dedupe_keys => array['y', 'old'])`), []int64{4, before})
	e.jump(2 * time.Minute)
	same(t, "after the window", e.positions(`select * from millrace.publish_batch('orders', array['0', '1']::jsonb[],
		p_dedupe_keys => array['y', 'old'])`), []int64{8, 9})
	same(t, "bytes", e.positions(`select * from millrace.publish_batch_bytes('raw', array['a', 'b', 'c']::bytea[],
		p_dedupe_keys => array['x', 'x', 'y'])`), []int64{1, 1, 2})
	if one[int64](e, "select millrace.publish_bytes('raw', 'd', p_dedupe_key => 'y')") != 2 {
		t.Error("a single publish does not see the batch's key")
	}

	// A large batch takes time in proportion.
	const n = 20000
	got = e.positions(`select p from (select array_agg(to_jsonb(i)) as payloads, array_agg('n' || i % 10000) as keys from generate_series(1, $1) i) a,
		millrace.publish_batch('orders', a.payloads, p_dedupe_keys => a.keys) p`, n)
	for i := range n {
		if got[i] != int64(10+i%10000) {
			t.Fatalf("message %d of the large batch has position %d", i, got[i])
		}
	}
}

func TestWhoComesSecondWithADedupeKeyWaitsForTheFirst(t *testing.T) {
	t.Parallel()
	for _, batch := range []bool{false, true} {
		t.Run(fmt.Sprintf("in a batch: %t", batch), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stream("orders")
			e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
			c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
			keys := []string{"a"}
			if batch {
				keys = []string{"a", "b"}
			}

			tx := e.begin()
			gone := e.once(tx, "a")
			waiter := e.onceBeside(keys...)
			rollback(e, tx)
			got := <-waiter
			must(t, got.err)
			if got.positions[0] <= gone {
				t.Fatalf("after a rollback the second has position %d, the first had %d", got.positions[0], gone)
			}
			same(t, "delivered after a rollback", drain(e, c), got.positions)

			tx = e.begin()
			kept := e.once(tx, "c")
			keys[0] = "c"
			waiter = e.onceBeside(keys...)
			// Who waits has no position yet, so it holds nobody back but by the transaction that it waits for.
			if n := one[int](e, `select count(*) from pg_locks where locktype = 'advisory' and mode = 'ShareLock' and objsubid = 1
					and database = (select oid from pg_database where datname = current_database())`); n != 1 {
				t.Errorf("%d publishers hold the horizon, want only the first", n)
			}
			commit(e, tx)
			got = <-waiter
			must(t, got.err)
			if got.positions[0] != kept {
				t.Errorf("the second has position %d, want the first one's, %d", got.positions[0], kept)
			}
			same(t, "delivered after the commit", drain(e, c), []int64{kept})
		})
	}
}

// Two batches with the same keys in opposite orders meet in the middle, at a key that somebody has: one waits for the other, and neither ends in a deadlock.
func TestBatchesTakeTheirDedupeKeysInOneOrder(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	tx := e.begin()
	e.once(tx, "m")
	there, back := e.onceBeside("a", "m", "z"), e.onceBeside("z", "m", "a")
	rollback(e, tx)
	first, second := <-there, <-back
	must(t, first.err)
	must(t, second.err)
	slices.Reverse(second.positions)
	same(t, "positions of the same keys", first.positions, second.positions)
}

func TestADedupeKeyIsNotPublishedTwiceInAnOlderSnapshot(t *testing.T) {
	t.Parallel()
	for _, level := range []pgx.TxIsoLevel{pgx.RepeatableRead, pgx.Serializable} {
		t.Run(string(level), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stopClock()
			e.stream("orders")
			tx := e.beginAs(pgx.TxOptions{IsoLevel: level})
			exec(e, tx, "select 1 from millrace_engine.stream") // takes the snapshot
			first := e.once(e, "a")
			if _, err := onceIn(e.ctx, tx, "a"); sqlState(err) != "40001" {
				t.Fatalf("with a snapshot from before: %v, want 40001", err)
			}
			rollback(e, tx)
			tx = e.beginAs(pgx.TxOptions{IsoLevel: level})
			if again := e.once(tx, "a"); again != first {
				t.Errorf("tried again, it returned %d, want %d", again, first)
			}
			b := e.once(tx, "b")
			if again := e.once(tx, "b"); again != b {
				t.Errorf("its own key again: %d, want %d", again, b)
			}
			commit(e, tx)

			e.jump(2 * time.Minute)
			tx = e.beginAs(pgx.TxOptions{IsoLevel: level})
			exec(e, tx, "select 1 from millrace_engine.stream")
			e.once(e, "a") // the expired key is taken anew
			if _, err := onceIn(e.ctx, tx, "a"); sqlState(err) != "40001" {
				t.Fatalf("an expired key that was taken meanwhile: %v, want 40001", err)
			}
		})
	}
}

func TestADedupeKeyGoesWithItsSavepoint(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	tx := e.begin()
	exec(e, tx, "savepoint s")
	gone := e.once(tx, "a")
	exec(e, tx, "rollback to s")
	kept := e.once(tx, "a")
	if kept == gone {
		t.Fatal("the key outlived its savepoint")
	}
	if again := e.once(tx, "a"); again != kept {
		t.Errorf("position %d, want %d", again, kept)
	}
	exec(e, tx, "do $$ begin perform millrace.publish('orders', '{}', p_dedupe_key => 'b'); perform 1 / 0; exception when others then null; end $$")
	commit(e, tx)
	if n := one[int](e, "select count(*) from millrace_engine.dedupe"); n != 1 {
		t.Errorf("%d keys are remembered, want 1", n)
	}
	same(t, "stored", e.positions("select position from millrace.orders"), []int64{kept})
	if again := e.once(e, "a"); again != kept {
		t.Errorf("later: position %d, want %d", again, kept)
	}
}

func TestADedupeKeyOfAPreparedTransactionIsWaitedFor(t *testing.T) {
	t.Parallel()
	for _, end := range []string{"commit", "rollback"} {
		t.Run(end, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stream("orders")
			tx := e.begin()
			exec(e, tx, "set local millrace.notify = off")
			first := e.once(tx, "a")
			name := fmt.Sprintf("'dedupe_%d'", pid(tx))
			exec(e, tx, "prepare transaction "+name)
			t.Cleanup(func() { _, _ = e.Exec(context.Background(), "rollback prepared "+name) })
			waiter := e.onceBeside("a")
			e.run(end + " prepared " + name)
			got := <-waiter
			must(t, got.err)
			if (got.positions[0] == first) != (end == "commit") {
				t.Errorf("position %d, the first had %d", got.positions[0], first)
			}
			if n := e.length("orders"); n != 1 {
				t.Errorf("%d messages, want 1", n)
			}
		})
	}
}

func TestWaitingForADedupeKeyCanBeGivenUp(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	tx := e.begin()
	first := e.once(tx, "a")
	second := e.begin()
	exec(e, second, "savepoint s")
	exec(e, second, "set local statement_timeout = '50ms'")
	if _, err := onceIn(e.ctx, second, "a"); sqlState(err) != "57014" {
		t.Fatalf("error %v, want 57014", err)
	}
	exec(e, second, "rollback to s")
	other := e.once(second, "b") // it goes on with something else
	commit(e, second)
	commit(e, tx)
	if again := e.once(e, "a"); again != first {
		t.Errorf("position %d, want %d", again, first)
	}
	same(t, "stored", e.positions("select position from millrace.orders order by 1"), []int64{first, other})
}

func TestExpiredDedupeKeysArePurged(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	for i := range 5 {
		e.once(e, fmt.Sprint("old", i))
	}
	e.jump(time.Minute)
	young := e.once(e, "young")
	if n := one[int](e, "select millrace_engine.purge_dedupe(100)"); n != 0 {
		t.Errorf("%d keys were purged before they expired", n)
	}
	e.jump(time.Minute)
	tx := e.begin()
	e.once(tx, "old0") // taken anew by an open transaction: not waited for
	e.run("alter function millrace_engine.purge_dedupe set lock_timeout = '5s'")
	if n := one[int](e, "select millrace_engine.purge_dedupe(3)"); n != 3 {
		t.Errorf("%d keys were purged, want as many as were asked for, 3", n)
	}
	if n := one[int](e, "select millrace_engine.purge_dedupe(100)"); n != 1 {
		t.Errorf("%d keys were purged, want the last one that is free", n)
	}
	commit(e, tx)
	if again := e.once(e, "young"); again != young {
		t.Errorf("a key within its window was purged: position %d, want %d", again, young)
	}
}

// Between finding a key and reading its position the key can expire. A purge that took it there would leave the publisher without an answer.
func TestADuplicateKeepsItsKeyFromBeingPurged(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	first := e.once(e, "a")
	e.mutate("millrace_engine.remember", "return query", pass+"; return query")
	reached, open := e.gate()
	conn := e.connect()
	done := make(chan answer, 1)
	go func() {
		position, err := onceIn(e.ctx, conn, "a")
		done <- answer{[]int64{position}, err}
	}()
	reached()
	e.jump(2 * time.Minute)
	e.run("alter function millrace_engine.purge_dedupe set lock_timeout = '5s'")
	if n := one[int](e, "select millrace_engine.purge_dedupe(100)"); n != 0 {
		t.Errorf("%d keys were purged while a publisher has found them", n)
	}
	open()
	again := <-done
	must(t, again.err)
	same(t, "found before the window's end", again.positions, []int64{first})
	if n := one[int](e, "select millrace_engine.purge_dedupe(100)"); n != 1 {
		t.Errorf("%d keys were purged when nobody had them any more, want 1", n)
	}
}

// publishOnce has several publishers try the same keys at once, singly and in batches, with rollbacks, and returns how often a key was stored
// more than once or, though somebody has committed it, never.
func publishOnce(t *testing.T, e *engine) (twice, never int) {
	t.Helper()
	r := random(t)
	const keys = 60
	var mu sync.Mutex
	committed := map[string]bool{}
	var all sync.WaitGroup
	for range 4 {
		own := newRand(r)
		conn := e.connect()
		all.Go(func() {
			for range 60 {
				tx, err := conn.Begin(e.ctx)
				if err != nil {
					t.Error(err)
					return
				}
				batch := make([]string, 1+own.IntN(4))
				for i := range batch {
					batch[i] = fmt.Sprint(own.IntN(keys))
				}
				if len(batch) == 1 {
					_, err = tx.Exec(e.ctx, "select millrace.publish('orders', '{}', $1, p_dedupe_key => $1)", batch[0])
				} else {
					_, err = tx.Exec(e.ctx, `select millrace.publish_batch('orders', array_fill('{}'::jsonb, array[cardinality($1::text[])]), $1,
						p_dedupe_keys => $1)`, batch)
				}
				if err != nil {
					t.Error(err) // one call in a transaction cannot deadlock
					return
				}
				if own.IntN(3) == 0 {
					err = tx.Rollback(e.ctx)
				} else if err = tx.Commit(e.ctx); err == nil {
					mu.Lock()
					for _, k := range batch {
						committed[k] = true
					}
					mu.Unlock()
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	twice = one[int](e, "select count(*) from (select key from millrace.orders group by key having count(*) > 1) x")
	for k := range committed {
		if one[int](e, "select count(*) from millrace.orders where key = $1", k) == 0 {
			never++
		}
	}
	return twice, never
}

func TestManyPublishersOfTheSameDedupeKeysStoreEachOnce(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	if twice, never := publishOnce(t, e); twice != 0 || never != 0 {
		t.Errorf("%d keys were stored more than once, %d never", twice, never)
	}
	if wrong := one[int](e, `select count(*) from millrace_engine.dedupe d left join millrace.orders o on o.key = d.key
		where d.position is distinct from o.position`); wrong != 0 {
		t.Errorf("%d keys are remembered with another position than their message's", wrong)
	}
}

func TestDuplicatesAreSeenWhenEveryKeyIsTakenForFree(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.mutate("millrace_engine.remember", "where d.expires_at <= millrace_engine.clock()", "where true")
	if twice, _ := publishOnce(t, e); twice == 0 {
		t.Error("the check is blind: no key was stored twice though every publisher took every key for free")
	}
}
