package pgstream_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func (e *engine) reader(from int64) *pgstream.Reader {
	e.t.Helper()
	r, err := pgstream.NewReader(e.ctx, e.Pool, "orders", from, nil)
	must(e.t, err)
	return r
}

// read returns the positions that millrace.read gives, with the arguments after the stream's name.
func (e *engine) read(db pgstream.DB, args string) ([]int64, error) {
	rows, err := db.Query(e.ctx, "select position from millrace.read('orders', "+args+")")
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[int64])
}

func TestReadReturnsWhatIsThereInOrder(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.fillRing()
	e.run(`insert into millrace.orders (key, headers, payload) values ('a', '{"kind": "x"}', '1'), ('b', '{"kind": "y"}', '2'), ('a', null, '3')`)
	for args, want := range map[string][]int64{
		"99, 4":         {99, 100, 101, 102},
		"0, 2":          {1, 2},
		"399, 100, 401": {399, 400, 401},
		"402":           {402, 403},
		"404":           nil,
		"1, 10, null, '{\"headers\": {\"kind\": \"y\"}}'": {402},
		"1, 1, null, '{\"keys\": [\"a\"]}'":               {401},
		"401, 10, null, '{\"keys\": [\"a\"]}'":            {401, 403},
	} {
		got, err := e.read(e, args)
		must(t, err)
		same(t, args, got, want)
	}
	if got := one[string](e, "select concat_ws('|', key, headers, payload, payload_bytes is null, created_at <= now()) from millrace.read('orders', 402, 1)"); got != `b|{"kind": "y"}|2|t|t` {
		t.Errorf("a row is %s", got)
	}
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "raw", PayloadType: pgstream.PayloadBytes}}))
	e.run(`insert into millrace.raw (payload) values ('\x0102')`)
	if got := one[string](e, "select concat_ws('|', payload_bytes, payload is null) from millrace.read('raw', 1)"); got != `\x0102|t` {
		t.Errorf("a row of bytes is %s", got)
	}
	for args, code := range map[string]string{"null": "MR004", "1, 0": "MR004", "1, 10001": "MR004", "1, null": "MR004", "1, 10, 10, '[]'": "MR004"} {
		if _, err := e.read(e, args); sqlState(err) != code {
			t.Errorf("read(%s): %v; want %s", args, err, code)
		}
	}
	if _, err := e.Exec(e.ctx, "select millrace.read('nothing', 1)"); sqlState(err) != "MR002" {
		t.Errorf("a stream that does not exist: %v", err)
	}
	tx := e.beginAs(pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if _, err := e.read(tx, "1"); sqlState(err) != "MR003" {
		t.Errorf("under repeatable read: %v; want MR003", err)
	}
}

// Invariant 1 for readers without a group.
func TestReadStaysBelowTheHorizon(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.publish("orders", 2)
	late := e.begin()
	p := publishIn(e, late, "orders")
	e.publish("orders", 2)
	got, err := e.read(e, "1")
	must(t, err)
	same(t, "while a publisher is open", got, []int64{1, 2})
	commit(e, late)
	got, err = e.read(e, "3")
	must(t, err)
	same(t, "after its commit", got, []int64{p, 4, 5})
}

func TestReadIsSeenBrokenWithoutTheHorizon(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.mutate("millrace_engine.read_1", "millrace_engine.horizon_from(c_stream, p_safe)", "pg_sequence_last_value('millrace_engine.position_1')")
	late := e.begin()
	publishIn(e, late, "orders")
	e.publish("orders", 2)
	got, err := e.read(e, "1")
	must(t, err)
	if slices.Equal(got, []int64{1, 2, 3}) || len(got) == 0 {
		t.Errorf("got %v; want to see it pass over the open publisher", got)
	}
}

func TestReadingWhatWasRemovedIsOutOfRange(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.publish("orders", 20)
	e.run("select millrace.trim('orders', 11)")
	_, err := e.read(e, "10")
	if sqlState(err) != "MR008" || !strings.Contains(err.Error(), "position out of range") || !strings.Contains(err.Error(), "11") || !strings.Contains(hint(err), "11") {
		t.Errorf("reading below the mark: %v, hint %q; want MR008 that names position 11", err, hint(err))
	}
	r := e.reader(10)
	if _, err := r.Next(e.ctx, 10); !errors.Is(err, pgstream.ErrOutOfRange) || !strings.Contains(err.Error(), "11") {
		t.Errorf("a reader: %v; want ErrOutOfRange that names 11", err)
	}
	if r.Position() != 10 {
		t.Errorf("the reader moved to %d", r.Position())
	}
	r.MoveTo(11)
	got, err := r.Next(e.ctx, 3)
	must(t, err)
	same(t, "from the first that is left", read(got), []int64{11, 12, 13})
	got, err = e.reader(pgstream.ReadFirst).Next(e.ctx, 1)
	must(t, err)
	same(t, "ReadFirst", read(got), []int64{11})
}

func read(messages []pgstream.Message) []int64 {
	var all []int64
	for _, m := range messages {
		all = append(all, m.Position)
	}
	return all
}

// overtaken runs f in a backend that stands at the lock of the oldest segment while the first two segments are trimmed away: by then f has compared with the
// mark, and what it reads next is empty.
func (e *engine) overtaken(f func(conn *pgx.Conn) error) error {
	e.t.Helper()
	e.fillRing()
	trim := e.begin()
	exec(e, trim, "select millrace.trim('orders', 201)")
	conn := e.connect()
	done := e.blocked(conn.PgConn().PID(), func() error { return f(conn) })
	commit(e, trim)
	return <-done
}

// TRUNCATE is not MVCC-safe: a statement that is overtaken by it sees an empty segment.
func TestATruncationThatOvertakesAReadIsOutOfRange(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	err := e.overtaken(func(conn *pgx.Conn) error {
		got, err := e.read(conn, "100, 2")
		if err == nil {
			err = fmt.Errorf("got %v", got)
		}
		return err
	})
	if sqlState(err) != "MR008" {
		t.Errorf("a read that was overtaken: %v; want MR008", err)
	}
}

func TestATruncationThatOvertakesAReadIsSeenBrokenWithoutTheSecondLook(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.mutate("millrace_engine.read_1", "select x.name, x.first_position into strict s from millrace_engine.stream x where x.id = c_stream;\n    end if;", "end if;")
	var got []int64
	must(t, e.overtaken(func(conn *pgx.Conn) (err error) {
		got, err = e.read(conn, "100, 2")
		return err
	}))
	if slices.Contains(got, 100) {
		t.Errorf("got %v: nothing was overtaken, so this proves nothing", got)
	}
}

// A receive may fail and be repeated, or find what is left; it never counts messages as handled that it has not seen.
func TestATruncationThatOvertakesAReceiveLosesNothing(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
		var got []int64
		var token string
		err := e.overtaken(func(conn *pgx.Conn) error {
			rows, err := conn.Query(e.ctx, "select claim, position from millrace.receive('orders', 'g', 'm', 10)")
			if err != nil {
				return err
			}
			var p int64
			_, err = pgx.ForEachRow(rows, []any{&token, &p}, func() error { got = append(got, p); return nil })
			return err
		})
		if err != nil && !pgstream.IsTransient(err) {
			t.Errorf("a receive that was overtaken: %v; want a passing error or none", err)
		}
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "m"})
		if token != "" {
			must(t, c.Ack(e.ctx, token))
		}
		got = append(got, drain(e, c)...)
		if len(got) != 200 || got[0] != 201 || got[199] != 400 {
			t.Errorf("got %d messages: %v; want the 200 from 201 on", len(got), got)
		}
	})
}

func TestAReaderWaitsForWhatComesNext(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.publish("orders", 5)
	l := e.listener()
	r, err := pgstream.NewReader(e.ctx, e.Pool, "orders", pgstream.ReadNext, l)
	must(t, err)
	if r.Position() != 6 {
		t.Errorf("ReadNext is position %d, want 6", r.Position())
	}
	if m, err := r.TryNext(e.ctx, 10); err != nil || len(m) != 0 {
		t.Errorf("nothing is there: %v, %v", read(m), err)
	}
	type result struct {
		messages []pgstream.Message
		err      error
	}
	got := make(chan result)
	for i := range 3 {
		go func() {
			m, err := r.Next(e.ctx, 10)
			got <- result{m, err}
		}()
		// It holds no connection while it waits, and its registration is there.
		e.eventually("the reader waits", func() bool {
			return one[bool](e, "select to_timestamp(pg_sequence_last_value('millrace_engine.state_1') >> 4) > clock_timestamp()") && e.Stat().AcquiredConns() == 0
		})
		e.publish("orders", 1)
		res := <-got
		must(t, res.err)
		same(t, "what was published", read(res.messages), []int64{int64(6 + i)})
		if m := res.messages[0]; *m.Key != "k0" || string(m.Payload) != `{"n": 0}` || m.CreatedAt.IsZero() {
			t.Errorf("the message is %+v", m)
		}
	}
	ctx, cancel := context.WithCancel(e.ctx)
	cancel()
	if _, err := r.Next(ctx, 10); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end of its context: %v", err)
	}
	if _, err := pgstream.NewReader(e.ctx, e.Pool, "nothing", 1, nil); !errors.Is(err, pgstream.ErrNotFound) {
		t.Errorf("a stream that does not exist: %v", err)
	}
	must(t, pgstream.DropStream(e.ctx, e, "orders", pgstream.Owner{}, false))
	if _, err := r.TryNext(e.ctx, 10); !errors.Is(err, pgstream.ErrNotFound) {
		t.Errorf("a stream that was dropped: %v", err)
	}
}

// A crash may forget that positions were handed out, with transactions that nobody waited for, and then they are handed out again. A reader that knew an old horizon
// goes on behind the last message that it saw, and looks at the publishers' locks again, whether it hears of the crash or its pool has replaced the connections before.
func TestAReaderForgetsItsHorizonWithACrash(t *testing.T) {
	t.Parallel()
	for name, crash := range map[string]func(e *engine){
		"that it hears of": func(e *engine) {
			exec(e, e.connect(), "select pg_terminate_backend(pid, 60000) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()")
		},
		"that only its pool has noticed": func(e *engine) { e.Reset() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stream("orders")
			e.publish("orders", 5)
			tx := e.begin()
			for range 3 {
				publishIn(e, tx, "orders")
			}
			rollback(e, tx)
			r := e.reader(1)
			got, err := r.Next(e.ctx, 10)
			must(t, err)
			same(t, "before", read(got), []int64{1, 2, 3, 4, 5}) // and the horizon is 8
			crash(e)
			exec(e, e.connect(), "select setval('millrace_engine.position_1', 5)")
			late, other := e.begin(), e.begin()
			publishIn(e, late, "orders")
			publishIn(e, other, "orders")
			commit(e, other)
			got, err = r.TryNext(e.ctx, 10)
			if err != nil {
				got, err = r.TryNext(e.ctx, 10)
			}
			must(t, err)
			same(t, "while position 6 is open", read(got), nil)
			commit(e, late)
			got, err = r.TryNext(e.ctx, 10)
			must(t, err)
			same(t, "after its commit", read(got), []int64{6, 7})
		})
	}
}

// Whatever publishers do, a reader sees each committed message once, in order, and nothing else.
func TestAReaderMissesNothing(t *testing.T) {
	t.Parallel()
	length := soak(t, 2*time.Second)
	e := newEngine(t)
	e.extendDeadline(length)
	e.stream("orders")
	h := newHistory()
	ctx, cancel := context.WithTimeout(e.ctx, length)
	defer cancel()
	failed := make(chan error, 100)
	var publishers, readers sync.WaitGroup
	r := random(t)
	for range 5 {
		conn, own := e.connect(), newRand(r)
		publishers.Go(func() {
			for ctx.Err() == nil {
				if err := h.publishAndPause(e.ctx, conn, own); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	var quiet atomic.Bool
	for i, size := range []int{1, 7, 1000} {
		reader := e.reader(1)
		readers.Go(func() {
			var last int64
			for {
				ends := quiet.Load()
				messages, err := reader.TryNext(e.ctx, size)
				if err != nil {
					failed <- err
					return
				}
				for _, m := range messages {
					if m.Position <= last {
						failed <- fmt.Errorf("position %d came after %d", m.Position, last)
					}
					last = m.Position
				}
				h.received(fmt.Sprint(i), read(messages))
				if ends && len(messages) == 0 {
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
	mustHold(t, h.broken("0", "1", "2"))
}

// Invariant 6 for readers: while segments turn and are trimmed away beneath them, each message is read, or reported as gone.
func TestAReaderReadsEverythingOrIsTold(t *testing.T) {
	t.Parallel()
	length := soak(t, 2*time.Second)
	e := newEngine(t)
	e.extendDeadline(length)
	e.stream("orders")
	h := newHistory()
	ctx, cancel := context.WithTimeout(e.ctx, length)
	defer cancel()
	failed := make(chan error, 100)
	var publishers, readers, upkeep sync.WaitGroup
	r := random(t)
	for range 3 {
		conn, own := e.connect(), newRand(r)
		publishers.Go(func() {
			for ctx.Err() == nil {
				if err := h.publishAndPause(e.ctx, conn, own); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	var quiet, done atomic.Bool
	var mu sync.Mutex
	told := 0
	for i, size := range []int{3, 50, 1000} {
		reader := e.reader(1)
		group := fmt.Sprint(i)
		readers.Go(func() {
			for {
				ends := quiet.Load()
				messages, err := reader.TryNext(e.ctx, size)
				if errors.Is(err, pgstream.ErrOutOfRange) {
					var first int64
					if err := e.QueryRow(e.ctx, "select first_position from millrace_engine.stream").Scan(&first); err != nil {
						failed <- err
						return
					}
					mu.Lock()
					told++
					mu.Unlock()
					h.mu.Lock()
					if h.delivered[group] == nil {
						h.delivered[group] = map[int64]int{}
					}
					for p := reader.Position(); p < first; p++ { // whether it was committed or not
						h.delivered[group][p]++
					}
					h.mu.Unlock()
					reader.MoveTo(first)
					continue
				}
				if err != nil {
					failed <- err
					return
				}
				h.received(group, read(messages))
				if ends && len(messages) == 0 {
					return
				}
			}
		})
	}
	trims := 0
	own := newRand(r)
	upkeep.Go(func() {
		for segment := 0; !done.Load(); segment++ {
			if _, err := e.Exec(e.ctx, "select millrace_engine.set_state(1, $1, null)", segment%4); err != nil {
				failed <- err
				return
			}
			if _, err := e.Exec(e.ctx, "select millrace.trim('orders', p_max_messages => $1, p_exact => $2)", own.IntN(30), own.IntN(2) == 0); err != nil {
				failed <- err
				return
			}
			trims++
		}
	})
	publishers.Wait()
	quiet.Store(true)
	readers.Wait()
	done.Store(true)
	upkeep.Wait()
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	if told == 0 {
		t.Error("no reader was overtaken: the run proves nothing")
	}
	for _, group := range []string{"0", "1", "2"} {
		for p := range h.committed {
			if n := h.delivered[group][p]; n != 1 {
				t.Errorf("reader %s: position %d was read or reported %d times", group, p, n)
			}
		}
	}
	t.Logf("%d committed, %d trims, readers were told %d times", len(h.committed), trims, told)
}

func TestAPositionIsFoundByTime(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	at := func(when string) int64 {
		t.Helper()
		return one[int64](e, "select millrace.position_at('orders', "+when+")")
	}
	if p := at("'2000-01-01'"); p != 1 {
		t.Errorf("in an empty stream: %d, want 1", p)
	}
	e.fillRing()
	e.run("delete from millrace.orders where position between 150 and 180 or position > 390") // as if rolled back
	e.run("update millrace.orders set created_at = timestamptz '2020-01-01' + position * interval '1 minute'")
	for when, want := range map[string]int64{
		"'-infinity'": 1, "'infinity'": 401, "'2020-01-01'": 1, "'2020-01-01 00:01'": 1, "'2020-01-01 00:01:01'": 2,
		"timestamptz '2020-01-01' + 149 * interval '1 minute'": 149, "timestamptz '2020-01-01' + 160 * interval '1 minute'": 181,
		"timestamptz '2020-01-01' + 390 * interval '1 minute'": 390, "timestamptz '2020-01-01' + 391 * interval '1 minute'": 401,
	} {
		if p := at(when); p != want {
			t.Errorf("at %s: %d, want %d", when, p, want)
		}
	}
	e.run("select millrace.trim('orders', 50)")
	if p := at("'-infinity'"); p != 50 {
		t.Errorf("after a trim: %d, want the first that is left", p)
	}
	late := e.begin()
	publishIn(e, late, "orders")
	e.publish("orders", 1)
	if p := at("'infinity'"); p != 401 {
		t.Errorf("with an open publisher: %d, want 401, which may still be committed", p)
	}
	for sql, code := range map[string]string{"null": "MR004"} {
		if _, err := e.Exec(e.ctx, "select millrace.position_at('orders', "+sql+")"); sqlState(err) != code {
			t.Errorf("at %s: %v; want %s", sql, err, code)
		}
	}
	if _, err := pgstream.PositionAt(e.ctx, e, "nothing", time.Now()); !errors.Is(err, pgstream.ErrNotFound) {
		t.Errorf("a stream that does not exist: %v", err)
	}
	tx := e.beginAs(pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if _, err := pgstream.PositionAt(e.ctx, tx, "orders", time.Now()); sqlState(err) != "MR003" {
		t.Errorf("under repeatable read: %v; want MR003", err)
	}
}

// What position_at promises while long statements make times run against positions.
func TestAPositionByTimePassesOverNoMoreThanItSays(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	r := random(t)
	const longest = 600 // seconds that a publishing statement took at most, D
	n := 5000 + r.IntN(5000)
	// One position per second; a part of the messages come from statements that began earlier.
	e.run("select setseed($1)", r.Float64()*2-1)
	e.run(`insert into millrace.orders (created_at, payload) select timestamptz '2020-01-01' + make_interval(secs => n
		- case when random() < 0.3 or n % 2000 < 500 then random() * $2 else 0 end), '{}' from generate_series(1, $1) n`, n, float64(longest))
	for range 200 {
		secs := r.IntN(n + 100)
		when := time.Date(2020, 1, 1, 0, 0, secs, 0, time.UTC)
		p, err := pgstream.PositionAt(e.ctx, e, "orders", when)
		must(t, err)
		var atResult, nearby, far bool
		must(t, e.QueryRow(e.ctx, `select not exists (select from millrace.orders where position = $1 and created_at < $2),
			exists (select from millrace.orders where position < $1 and position >= $1 - 1000 and created_at >= $2),
			exists (select from millrace.orders where position < $1 and created_at >= $2 + make_interval(secs => $3))`,
			p, when, float64(longest)).Scan(&atResult, &nearby, &far))
		if !atResult || nearby || far {
			t.Fatalf("at second %d: position %d is at or after it: %t; passes over one of the thousand before: %t, over one a statement later: %t", secs, p, atResult, nearby, far)
		}
	}
}

func TestAPositionByTimeIsFoundByFewProbes(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.run(`insert into millrace.orders (created_at, payload) select timestamptz '2020-01-01' + n * interval '1 second', '{}' from generate_series(1, 100000) n`)
	tx := e.begin()
	var p, n int64
	must(t, tx.QueryRow(e.ctx, "select millrace.position_at('orders', '2020-01-01 12:00')").Scan(&p))
	must(t, tx.QueryRow(e.ctx, `select sum(pg_stat_get_xact_tuples_returned(c.oid) + pg_stat_get_xact_tuples_fetched(c.oid))::bigint
		from pg_class c where c.relnamespace = 'millrace_engine'::regnamespace and c.relname ~ '^segment_1'`).Scan(&n))
	if p != 43200 || n > 4*(1000+20*4) {
		t.Errorf("position %d after reading %d rows; want 43200 and little more than the thousand before it", p, n)
	}
}
