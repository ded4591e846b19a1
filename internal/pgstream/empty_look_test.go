package pgstream_test

import (
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// sharedAlone is an engine with a Shared group from whose stream the copy of receive was taken away: whatever claim_next does not answer by itself is an error.
func sharedAlone(t *testing.T) *engine {
	t.Helper()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeShared, AckWait: time.Second})
	e.run("alter function millrace_engine.receive_1(text, text, integer, bigint, text, boolean) rename to receive_away")
	return e
}

// newest is the newest row of the only lane.
func newest(e *engine) (claim, floor int64, nextCheck string) {
	e.t.Helper()
	err := e.QueryRow(e.ctx, "select claim, floor, next_check::text from millrace_engine.claim order by claim desc limit 1").Scan(&claim, &floor, &nextCheck)
	must(e.t, err)
	return claim, floor, nextCheck
}

// A poll that finds nothing, and a lease that ends with nothing open, are what a waiting session does most. They do not need the stream's own copy of receive.
func TestAnIdleGroupNeedsOnlyWhatAllStreamsShare(t *testing.T) {
	t.Parallel()
	e := sharedAlone(t)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 1})
	same(t, "of an empty stream", positions(receive(e, c)), nil)

	want := e.publish("orders", 50)
	same(t, "received", drain(e, c), want) // the last call acked and found nothing
	if s := e.stats("orders", "g"); s.InFlight != 0 || s.Lag != 0 || s.AckFloor != 50 {
		t.Errorf("at the end: %+v", s)
	}
	e.jump(2 * time.Second)
	before, _, _ := newest(e)
	for range 3 {
		same(t, "after the lease", positions(receive(e, c)), nil)
		e.jump(time.Hour)
	}
	claim, floor, next := newest(e)
	if claim != before+1 || floor != before || next != "infinity" {
		t.Errorf("newest claim %d after %d, floor %d, next check %s", claim, before, floor, next)
	}
	same(t, "received", drain(e, c), nil)
	want = e.publish("orders", 3)
	same(t, "received", drain(e, c), want)
}

// The same where claims are made by one transaction and read by another.
func TestAnEmptyFetchSettlesWhatItAcks(t *testing.T) {
	t.Parallel()
	e := sharedAlone(t)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 60})
	e.publish("orders", 60)
	claim := mustReceive(e, c)
	if !pgstream.Fetches(c) {
		t.Fatal("the next claim would not be fetched")
	}
	again, err := c.AckAndTryReceive(e.ctx, claim.Token)
	must(t, err)
	same(t, "received", positions(again), nil)
	if s := e.stats("orders", "g"); s.InFlight != 0 || s.AckFloor != 60 {
		t.Errorf("at the end: %+v", s)
	}
}

// A lease that has come to its end is looked at once: claims that are still held are noted with their own ends, and found when these come.
func TestAnEmptyLookNotesWhenTheNextClaimMayExpire(t *testing.T) {
	t.Parallel()
	expired := func(e *engine) (taken, late []int64) {
		e.stopClock()
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeShared, AckWait: time.Second})
		e.publish("orders", 3)
		holder := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "holder", MaxMessages: 1})
		other := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "other", MaxMessages: 1})
		held, lost := mustReceive(e, holder), mustReceive(e, holder)
		_, err := holder.Extend(e.ctx, held.Token, time.Minute)
		must(e.t, err)
		_, err = holder.Extend(e.ctx, lost.Token, 30*time.Second)
		must(e.t, err)
		e.jump(2 * time.Second)
		must(e.t, other.Ack(e.ctx, mustReceive(e, other).Token))
		claim := receive(e, other)
		same(e.t, "while both are held", positions(claim), nil)
		e.jump(30 * time.Second)
		if claim = receive(e, other); claim != nil {
			must(e.t, other.Ack(e.ctx, claim.Token))
			taken = positions(claim)
		}
		e.jump(30 * time.Second)
		if claim = receive(e, other); claim != nil {
			late = positions(claim)
		}
		return taken, late
	}
	taken, late := expired(newEngine(t))
	same(t, "taken over at the end of its lease", taken, []int64{2})
	same(t, "taken over at the end of the other lease", late, []int64{1})

	e := newEngine(t)
	e.mutate("millrace_engine.note_checked", "next_ := coalesce(", "next_ := coalesce('infinity'::timestamptz, ")
	if taken, late := expired(e); taken != nil || late != nil {
		t.Errorf("%v and %v were found although nobody noted when to look", taken, late)
	}
}

// What a look has found is no answer to the next one in the same transaction, which may have something to refuse.
func TestALookThatFoundNothingSaysNothingOfTheNext(t *testing.T) {
	t.Parallel()
	second := func(e *engine) error {
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeShared})
		e.publish("orders", 1)
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
		claim := mustReceive(e, c)
		must(e.t, c.Ack(e.ctx, claim.Token))
		return pgx.BeginFunc(e.ctx, e, func(tx pgx.Tx) error {
			exec(e, tx, "select * from millrace.receive('orders', 'g', 'm')")
			_, err := tx.Exec(e.ctx, "select * from millrace.receive('orders', 'g', 'm', p_ack => $1)", claim.Token)
			return err
		})
	}
	if err := second(newEngine(t)); sqlState(err) != "MR001" {
		t.Errorf("an ended claim was acked by a look after an empty one: %v", err)
	}
	e := newEngine(t)
	e.mutate("millrace_engine.claim_next", "set_config('millrace.nothing', '', true)", "''")
	if err := second(e); err != nil {
		t.Errorf("nothing was seen without it: %v", err)
	}
}
