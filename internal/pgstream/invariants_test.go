package pgstream_test

import (
	"context"
	crypto "crypto/rand"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Invariants 1, 3, 7 and 8 of the engine: a checker for each, the engine under load or in a known trap, and the same trap with the
// mechanism broken on purpose, where the checker must raise the alarm. A checker that nothing has ever made fail proves nothing.

// history is what a test knows: what was committed, and what each group was given and settled.
type history struct {
	mu        sync.Mutex
	committed map[int64]bool
	gone      map[int64]bool           // rolled back
	delivered map[string]map[int64]int // by group
}

func newHistory() *history {
	return &history{committed: map[int64]bool{}, gone: map[int64]bool{}, delivered: map[string]map[int64]int{}}
}

func (h *history) published(positions []int64, committed bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range positions {
		if committed {
			h.committed[p] = true
		} else {
			h.gone[p] = true
		}
	}
}

func (h *history) received(group string, positions []int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.delivered[group] == nil {
		h.delivered[group] = map[int64]int{}
	}
	for _, p := range positions {
		h.delivered[group][p]++
	}
}

// broken checks invariant 1 after everything was acked in time: every committed message was delivered to every group, and exactly once;
// what was rolled back never was.
func (h *history) broken(groups ...string) []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []string
	for _, g := range groups {
		for _, p := range slices.Sorted(maps.Keys(h.committed)) {
			if n := h.delivered[g][p]; n != 1 {
				all = append(all, fmt.Sprintf("position %d was delivered %d times to group %s", p, n, g))
			}
		}
		for _, p := range slices.Sorted(maps.Keys(h.delivered[g])) {
			if !h.committed[p] {
				all = append(all, fmt.Sprintf("position %d, which was not committed, was delivered to group %s", p, g))
			}
		}
	}
	return all
}

func mustHold(t testing.TB, broken []string) {
	t.Helper()
	if len(broken) > 0 {
		t.Errorf("%d violations, the first: %s", len(broken), broken[0])
	}
}

func mustBeBroken(t testing.TB, broken []string) {
	t.Helper()
	if len(broken) == 0 {
		t.Error("the checker saw nothing wrong")
	}
}

// publishAndPause publishes in one transaction, with pauses, savepoints and an end that chance decides.
func (h *history) publishAndPause(ctx context.Context, conn *pgx.Conn, r *rand.Rand) error {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	var kept, dropped []int64
	for range 1 + r.IntN(4) {
		n := 1 + r.IntN(5)
		ms := make([]pgstream.NewMessage, n)
		for i := range ms {
			key := fmt.Sprintf("k%d", r.IntN(10))
			ms[i] = pgstream.NewMessage{Key: &key, Payload: []byte(`{}`)}
		}
		target := pgstream.DB(tx)
		undo := r.IntN(4) == 0
		var nested pgx.Tx
		if undo {
			if nested, err = tx.Begin(ctx); err != nil {
				return err
			}
			target = nested
		}
		var positions []int64
		switch r.IntN(3) {
		case 0:
			positions, err = pgstream.PublishBatch(ctx, target, "orders", ms)
		case 1:
			for _, m := range ms {
				var p int64
				if p, err = pgstream.Publish(ctx, target, "orders", m); err != nil {
					return err
				}
				positions = append(positions, p)
			}
		case 2:
			var rows pgx.Rows
			rows, err = target.Query(ctx, `insert into millrace_engine.segment_1_1 (key, payload)
				select $1, '{}' from generate_series(1, $2) returning position`, *ms[0].Key, n)
			if err == nil {
				positions, err = pgx.CollectRows(rows, pgx.RowTo[int64])
			}
		}
		if err != nil {
			return err
		}
		if undo {
			if err := nested.Rollback(ctx); err != nil {
				return err
			}
			dropped = append(dropped, positions...)
		} else {
			kept = append(kept, positions...)
		}
		if r.IntN(3) == 0 { // an application that thinks while its transaction is open
			if _, err := tx.Exec(ctx, "select pg_sleep($1)", r.Float64()*0.02); err != nil {
				return err
			}
		}
	}
	h.published(dropped, false)
	if r.IntN(4) == 0 {
		h.published(kept, false)
		return tx.Rollback(ctx)
	}
	if err := tx.Commit(ctx); err != nil {
		return err
	}
	h.published(kept, true)
	return nil
}

func TestEveryCommittedMessageIsDeliveredOnceToEveryGroup(t *testing.T) {
	t.Parallel()
	everyCommittedMessageIsDelivered(t, func(*engine) {})
}

func TestEveryCommittedMessageIsDeliveredWhenReadersTryTheLocks(t *testing.T) {
	t.Parallel()
	everyCommittedMessageIsDelivered(t, freshLocks)
}

func everyCommittedMessageIsDelivered(t *testing.T, prepare func(e *engine)) {
	r := random(t)
	length := soak(t, 2*time.Second)
	e := newEngine(t)
	e.extendDeadline(length)
	e.stream("orders")
	prepare(e)
	groups := []string{"first", "second", "ordered"}
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "first", AckWait: 10 * time.Minute})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "second", AckWait: 10 * time.Minute})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "ordered", Mode: pgstream.ModeOrdered, AckWait: 10 * time.Minute})
	h := newHistory()

	// A transaction that writes elsewhere for the whole run.
	e.run("create table public.foreign_writes (n int)")
	exec(e, e.begin(), "insert into public.foreign_writes values (1)")

	ctx, cancel := context.WithTimeout(e.ctx, length)
	defer cancel()
	failed := make(chan error, 100)
	var publishers, readers sync.WaitGroup
	for range 10 {
		conn, own := e.connect(), rand.New(rand.NewPCG(r.Uint64(), r.Uint64()))
		publishers.Go(func() {
			for ctx.Err() == nil {
				if err := h.publishAndPause(e.ctx, conn, own); err != nil {
					failed <- fmt.Errorf("publish: %w", err)
					return
				}
			}
		})
	}
	var quiet atomic.Bool
	for i, group := range []string{"first", "first", "second", "ordered", "ordered"} {
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: group, Member: fmt.Sprintf("m%d", i), MaxMessages: 1 + r.IntN(50)})
		readers.Go(func() {
			token := ""
			for {
				last := quiet.Load()
				claim, err := c.AckAndTryReceive(e.ctx, token)
				if err != nil {
					failed <- err
					return
				}
				token = ""
				if claim != nil {
					h.received(group, positions(claim))
					token = claim.Token
				} else if last {
					return
				}
			}
		})
	}
	publishers.Wait()
	quiet.Store(true)
	readers.Wait()
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	if len(h.committed) == 0 || len(h.gone) == 0 {
		t.Fatalf("%d committed, %d rolled back: the run proves nothing", len(h.committed), len(h.gone))
	}
	for _, g := range groups { // what the last claims of a departed member left
		h.received(g, drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: g, Member: "m3"})))
	}
	mustHold(t, h.broken(groups...))
	t.Logf("%d committed, %d rolled back", len(h.committed), len(h.gone))
}

// lateCommit is the trap of invariant 1: a reader looks between the commit of a position and that of a lower one.
func lateCommit(e *engine, late func(tx pgx.Tx)) []string {
	e.t.Helper()
	h := newHistory()
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	tx := e.begin()
	late(tx)
	low := one[int64](e, "select last_value from millrace_engine.position_1")
	high := publishIn(e, e, "orders")
	h.received("g", drain(e, c))
	exec(e, tx, "commit")
	h.published([]int64{low, high}, true)
	h.received("g", drain(e, c))
	return h.broken("g")
}

// slowInsert is the same trap inside one statement: it has allocated a position and is not finished.
func slowInsert(e *engine) []string {
	e.t.Helper()
	h := newHistory()
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	stop, tx := e.begin(), e.begin()
	exec(e, stop, "select pg_advisory_xact_lock(2)")
	done := e.blocked(pid(tx), func() error {
		_, err := tx.Exec(e.ctx, "insert into millrace.orders (payload) select to_jsonb(pg_advisory_xact_lock(n)::text) from generate_series(1, 2) n")
		return err
	})
	h.published([]int64{publishIn(e, e, "orders")}, true)
	h.received("g", drain(e, c))
	rollback(e, stop)
	must(e.t, <-done)
	commit(e, tx)
	h.published([]int64{1, 3}, true)
	h.received("g", drain(e, c))
	return h.broken("g")
}

// ownPublish looks at the horizon in the transaction that has published. Nobody else writes for a moment, so it tries often.
func ownPublish(e *engine) []string {
	e.t.Helper()
	conn := e.connect()
	for range 300 {
		tx, err := conn.Begin(e.ctx)
		must(e.t, err)
		position := publishIn(e, tx, "orders")
		publishIn(e, e, "orders") // a later transaction, which has ended
		var h int64
		must(e.t, tx.QueryRow(e.ctx, "select millrace_engine.horizon(1)").Scan(&h))
		rollback(e, tx)
		if h >= position {
			return []string{fmt.Sprintf("the horizon was %d in the transaction that has published %d", h, position)}
		}
	}
	return nil
}

// newestWriter looks at the horizon while the only open transaction is the newest of the server, which no snapshot lists; olderWriter, when a later one has ended,
// so that snapshots list it. Other tests' transactions make the horizon look at the locks, so they try often.
func newestWriter(e *engine) []string { e.t.Helper(); return openWriter(e, false) }

func olderWriter(e *engine) []string { e.t.Helper(); return openWriter(e, true) }

func openWriter(e *engine, older bool) []string {
	e.t.Helper()
	conn := e.connect()
	for range 300 {
		tx, err := conn.Begin(e.ctx)
		must(e.t, err)
		position := publishIn(e, tx, "orders")
		if older {
			publishIn(e, e, "orders")
		}
		h := one[int64](e, "select millrace_engine.horizon(1)")
		rollback(e, tx)
		if h >= position {
			return []string{fmt.Sprintf("the horizon was %d while position %d was not committed", h, position)}
		}
	}
	return nil
}

func TestInvariant1IsSeenBrokenWithout(t *testing.T) {
	t.Parallel()
	late := func(sql ...string) func(e *engine) []string {
		return func(e *engine) []string {
			e.t.Helper()
			return lateCommit(e, func(tx pgx.Tx) {
				for _, s := range sql {
					exec(e, tx, s)
				}
			})
		}
	}
	const insert = "insert into millrace.orders (payload) values ('{}')"
	const insertIntoSegment = "insert into millrace_engine.segment_1_2 (payload) values ('{}')"
	for _, c := range []struct {
		name   string
		trap   func(e *engine) []string
		damage func(e *engine)
	}{
		{"the publisher's lock", late(insert),
			func(e *engine) {
				e.mutate("millrace_engine.publish_guard_1", "pg_advisory_xact_lock_shared(", "int8send(")
			}},
		{"a horizon that stays below open publishers", late(insert),
			func(e *engine) { e.mutate("millrace_engine.horizon", "return least(h, l)", "return h") }},
		{"the open transactions that a snapshot lists", olderWriter,
			func(e *engine) { e.mutate("millrace_engine.nobody_writes", "right(s::text, 1) <> ':'", "false") }},
		{"the open transactions that no snapshot lists yet", newestWriter,
			func(e *engine) {
				e.mutate("millrace_engine.nobody_writes", "perform pg_xact_status(pg_snapshot_xmax(s))", "return true")
			}},
		{"the reader's own transaction", ownPublish,
			func(e *engine) {
				e.mutate("millrace_engine.nobody_writes", "pg_current_xact_id_if_assigned() is not null", "false")
			}},
		{"a lock before the position is allocated", slowInsert, func(e *engine) {
			e.run("drop trigger publish_guard on millrace.orders")
			e.run("alter table millrace.orders alter segment set default 0")
			e.run("create trigger publish_guard after insert on millrace.orders for each statement execute function " +
				"millrace_engine.publish_guard_1()")
		}},
		{"a guard on every segment", late(insertIntoSegment),
			func(e *engine) { e.run("drop trigger publish_guard on millrace_engine.segment_1_2") }},
		{"a guard that fires for replicas", late("set local session_replication_role = replica", insertIntoSegment),
			func(e *engine) { e.run("alter table millrace_engine.segment_1_2 enable trigger publish_guard") }},
		{"the transaction's id in the setting",
			late("select set_config('millrace.guard_1', 'adone', false), pg_current_xact_id()", insert),
			func(e *engine) { e.mutate("millrace_engine.publish_guard_1", "pg_current_xact_id()::text", "'done'") }},
		{"a sequence without cache", cachedPositions,
			func(e *engine) { e.run("alter sequence millrace_engine.position_1 cache 20") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			for _, broken := range []bool{false, true} {
				e := newEngine(t)
				e.stream("orders")
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
	t.Run("the isolation level", func(t *testing.T) {
		t.Parallel()
		e := newEngine(t)
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
		e.mutate("millrace_engine.receive_1", "current_setting('transaction_isolation') <> 'read committed'", "false")
		h := newHistory()
		h.published([]int64{publishIn(e, e, "orders")}, true)
		tx := e.beginAs(pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
		exec(e, tx, "select 1 from millrace.orders") // its snapshot
		h.published([]int64{publishIn(e, e, "orders")}, true)
		rows, err := tx.Query(e.ctx, `select "position" from millrace.receive('orders', 'g', 'm')`)
		must(t, err)
		got, err := pgx.CollectRows(rows, pgx.RowTo[int64])
		must(t, err)
		h.received("g", got)
		commit(e, tx)
		h.received("g", drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})))
		mustBeBroken(t, h.broken("g"))
	})
}

// cachedPositions publishes from two sessions in turn; with a cache the second one's positions are above what the first one allocates later.
func cachedPositions(e *engine) []string {
	e.t.Helper()
	h := newHistory()
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	first, second := e.connect(), e.connect()
	for _, conn := range []*pgx.Conn{first, second, first} {
		h.published([]int64{publishIn(e, conn, "orders")}, true)
		h.received("g", drain(e, c))
	}
	return h.broken("g")
}

// takeoverDuringAck is the trap of invariant 3: a transactional ack is open when its claim expires and another member receives. It
// reports every message whose effect was written twice.
func takeoverDuringAck(e *engine, mode pgstream.Mode) []string {
	e.t.Helper()
	old, new := e.twoMembers("orders", mode)
	e.run("create table public.sink (position bigint, member text)")
	write := func(c *pgstream.Consumer, claim *pgstream.Claim) pgx.Tx {
		tx := e.begin()
		exec(e, tx, "insert into public.sink select unnest($1::bigint[]), $2", positions(claim), c.Member())
		if err := c.AckTx(e.ctx, tx, claim.Token); err != nil {
			rollback(e, tx)
			return nil
		}
		return tx
	}
	claim := mustReceive(e, old)
	open := write(old, claim)
	e.jump(2 * time.Second)
	if again := receive(e, new); again != nil {
		if tx := write(new, again); tx != nil {
			commit(e, tx)
		}
	}
	if open != nil {
		commit(e, open)
	}
	return writtenTwice(e)
}

// lateAck is its mirror image: the other member receives before the ack begins.
func lateAck(e *engine, mode pgstream.Mode, level pgx.TxIsoLevel) []string {
	e.t.Helper()
	old, new := e.twoMembers("orders", mode)
	e.run("create table public.sink (position bigint, member text)")
	claim := mustReceive(e, old)
	slow := e.beginAs(pgx.TxOptions{IsoLevel: level})
	exec(e, slow, "insert into public.sink select unnest($1::bigint[]), 'old'", positions(claim))
	e.jump(2 * time.Second)
	again := mustReceive(e, new)
	quick := e.begin()
	exec(e, quick, "insert into public.sink select unnest($1::bigint[]), 'new'", positions(again))
	must(e.t, new.AckTx(e.ctx, quick, again.Token))
	commit(e, quick)
	if err := old.AckTx(e.ctx, slow, claim.Token); err == nil {
		commit(e, slow)
	}
	return writtenTwice(e)
}

// lostClaim is the trap of the nonce: the newest claim is lost in a crash, and its number is given to another member.
func lostClaim(e *engine, mode pgstream.Mode) []string {
	e.t.Helper()
	old, new := e.twoMembers("orders", mode)
	lost := mustReceive(e, old)
	e.forget(lost.Token)
	e.run("update millrace_engine.lane set member = null")
	e.run("delete from millrace_engine.member")
	mustReceive(e, new)
	if err := old.Ack(e.ctx, lost.Token); err == nil {
		return []string{"the holder of a lost claim settled the claim that has its number now"}
	}
	return nil
}

// lostClaimAndReceive is the same trap with an ack that goes with the member's next receive.
func lostClaimAndReceive(e *engine, mode pgstream.Mode) []string {
	e.t.Helper()
	old, new := e.twoMembers("orders", mode)
	lost := mustReceive(e, old)
	e.forget(lost.Token)
	if mode == pgstream.ModeShared {
		mustReceive(e, new)
	} else { // only the owner of a lane can ack like that
		mustReceive(e, old)
	}
	if _, err := old.AckAndTryReceive(e.ctx, lost.Token); err == nil {
		return []string{"the holder of a lost claim settled the claim that has its number now"}
	}
	return nil
}

// lateAckAndReceive acks, with the next receive, what another member has taken over and not settled. In an Ordered group the lane is
// another's then, and receive leaves the ack to millrace.ack: so there is one trap for both modes.
func lateAckAndReceive(e *engine, _ pgstream.Mode) []string {
	e.t.Helper()
	old, new := e.twoMembers("orders", pgstream.ModeShared)
	claim := mustReceive(e, old)
	e.jump(2 * time.Second)
	mustReceive(e, new)
	if _, err := old.AckAndTryReceive(e.ctx, claim.Token); err == nil {
		return []string{"a member acked what another one has taken over"}
	}
	return nil
}

func writtenTwice(e *engine) []string {
	e.t.Helper()
	rows, err := e.Query(e.ctx, "select position::text || ' was written by ' || string_agg(member, ' and ') from public.sink group by position having count(*) > 1")
	must(e.t, err)
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	must(e.t, err)
	return all
}

func TestInvariant3IsSeenBrokenWithout(t *testing.T) {
	t.Parallel()
	during := takeoverDuringAck
	late := func(e *engine, mode pgstream.Mode) []string { e.t.Helper(); return lateAck(e, mode, pgx.ReadCommitted) }
	lateInOldSnapshot := func(e *engine, mode pgstream.Mode) []string {
		e.t.Helper()
		return lateAck(e, mode, pgx.RepeatableRead)
	}
	for _, c := range []struct {
		name   string
		trap   func(e *engine, mode pgstream.Mode) []string
		damage func(e *engine)
	}{
		{"the lock that an ack takes on its claim", during, func(e *engine) {
			e.mutate("millrace.ack", "pg_advisory_xact_lock_shared(", "num_nonnulls(")
		}},
		{"the lock that a takeover tries", during, func(e *engine) {
			e.mutate("millrace_engine.take_over", "not pg_try_advisory_xact_lock((1073741824 + p_lane)::integer, (o.claim & 2147483647)::integer)", "false")
		}},
		{"the settlement that a takeover writes", late, func(e *engine) {
			e.mutate("millrace.ack", "'A', 'T', 'R'", "'A', 'R'")
		}},
		{"the isolation level", lateInOldSnapshot, func(e *engine) {
			e.mutate("millrace.ack", "current_setting('transaction_isolation') <> 'read committed'", "false")
		}},
		{"the nonce", lostClaim, func(e *engine) { e.mutate("millrace.ack", "c.nonce = t[4]", "true") }},
		{"the nonce, when the next receive acks", lostClaimAndReceive, func(e *engine) {
			e.mutate("millrace_engine.receive_template", "y.nonce = acked[4]", "true")
		}},
		{"the settlement of a takeover, when the next receive acks", lateAckAndReceive, func(e *engine) {
			e.mutate("millrace_engine.receive_template", "y.kind in ('A', 'T', 'R')", "y.kind in ('A', 'R')")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
				mustHold(t, c.trap(newEngine(t), mode))
				e := newEngine(t)
				c.damage(e) // before the stream gets its own copy of the template
				mustBeBroken(t, c.trap(e, mode))
			})
		})
	}
}

// unmaintained checks invariant 7: it publishes in every way while nobody maintains and everything is as full and as locked as it can be.
func unmaintained(e *engine, limit time.Duration) []string {
	e.t.Helper()
	var all []string
	ctx, cancel := context.WithTimeout(e.ctx, limit)
	defer cancel()
	for range 3 {
		if _, err := pgstream.Publish(ctx, e, "orders", pgstream.NewMessage{Payload: []byte(`{}`)}); err != nil {
			all = append(all, err.Error())
		}
		if _, err := pgstream.PublishBatch(ctx, e, "orders", []pgstream.NewMessage{{Payload: []byte(`{}`)}}); err != nil {
			all = append(all, err.Error())
		}
		if err := pgstream.PublishCopy(ctx, e, "orders", []pgstream.NewMessage{{Payload: []byte(`{}`)}}); err != nil {
			all = append(all, err.Error())
		}
		for _, m := range []pgstream.NewMessage{{Payload: []byte(`{}`), Delay: time.Hour}, {Payload: []byte(`{}`), DedupeKey: crypto.Text()}} {
			if _, err := pgstream.Publish(ctx, e, "orders", m); err != nil {
				all = append(all, err.Error())
			}
		}
	}
	return all
}

// fillSegments puts messages into every segment and makes all limits overdue.
func (e *engine) fillSegments() {
	e.t.Helper()
	for k := range 4 {
		e.run("select millrace_engine.set_state(1, $1, null)", k)
		e.publish("orders", 20)
	}
	e.run("update millrace_engine.stream set max_bytes = 1, max_messages = 1, max_age_seconds = 1, segment_started_at = now() - interval '1 day'")
}

func TestPublishingNeverNeedsMaintenance(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered})
	e.fillSegments()
	t.Run("with every segment full and nobody maintaining", func(t *testing.T) { mustHold(t, unmaintained(e, patience)) })
	t.Run("with maintenance stopped in the middle, holding its locks", func(t *testing.T) {
		tx := e.begin()
		exec(e, tx, "select millrace_engine.maintain_stream(1)")
		exec(e, tx, "select millrace_engine.carry_over(id) from millrace_engine.consumer_group")
		exec(e, tx, "select millrace_engine.rotate_ledger(1)")
		mustHold(t, unmaintained(e, patience))
		rollback(e, tx)
	})
	t.Run("with a segment locked for truncation", func(t *testing.T) {
		tx := e.begin()
		exec(e, tx, "select from millrace_engine.stream for no key update")
		exec(e, tx, "lock table millrace_engine.segment_1_0 in access exclusive mode")
		mustHold(t, unmaintained(e, patience))
		rollback(e, tx)
	})
	t.Run("with settings of the stream being changed", func(t *testing.T) {
		tx := e.begin()
		exec(e, tx, "select millrace_engine.apply_stream('{\"name\": \"orders\", \"partitions\": 16, \"max_bytes\": 5}')")
		mustHold(t, unmaintained(e, patience))
		rollback(e, tx)
	})
	t.Run("with somebody registering to wait", func(t *testing.T) {
		tx := e.begin()
		exec(e, tx, "select millrace_engine.wait_for(array[1])")
		mustHold(t, unmaintained(e, patience))
		rollback(e, tx)
	})
}

func TestInvariant7IsSeenBrokenWithout(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		damage func(e *engine)
	}{
		{"segments that always exist", func(e *engine) { // as with a partition per day that somebody must create in time
			e.mutate("millrace_engine.publish_guard_1", "(state & 15)::integer", "15")
		}},
		{"publishers that read without waiting for whoever maintains", func(e *engine) {
			e.mutate("millrace_engine.publish_guard_1", "return null;\nend", "perform from millrace_engine.stream x where x.id = 1 for share;\n    return null;\nend")
			tx := e.begin()
			exec(e, tx, "select millrace_engine.maintain_stream(1)")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stream("orders")
			e.fillSegments()
			c.damage(e)
			mustBeBroken(t, unmaintained(e, time.Second))
		})
	}
}

// hot is every table of the log, of the ledgers and of best-effort frames.
const hot = `select c.oid from pg_class c where c.relnamespace = 'millrace_engine'::regnamespace and c.relkind = 'r'
	and c.relname ~ '^(segment|claim|settlement|live_frame)_'`

// deadTuples checks invariant 8: nothing on the log and the ledgers was ever updated, deleted or rolled back. It closes the engine's
// pool, because a backend reports its statistics at the latest when it ends.
func deadTuples(e *engine, published int64) []string {
	e.t.Helper()
	e.Close()
	pool, err := pgxpool.New(e.ctx, e.dsn)
	must(e.t, err)
	e.t.Cleanup(pool.Close)
	e.Pool = pool
	conn := e.connect() // a snapshot of the statistics lasts for a transaction only
	type row struct {
		Table                            string
		Inserted, Updated, Deleted, Dead int64
	}
	var all []row
	e.eventually("the backends of the pool have ended", func() bool {
		var ended bool
		must(e.t, conn.QueryRow(e.ctx, `select not exists (select from pg_stat_activity a where a.datname = current_database() and a.backend_type = 'client backend'
			and a.state = 'idle' and a.pid <> pg_backend_pid())`).Scan(&ended))
		return ended
	})
	e.eventually("the statistics know every message", func() bool {
		rows, err := conn.Query(e.ctx, `select relid::regclass::text, n_tup_ins, n_tup_upd, n_tup_del, n_dead_tup from pg_stat_all_tables where relid in (`+hot+`)`)
		must(e.t, err)
		all, err = pgx.CollectRows(rows, pgx.RowToStructByPos[row])
		must(e.t, err)
		var log int64
		for _, r := range all {
			if strings.Contains(r.Table, "segment") {
				log += r.Inserted
			}
		}
		return log >= published
	})
	var broken []string
	for _, r := range all {
		if r.Updated+r.Deleted+r.Dead > 0 {
			broken = append(broken, fmt.Sprintf("%s: %d updated, %d deleted, %d dead", r.Table, r.Updated, r.Deleted, r.Dead))
		}
		if n := one[int](e, "select count(*) from "+r.Table+" where xmax <> 0"); n > 0 {
			broken = append(broken, fmt.Sprintf("%s: %d rows carry a mark of a writer", r.Table, n))
		}
	}
	return broken
}

// publishAndConsume is a run without rollback, nack or expiry.
func publishAndConsume(e *engine) (published int64) {
	e.t.Helper()
	e.stream("orders")
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		e.group(pgstream.GroupSpec{Stream: "orders", Name: strings.ToLower(string(mode)), Mode: mode})
	}
	for range 5 {
		published += int64(len(e.publish("orders", 100)))
		publishIn(e, e, "orders")
		published++
		for _, group := range []string{"shared", "ordered"} {
			for m := range 3 {
				c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: group, Member: fmt.Sprintf("m%d", m), MaxMessages: 20})
				claim := receive(e, c)
				if claim == nil {
					continue
				}
				_, err := c.Extend(e.ctx, claim.Token, time.Minute)
				must(e.t, err)
				must(e.t, c.AckMessages(e.ctx, claim.Token, positions(claim)[:1]))
				must(e.t, pgx.BeginFunc(e.ctx, e.Pool, func(tx pgx.Tx) error { return c.AckTx(e.ctx, tx, claim.Token) }))
				drain(e, c)
			}
		}
		e.run("select millrace_engine.wait_for(array[1])")
	}
	return published
}

func TestARunWithoutTroubleLeavesNoDeadTuples(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	mustHold(t, deadTuples(e, publishAndConsume(e)))
}

func TestInvariant8IsSeenBrokenWithout(t *testing.T) {
	t.Parallel()
	t.Run("settlements that are rows of their own", func(t *testing.T) {
		t.Parallel()
		e := newEngine(t)
		e.mutate("millrace.ack", "if not found then", "update millrace_engine.claim c set expires_at = now() where c.lane_id = t[2] and c.claim = t[3];\n    if not found then")
		mustBeBroken(t, deadTuples(e, publishAndConsume(e)))
	})
	t.Run("consuming that writes nothing to the log", func(t *testing.T) {
		t.Parallel()
		e := newEngine(t)
		published := publishAndConsume(e)
		e.run("update millrace.orders set headers = '{}' where position = 7")
		mustBeBroken(t, deadTuples(e, published))
	})
	t.Run("readers that take no row locks", func(t *testing.T) {
		t.Parallel()
		e := newEngine(t)
		published := publishAndConsume(e)
		e.run("select from millrace.orders where position = 7 for update skip locked")
		mustBeBroken(t, deadTuples(e, published))
	})
}
