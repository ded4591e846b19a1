package pgstream_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// aheadOf makes a member of an Ordered group that has settled messages 1 to 20 of 100, and has read ahead 21 to 30. The last token is of 11 to 20.
func (e *engine) aheadOf(t *testing.T) (c *pgstream.Consumer, token string) {
	t.Helper()
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered, AckWait: time.Minute})
	e.publish("orders", 100)
	c = e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "m", MaxMessages: 10})
	for range 2 {
		token = mustReceive(e, c).Token
		must(t, c.Ack(e.ctx, token))
		if ahead := pgstream.Hurry(c); ahead > 0 {
			return c, token
		}
	}
	t.Fatal("nothing was read ahead")
	return nil, ""
}

// A busy member of an Ordered group reads each message once, whether it acks with the next receive or by itself.
func TestABusyMemberClaimsWhatItHasRead(t *testing.T) {
	t.Parallel()
	for _, acks := range []string{"with the next receive", "by itself"} {
		t.Run(acks, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			c, _ := e.aheadOf(t)
			got := upTo(20)
			used, token := 0, ""
			for {
				used += min(pgstream.Hurry(c), 1)
				claim, err := c.AckAndTryReceive(e.ctx, token)
				must(t, err)
				if claim == nil {
					break
				}
				got = append(got, positions(claim)...)
				if token = claim.Token; acks == "by itself" {
					must(t, c.Ack(e.ctx, token))
					token = ""
				}
			}
			same(t, "received", got, upTo(100))
			if used != 8 {
				t.Errorf("%d of 8 claims were of what had been read ahead", used)
			}
			if n := one[int](e, "select count(*) from millrace_engine.claim where messages = 10 and high - low = 10"); n != 10 {
				t.Errorf("%d of 10 claims know what they hold", n)
			}
			if s := e.stats("orders", "g"); s.Lag != 0 || s.InFlight != 0 {
				t.Errorf("at the end: %+v", s)
			}
		})
	}
}

func upTo(n int64) []int64 {
	var all []int64
	for i := range n {
		all = append(all, i+1)
	}
	return all
}

// What was read ahead is handed out for a moment only, and never after something has happened to the lane: without each check something is handed out, or left out, that must not be.
func TestReadingAheadIsSeenBrokenWithout(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name     string
		happens  func(e *engine, c *pgstream.Consumer, token string)
		first    int64 // what comes then
		old, new string
	}{
		{"the place of the lane", func(e *engine, _ *pgstream.Consumer, _ string) {
			other := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "m", MaxMessages: 3})
			must(e.t, other.Ack(e.ctx, mustReceive(e, other).Token))
		}, 24, "y.claim = p_after[1] and y.nonce = p_after[2] and", ""},
		{"its nonce", func(e *engine, _ *pgstream.Consumer, token string) {
			e.forget(token)
			other := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "m", MaxMessages: 3})
			must(e.t, other.Ack(e.ctx, mustReceive(e, other).Token))
		}, 14, "y.nonce = p_after[2]", "true"},
		{"the trim mark", func(e *engine, _ *pgstream.Consumer, _ string) {
			e.trim("40")
		}, 40, "y.frontier >= g.first_position - 1", "true"},
		{"a claim that was given back", func(e *engine, c *pgstream.Consumer, token string) {
			e.run("delete from millrace_engine.settlement")
			must(e.t, c.Release(e.ctx, token))
		}, 11, "millrace_engine.is_settled(l.id, y.claim)", "true"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			first := func(e *engine) int64 {
				member, token := e.aheadOf(t)
				c.happens(e, member, token)
				if pgstream.Hurry(member) == 0 {
					t.Fatal("nothing was read ahead")
				}
				return mustReceive(e, member).Messages[0].Position
			}
			if got := first(newEngine(t)); got != c.first {
				t.Fatalf("message %d came next, not %d", got, c.first)
			}
			e := newEngine(t)
			e.mutate("millrace_engine.claim_ordered_template", c.old, c.new)
			if first(e) == c.first {
				t.Error("nothing was seen without it")
			}
		})
	}
}

// A reset is for what was read ahead, too.
func TestAResetForgetsWhatWasReadAhead(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	c, _ := e.aheadOf(t)
	e.run("select millrace.reset_group('orders', 'g', 'Earliest')")
	if got := mustReceive(e, c).Messages[0].Position; got != 1 {
		t.Errorf("message %d came after a reset to the earliest", got)
	}
}

// A message that is deleted may be handed out for as long as it might travel, not longer.
func TestWhatWasReadLongAgoIsForgotten(t *testing.T) {
	t.Parallel()
	for _, slow := range []bool{false, true} {
		t.Run(fmt.Sprintf("slow %v", slow), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			c, _ := e.aheadOf(t)
			e.run("delete from millrace.orders where position = 21")
			want := int64(21)
			if slow {
				pgstream.Dawdle(c)
				want = 22
			}
			if got := mustReceive(e, c).Messages[0].Position; got != want {
				t.Errorf("message %d came, not %d", got, want)
			}
			if ahead := pgstream.Hurry(c); slow && ahead > 0 {
				t.Errorf("a slow member has read %d messages ahead", ahead)
			}
		})
	}
}

// A claim of what was read ahead must fit into the lane: beyond the last claim, below the horizon, of so many messages as were asked for at most.
func TestAClaimOfWhatWasReadFitsIntoItsLane(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	_, token := e.aheadOf(t)
	parts := strings.Split(token, ".")
	id := one[int](e, "select id from millrace_engine.stream where name = 'orders'")
	for _, c := range []struct {
		end, n int64
		ok     bool
	}{{20, 1, false}, {101, 10, false}, {30, 11, false}, {30, 0, false}, {30, 10, true}} {
		tx := e.begin()
		var claimed bool
		must(t, tx.QueryRow(e.ctx, fmt.Sprintf("select claim is not null from millrace_engine.claim_ordered_%d('g', 'm', 10, null, null, 7, null, false, $1, $2, $3)", id),
			fmt.Sprintf("{%s,%s}", parts[2], parts[3]), c.end, c.n).Scan(&claimed))
		if claimed != c.ok {
			t.Errorf("a claim of %d messages up to %d: %v", c.n, c.end, claimed)
		}
		must(t, tx.Rollback(e.ctx))
	}
}

// Reading ahead takes as much memory again, so it is left where claims are large.
func TestLargeClaimsAreNotReadAhead(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered})
	e.run("insert into millrace.orders (key, payload) select 'k', to_jsonb(repeat('x', 1 << 20)) from generate_series(1, 6)")
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 5})
	if claim := mustReceive(e, c); len(claim.Messages) != 5 || pgstream.HandedOut(c) {
		t.Error("a claim of five megabytes is read ahead of")
	}
	small := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 3, Member: c.Member()})
	must(t, c.Release(e.ctx, one[string](e, "select concat_ws('.', (select id from millrace_engine.consumer_group), lane_id, claim, nonce) from millrace_engine.claim order by claim desc limit 1")))
	if claim := mustReceive(e, small); len(claim.Messages) != 3 || !pgstream.HandedOut(small) {
		t.Error("a claim of three megabytes is not read ahead of")
	}
}
