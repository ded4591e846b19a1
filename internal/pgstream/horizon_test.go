package pgstream_test

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Each test here is a way in which a reader that only goes forward has lost messages.

func TestTheFirstMessageOfAFreshSequenceIsNotSkipped(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	tx := e.begin()
	if first := publishIn(e, tx, "orders"); first != 1 {
		t.Fatalf("the first position is %d", first)
	}
	second := publishIn(e, e, "orders")
	same(t, "before the first is committed", drain(e, c), nil)
	commit(e, tx)
	same(t, "after", drain(e, c), []int64{1, second})
}

func TestALateCommitBelowTheSequenceIsNotSkipped(t *testing.T) {
	t.Parallel()
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stream("orders")
			e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
			c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
			p1 := publishIn(e, e, "orders")
			late, gone := e.begin(), e.begin()
			p2 := publishIn(e, late, "orders")
			p3 := publishIn(e, e, "orders")
			publishIn(e, gone, "orders")
			p5 := publishIn(e, e, "orders")
			same(t, "with two open", drain(e, c), []int64{p1})
			commit(e, late)
			same(t, "with one open", drain(e, c), []int64{p2, p3})
			// The horizon moves although the sequence stands still.
			rollback(e, gone)
			same(t, "with none open", drain(e, c), []int64{p5})
		})
	}
}

func TestOnlyReadCommittedMayReceive(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	publishIn(e, e, "orders")
	for _, level := range []pgx.TxIsoLevel{pgx.RepeatableRead, pgx.Serializable} {
		tx := e.beginAs(pgx.TxOptions{IsoLevel: level})
		_, err := tx.Exec(e.ctx, "select * from millrace.receive('orders', 'g', 'm')")
		if sqlState(err) != "MR003" || !strings.Contains(hint(err), "READ COMMITTED") {
			t.Errorf("%s: %v, hint %q; want MR003", level, err, hint(err))
		}
	}
	// A database whose default is another level does not hurt the Go client, which asks for the one it needs.
	e.run("do $$ begin execute format('alter database %I set default_transaction_isolation = %L', current_database(), 'serializable'); end $$")
	other := engineOn(t, e.dsn)
	if level := one[string](other, "show transaction_isolation"); level != "serializable" {
		t.Fatalf("the default is %s", level)
	}
	c := other.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	claim := mustReceive(other, c)
	publishIn(other, other, "orders")
	same(t, "received", append(positions(claim), positions(mustReceive(other, c))...), []int64{1, 2})
}

func TestReceiveStandsInATransactionOfItsOwn(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	tx := e.begin()
	publishIn(e, tx, "orders")
	_, err := tx.Exec(e.ctx, "select * from millrace.receive('orders', 'g', 'm')")
	if sqlState(err) != "MR006" {
		t.Errorf("receive after a write: %v; want MR006", err)
	}
}

func TestOnlyPublishersOfTheStreamHoldItsHorizon(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.stream("others")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	publishIn(e, e, "orders")

	// The same stream id in another database, with a lock that carries a low position.
	twin := newEngine(t)
	twin.stream("orders")
	publishIn(twin, twin.begin(), "orders")
	// A publisher of another stream of this database.
	idle := e.begin()
	publishIn(e, idle, "others")
	// A transaction that writes elsewhere and stays open.
	e.run("create table public.foreign_writes (n int)")
	exec(e, e.begin(), "insert into public.foreign_writes values (1)")
	// Locks that only look like a publisher's: exclusive, in the space of two keys, or somebody else's session lock.
	strange := e.begin()
	exec(e, strange, "select pg_advisory_lock((1::bigint << 40) | 0), pg_advisory_xact_lock_shared(1 << 8, 0), pg_advisory_xact_lock_shared(3)")

	publishIn(e, e, "orders")
	publishIn(e, e, "orders")
	same(t, "delivered", drain(e, c), []int64{1, 2, 3})

	orders, err := pgstream.DescribeStream(e.ctx, e, "orders")
	must(t, err)
	if orders.Horizon != 3 || orders.LastPosition != 3 || orders.HorizonHolder != 0 {
		t.Errorf("orders: horizon %d, last %d, holder %d; want 3, 3, none", orders.Horizon, orders.LastPosition, orders.HorizonHolder)
	}
	others, err := pgstream.DescribeStream(e.ctx, e, "others")
	must(t, err)
	if others.Horizon != 0 || others.LastPosition != 1 || others.HorizonHolder != int32(pid(idle)) {
		t.Errorf("others: horizon %d, last %d, holder %d; want 0, 1, %d", others.Horizon, others.LastPosition, others.HorizonHolder, pid(idle))
	}
}

func TestTheHorizonOfAGroupNeverGoesBack(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	e.publish("orders", 10)
	// A publisher that read the sequence long ago and locks only now: what it will publish is above 10 all the same.
	slow := e.begin()
	if claim := mustReceive(e, c); len(claim.Messages) != 10 {
		t.Fatalf("%d messages", len(claim.Messages))
	}
	exec(e, slow, "select pg_current_xact_id(), pg_advisory_xact_lock_shared((1::bigint << 40) | 3)")
	if h := one[int64](e, "select millrace_engine.horizon(1)"); h != 3 {
		t.Fatalf("horizon %d, want 3", h)
	}
	same(t, "while the horizon is back", drain(e, c), nil)
	p := publishIn(e, e, "orders")
	same(t, "while the horizon is back, after one more", drain(e, c), nil)
	commit(e, slow)
	same(t, "afterwards", drain(e, c), []int64{p})
}

func TestPositionsMayPassTheBitsOfTheLock(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	// The highest stream id, which makes the lock's key negative, and positions that cross the 40 bits of it.
	e.run("alter table millrace_engine.stream alter column id restart with 16777215")
	e.stream("orders")
	const edge = int64(1) << 40
	e.run("select setval('millrace_engine.position_16777215', $1)", edge-3)
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", StartFrom: pgstream.StartLatest})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	first, second := e.begin(), e.begin()
	p := []int64{publishIn(e, first, "orders"), publishIn(e, e, "orders"), publishIn(e, e, "orders"), publishIn(e, second, "orders"), publishIn(e, e, "orders")}
	if p[0] != edge-2 || p[4] != edge+2 {
		t.Fatalf("positions %v", p)
	}
	same(t, "two open", drain(e, c), nil)
	commit(e, first)
	same(t, "one open", drain(e, c), p[:3])
	commit(e, second)
	same(t, "none open", drain(e, c), p[3:])
}

func TestASequenceWithACacheIsFoundAndMended(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	for _, wrong := range []string{"cache 20", "increment 2", "cycle"} {
		e.run("alter sequence millrace_engine.position_1 " + wrong)
		plan, err := pgstream.PlanStream(e.ctx, e, pgstream.StreamSpec{Name: "orders"})
		must(t, err)
		if !plan.Drift || len(plan.Steps) != 1 || !strings.Contains(plan.Steps[0].Summary, "position sequence") {
			t.Fatalf("%s: plan %+v", wrong, plan)
		}
		must(t, pgstream.ApplyStream(e.ctx, e, plan))
		plan, err = pgstream.PlanStream(e.ctx, e, pgstream.StreamSpec{Name: "orders"})
		must(t, err)
		if plan.Drift || len(plan.Steps) != 0 {
			t.Fatalf("%s: after mending it: %+v", wrong, plan)
		}
	}

	// A session that had taken positions ahead must not use them after the repair.
	e.run("alter sequence millrace_engine.position_1 cache 20")
	ahead := e.connect()
	publishIn(e, ahead, "orders")
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders"}}))
	drain(e, c)
	newest := publishIn(e, e, "orders")
	if p := publishIn(e, ahead, "orders"); p <= newest {
		t.Errorf("position %d after %d: from the cache", p, newest)
	}
	same(t, "after the repair", drain(e, c), []int64{newest, newest + 1})
}
