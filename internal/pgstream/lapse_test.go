package pgstream_test

import (
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// lapsing gives group g its limits; 0 is none.
func (e *engine) lapsing(after time.Duration, lag int) {
	e.t.Helper()
	e.run("update millrace_engine.consumer_group set lapse_after_seconds = $1, lapse_lag = $2 where name = 'g'", int64(after.Seconds()), lag)
}

// lapsed runs maintenance and returns why the group has lapsed.
func (e *engine) lapsed() string {
	e.t.Helper()
	e.maintain(1)
	return e.stats("orders", "g").Lapsed
}

func TestAGroupLapsesByItsLag(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "other", Mode: mode})
		e.lapsing(0, 100)
		e.publish("orders", 100)
		if why := e.lapsed(); why != "" {
			t.Fatalf("lapsed at its limit: %s", why)
		}
		e.publish("orders", 1)
		if why := e.lapsed(); !strings.Contains(why, "lag 101") || !strings.Contains(why, "100") {
			t.Errorf("above its limit: %q", why)
		}
		if s := e.stats("orders", "other"); s.Lapsed != "" {
			t.Errorf("a group without a limit: %q", s.Lapsed)
		}
	})
}

// Somebody who keeps the oldest segment busy keeps it from being removed, and nothing else from being maintained.
func TestAGroupLapsesWhileASegmentIsBusy(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.retained(pgstream.Retention{MaxMessages: 20})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.lapsing(0, 10)
	e.run("select millrace_engine.set_state(1, 0, null)")
	e.publish("orders", 50)
	late := e.begin()
	publishIn(e, late, "orders")
	e.run("select millrace_engine.set_state(1, 1, null)")
	e.publish("orders", 100)
	if why := e.lapsed(); why == "" || e.kept() != 150 {
		t.Errorf("lapsed: %q; %d messages are kept, want all 150", why, e.kept())
	}
	rollback(e, late)
}

func TestAGroupLapsesWhenNobodyWorksWhileMessagesWait(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stopClock()
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, AckWait: time.Minute})
		e.lapsing(time.Hour, 0)
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 1})
		stays := func(when string) {
			t.Helper()
			if why := e.lapsed(); why != "" {
				t.Fatalf("%s: lapsed: %s", when, why)
			}
		}
		stays("new")
		e.jump(48 * time.Hour)
		stays("for two days there was nothing to do")
		e.publish("orders", 10)
		e.run("update millrace.orders set created_at = (select now from public.test_clock)")
		stays("messages came just now")
		for range 6 {
			e.jump(45 * time.Minute)
			claim := mustReceive(e, c)
			stays("it works slowly")
			must(t, c.Ack(e.ctx, claim.Token))
		}
		// A claim that is held for long, and extended, is work.
		claim := mustReceive(e, c)
		for range 4 {
			if _, err := c.Extend(e.ctx, claim.Token, 50*time.Minute); err != nil {
				t.Fatal(err)
			}
			e.jump(45 * time.Minute)
			stays("it holds a claim")
		}
		// Ledgers that turn are not work.
		for range 5 {
			e.jump(11 * time.Minute)
			if _, err := pgstream.MaintainWithRing(e.ctx, e.Pool, 1); err != nil {
				t.Fatal(err)
			}
			stays("not yet for an hour")
		}
		e.jump(30 * time.Minute)
		if why := e.lapsed(); !strings.Contains(why, "3600 seconds") {
			t.Errorf("after more than an hour: %q", why)
		}
	})
}

// A retry that is held, and a member of an Ordered group, leave no newer claim behind, and are work until their lease ends.
func TestAGroupDoesNotLapseWhileSomebodyHasIt(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stopClock()
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, AckWait: 3 * time.Hour})
		e.lapsing(time.Hour, 0)
		e.publish("orders", 1)
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
		claim := mustReceive(e, c)
		if mode == pgstream.ModeShared {
			must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 0, "no"))
			mustReceive(e, c)
		} else {
			must(t, c.Ack(e.ctx, claim.Token))
		}
		e.publish("orders", 1)
		for range 2 {
			if why := e.lapsed(); why != "" {
				t.Fatalf("within the lease: %s", why)
			}
			e.jump(91 * time.Minute)
		}
		if why := e.lapsed(); why == "" {
			t.Error("the lease has ended, nobody has worked for more than an hour, and it has not lapsed")
		}
	})
}

// Redeliveries that are handed out and given back between two rounds of maintenance leave no claim to see.
func TestAGroupThatReceivesRedeliveriesOnlyDoesNotLapse(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stopClock()
		e.run("select millrace.create_stream('orders', p_priorities => 2)")
		g := pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode}
		if mode == pgstream.ModeOrdered {
			g.FailurePolicy = pgstream.FailurePark
		}
		e.group(g)
		e.lapsing(time.Hour, 0)
		for range 2 {
			e.run("select millrace.publish('orders', '{}', p_key => 'k', p_priority => 1)")
		}
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 1})
		for turn := range 5 {
			claim := mustReceive(e, c)
			same(t, "received", positions(claim), []int64{1})
			must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 0, "no"))
			must(t, c.Leave(e.ctx)) // a member of an Ordered group is seen
			if why := e.lapsed(); why != "" {
				t.Fatalf("after %d turns: %s", turn, why)
			}
			e.jump(45 * time.Minute)
		}
		e.jump(45 * time.Minute)
		if why := e.lapsed(); why == "" {
			t.Error("nobody has worked for more than an hour, and it has not lapsed")
		}
	})
}

// A ledger that turns between a claim and the next round of maintenance leaves a newer row behind, and does not hide the claim.
func TestALedgerThatTurnsHidesNoWork(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.lapsing(time.Hour, 0)
	e.publish("orders", 10)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 1})
	for turn := range 5 {
		must(t, c.Ack(e.ctx, mustReceive(e, c).Token))
		e.run("select setval('millrace_engine.ring', $1)", turn%3)
		e.run("select millrace_engine.carry_over(id) from millrace_engine.consumer_group")
		if why := e.lapsed(); why != "" {
			t.Fatalf("after %d turns: %s", turn, why)
		}
		e.jump(45 * time.Minute)
	}
}

func TestAPausedGroupDoesNotLapseByTime(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Paused: true})
	e.lapsing(time.Hour, 0)
	e.publish("orders", 10)
	for range 3 {
		e.jump(2 * time.Hour)
		if why := e.lapsed(); why != "" {
			t.Fatalf("while it is paused: %s", why)
		}
	}
	e.run("update millrace_engine.consumer_group set paused = false")
	if why := e.lapsed(); why != "" {
		t.Errorf("when it is resumed: %s", why)
	}
	if s := e.stats("orders", "g"); s.Paused {
		t.Error("it is shown as paused")
	}
	e.jump(2 * time.Hour)
	if why := e.lapsed(); why == "" {
		t.Error("nobody has worked since, and it has not lapsed")
	}
}

// Invariant 6: truncation never removes what a live group within its limits still needs; one that has lapsed keeps nothing.
func TestAGroupThatHasLapsedKeepsNothing(t *testing.T) {
	t.Parallel()
	for _, policy := range []pgstream.RetentionPolicy{pgstream.RetentionInterest, pgstream.RetentionWorkQueue} {
		t.Run(string(policy), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.retained(pgstream.Retention{Policy: policy})
			e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
			if policy == pgstream.RetentionInterest {
				e.group(pgstream.GroupSpec{Stream: "orders", Name: "live"})
			}
			e.fillRing()
			e.maintain(5)
			if n := e.kept(); n != 400 {
				t.Fatalf("%d messages are kept before, want 400", n)
			}
			e.lapsing(0, 399)
			e.maintain(5)
			if policy == pgstream.RetentionInterest {
				if n := e.kept(); n != 400 {
					t.Fatalf("%d messages are kept while another group needs them, want 400", n)
				}
				c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "live", MaxMessages: 150})
				must(t, c.Ack(e.ctx, mustReceive(e, c).Token))
				e.maintain(5)
				if n := e.kept(); n != 300 {
					t.Errorf("%d messages are kept, want the 300 in segments that the live group still needs", n)
				}
				drain(e, c)
				e.maintain(5)
			}
			if n := e.kept(); n != 100 {
				t.Errorf("%d messages are kept, want the 100 of the current segment", n)
			}
		})
	}
}

func TestAGroupThatHasLapsedIsSeenToKeepEverythingWithoutTheCheck(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.retained(pgstream.Retention{Policy: pgstream.RetentionInterest})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.mutate("millrace_engine.maintain_stream", "where g.lapsed_at is null", "")
	e.fillRing()
	e.lapsing(0, 399)
	e.maintain(5)
	if n := e.kept(); n != 400 || e.stats("orders", "g").Lapsed == "" {
		t.Errorf("%d messages are kept, lapsed %q: the checker sees nothing wrong", n, e.stats("orders", "g").Lapsed)
	}
}

// All priorities are one group: what waits in them is counted together, and they lapse and come back together.
func TestTheGroupsOfAllPrioritiesLapseTogether(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.prioritized(pgstream.ModeShared)
	e.lapsing(0, 6)
	for priority := range 3 {
		e.publishAt(priority, 1, 2)
	}
	if why := e.lapsed(); why != "" {
		t.Fatalf("at the limit: %s", why)
	}
	e.publishAt(2, 3)
	if why := e.lapsed(); !strings.Contains(why, "lag 7") {
		t.Errorf("above the limit: %q", why)
	}
	if n := one[int](e, "select count(*) from millrace_engine.consumer_group where lapsed_at is not null"); n != 3 {
		t.Errorf("%d groups have lapsed, want the one and its two mirrors", n)
	}
	e.run("select millrace.reset_group('orders', 'g', 'Latest')")
	if why := e.lapsed(); why != "" {
		t.Errorf("after a reset: %s", why)
	}
}

// A group that had nothing to do for long begins its time anew when it is reset to messages that are old.
func TestAGroupThatIsResetHasItsTime(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.lapsing(time.Hour, 0)
	e.publish("orders", 10)
	drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"}))
	e.maintain(1)
	e.jump(48 * time.Hour)
	e.maintain(1)
	e.run("select millrace.reset_group('orders', 'g', 'Earliest')")
	if why := e.lapsed(); why != "" {
		t.Fatalf("just reset: %s", why)
	}
	e.jump(2 * time.Hour)
	if why := e.lapsed(); why == "" {
		t.Fatal("nobody has worked for two hours, and it has not lapsed")
	}
	e.run("select millrace.reset_group('orders', 'g', 'Earliest')")
	if why := e.lapsed(); why != "" {
		t.Errorf("reset after it lapsed: %s", why)
	}
	e.jump(59 * time.Minute)
	e.run("select millrace.reset_group('orders', 'g', 'Earliest')")
	e.jump(2 * time.Minute)
	if why := e.lapsed(); why != "" {
		t.Errorf("reset to where it stood: %s", why)
	}
}
