package pgstream_test

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func TestStatsTellTheProgressOfAGroup(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stopClock()
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, AckWait: time.Minute})
		check := func(when string, lag, inFlight, retrying, dead, floor int64, old bool) {
			t.Helper()
			s := e.stats("orders", "g")
			if s.Mode != mode || s.Lag != lag || s.InFlight != inFlight || s.Retrying != retrying || s.DeadLetters != dead || s.AckFloor != floor || (s.OldestAge > 0) != old {
				t.Errorf("%s: %+v; want lag %d, in flight %d, retrying %d, dead letters %d, ack floor %d, something old: %t",
					when, s, lag, inFlight, retrying, dead, floor, old)
			}
		}
		check("empty", 0, 0, 0, 0, 0, false)
		e.publish("orders", 20)
		e.jump(time.Hour)
		check("published", 20, 0, 0, 0, 0, true)
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 8})
		claim := mustReceive(e, c)
		check("claimed", 12, 8, 0, 0, 0, true)
		must(t, c.DeadLetter(e.ctx, claim.Token, []int64{1}, "no"))
		must(t, c.AckMessages(e.ctx, claim.Token, []int64{2, 3}))
		check("partly settled", 12, 5, 0, 1, 0, true)
		must(t, c.Nack(e.ctx, claim.Token, []int64{4}, time.Hour, "no"))
		if mode == pgstream.ModeShared {
			check("nacked", 12, 4, 1, 1, 0, true)
			must(t, c.Ack(e.ctx, claim.Token))
			check("acked, but for the retry", 12, 0, 1, 1, 8, true)
			drain(e, c)
			check("only the retry is left", 0, 0, 1, 1, 20, true)
		} else {
			check("nacked, with which the claim has ended", 17, 0, 0, 1, 0, true)
		}
		e.jump(2 * time.Hour)
		drain(e, c)
		check("drained", 0, 0, 0, 1, 20, false)

		// What was rolled back at the end is nobody's lag.
		tx := e.begin()
		for range 5 {
			publishIn(e, tx, "orders")
		}
		rollback(e, tx)
		check("after a rollback", 0, 0, 0, 1, 25, false)
		same(t, "left", drain(e, c), nil)
		// What is still open is, and it does not count as settled.
		publishIn(e, e.begin(), "orders")
		if s := e.stats("orders", "g"); s.AckFloor != 25 {
			t.Errorf("ack floor %d with an open publisher, want 25", s.AckFloor)
		}
	})
}

// What was given back is held by nobody: it waits, in the statistics as in the report, and again after the ledger was carried on.
func TestWhatWasGivenBackWaits(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stopClock()
		e.stream("orders")
		group := func(name string, filter pgstream.Filter) *pgstream.Consumer {
			e.group(pgstream.GroupSpec{Stream: "orders", Name: name, Mode: mode, AckWait: time.Minute, Filter: filter})
			return e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: name, Member: "m", MaxMessages: 8})
		}
		all, even := group("all", pgstream.Filter{}), group("even", pgstream.Filter{Keys: []string{"k0", "k2", "k4", "k6", "k8"}})
		check := func(when, group string, waiting, held int64, deliveries int, holders int) {
			t.Helper()
			r := e.report("orders", group)
			if r.Queued != waiting || r.InFlight != held || r.Active != held || r.Retrying != 0 || r.Deliveries != deliveries || len(r.Holders) != holders {
				t.Errorf("%s: %+v; want %d waiting, %d in flight, %d deliveries and %d holders", when, r, waiting, held, deliveries, holders)
			}
			if group == "all" && r.Lag != waiting {
				t.Errorf("%s: lag %d, want %d", when, r.Lag, waiting)
			}
		}
		e.publish("orders", 40)
		claim, other := mustReceive(e, all), mustReceive(e, even)
		check("claimed", "all", 32, 8, 1, 1)
		check("claimed", "even", 20-int64(len(other.Messages)), int64(len(other.Messages)), 1, 1)
		must(t, all.AckMessages(e.ctx, claim.Token, positions(claim)[:3]))
		must(t, all.Release(e.ctx, claim.Token))
		must(t, even.Leave(e.ctx))
		check("released", "all", 37, 0, 0, 0)
		check("left", "even", 20, 0, 0, 0)
		e.turnLedger()
		e.turnLedger()
		check("released, and carried on", "all", 37, 0, 0, 0)
		claim = mustReceive(e, all)
		check("claimed again", "all", 32, 5, 1, 1)
		if mode == pgstream.ModeOrdered {
			must(t, all.Nack(e.ctx, claim.Token, positions(claim)[:1], time.Hour, "no"))
			check("nacked: the claim has ended, and comes again in an hour", "all", 37, 0, 1, 0)
			e.jump(2 * time.Hour)
			claim = mustReceive(e, all)
			check("claimed for another time", "all", 32, 5, 2, 1)
		}
		must(t, all.Ack(e.ctx, claim.Token))
		drain(e, all)
		drain(e, even)
		check("drained", "all", 0, 0, 0, 0)
		check("drained", "even", 0, 0, 0, 0)
	})
}

func TestStatsOfManyLanesAddUp(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered})
	members := make([]*pgstream.Consumer, 5)
	for i := range members {
		members[i] = e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: fmt.Sprintf("m%d", i)})
	}
	for range 4 {
		e.publish("orders", 100)
		for range 2 {
			for _, m := range members {
				drain(e, m)
			}
		}
		if s := e.stats("orders", "g"); s.Lag != 0 || s.InFlight != 0 || s.OldestAge != 0 || s.AckFloor != one[int64](e, "select last_value from millrace_engine.position_1") {
			t.Errorf("everything is handled: %+v", s)
		}
	}
	e.publish("orders", 200)
	if s := e.stats("orders", "g"); s.Lag < 150 || s.Lag > 250 {
		t.Errorf("lag %d with 200 messages", s.Lag)
	}
}

// The cost of statistics must not grow with the backlog.
func TestStatsDoNotReadTheBacklog(t *testing.T) {
	t.Parallel()
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stream("orders")
			e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
			e.run(`insert into millrace.orders (key, payload) select 'k' || n % 100, '{}' from generate_series(1, 50000) n`)
			c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 1})
			must(t, c.Ack(e.ctx, mustReceive(e, c).Token))
			must(t, c.Release(e.ctx, mustReceive(e, c).Token))
			tx := e.begin() // counts what this transaction reads
			read := func() int64 {
				var n int64
				must(t, tx.QueryRow(e.ctx, `select sum(pg_stat_get_xact_tuples_returned(c.oid) + pg_stat_get_xact_tuples_fetched(c.oid))::bigint
					from pg_class c where c.relnamespace = 'millrace_engine'::regnamespace and c.relname ~ '^segment_1'`).Scan(&n))
				return n
			}
			before := read()
			rows, err := tx.Query(e.ctx, "select lag from millrace.stats()")
			must(t, err)
			lag, err := pgx.CollectExactlyOneRow(rows, pgx.RowTo[int64])
			must(t, err)
			if lag != 49999 {
				t.Errorf("lag %d, want 49999", lag)
			}
			if n := read() - before; n > 5000 {
				t.Errorf("%d rows of the log were read", n)
			}
		})
	}
}

// The hot functions keep an ordered index scan, whatever the statistics said when a segment was empty.
func TestReceiveNeverScansTheLog(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
		conn := e.connect()
		receive := func() {
			t.Helper()
			exec(e, conn, "select from millrace.receive('orders', 'g', 'm', 10)")
			exec(e, conn, "select millrace.leave('orders', 'g', 'm')")
		}
		for range 6 {
			receive() // plans made while everything was empty
		}
		e.run("analyze")
		e.run(`insert into millrace.orders (key, payload) select 'k' || n % 100, '{}' from generate_series(1, 30000) n`)
		for range 10 {
			receive()
		}
		must(t, conn.Close(e.ctx)) // reports its statistics
		other := e.connect()
		var scans, rows int64
		e.eventually("the statistics arrive", func() bool {
			must(t, other.QueryRow(e.ctx, `select sum(idx_scan), sum(idx_tup_fetch) from pg_stat_all_tables where relname ~ '^segment_1'`).Scan(&scans, &rows))
			return scans > 0
		})
		if n := one[int64](e, "select sum(seq_tup_read)::bigint from pg_stat_all_tables where relname ~ '^segment_1'"); n > 0 {
			t.Errorf("%d rows were read by sequential scans", n)
		}
		if rows > 3000 {
			t.Errorf("%d rows were fetched for a hundred messages", rows)
		}
	})
}

// Positions of a transaction that rolled back at the end of a quiet stream are not work to do, and nobody may be woken by
// them or kept from scaling down.
func TestRolledBackPositionsAtTheEndAreNoLag(t *testing.T) {
	t.Parallel()
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stream("orders")
			e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
			c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "one"})
			e.publish("orders", 10)
			drain(e, c)
			tx := e.begin()
			publishIn(e, tx, "orders")
			publishIn(e, tx, "orders")
			rollback(e, tx)
			drain(e, c)
			if s := e.stats("orders", "g"); s.Lag != 0 || s.OldestAge != 0 {
				t.Errorf("after a rollback: lag %d, oldest %s", s.Lag, s.OldestAge)
			}
			e.publish("orders", 1)
			if s := e.stats("orders", "g"); s.Lag < 1 || s.InFlight != 0 {
				t.Errorf("with one message to claim: lag %d, in flight %d", s.Lag, s.InFlight)
			}
		})
	}
}

// A group that waits for a position ahead of the log has nothing to do, however far that is, and what it will pass over is no lag, nor less than none.
func TestAGroupAheadOfTheLogHasNoLag(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, new := twoMembers(t, mode)
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "filtered", Mode: mode, Filter: pgstream.Filter{KeyPrefix: "x"}})
		e.run("select millrace.create_stream('urgent', p_priorities => 2)")
		e.group(pgstream.GroupSpec{Stream: "urgent", Name: "g", Mode: mode})
		openClaims(e, old, new)
		for _, to := range []int64{12, 100, math.MaxInt64 / 2} {
			e.run(`select millrace.reset_group(s.name, g.name, 'Position', $1)
				from millrace_engine.consumer_group g join millrace_engine.stream s on s.id = g.stream_id where g.parent_id is null`, to)
			e.publish("urgent", 1)
			same(t, "received", positions(receive(e, old)), nil)
			reports, err := pgstream.GroupReports(e.ctx, e)
			must(t, err)
			if len(reports) != 3 {
				t.Errorf("%d reports", len(reports))
			}
			for _, r := range reports {
				s := e.stats(r.Stream, r.Group)
				if one := one[int64](e, `select lag from millrace.stats($1) where "group" = $2`, r.Stream, r.Group); one != 0 {
					t.Errorf("group %s of %s at %d has lag %d", r.Group, r.Stream, to, one)
				}
				for _, s := range []pgstream.GroupStats{s, r.GroupStats} {
					if s.Lag != 0 || s.InFlight != 0 || s.Retrying != 0 || s.Queued != 0 || s.Active != 0 || s.OldestAge != 0 || s.AckFloor != to-1 {
						t.Errorf("group %s of %s at %d: %+v", s.Group, s.Stream, to, s)
					}
				}
			}
		}
	})
}

// Only a stream to which nothing was ever published counts as unused: what was lost, rolled back or published to a priority counts as well.
func TestAnUnusedStreamIsKnown(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	want := func(stream string, want bool) {
		t.Helper()
		got, bytes, err := pgstream.UnusedStream(e.ctx, e, stream)
		must(t, err)
		if got != want || (bytes > 0) != (stream != "missing") {
			t.Errorf("stream %q counts as unused: %t, with %d bytes", stream, got, bytes)
		}
	}
	e.stream("orders")
	want("orders", true)
	want("missing", false)
	e.publish("orders", 1)
	want("orders", false)

	e.run("select millrace.create_stream('urgent', p_priorities => 2)")
	want("urgent", true)
	e.run("select millrace.publish('urgent', '{}', p_priority => 1)")
	want("urgent", false)

	e.stream("lost")
	e.publish("lost", 1)
	e.run(fmt.Sprintf("drop sequence millrace_engine.position_%d cascade", one[int32](e, "select id from millrace_engine.stream where name = 'lost'")))
	want("lost", false)
	e.run(`select millrace_engine.apply_stream('{"name": "lost"}')`)
	want("lost", false)
}
