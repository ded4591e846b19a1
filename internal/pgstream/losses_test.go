package pgstream_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// Invariants 4, 5 and 6, and the traps of the horizon that need two sessions in step: a checker for each, the engine in the trap, and the same with the
// mechanism broken on purpose, as in invariants_test.go.

// pauseAt is the number of an advisory lock at which a function that the test has changed waits.
const pauseAt = "perform pg_advisory_xact_lock_shared(77); "

// inStep starts a reader, which stops where it was told to, does something meanwhile, and returns what the reader got.
func inStep(e *engine, read func(tx pgx.Tx) []int64, meanwhile func()) []int64 {
	e.t.Helper()
	stop, tx := e.begin(), e.begin()
	exec(e, stop, "select pg_advisory_xact_lock(77)")
	got := make(chan []int64, 1)
	go func() { got <- read(tx) }()
	e.waitsForLock(pid(tx))
	meanwhile()
	rollback(e, stop)
	defer func() { _ = tx.Conn().Close(e.ctx) }()
	return <-got
}

func receiveIn(e *engine, tx pgx.Tx) []int64 {
	rows, _ := tx.Query(e.ctx, `select "position" from millrace.receive('orders', 'g', 'm')`)
	got, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err == nil {
		err = tx.Commit(e.ctx)
	}
	if err != nil {
		e.t.Errorf("receive: %v", err)
	}
	return got
}

func TestTheHorizonIsReadInAnEarlierStatementThanTheLog(t *testing.T) {
	t.Parallel()
	// One statement for both: its snapshot is older than the horizon.
	oneStatement := func(e *engine) func(tx pgx.Tx) []int64 {
		return func(tx pgx.Tx) []int64 {
			rows, _ := tx.Query(e.ctx, `with h as materialized (select millrace_engine.horizon(1) as horizon)
				select m."position" from h, millrace.orders m where m."position" <= h.horizon`)
			got, err := pgx.CollectRows(rows, pgx.RowTo[int64])
			if err == nil {
				// A reader that only goes forward: from here on it asks for more than the horizon.
				_, err = tx.Exec(e.ctx, "select millrace.reset_group('orders', 'g', 'Position', last_value + 1) from millrace_engine.position_1")
			}
			if err == nil {
				err = tx.Commit(e.ctx)
			}
			if err != nil {
				e.t.Errorf("read: %v", err)
			}
			return got
		}
	}
	for _, broken := range []bool{false, true} {
		e := newEngine(t)
		e.mutate("millrace_engine.horizon", "h := coalesce(", pauseAt+"h := coalesce(")
		e.stream("orders")
		h := newHistory()
		h.published([]int64{publishIn(e, e, "orders")}, true)
		e.run(`select pg_advisory_unlock_all()`)
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
		read := func(tx pgx.Tx) []int64 { return receiveIn(e, tx) }
		if broken {
			read = oneStatement(e)
		}
		h.received("g", inStep(e, read, func() { h.published([]int64{publishIn(e, e, "orders")}, true) }))
		h.received("g", drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})))
		if broken {
			mustBeBroken(t, h.broken("g"))
		} else {
			mustHold(t, h.broken("g"))
		}
	}
}

func TestTheLastPositionIsReadBeforeThePublishersLocks(t *testing.T) {
	t.Parallel()
	for _, broken := range []bool{false, true} {
		e := newEngine(t)
		e.mutate("millrace_engine.nobody_writes", "right(s::text, 1) <> ':'", "true") // always looks at the locks
		if broken {                                                                   // the locks first
			def := one[string](e, "select pg_get_functiondef('millrace_engine.horizon(integer)'::regprocedure)")
			assign := def[strings.Index(def, "h := coalesce("):strings.Index(def, "select min(h")]
			locks := def[strings.Index(def, "select min(h"):strings.Index(def, "return least(")]
			def = strings.Replace(def, assign+locks, "h := 0; "+locks+pauseAt+assign, 1)
			e.run(def)
		} else {
			e.mutate("millrace_engine.horizon", "select min(h", pauseAt+"select min(h")
		}
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
		h := newHistory()
		h.published([]int64{publishIn(e, e, "orders")}, true)
		late := e.begin()
		h.received("g", inStep(e, func(tx pgx.Tx) []int64 { return receiveIn(e, tx) }, func() {
			h.published([]int64{publishIn(e, late, "orders"), publishIn(e, e, "orders")}, true)
		}))
		commit(e, late)
		h.received("g", drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})))
		if broken {
			mustBeBroken(t, h.broken("g"))
		} else {
			mustHold(t, h.broken("g"))
		}
	}
}

// deliveredAfterAck is the trap of invariant 4: whole claims and parts of claims are acked, in one transaction with the next receive and alone, all leases end, and
// the ledgers turn until no row is where it was. It reports what is delivered again.
func deliveredAfterAck(e *engine, mode pgstream.Mode) []string {
	e.t.Helper()
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, AckWait: time.Second})
	e.publish("orders", 20)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "old", MaxMessages: 4})
	acked := map[int64]bool{}
	var broken []string
	look := func(all []int64) {
		for _, p := range all {
			if acked[p] {
				broken = append(broken, fmt.Sprintf("position %d was delivered again", p))
			}
		}
	}
	ack := func(some []int64) {
		for _, p := range some {
			acked[p] = true
		}
	}
	first := mustReceive(e, c)
	second, err := c.AckAndTryReceive(e.ctx, first.Token)
	must(e.t, err)
	must(e.t, c.Ack(e.ctx, second.Token))
	ack(slices.Concat(positions(first), positions(second)))
	e.jump(time.Hour)
	third := mustReceive(e, c)
	look(positions(third))
	must(e.t, c.AckMessages(e.ctx, third.Token, positions(third)[:2]))
	ack(positions(third)[:2])
	new := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "new", MaxMessages: 4})
	for range 3 {
		e.jump(time.Hour)
		if claim := receive(e, new); claim != nil {
			look(positions(claim))
			must(e.t, new.AckMessages(e.ctx, claim.Token, positions(claim)[:1]))
			ack(positions(claim)[:1])
		}
		_, err := pgstream.MaintainWithRing(e.ctx, e.Pool, 1)
		must(e.t, err)
	}
	e.jump(time.Hour)
	look(drain(e, new))
	return broken
}

func TestInvariant4IsSeenBrokenWithout(t *testing.T) {
	t.Parallel()
	both := []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered}
	for _, c := range []struct {
		name   string
		modes  []pgstream.Mode
		damage func(e *engine)
	}{
		{"settlements that end a claim", both, func(e *engine) {
			e.mutate("millrace_engine.open_claims", "s.kind in ('A', 'T')", "s.kind in ('T')")
			e.mutate("millrace_engine.is_settled", "s.kind in ('A', 'T')", "s.kind in ('T')")
		}},
		// In an Ordered lane nobody looks at a claim before the newest one.
		{"claims that settle the one before", both[:1], func(e *engine) {
			e.mutate("millrace_engine.open_claims", "and c.claim <> all (acked)", "")
			e.mutate("millrace_engine.open_claims", "s.settles = c.claim", "false")
			e.mutate("millrace_engine.is_settled", "c.settles = p_claim", "false")
		}},
		{"the progress inside a claim", both, func(e *engine) {
			e.mutate("millrace_engine.open_claims", " + coalesce(progress.settled, '{}'::int8multirange)", "")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			for _, mode := range c.modes {
				mustHold(t, deliveredAfterAck(newEngine(t), mode))
				e := newEngine(t)
				c.damage(e)
				mustBeBroken(t, deliveredAfterAck(e, mode))
			}
		})
	}
}

func TestALaneWithoutALedgerIsAnErrorAndNeverTheBeginning(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		old, _ := e.twoMembers("orders", mode)
		drain(e, old)
		e.run("truncate millrace_engine.claim, millrace_engine.settlement")
		if _, err := old.TryReceive(e.ctx); sqlState(err) != "MR009" {
			t.Errorf("receive: %v", err)
		}
	})
}

// forgetful is a server that forgets what was committed asynchronously when it is killed: it writes its log only when somebody waits for it.
func forgetful(t *testing.T) (*engine, *postgres.Server) {
	t.Helper()
	e, server := ownServer(t)
	e.run("alter system set wal_writer_delay = '10s'")
	e.run("alter system set wal_writer_flush_after = '1GB'")
	e.run("alter system set autovacuum = off")
	e.run("select pg_reload_conf()")
	return e, server
}

func (e *engine) crash(server *postgres.Server) {
	e.t.Helper()
	must(e.t, server.Kill())
	must(e.t, server.Restart(e.ctx))
	e.Reset()
}

func TestAClaimThatACrashForgotIsGoodForNothing(t *testing.T) {
	t.Parallel()
	e, server := forgetful(t)
	number := func(c *pgstream.Claim) string { return strings.Join(strings.Split(c.Token, ".")[:3], ".") }
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		stream := "stream_" + strings.ToLower(string(mode))
		old, other := e.twoMembers(stream, mode)
		forgotten := 0
		for range 5 {
			lost := mustReceive(e, old)
			e.crash(server)
			must(t, old.Leave(e.ctx)) // an Ordered lane may still be its
			again := mustReceive(e, other)
			if number(again) == number(lost) {
				forgotten++
			}
			mustBeFenced(t, "the ack of a claim that the server forgot", old.Ack(e.ctx, lost.Token))
			must(t, other.Release(e.ctx, again.Token))
			must(t, other.Leave(e.ctx))
			if forgotten > 0 {
				break
			}
		}
		if forgotten == 0 {
			t.Errorf("%s: no claim was forgotten: the test proves nothing", mode)
		}
	}
}

func TestAConfirmedEffectAndItsAckOutliveACrash(t *testing.T) {
	t.Parallel()
	e, server := forgetful(t)
	effects := func(stream string, damage func()) int {
		old, _ := e.twoMembers(stream, pgstream.ModeShared)
		e.run("create table public." + stream + " (position bigint)")
		damage()
		claim := mustReceive(e, old)
		must(t, pgx.BeginFunc(e.ctx, e.Pool, func(tx pgx.Tx) error {
			exec(e, tx, "insert into public."+stream+" select unnest($1::bigint[])", positions(claim))
			return old.AckTx(e.ctx, tx, claim.Token)
		}))
		e.crash(server)
		n := one[int](e, "select count(*) from public."+stream)
		e.jump(time.Hour)
		if again := len(drain(e, old)); n+again != 10 {
			t.Errorf("%s: %d effects, and %d messages came again", stream, n, again)
		}
		return n
	}
	if n := effects("safe", func() {}); n != 10 {
		t.Errorf("%d of 10 effects are left of a confirmed transaction", n)
	}
	// An ack that makes its caller's commit asynchronous.
	for range 5 {
		if effects("hasty", func() {
			e.mutate("millrace.ack", "if not found then", "perform set_config('synchronous_commit', 'off', true), true;\n    if not found then")
		}) == 0 {
			return
		}
		e.run("drop table public.hasty; select millrace_engine.drop_stream('hasty', false)")
	}
	t.Error("an ack that weakens its caller's commit was not seen")
}

// conserved is the checker of invariant 5: what was set aside is in the delivery table, a dead letter, or acked.
func conserved(e *engine, set, acked []int64) []string {
	e.t.Helper()
	var broken []string
	for _, p := range set {
		n := one[int](e, `select (select count(*) from millrace_engine.delivery where "position" = $1) + (select count(*) from millrace_engine.dead_letter where "position" = $1)`, p)
		if slices.Contains(acked, p) {
			n++
		}
		if n != 1 {
			broken = append(broken, fmt.Sprintf("position %d is in %d places", p, n))
		}
	}
	return broken
}

// setAside is the trap of invariant 5: messages are nacked, and from then on nacked again, acked, extended, released, expired and left behind until they
// have had their attempts.
func setAside(e *engine) []string {
	e.t.Helper()
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", AckWait: time.Second, MaxAttempts: 3})
	all := e.publish("orders", 12)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "m", MaxMessages: 12})
	claim := mustReceive(e, c)
	must(e.t, c.Nack(e.ctx, claim.Token, all, 0, "no"))
	var acked []int64
	broken := conserved(e, all, acked)
	for round := range 12 {
		claim := receive(e, c)
		if claim != nil {
			held := positions(claim)
			switch round {
			case 0:
				must(e.t, c.Release(e.ctx, claim.Token))
			case 1:
				must(e.t, c.AckMessages(e.ctx, claim.Token, held[:1]))
				acked = append(acked, held[0])
				must(e.t, c.Leave(e.ctx))
			case 2: // the second attempt of some expires, the others' ends
				must(e.t, c.Nack(e.ctx, claim.Token, held[:4], 0, "no"))
			default:
				must(e.t, c.Nack(e.ctx, claim.Token, held[:len(held)/2], 0, "no"))
			}
		}
		broken = append(broken, conserved(e, all, acked)...)
		e.jump(time.Minute)
		_, err := pgstream.MaintainWithRing(e.ctx, e.Pool, 1)
		must(e.t, err)
	}
	if n := one[int](e, "select count(*) from millrace_engine.delivery"); n != 0 && len(broken) == 0 {
		e.t.Errorf("%d messages are still to be delivered: the trap is not at its end", n)
	}
	return broken
}

func TestInvariant5IsSeenBrokenWithout(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		damage func(e *engine)
	}{
		{"dead letters of those that expired", func(e *engine) {
			e.mutate("millrace_engine.bury", "from worn w on conflict", "from worn w where false on conflict")
		}},
		{"dead letters of those that were nacked", func(e *engine) {
			e.mutate("millrace.nack", "from held h where h.done\n            on conflict", "from held h where false\n            on conflict")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			mustHold(t, setAside(newEngine(t)))
			e := newEngine(t)
			c.damage(e)
			mustBeBroken(t, setAside(e))
		})
	}
}

// behind is the trap of invariant 6: of two groups one has read everything, the other one nothing, and retention looks again and again.
func behind(e *engine) []string {
	e.t.Helper()
	e.stream("orders")
	e.run(`select millrace_engine.apply_stream('{"name": "orders", "retention_policy": "Interest"}')`)
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "quick"})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "slow"})
	h := newHistory()
	for k := range 4 {
		e.run("select millrace_engine.set_state(1, $1, null)", k)
		h.published(e.publish("orders", 20), true)
	}
	h.received("quick", drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "quick"})))
	slow := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "slow", MaxMessages: 5})
	claim := mustReceive(e, slow)
	h.received("slow", positions(claim))
	must(e.t, slow.Ack(e.ctx, claim.Token))
	for range 6 {
		_, err := pgstream.MaintainWithRing(e.ctx, e.Pool, 1)
		must(e.t, err)
	}
	h.received("slow", drain(e, slow))
	return h.broken("quick", "slow")
}

// readRemoved is the other half of it: whoever reads where retention has been is told so, and never given less.
func readRemoved(e *engine) []string {
	e.t.Helper()
	e.stream("orders")
	e.publish("orders", 20)
	e.run("select millrace.trim('orders', 11)")
	rows, _ := e.Query(e.ctx, `select "position" from millrace.read('orders', 5)`)
	got, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if sqlState(err) == "MR008" {
		return nil
	}
	return []string{fmt.Sprintf("read from 5: %v, %v", got, err)}
}

func TestInvariant6IsSeenBrokenWithout(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		trap   func(e *engine) []string
		damage func(e *engine)
	}{
		{"the low-water mark", behind, func(e *engine) { e.mutate("millrace_engine.removable", "p_position <= p_settled", "true") }},
		{"the slowest group", behind, func(e *engine) { e.mutate("millrace_engine.maintain_stream", "min(t.ack_floor)", "max(t.ack_floor)") }},
		{"a look at the trim mark", readRemoved, func(e *engine) {
			e.mutate("millrace_engine.read_template", "if from_ < s.first_position then", "if false then")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			mustHold(t, c.trap(newEngine(t)))
			e := newEngine(t)
			c.damage(e)
			mustBeBroken(t, c.trap(e))
		})
	}
}
