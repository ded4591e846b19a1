package pgstream_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// receiveRead receives at most n messages as the group jobs does, and returns their positions and how much of the delivery table was read for that: entries of its
// indexes, and rows.
func (e *engine) receiveRead(n int) (positions []int64, read int64) {
	e.t.Helper()
	const counted = `select pg_stat_get_xact_tuples_returned('millrace_engine.delivery'::regclass) + pg_stat_get_xact_tuples_fetched('millrace_engine.delivery'::regclass)
		+ (select sum(pg_stat_get_xact_tuples_returned(indexrelid)) from pg_index where indrelid = 'millrace_engine.delivery'::regclass)`
	tx, err := e.Begin(e.ctx)
	must(e.t, err)
	var before, after int64 // what was counted before and not yet reported is among them
	must(e.t, tx.QueryRow(e.ctx, counted).Scan(&before))
	must(e.t, tx.QueryRow(e.ctx, `select coalesce(array_agg(position order by position), '{}') from millrace.receive('orders', 'jobs', 'm', $1)`, n).Scan(&positions))
	must(e.t, tx.QueryRow(e.ctx, counted).Scan(&after))
	must(e.t, tx.Commit(e.ctx))
	return positions, after - before
}

// With one message of a key active, a receive reads the same however many wait behind it, and whatever waits behind those.
func TestWhatWaitsBehindAnActiveMessageCostsAReceiveNothing(t *testing.T) {
	t.Parallel()
	if broken := behindAnActive(t, newEngine(t)); broken != "" {
		t.Error(broken)
	}
}

func TestTheCostOfWhatWaitsIsSeenWithoutTheMark(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	def := one[string](e, `select pg_get_functiondef('millrace_engine.receive_singletons'::regproc)`)
	const mark = "set blocked = true"
	if !strings.Contains(def, mark) {
		t.Fatalf("receive_singletons has no %q any more", mark)
	}
	e.run(strings.Replace(def, mark, "set blocked = false", 1))
	if behindAnActive(t, e) == "" {
		t.Error("receive read everything that waits, and nobody saw it")
	}
}

func behindAnActive(t *testing.T, e *engine) (broken string) {
	e.stream("orders")
	e.group(policy(pgstream.QueueSingleton))
	const waiting = 3000
	e.run(`select count(millrace.publish('orders', '{}', 'slow')) from generate_series(1, $1)`, waiting)
	claim, got := e.take("jobs", 1)
	same(t, "the active one", got, []int64{1})
	same(t, "behind it", e.positions(`select position from millrace.receive('orders', 'jobs', 'm', 10)`), nil)
	expect := func(what string, n int, want ...int64) {
		t.Helper()
		got, read := e.receiveRead(n)
		same(t, what, got, want)
		if read > 1000 {
			broken = fmt.Sprintf("%s: a receive of %d reads %d rows and index entries", what, n, read)
		}
	}
	// The marks have left dead entries in the index. A scan may clean them up, but not while any transaction of the server, another test's too, is older.
	e.run("vacuum millrace_engine.delivery")
	expect("nothing else", 10)
	b := e.job("b")
	expect("another key", 10, b)
	// Many other keys: not all of them are looked at either.
	e.run(`select count(millrace.publish('orders', '{}', 'other ' || n)) from generate_series(1, $1) n`, waiting)
	same(t, "copied", e.positions(`select position from millrace.receive('orders', 'jobs', 'm', 1)`), []int64{b + 1})
	expect("the oldest of many keys", 1, b+2)
	e.run("select millrace.ack($1)", claim)
	expect("the next of the key", 1, 2)
	expect("the oldest of many keys", 1, b+3)
	return broken
}

// What is marked as blocked is handed out as soon as its key is free, oldest first, and nothing is forgotten.
func TestBlockedMessagesAreHandedOutInTheirOrder(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(policy(pgstream.QueueSingleton))
	const each = 250
	e.run(`select count(millrace.publish('orders', '{}', k)) from unnest(array['a', 'b', '']) k, generate_series(1, $1)`, each)
	e.run(`select millrace.publish('orders', '{}', 'c')`)
	claim, got := e.take("jobs", 1)
	same(t, "one of a", got, []int64{1})
	// b and those without a key follow each other while a is active: each receive finds one of both.
	for i := range int64(each) {
		second, got := e.take("jobs", 10)
		want := []int64{each + 1 + i, 2*each + 1 + i}
		if i == 0 {
			want = append(want, 3*each+1)
		}
		same(t, "beside a", got, want)
		e.run("select millrace.ack($1)", second)
	}
	same(t, "only a is left", e.takeAll("jobs"), nil)
	if n := one[int](e, `select count(*) from millrace_engine.delivery where blocked`); n != each-1 {
		t.Errorf("%d are marked as blocked", n)
	}
	// A message that failed makes way, and one that is given back has to wait its turn again.
	e.run("select millrace.nack($1, $2, 3600, 'no')", claim, []int64{1})
	claim, got = e.take("jobs", 10)
	same(t, "after the nack", got, []int64{2})
	e.run("select millrace.release($1)", claim)
	var rest []int64
	for p := int64(3); p <= each; p++ {
		rest = append(rest, p)
	}
	rest = append(rest, 2)
	same(t, "the others", e.takeAll("jobs"), rest)
	e.jump(2 * time.Hour)
	same(t, "the failed one", e.takeAll("jobs"), []int64{1})
}

func TestAWornMessageIsNotHandedOutBesideABlockedOne(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.stopClock()
	spec := policy(pgstream.QueueSingleton)
	spec.MaxAttempts = 1
	e.group(spec)
	e.job("a")
	e.job("a")
	b := e.job("b")
	_, got := e.take("jobs", 1)
	same(t, "one of a", got, []int64{1})
	same(t, "b", e.positions(`select position from millrace.receive('orders', 'jobs', 'm', 1, 1)`), []int64{b})
	e.jump(2 * time.Second)
	same(t, "a second time", e.positions(`select position from millrace.receive('orders', 'jobs', 'm', 1)`), nil)
	same(t, "dead", e.positions("select position from millrace.dead_letters('orders', 'jobs')"), []int64{b})
}
