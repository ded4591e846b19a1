package pgstream_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func TestASharedGroupHasMoreConsumersThanPartitions(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", Partitions: 1}}))
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	want := e.publish("orders", 100)
	var got []int64
	for i := range 20 {
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: fmt.Sprintf("m%d", i), MaxMessages: 5})
		got = append(got, positions(mustReceive(e, c))...) // all of them open at once
	}
	same(t, "delivered", got, want)
	if s := e.stats("orders", "g"); s.InFlight != 100 || s.Lag != 0 || s.AckFloor != 0 {
		t.Errorf("in flight %d, lag %d, ack floor %d", s.InFlight, s.Lag, s.AckFloor)
	}
}

func TestExtendKeepsAClaim(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, new := twoMembers(t, mode)
		claim := mustReceive(e, old)
		now := one[time.Time](e, "select millrace_engine.clock()")
		if d := claim.ExpiresAt.Sub(now); d != time.Second {
			t.Errorf("the claim lasts %s, want the group's ack wait", d)
		}
		for range 5 {
			e.jump(900 * time.Millisecond)
			ends, err := old.Extend(e.ctx, claim.Token, time.Second)
			must(t, err)
			if now = one[time.Time](e, "select millrace_engine.clock()"); !ends.Equal(now.Add(time.Second)) {
				t.Errorf("extended to %s, want %s", ends, now.Add(time.Second))
			}
			same(t, "for others", positions(receive(e, new)), nil)
		}
		e.jump(time.Second)
		claim = mustReceive(e, new)
		if len(claim.Messages) != 10 {
			t.Errorf("after the end of the extension: %v", positions(claim))
		}
		if _, err := new.Extend(e.ctx, claim.Token, 0); !errors.Is(err, pgstream.ErrRefused) {
			t.Errorf("Extend by nothing: %v", err)
		}
	})
}

func TestExtendKeepsAMessageThatIsRetried(t *testing.T) {
	t.Parallel()
	e, old, new := twoMembers(t, pgstream.ModeShared)
	claim := mustReceive(e, old)
	must(t, old.Nack(e.ctx, claim.Token, positions(claim)[:1], 0, "no"))
	retry := mustReceive(e, old)
	_, err := old.Extend(e.ctx, retry.Token, time.Hour)
	must(t, err)
	must(t, old.Ack(e.ctx, claim.Token))
	e.jump(time.Minute)
	same(t, "for others", positions(receive(e, new)), nil)
	e.jump(time.Hour)
	again := mustReceive(e, new)
	same(t, "after its end", positions(again), []int64{1})
	mustRefuseAll(e, retry.Token)
	must(t, new.Ack(e.ctx, again.Token))
}

func TestAnOwnLeaseCountsInsteadOfTheAckWait(t *testing.T) {
	t.Parallel()
	e, _, new := twoMembers(t, pgstream.ModeShared)
	long := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Lease: time.Minute})
	claim := mustReceive(e, long)
	e.jump(59 * time.Second)
	same(t, "for others", positions(receive(e, new)), nil)
	e.jump(time.Second)
	same(t, "after the lease", positions(mustReceive(e, new)), positions(claim))
}

func TestASmallerConsumerCanTakeOverALargeClaim(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, _ := twoMembers(t, mode)
		mustReceive(e, old)
		e.jump(2 * time.Second)
		small := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 3})
		var got []int64
		token := ""
		for {
			claim, err := small.AckAndTryReceive(e.ctx, token)
			must(t, err)
			if claim == nil {
				break
			}
			if len(claim.Messages) > 3 {
				t.Fatalf("%d messages, asked for at most 3", len(claim.Messages))
			}
			got = append(got, positions(claim)...)
			token = claim.Token
		}
		same(t, "got", got, []int64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10})
	})
}

// After its second expiry a claim is handed out message by message, so that the one that kills its consumers is found, and the others
// do not pay for it.
func TestAPoisonMessageIsIsolated(t *testing.T) {
	t.Parallel()
	const poison = 6
	for _, c := range []struct {
		mode pgstream.Mode
		spec pgstream.GroupSpec
	}{
		{pgstream.ModeShared, pgstream.GroupSpec{Stream: "orders", Name: "p", Mode: pgstream.ModeShared, AckWait: time.Second, MaxAttempts: 4}},
		{pgstream.ModeOrdered, pgstream.GroupSpec{Stream: "orders", Name: "p", Mode: pgstream.ModeOrdered, AckWait: time.Second, MaxAttempts: 4, FailurePolicy: pgstream.FailureSkip}},
	} {
		t.Run(string(c.mode), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stopClock()
			e.stream("orders")
			e.group(c.spec)
			e.publish("orders", 10)
			acked, deliveries := map[int64]bool{}, map[int64]int{}
			for round := range 200 {
				// Each consumer dies of the poison, and another one takes its place.
				consumer := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "p", Member: fmt.Sprintf("m%d", round), MaxMessages: 10})
				claim := receive(e, consumer)
				if claim == nil {
					if e.jump(2 * time.Second); len(acked) == 9 && e.stats("orders", "p").DeadLetters == 1 {
						break
					}
					continue
				}
				died := false
				for _, m := range claim.Messages {
					deliveries[m.Position]++
					died = died || m.Position == poison
					if acked[m.Position] {
						t.Fatalf("position %d again after its ack", m.Position)
					}
				}
				if died {
					continue
				}
				must(t, consumer.Ack(e.ctx, claim.Token))
				for _, p := range positions(claim) {
					acked[p] = true
				}
				must(t, consumer.Leave(e.ctx))
			}
			if len(acked) != 9 {
				t.Fatalf("%d messages were acked, want the 9 good ones; deliveries %v", len(acked), deliveries)
			}
			if p := one[int64](e, `select "position" from millrace_engine.dead_letter`); p != poison {
				t.Errorf("position %d is the dead letter, want %d", p, poison)
			}
			for p, n := range deliveries {
				if p != poison && n > 3 {
					t.Errorf("position %d, which is innocent, was delivered %d times", p, n)
				}
			}
			if n := deliveries[poison]; n < 4 || n > 6 {
				t.Errorf("the poison was delivered %d times", n)
			}
		})
	}
}

// A receive that settles a claim takes the claim's locks one after the other and then the group's. Whoever takes claims back holds the group's already,
// so waiting for the claim would be a deadlock.
func TestWhoTakesClaimsBackWaitsForNobodyThatSettles(t *testing.T) {
	t.Parallel()
	takes := map[string]string{
		"leave": `select 1 from millrace.leave('orders', 'g', 'old')`,
		"retry": `select 1 from millrace.retry('orders', 'g', 'old')`,
	}
	for name, sql := range takes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
				e, old, _ := twoMembers(t, mode)
				claim := mustReceive(e, old)
				var lane, number int32
				must(t, e.QueryRow(e.ctx, "select split_part($1, '.', 2)::integer, split_part($1, '.', 3)::integer", claim.Token).Scan(&lane, &number))
				tx := e.begin()
				exec(e, tx, "select pg_advisory_xact_lock(1610612736 + $1, $2)", lane, number) // the first lock of a receive
				conn := e.connect()
				exec(e, conn, "set lock_timeout = '1s'") // what waits here would wait for ever
				exec(e, conn, sql)
				commit(e, tx)
				must(t, old.Ack(e.ctx, claim.Token))
			})
		})
	}
}

func TestLeaveGivesEverythingBackAtOnce(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, new := twoMembers(t, mode)
		claim := mustReceive(e, old)
		all := positions(claim)
		must(t, old.AckMessages(e.ctx, claim.Token, all[:2]))
		want := all[2:]
		if mode == pgstream.ModeShared {
			must(t, old.Nack(e.ctx, claim.Token, all[2:3], 0, "no"))
			mustReceive(e, old) // the nacked one
		}
		must(t, old.Leave(e.ctx))
		must(t, old.Leave(e.ctx)) // harmless
		mustRefuseAll(e, claim.Token)
		got := map[int64]int{}
		for {
			c := receive(e, new)
			if c == nil {
				break
			}
			for _, m := range c.Messages {
				got[m.Position] = m.Attempt
			}
			must(t, new.Ack(e.ctx, c.Token))
		}
		for _, p := range want {
			attempt := 1
			if mode == pgstream.ModeShared && p == 3 {
				attempt = 2
			}
			if got[p] != attempt {
				t.Errorf("position %d: attempt %d, want %d: leaving does not count", p, got[p], attempt)
			}
		}
		if len(got) != len(want) {
			t.Errorf("got %v, want %v", got, want)
		}
	})
}

func TestReceiveRefusesWhatItCannotDo(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.publish("orders", 1)
	for _, c := range []struct{ name, sql, code string }{
		{"an unknown stream", `select * from millrace.receive('nothing', 'g', 'm')`, "MR002"},
		{"an unknown group", `select * from millrace.receive('orders', 'nothing', 'm')`, "MR002"},
		{"no member", `select * from millrace.receive('orders', 'g', '')`, "MR004"},
		{"a null member", `select * from millrace.receive('orders', 'g', null)`, "MR004"},
		{"no messages", `select * from millrace.receive('orders', 'g', 'm', 0)`, "MR004"},
		{"too many messages", `select * from millrace.receive('orders', 'g', 'm', 10001)`, "MR004"},
		{"a lease in the past", `select * from millrace.receive('orders', 'g', 'm', 1, -1)`, "MR004"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := e.Exec(e.ctx, c.sql); sqlState(err) != c.code {
				t.Errorf("%v; want SQLSTATE %s", err, c.code)
			}
		})
	}
	_, err := pgstream.NewConsumer(e.ctx, e.Pool, pgstream.ConsumerConfig{Stream: "orders", Group: "nothing"})
	if !errors.Is(err, pgstream.ErrNotFound) {
		t.Errorf("NewConsumer: %v; want ErrNotFound", err)
	}
}
