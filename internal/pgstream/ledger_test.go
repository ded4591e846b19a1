package pgstream_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// turnLedger makes the ledgers move on to their next ring, and everything in the oldest one disappear.
func (e *engine) turnLedger() {
	e.t.Helper()
	before := one[int](e, "select last_value from millrace_engine.ring")
	for range 3 { // carry over, truncate and move on may take a round each
		if _, err := pgstream.MaintainWithRing(e.ctx, e.Pool, 1); err != nil {
			e.t.Fatal(err)
		}
		if one[int](e, "select last_value from millrace_engine.ring") != before {
			return
		}
	}
	e.t.Fatal("the ledgers did not move on")
}

// ledgerRows counts what the ledgers hold.
func (e *engine) ledgerRows() int {
	e.t.Helper()
	return one[int](e, "select (select count(*) from millrace_engine.claim) + (select count(*) from millrace_engine.settlement)")
}

func TestOpenClaimsOutliveTheLedger(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, new := twoMembers(t, mode)
		claim := mustReceive(e, old)
		all := positions(claim)
		must(t, old.AckMessages(e.ctx, claim.Token, all[:2]))
		for turn := range 7 {
			e.turnLedger()
			if again := receive(e, new); again != nil {
				t.Fatalf("turn %d: %v were handed out twice", turn, positions(again))
			}
			must(t, old.AckMessages(e.ctx, claim.Token, all[2+turn:3+turn]))
			_, err := old.Extend(e.ctx, claim.Token, time.Minute)
			must(t, err)
			if s := e.stats("orders", "g"); s.InFlight != int64(7-turn) || s.Lag != 0 {
				t.Fatalf("turn %d: in flight %d, lag %d", turn, s.InFlight, s.Lag)
			}
			e.jump(30 * time.Second) // within the extension only
		}
		must(t, old.Ack(e.ctx, claim.Token))
		for range 4 {
			mustRefuseAll(e, claim.Token)
			e.turnLedger()
		}
		e.jump(time.Hour)
		same(t, "left", drain(e, new), nil)
		if n := e.ledgerRows(); n > 12 {
			t.Errorf("%d rows in the ledgers after many turns", n)
		}
	})
}

func TestEndedClaimsStayEndedWhenTheLedgerTurns(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		for _, end := range []struct {
			name string
			do   func(e *engine, old *pgstream.Consumer, token string)
		}{
			{"taken over", func(e *engine, _ *pgstream.Consumer, _ string) { e.jump(2 * time.Second) }},
			{"released", func(e *engine, old *pgstream.Consumer, token string) {
				_, err := old.Extend(e.ctx, token, time.Minute) // at the same time on the clock, which stands still
				must(e.t, err)
				must(e.t, old.Release(e.ctx, token))
				must(e.t, old.Leave(e.ctx))
			}},
		} {
			t.Run(end.name, func(t *testing.T) {
				t.Parallel()
				e := newEngine(t)
				for turnsBefore := range 3 {
					old, new := e.twoMembers(fmt.Sprintf("turned_%d", turnsBefore), mode)
					claim := mustReceive(e, old)
					for range turnsBefore {
						e.turnLedger() // the claim is a copy by now
					}
					end.do(e, old, claim.Token)
					for range 2 {
						mustRefuseAllOr(e, claim.Token, end.name == "taken over")
						e.turnLedger()
					}
					again := mustReceive(e, new)
					same(t, "received again", positions(again), positions(claim))
					for range 4 {
						mustRefuseAll(e, claim.Token)
						e.turnLedger()
					}
					must(t, new.Ack(e.ctx, again.Token))
					e.jump(time.Hour)
					for range 3 {
						same(t, "left", drain(e, new), nil)
						e.turnLedger()
					}
				}
			})
		}
	})
}

// mustRefuseAllOr does nothing while the claim has only expired: it works until somebody takes it over.
func mustRefuseAllOr(e *engine, token string, expired bool) {
	e.t.Helper()
	if !expired {
		mustRefuseAll(e, token)
	}
}

func TestProgressOutlivesTheLedger(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 7})
		var got []int64
		for range 5 {
			e.publish("orders", 20)
			claim := mustReceive(e, c)
			got = append(got, positions(claim)...)
			e.turnLedger()
			next, err := c.AckAndTryReceive(e.ctx, claim.Token)
			must(t, err)
			got = append(got, positions(next)...)
			e.turnLedger()
			must(t, c.Ack(e.ctx, next.Token))
			e.turnLedger()
			e.turnLedger()
		}
		got = append(got, drain(e, c)...)
		if len(got) != 100 {
			t.Fatalf("%d deliveries of 100 messages: %v", len(got), got)
		}
		for i, p := range got {
			if p != int64(i+1) {
				t.Fatalf("delivery %d is position %d: %v", i, p, got)
			}
		}
	})
}

// Many claims in flight, some of them for long, settled in any order while the ledgers turn.
func TestAckedMessagesStayAckedWhenTheLedgerTurns(t *testing.T) {
	t.Parallel()
	r := random(t)
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", AckWait: time.Minute})
	const n = 400
	e.publish("orders", n)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 1})
	var held []*pgstream.Claim
	acked := map[int64]bool{}
	for len(acked) < n {
		if claim := receive(e, c); claim != nil {
			p := claim.Messages[0].Position
			if acked[p] {
				t.Fatalf("position %d was delivered after its ack", p)
			}
			held = append(held, claim)
		}
		for len(held) > 0 && (len(held) > 150 || len(held)+len(acked) == n || r.IntN(3) == 0) {
			i := r.IntN(len(held))
			if len(held) > 20 && i < 10 && len(held)+len(acked) < n {
				break // the first ones are held to the end
			}
			must(t, c.Ack(e.ctx, held[i].Token))
			acked[held[i].Messages[0].Position] = true
			held = append(held[:i], held[i+1:]...)
		}
		if r.IntN(20) == 0 {
			e.turnLedger()
		}
	}
	e.jump(time.Hour)
	for range 3 {
		same(t, "left", drain(e, c), nil)
		e.turnLedger()
	}
}

// A receive that waits for its turn while the ledgers move on must not write into a ring that is about to be emptied.
func TestATakeoverThatWaitedIsNotForgottenWithTheOldRing(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", AckWait: time.Second})
	group := one[int](e, "select id from millrace_engine.consumer_group")
	e.publish("orders", 10)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 5, Member: "old"})
	slow := mustReceive(e, c) // stays open, so that the floor cannot pass the other claim
	_, err := c.Extend(e.ctx, slow.Token, time.Hour)
	must(t, err)
	lost := mustReceive(e, c)
	e.jump(2 * time.Second)

	turn := e.begin()
	exec(e, turn, "select pg_advisory_xact_lock(536870912 + $1, 0)", group)
	receiving := e.begin()
	type result struct {
		tokens int
		token  string
		err    error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		r.err = receiving.QueryRow(e.ctx, "select count(*), min(claim) from millrace.receive('orders', 'g', 'new', 5)").Scan(&r.tokens, &r.token)
		done <- r
	}()
	e.waitsForLock(pid(receiving))
	if !one[bool](e, "select millrace_engine.rotate_ledger(1)") {
		t.Fatal("the ledgers did not move on")
	}
	exec(e, turn, fmt.Sprintf("select millrace_engine.carry_over(%d)", group))
	commit(e, turn)
	r := <-done
	must(t, r.err)
	commit(e, receiving)
	if r.tokens != 5 {
		t.Fatalf("%d messages were taken over, want 5", r.tokens)
	}
	must(t, c.Ack(e.ctx, r.token))
	for range 4 {
		mustRefuseAll(e, lost.Token)
		e.turnLedger()
	}
	e.jump(time.Minute)
	same(t, "left, but for the claim that is held", drain(e, c), nil)
	must(t, c.Ack(e.ctx, slow.Token))
}

func TestALedgerThatIsInUseWaitsForTheNextRound(t *testing.T) {
	t.Parallel()
	e, c, _ := twoMembers(t, pgstream.ModeShared)
	claim := mustReceive(e, c)
	e.turnLedger()
	tx := e.begin()
	must(t, c.AckTx(e.ctx, tx, claim.Token))
	for range 3 { // a slow sink must not make it fail, nor wait for long
		if _, err := pgstream.MaintainWithRing(e.ctx, e.Pool, 1); err != nil {
			t.Fatal(err)
		}
	}
	commit(e, tx)
	for range 3 {
		e.turnLedger()
	}
	mustRefuseAll(e, claim.Token)
	e.jump(time.Hour)
	same(t, "left", drain(e, c), nil)
}

// Nobody waits while the oldest ring is looked at: with many groups that takes long.
func TestNobodyWaitsWhileTheOldestLedgerIsLookedAt(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.publish("orders", 10)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	claim := receive(e, c)
	e.run("select setval('millrace_engine.ring', 2)") // the ring with the claim is the oldest now

	// Looking at a lane takes as long as the test holds the lock.
	e.run("alter function millrace_engine.lane_progress(bigint) rename to look_at_lane")
	e.run(`create function millrace_engine.lane_progress(l bigint, out floor bigint, out stragglers bigint[]) language plpgsql set lock_timeout = 0 as $$ begin
		` + pass + `;
		select p.floor, p.stragglers into floor, stragglers from millrace_engine.look_at_lane(l) p; end $$`)
	reached, open := e.gate()
	emptied := make(chan error, 1)
	go func() {
		var empty bool
		err := e.QueryRow(e.ctx, "select millrace_engine.truncate_ledger()").Scan(&empty)
		if err == nil && empty {
			err = errors.New("a ring with an open claim was emptied")
		}
		emptied <- err
	}()
	reached()
	tx := e.begin()
	_, err := tx.Exec(e.ctx, "set local lock_timeout = '5s'")
	must(t, err)
	if err := c.AckTx(e.ctx, tx, claim.Token); err != nil {
		t.Fatalf("an ack: %v", err)
	}
	commit(e, tx)
	open()
	must(t, <-emptied)
}

// Statistics of what only grows and is emptied help nobody, and collecting them invalidates plans in every session.
func TestWhatOnlyGrowsIsNotAnalyzed(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.run(`select millrace.create_stream('runs', p_frames => '{}')`)
	analyzed, found := []string{}, 0
	rows, err := e.Query(e.ctx, `select c.relname, c.reloptions @> '{autovacuum_vacuum_insert_threshold=-1,autovacuum_analyze_threshold=2147483647}'
		from pg_class c where c.relnamespace = 'millrace_engine'::regnamespace and c.relkind = 'r' and c.relispartition`)
	must(t, err)
	for rows.Next() {
		var name string
		var left *bool
		must(t, rows.Scan(&name, &left))
		found++
		if left == nil || !*left {
			analyzed = append(analyzed, name)
		}
	}
	must(t, rows.Err())
	if len(analyzed) > 0 || found < 16 {
		t.Errorf("of %d tables autovacuum collects statistics of %v", found, analyzed)
	}
}
