package pgstream_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// counter counts what is sent.
type counter struct {
	*engine
	sent int
}

func (c *counter) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	c.sent++
	return c.engine.Query(ctx, sql, args...)
}

func (c *counter) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	c.sent++
	return c.engine.QueryRow(ctx, sql, args...)
}

func (c *counter) CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, rows pgx.CopyFromSource) (int64, error) {
	c.sent++
	return c.engine.CopyFrom(ctx, table, columns, rows)
}

func (e *engine) publisher(stream string) *pgstream.Publisher {
	e.t.Helper()
	p, err := pgstream.NewPublisher(e.ctx, e, stream)
	must(e.t, err)
	return p
}

func TestAPublisherNeedsOneRoundTripPerCall(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.run("select millrace.create_stream('raw', p_payload_type => 'Bytes')")
	for _, stream := range []string{"orders", "raw"} {
		p, db := e.publisher(stream), &counter{engine: e}
		m := pgstream.NewMessage{Payload: []byte(`{}`), Headers: []byte(` {"h": 1}`)}
		_, err := p.Publish(e.ctx, db, m)
		must(t, err)
		got, err := p.PublishBatch(e.ctx, db, []pgstream.NewMessage{m, m})
		must(t, err)
		same(t, "positions", got, []int64{2, 3})
		must(t, p.Copy(e.ctx, db, []pgstream.NewMessage{m, m}))
		m.DedupeKey = "a"
		at, err := p.Publish(e.ctx, db, m)
		must(t, err)
		if db.sent != 4 {
			t.Errorf("%d round trips, want 4", db.sent)
		}
		if n := one[int](e, "select count(*) from millrace."+stream+` where headers = '{"h": 1}'`); n != 6 || at != 6 {
			t.Errorf("%d messages, the last at %d, want 6", n, at)
		}
		if none, err := p.PublishBatch(e.ctx, db, nil); err != nil || none != nil || db.sent != 4 {
			t.Errorf("an empty batch: %v, %v", none, err)
		}
	}
	if _, err := pgstream.NewPublisher(e.ctx, e, "nothing"); !errors.Is(err, pgstream.ErrNotFound) {
		t.Errorf("NewPublisher for an unknown stream: %v", err)
	}
}

func TestAPublisherRefusesBeforeItSends(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", MaxMessageBytes: 100}}))
	p := e.publisher("orders")
	good := pgstream.NewMessage{Payload: []byte(`{}`)}
	large := pgstream.NewMessage{Payload: []byte(`"` + strings.Repeat("x", 99) + `"`)}
	for _, c := range []struct {
		name   string
		m      pgstream.NewMessage
		answer string
	}{
		{"a payload that is too large", large, "maxMessageBytes"},
		{"no payload", pgstream.NewMessage{}, `"null"`},
		{"headers that are an array", pgstream.NewMessage{Payload: []byte(`{}`), Headers: []byte(`[1]`)}, "object"},
		{"headers that are broken", pgstream.NewMessage{Payload: []byte(`{}`), Headers: []byte(`{"a":`)}, "object"},
		{"headers that are empty", pgstream.NewMessage{Payload: []byte(`{}`), Headers: []byte{}}, "object"},
	} {
		t.Run(c.name, func(t *testing.T) {
			db := &counter{engine: e}
			_, err := p.Publish(e.ctx, db, c.m)
			_, err2 := p.PublishBatch(e.ctx, db, []pgstream.NewMessage{good, c.m})
			err3 := p.Copy(e.ctx, db, []pgstream.NewMessage{good, c.m})
			for _, err := range []error{err, err2, err3} {
				if !errors.Is(err, pgstream.ErrRefused) || !strings.Contains(err.Error(), c.answer) || strings.Contains(err.Error(), "xxx") {
					t.Errorf("%v; want ErrRefused, %s, and nothing of the payload", err, c.answer)
				}
			}
			if db.sent > 0 && c.answer != "maxMessageBytes" {
				t.Errorf("%d round trips", db.sent)
			}
		})
	}
	db := &counter{engine: e}
	many := make([]pgstream.NewMessage, 100_001)
	if _, err := p.PublishBatch(e.ctx, db, many); !errors.Is(err, pgstream.ErrRefused) || !strings.Contains(err.Error(), "Split") {
		t.Errorf("a batch that is too long: %v", err)
	}
	mixed := []pgstream.NewMessage{good, {Payload: []byte(`{}`), Delay: time.Second}}
	if _, err := p.PublishBatch(e.ctx, db, mixed); !errors.Is(err, pgstream.ErrRefused) || !strings.Contains(err.Error(), "options") {
		t.Errorf("a batch with different options: %v", err)
	}
	for _, m := range []pgstream.NewMessage{{Payload: []byte(`{}`), DedupeKey: "a"}, {Payload: []byte(`{}`), Priority: 1}} {
		if err := p.Copy(e.ctx, db, []pgstream.NewMessage{m}); !errors.Is(err, pgstream.ErrRefused) || !strings.Contains(err.Error(), "PublishBatch") {
			t.Errorf("COPY with an option: %v", err)
		}
	}
	if db.sent != 0 {
		t.Errorf("%d round trips", db.sent)
	}
	if n := e.length("orders"); n != 0 {
		t.Errorf("%d messages were stored all the same", n)
	}

	// A limit that was raised holds at once.
	e.run("update millrace_engine.stream set max_message_bytes = 200")
	_, err := p.Publish(e.ctx, e, large)
	must(t, err)
}

func TestOptionsInGoAreThoseOfSQL(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.run("select millrace.create_stream('orders', p_priorities => 2)")
	p := e.publisher("orders")
	now := one[time.Time](e, "select millrace_engine.clock()")
	key := "k"
	message := func(payload string) pgstream.NewMessage {
		return pgstream.NewMessage{Key: &key, Payload: []byte(payload)}
	}
	publish := func(want int64, m pgstream.NewMessage) {
		t.Helper()
		for range 2 { // both ways; the second time it is a duplicate
			m.DedupeKey = string(m.Payload)
			got, err := p.Publish(e.ctx, e, m)
			must(t, err)
			if got != want {
				t.Errorf("position %d, want %d", got, want)
			}
			if got, err = pgstream.Publish(e.ctx, e, "orders", m); err != nil || got != want {
				t.Errorf("position %d, %v; want %d", got, err, want)
			}
		}
	}
	m := message("1")
	publish(1, m)
	m = message("2")
	m.Delay = 1500 * time.Millisecond
	publish(0, m)
	m = message("3")
	m.DeliverAt = now.Add(time.Second)
	publish(0, m)
	m = message("4")
	m.Priority = 1
	publish(1, m)
	m = message("5")
	m.Serialize = true
	publish(2, m)
	got, err := p.PublishBatch(e.ctx, e, []pgstream.NewMessage{{Payload: []byte("6"), DedupeKey: "1"}, {Payload: []byte("7")}, {Payload: []byte("8"), DedupeKey: "8"}})
	must(t, err)
	same(t, "a batch with dedupe keys", got, []int64{1, 3, 4})
	got, err = pgstream.PublishBatch(e.ctx, e, "orders", []pgstream.NewMessage{{Payload: []byte("9"), Delay: time.Second}, {Payload: []byte("10"), Delay: time.Second}})
	must(t, err)
	same(t, "a delayed batch", got, []int64{0, 0})
	e.jump(time.Minute)
	e.moveDue(e, 10)
	same(t, "priority 0", e.numbers("orders"), []int64{1, 5, 7, 8, 3, 9, 10, 2})
	same(t, "priority 1", e.numbers("orders.p1"), []int64{4})

	m = message("1")
	m.Delay, m.DeliverAt = time.Second, now
	if _, err := p.Publish(e.ctx, e, m); !errors.Is(err, pgstream.ErrRefused) {
		t.Errorf("both a delay and a time: %v", err)
	}
	m = message("1")
	m.Priority = 2
	if _, err := p.Publish(e.ctx, e, m); !errors.Is(err, pgstream.ErrRefused) || !strings.Contains(err.Error(), "0 to 1") {
		t.Errorf("a priority that the stream has not: %v", err)
	}

	tx := e.begin()
	if _, err := p.Publish(e.ctx, tx, message("11")); err != nil {
		t.Error(err)
	}
	rollback(e, tx)
	if n := e.length("orders"); n != 8 {
		t.Errorf("%d messages, want 8", n)
	}
}
