package pgstream_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func (e *engine) streamStats(stream string) pgstream.StreamStats {
	e.t.Helper()
	all, err := pgstream.AllStreamStats(e.ctx, e)
	must(e.t, err)
	for _, s := range all {
		if s.Stream == stream {
			return s
		}
	}
	e.t.Fatalf("no statistics of stream %s", stream)
	return pgstream.StreamStats{}
}

func TestStreamStatsTellWhatAStreamHolds(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.stream("empty")
	if s := e.streamStats("empty"); s.Messages != 0 || s.FirstPosition != 1 || s.LastPosition != 0 || s.Horizon != 0 || s.StalledBy != "" || s.StalledFor != 0 ||
		s.PublishedPerSecond != 0 || s.Segments != 4 || s.SegmentsUsed != 0 {
		t.Errorf("an empty stream: %+v", s)
	}
	e.fillRing()
	s := e.streamStats("orders")
	if s.Messages != 400 || s.FirstPosition != 1 || s.LastPosition != 400 || s.Horizon != 400 || s.Bytes < 400*50 || s.SegmentsUsed != 4 || s.Delayed != 0 {
		t.Errorf("a full ring: %+v", s)
	}
	if rate := s.PublishedPerSecond; rate < 6.6 || rate > 6.7 {
		t.Errorf("%f messages per second, want 400 in a minute", rate)
	}
	e.run("update millrace.orders set created_at = created_at - interval '1 hour' where position <= 340")
	if rate := e.streamStats("orders").PublishedPerSecond; rate != 1 {
		t.Errorf("%f messages per second, want 60 in a minute", rate)
	}
	e.run("update millrace.orders set created_at = created_at - interval '1 hour'")
	e.trim("201")
	if s := e.streamStats("orders"); s.Messages != 200 || s.FirstPosition != 201 || s.PublishedPerSecond != 0 || s.SegmentsUsed != 2 {
		t.Errorf("after a trim and an hour: %+v", s)
	}
	e.run(`insert into millrace_engine.delayed (stream_id, due_at, payload) select 1, 'infinity', '{}' from generate_series(1, 3)`)
	if s := e.streamStats("orders"); s.Delayed != 3 {
		t.Errorf("%d delayed messages, want 3", s.Delayed)
	}
}

func TestStreamStatsNameWhoHoldsTheHorizonBack(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.stream("other")
	e.publish("orders", 10)
	prepared := e.begin()
	exec(e, prepared, "set local millrace.notify = off")
	publishIn(e, prepared, "orders")
	exec(e, prepared, "prepare transaction 'the one'")
	t.Cleanup(func() { _, _ = e.Exec(e.ctx, "rollback prepared 'the one'") })
	open := e.begin()
	exec(e, open, "select pg_sleep(0.01)")
	publishIn(e, open, "orders")
	e.publish("orders", 10)
	s := e.streamStats("orders")
	if s.StalledBy != "prepared transaction the one" || s.Horizon != 10 || s.LastPosition != 22 || s.StalledFor <= 0 || s.StalledFor > time.Minute {
		t.Errorf("with a prepared transaction: %+v", s)
	}
	if s := e.streamStats("other"); s.StalledBy != "" || s.StalledFor != 0 {
		t.Errorf("another stream: %+v", s)
	}
	e.run("rollback prepared 'the one'")
	s = e.streamStats("orders")
	if want := fmt.Sprintf("pid %d", pid(open)); s.StalledBy != want || s.Horizon != 11 || s.StalledFor < time.Millisecond {
		t.Errorf("with an open transaction: %+v, want %s", s, want)
	}
	rollback(e, open)
	if s := e.streamStats("orders"); s.StalledBy != "" || s.Horizon != 22 {
		t.Errorf("afterwards: %+v", s)
	}
}

// Who may not see since when another role's transaction is open is told how long it has kept others' messages back. A stream that was quiet for an hour is not
// stalled for an hour as soon as somebody publishes.
func TestWhoMayNotSeeWhenATransactionBeganIsToldWhatItKeepsBack(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.publish("orders", 10)
	e.run("update millrace.orders set created_at = created_at - interval '1 hour'")
	stranger := e.login("stranger_" + e.database()[:20])
	look := func(db pgstream.DB) (by string, seconds float64) {
		t.Helper()
		must(t, db.QueryRow(e.ctx, "select stalled_by, extract(epoch from stalled_for) from millrace.stream_stats('orders')").Scan(&by, &seconds))
		return by, seconds
	}
	open := e.begin()
	publishIn(e, open, "orders")
	want := fmt.Sprintf("pid %d", pid(open))
	if by, seconds := look(stranger); by != want || seconds != 0 {
		t.Errorf("nothing is kept back: %s, %f s", by, seconds)
	}
	if by, seconds := look(e); by != want || seconds <= 0 || seconds > 600 {
		t.Errorf("to those who may see it: %s, %f s", by, seconds)
	}
	e.publish("orders", 2)
	e.run("update millrace.orders set created_at = created_at - interval '20 minutes' where position = 12")
	if by, seconds := look(stranger); by != want || seconds < 1200 || seconds > 1800 {
		t.Errorf("with two messages kept back, the first for 20 minutes: %s, %f s", by, seconds)
	}
	rollback(e, open)
}

func TestThePrioritiesOfAStreamAreOneRow(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.prioritized(pgstream.ModeShared)
	for priority := range 3 {
		e.publishAt(priority, 1, 2, 3)
	}
	open := e.begin()
	exec(e, open, "select millrace.publish('orders', '4', p_priority => 2)")
	all, err := pgstream.AllStreamStats(e.ctx, e)
	must(t, err)
	if len(all) != 1 {
		t.Fatalf("%d rows, want one", len(all))
	}
	if s := all[0]; s.Stream != "orders" || s.Messages != 10 || s.LastPosition != 3 || s.Horizon != 3 || s.StalledBy != fmt.Sprintf("pid %d", pid(open)) || s.PublishedPerSecond < 0.16 || s.PublishedPerSecond > 0.17 {
		t.Errorf("statistics: %+v", s)
	}
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 2})
	mustReceive(e, c)
	groups, err := pgstream.Stats(e.ctx, e)
	must(t, err)
	if len(groups) != 1 || groups[0].Lag != 8 || groups[0].InFlight != 2 || groups[0].AckFloor != 0 {
		t.Errorf("groups: %+v; want one with lag 8, the open one among them, and two in flight", groups)
	}
	if n := one[int](e, "select count(*) from millrace.stats('orders')"); n != 1 {
		t.Errorf("%d rows of the stream's own, want one", n)
	}
	rollback(e, open)
	// A position is one of the lowest priority; a number and an age are meant for each.
	e.trim("3")
	if s := e.streamStats("orders"); s.Messages != 8 || s.FirstPosition != 3 {
		t.Errorf("after a trim to a position: %+v", s)
	}
	e.trim("p_max_messages => 1")
	if got := one[int](e, `select (select count(*) from millrace.read('orders', 3)) + (select count(*) from millrace.read('orders.p1', 3))
		+ (select count(*) from millrace.read('orders.p2', 3))`); got != 3 {
		t.Errorf("%d messages are left, want one of each priority", got)
	}
}
