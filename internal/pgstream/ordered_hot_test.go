package pgstream_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Members of an Ordered group that come and go while others fetch: every message once, every key in order, whatever rollbacks left empty.
func TestOrderedBacklogIsFetchedInOrderByManyMembers(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered})
	var want []int64
	for i := range 20 {
		want = append(want, e.publish("orders", 150)...)
		e.run(fmt.Sprintf("do $$ begin begin insert into millrace.orders (payload) select '{}' from generate_series(1, %d); raise 'no'; exception when raise_exception then null; end; end $$", 1+i*20))
	}
	order := newKeyOrder()
	var mu sync.Mutex
	var got []int64
	fetched := 0
	var working sync.WaitGroup
	for i := range 4 {
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: []int{1, 7, 60, 500}[i]})
		working.Go(func() {
			defer func() {
				if err := c.Leave(e.ctx); err != nil {
					t.Error(err)
				}
			}()
			token := ""
			for rounds := 0; ; rounds++ {
				if rounds == 10 && i == 1 {
					return // its lane goes to the others, with the claim that it holds
				}
				claim, err := c.AckAndTryReceive(e.ctx, token)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				all := len(got) == len(want)
				mu.Unlock()
				if claim != nil {
					order.begin(c.Member(), claim)
				}
				if token = ""; claim == nil {
					if all {
						return
					}
					continue
				}
				if i == 1 && rounds == 9 {
					order.end(claim, false)
					if err := c.Release(e.ctx, claim.Token); err != nil {
						t.Error(err)
					}
					continue
				}
				order.end(claim, true)
				token = claim.Token
				mu.Lock()
				for _, m := range claim.Messages {
					got = append(got, m.Position)
				}
				if pgstream.Fetches(c) {
					fetched++
				}
				mu.Unlock()
			}
		})
	}
	working.Wait()
	same(t, "received", sorted(got), want)
	mustHold(t, order.broken)
	if fetched == 0 {
		t.Error("nothing was fetched by a transaction of its own")
	}
	if s := e.stats("orders", "g"); s.Lag != 0 || s.InFlight != 0 {
		t.Errorf("at the end: %+v", s)
	}
}

// hotClaim claims on the hot path of an Ordered group within a transaction, and waits for no lock longer than a moment.
func hotClaim(e *engine, tx pgx.Tx, member string, alone bool) (token *string, err error) {
	e.t.Helper()
	if _, err := tx.Exec(e.ctx, "set local lock_timeout = '50ms'"); err != nil {
		e.t.Fatal(err)
	}
	id := one[int](e, "select id from millrace_engine.stream where name = 'orders'")
	err = tx.QueryRow(e.ctx, fmt.Sprintf("select claim from millrace_engine.claim_ordered_%d('g', $1, 2, null, null, 7, null, $2)", id), member, alone).Scan(&token)
	return token, err
}

// settled makes old and new members of an Ordered group, each with its half of the partitions, nothing open and messages left.
func (e *engine) settledMembers() (old, new *pgstream.Consumer) {
	e.t.Helper()
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered, AckWait: time.Second})
	e.publish("orders", 100)
	old = e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "old", MaxMessages: 2})
	new = e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "new", MaxMessages: 2})
	for range 4 {
		for _, c := range []*pgstream.Consumer{old, new} {
			if claim := receive(e, c); claim != nil {
				must(e.t, c.Ack(e.ctx, claim.Token))
			}
		}
	}
	return old, new
}

// Members with lanes of their own do not wait for each other; two that call themselves the same do.
func TestOrderedMembersClaimWithoutWaitingForEachOther(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.settledMembers()
	first, second, third := e.begin(), e.begin(), e.begin()
	for i, tx := range []pgx.Tx{first, second} {
		if token, err := hotClaim(e, tx, []string{"old", "new"}[i], false); err != nil || token == nil {
			t.Fatalf("claim %v, error %v", token, err)
		}
	}
	if token, err := hotClaim(e, third, "old", false); !isLockTimeout(err) {
		t.Errorf("one lane was claimed twice at once: claim %v, error %v", token, err)
	}
	must(t, third.Rollback(e.ctx))
	if token, err := hotClaim(e, e.begin(), "old", true); !isLockTimeout(err) {
		t.Errorf("a claim alone did not wait for those that are not: claim %v, error %v", token, err)
	}
}

func isLockTimeout(err error) bool {
	var p interface{ SQLState() string }
	return errors.As(err, &p) && p.SQLState() == "55P03"
}

// What claim_ordered_template checks is needed: without each check something happens that must not.
func TestOrderedHotPathIsSeenBrokenWithout(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name     string
		happens  func(e *engine, old, new *pgstream.Consumer) bool
		old, new string
	}{
		{"the nonce", func(e *engine, old, _ *pgstream.Consumer) bool {
			lost := mustReceive(e, old)
			e.forget(lost.Token)
			mustReceive(e, old)
			_, err := old.AckAndTryReceive(e.ctx, lost.Token)
			return err == nil
		}, "y.nonce = acked[4]", "true"},
		{"the settlement of an ack", func(e *engine, old, _ *pgstream.Consumer) bool {
			claim := mustReceive(e, old)
			must(e.t, old.Ack(e.ctx, claim.Token))
			_, err := old.AckAndTryReceive(e.ctx, claim.Token)
			return err == nil
		}, "n.kind in ('A', 'T', 'R')", "n.kind in ('T', 'R')"},
		{"the open claim of its lane", func(e *engine, old, _ *pgstream.Consumer) bool {
			mustReceive(e, old)
			return receive(e, old) != nil
		}, "millrace_engine.is_settled(l.id, y.claim)", "true"},
		{"the pause", func(e *engine, old, _ *pgstream.Consumer) bool {
			e.run("update millrace_engine.consumer_group set paused = true")
			return receive(e, old) != nil
		}, "not g.paused", "true"},
		{"the filter", func(e *engine, old, _ *pgstream.Consumer) bool {
			e.run(`update millrace_engine.consumer_group set filter = '{"key_prefix": "none"}'`)
			return receive(e, old) != nil
		}, "g.filter is null", "true"},
		{"the fair share", func(e *engine, _, new *pgstream.Consumer) bool {
			third := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "third", MaxMessages: 2})
			receive(e, third)
			for range 3 {
				if claim := receive(e, new); claim != nil {
					must(e.t, new.Ack(e.ctx, claim.Token))
				}
				if receive(e, third) != nil {
					return false
				}
			}
			return true
		}, "and l.slot_high = ((a.rank + 1) * s.partitions / a.members) * 1024 / s.partitions", ""},
		{"the other members' leases", func(e *engine, old, new *pgstream.Consumer) bool {
			e.jump(600 * time.Millisecond)
			must(e.t, old.Ack(e.ctx, mustReceive(e, old).Token))
			dead := mustReceive(e, new) // until 1.6 s
			e.jump(410 * time.Millisecond)
			must(e.t, old.Ack(e.ctx, mustReceive(e, old).Token)) // no claim of its lane to look after until 2 s
			e.jump(100 * time.Millisecond)
			must(e.t, old.Ack(e.ctx, mustReceive(e, old).Token)) // its lease is renewed until 2.1 s
			e.jump(495 * time.Millisecond)
			for range 3 { // of many more that its own lane has
				claim := mustReceive(e, old)
				if claim.Messages[0].Position == dead.Messages[0].Position {
					return false
				}
				must(e.t, old.Ack(e.ctx, claim.Token))
			}
			return true
		}, "m.expires_at > now_ and ", ""},
		{"the lane's lock", func(e *engine, _, _ *pgstream.Consumer) bool {
			first, err := hotClaim(e, e.begin(), "old", false)
			if err != nil || first == nil {
				e.t.Fatalf("claim %v, error %v", first, err)
			}
			second, err := hotClaim(e, e.begin(), "old", false)
			return err == nil && second != nil
		}, "pg_advisory_xact_lock((536870912 + group_)::integer, lane_::integer) is not null", "true"},
		{"the group's lock", func(e *engine, _, _ *pgstream.Consumer) bool {
			alone := e.begin()
			_, err := alone.Exec(e.ctx, "select millrace_engine.hold_receives(id) from millrace_engine.consumer_group where name = 'g'")
			must(e.t, err)
			claim, err := hotClaim(e, e.begin(), "old", false)
			return err == nil && claim != nil
		}, "pg_advisory_xact_lock_shared((536870912 + group_)::integer, 0) is not null", "true"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			happens := func(e *engine) bool {
				old, new := e.settledMembers()
				return c.happens(e, old, new)
			}
			if happens(newEngine(t)) {
				t.Fatal("it happens with everything in place")
			}
			e := newEngine(t)
			e.mutate("millrace_engine.claim_ordered_template", c.old, c.new)
			if !happens(e) {
				t.Error("nothing was seen without it")
			}
		})
	}
}
