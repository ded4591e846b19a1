package pgstream_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func TestANackedMessageComesBackAfterItsDelay(t *testing.T) {
	t.Parallel()
	e, old, new := twoMembers(t, pgstream.ModeShared)
	claim := mustReceive(e, old)
	must(t, old.Nack(e.ctx, claim.Token, []int64{3, 4}, 10*time.Second, "busy"))
	same(t, "at once", positions(receive(e, new)), nil)
	if s := e.stats("orders", "g"); s.Retrying != 2 || s.InFlight != 8 {
		t.Errorf("retrying %d, in flight %d; want 2, 8", s.Retrying, s.InFlight)
	}
	must(t, old.Ack(e.ctx, claim.Token))
	e.jump(9 * time.Second)
	same(t, "before the delay is over", positions(receive(e, new)), nil)
	e.jump(time.Second)
	again := mustReceive(e, new)
	same(t, "after it", sorted(positions(again)), []int64{3, 4})
	for _, m := range again.Messages {
		if m.Attempt != 2 || m.Key == nil || !json.Valid(m.Payload) {
			t.Errorf("attempt %d, key %v, payload %s", m.Attempt, m.Key, m.Payload)
		}
	}
	must(t, new.AckMessages(e.ctx, again.Token, []int64{3}))
	must(t, new.Ack(e.ctx, again.Token))
	mustRefuseAll(e, again.Token)
	e.jump(time.Hour)
	same(t, "left", drain(e, new), nil)
	if s := e.stats("orders", "g"); s.Retrying != 0 || s.InFlight != 0 || s.AckFloor != 10 || s.OldestAge != 0 {
		t.Errorf("at the end: %+v", s)
	}
}

func TestBackoffGrowsUpToItsMaximum(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		e.group(pgstream.GroupSpec{Stream: "orders", Name: strings.ToLower(string(mode)), Mode: mode, AckWait: time.Minute,
			BackoffInitial: 8 * time.Second, BackoffMax: 30 * time.Second})
	}
	e.publish("orders", 1)
	for _, group := range []string{"shared", "ordered"} {
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: group})
		for attempt, full := range []time.Duration{8, 16, 30, 30, 30} {
			full *= time.Second
			claim := mustReceive(e, c)
			if a := claim.Messages[0].Attempt; a != attempt+1 {
				t.Fatalf("%s: attempt %d, want %d", group, a, attempt+1)
			}
			must(t, c.Nack(e.ctx, claim.Token, []int64{1}, -1, "no"))
			// Half of it is left to chance, so that messages nacked together do not come back together.
			e.jump(full/2 - time.Second)
			same(t, group+": too early", positions(receive(e, c)), nil)
			e.jump(full - full/2 + time.Second)
		}
	}
}

func TestAMessageThatHadAllItsAttemptsIsADeadLetter(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", MaxAttempts: 3, AckWait: time.Second})
	e.publish("orders", 2)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	for _, reason := range []string{"first", "second", "third"} {
		claim := mustReceive(e, c)
		must(t, c.Nack(e.ctx, claim.Token, []int64{2}, 0, reason))
		if reason == "first" {
			must(t, c.Ack(e.ctx, claim.Token))
		}
	}
	same(t, "after the last attempt", drain(e, c), nil)
	if s := e.stats("orders", "g"); s.DeadLetters != 1 || s.Retrying != 0 {
		t.Errorf("%d dead letters, %d retrying", s.DeadLetters, s.Retrying)
	}
	var position int64
	var attempts int
	var reason string
	var key *string
	var errs []struct {
		Attempt int
		Error   string
	}
	must(t, e.QueryRow(e.ctx, `select "position", attempts, reason, key, errors from millrace_engine.dead_letter`).Scan(&position, &attempts, &reason, &key, &errs))
	if position != 2 || attempts != 3 || reason != "third" || key == nil || *key != "k1" {
		t.Errorf("position %d, attempts %d, reason %q, key %v", position, attempts, reason, key)
	}
	for i, want := range []string{"first", "second", "third"} {
		if i >= len(errs) || errs[i].Error != want || errs[i].Attempt != i+1 {
			t.Fatalf("error history %+v", errs)
		}
	}
}

func TestARetriedMessageThatExpiresForTheLastTimeIsADeadLetter(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", MaxAttempts: 2, AckWait: time.Second})
	e.publish("orders", 1)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	claim := mustReceive(e, c)
	must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 0, "no"))
	last := mustReceive(e, c)
	e.jump(2 * time.Second)
	same(t, "after it expired", drain(e, c), nil)
	mustRefuseAll(e, last.Token)
	if s := e.stats("orders", "g"); s.DeadLetters != 1 || s.Retrying != 0 {
		t.Errorf("%d dead letters, %d retrying", s.DeadLetters, s.Retrying)
	}
}

func TestALongReasonAndALongHistoryAreCut(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", MaxAttempts: 0})
	e.publish("orders", 1)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	for range 14 {
		claim := mustReceive(e, c)
		must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 0, strings.Repeat("x", 5000)))
	}
	claim := mustReceive(e, c)
	if a := claim.Messages[0].Attempt; a != 15 {
		t.Errorf("attempt %d, want 15: no limit", a)
	}
	if n := one[int](e, "select jsonb_array_length(errors) from millrace_engine.delivery"); n != 10 {
		t.Errorf("%d errors are kept, want 10", n)
	}
	if n := one[int](e, "select max(length(x ->> 'error')) from millrace_engine.delivery, jsonb_array_elements(errors) x"); n != 1000 {
		t.Errorf("an error of %d characters is kept", n)
	}
}

func TestDeadLetterSetsMessagesAsideAtOnce(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, c, new := twoMembers(t, mode)
		claim := mustReceive(e, c)
		must(t, c.DeadLetter(e.ctx, claim.Token, []int64{2, 5}, "cannot be read"))
		tx := e.begin()
		must(t, c.DeadLetterTx(e.ctx, tx, claim.Token, []int64{6}, "cannot be read"))
		rollback(e, tx)
		if s := e.stats("orders", "g"); s.DeadLetters != 2 || s.InFlight != 8 {
			t.Errorf("%d dead letters, %d in flight; want 2, 8", s.DeadLetters, s.InFlight)
		}
		e.jump(2 * time.Second)
		again := mustReceive(e, new)
		same(t, "the rest, after the claim expired", positions(again), []int64{1, 3, 4, 6, 7, 8, 9, 10})
		must(t, new.DeadLetter(e.ctx, again.Token, positions(again), "none of them"))
		mustRefuseAll(e, again.Token)
		if n := one[int](e, "select count(*) from millrace_engine.dead_letter where payload is not null and errors -> 0 ->> 'error' = reason"); n != 10 {
			t.Errorf("%d dead letters with payload and reason, want 10", n)
		}
		e.jump(time.Hour)
		same(t, "left", drain(e, new), nil)
	})
}

func TestARetriedMessageCanBeADeadLetterAtOnce(t *testing.T) {
	t.Parallel()
	e, c, _ := twoMembers(t, pgstream.ModeShared)
	claim := mustReceive(e, c)
	must(t, c.Nack(e.ctx, claim.Token, []int64{1, 2, 3}, 0, "first"))
	must(t, c.Ack(e.ctx, claim.Token))
	retry := mustReceive(e, c)
	must(t, c.DeadLetter(e.ctx, retry.Token, []int64{2}, "second"))
	if err := c.AckMessages(e.ctx, retry.Token, []int64{2}); !errors.Is(err, pgstream.ErrFenced) {
		t.Errorf("ack of what is a dead letter: %v", err)
	}
	must(t, c.Release(e.ctx, retry.Token))
	mustRefuseAll(e, retry.Token)
	again := mustReceive(e, c)
	same(t, "the others", sorted(positions(again)), []int64{1, 3})
	if a := again.Messages[0].Attempt; a != 2 {
		t.Errorf("attempt %d, want 2: a release does not count", a)
	}
	if n := one[int](e, "select jsonb_array_length(errors) from millrace_engine.dead_letter"); n != 2 {
		t.Errorf("%d errors in the history, want 2", n)
	}
}

// Clients send an array with nothing in it as null. That is not everything: a copy of each message, which the claim would hold as well.
func TestPositionsThatAreNullAreNone(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "shared", Mode: pgstream.ModeShared})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "parks", Mode: pgstream.ModeOrdered, FailurePolicy: pgstream.FailurePark, MaxAttempts: 1})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "single", Mode: pgstream.ModeShared, MaxAttempts: 1})
	e.publish("orders", 3)
	for _, group := range []string{"shared", "parks", "single"} {
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: group})
		claim := mustReceive(e, c)
		must(t, c.Nack(e.ctx, claim.Token, nil, 0, "busy"))
		must(t, c.DeadLetter(e.ctx, claim.Token, nil, "bad"))
		must(t, c.AckMessages(e.ctx, claim.Token, nil))
		if s := e.stats("orders", group); s.InFlight != 3 || s.Retrying != 0 || s.DeadLetters != 0 {
			t.Errorf("%s: in flight %d, retrying %d, dead letters %d; want 3, 0, 0", group, s.InFlight, s.Retrying, s.DeadLetters)
		}
		must(t, c.Ack(e.ctx, claim.Token))
		same(t, "left to "+group, drain(e, c), nil)
	}
}
