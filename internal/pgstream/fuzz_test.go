package pgstream_test

import (
	"context"
	"errors"
	"math"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Whatever an application passes to a function of the engine, it gets an answer: a result, or a refusal that says what is wrong with the argument. Never an
// internal error, never a lost connection, and never somebody else's claim.

// fuzzed is a database for the calls of a fuzz target, which runs them one after the other.
type fuzzed struct {
	mu   sync.Mutex
	e    *engine
	conn *pgx.Conn
	held string // the token of an open claim
}

func newFuzzed(f *testing.F) *fuzzed {
	f.Helper()
	e := newEngine(f)
	ctx, cancel := context.WithCancel(context.Background()) // for as long as the fuzzing lasts
	f.Cleanup(cancel)
	e.ctx = ctx
	e.stream("orders")
	e.run(`select millrace_engine.apply_stream('{"name": "raw", "payload_type": "Bytes"}')`)
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", AckWait: 24 * time.Hour})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "o", Mode: pgstream.ModeOrdered})
	e.publish("orders", 5)
	claim := mustReceive(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "holder", MaxMessages: 3}))
	must(f, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"}).DeadLetter(e.ctx, claim.Token, positions(claim)[:1], "bad"))
	return &fuzzed{e: e, conn: e.connect(), held: claim.Token}
}

// answers says whether err is something that an application can understand.
func answers(err error) bool {
	if err == nil || errors.Is(err, pgx.ErrNoRows) {
		return true
	}
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return false
	}
	if strings.HasPrefix(pg.Code, "MR") {
		return pg.Code != "MR009" // a broken invariant
	}
	switch pg.Code[:2] {
	case "22", "23", "54": // data, constraints, limits
		return true
	}
	return false
}

// try calls SQL in a transaction that is rolled back. It is refused with an answer, or it succeeds.
func (z *fuzzed) try(t *testing.T, sql string, args ...any) error {
	t.Helper()
	tx, err := z.conn.Begin(z.e.ctx)
	if err != nil {
		t.Fatal(err)
	}
	rows, err := tx.Query(z.e.ctx, sql, args...)
	if err == nil {
		for rows.Next() {
		}
		err = rows.Err()
	}
	if !answers(err) {
		t.Errorf("%s with %q: %v", sql, args, err)
	}
	if err := tx.Rollback(z.e.ctx); err != nil {
		t.Fatalf("%s with %q: the connection is lost: %v", sql, args, err)
	}
	return err
}

func FuzzClaimToken(f *testing.F) {
	z := newFuzzed(f)
	for _, seed := range []string{"", ".", "1.1.1.1", "1.0.0.5", "0.0.0.1", "9999999999.9999999999.999999999999999999.999999999999999999", "1.536870911.1.1",
		"1.2147483648.1.1", "-1.1.1.1", "1.1.1.0", "1.1.1.01", " 1.1.1.1", "1.1.1.1\n", "1.1.1.1.1", "١.1.1.1", strings.Repeat("1", 10000), "1.1.9223372036854775808.1"} {
		f.Add(seed, int64(1))
	}
	f.Fuzz(func(t *testing.T, token string, position int64) {
		z.mu.Lock()
		defer z.mu.Unlock()
		if token == z.held {
			return
		}
		for _, sql := range []string{"select millrace.ack($1)", "select millrace.release($1)", "select millrace.extend($1, 60)",
			"select * from millrace.receive('orders', 'g', 'm', 10, null, $1)", "select * from millrace.receive('orders', 'o', 'm', 10, null, $1)"} {
			if err := z.try(t, sql, token); err == nil {
				t.Errorf("%s took %q for a claim", sql, token)
			}
		}
		for _, sql := range []string{"select millrace.ack_messages($1, array[$2::bigint])", "select millrace.nack($1, array[$2::bigint])",
			"select millrace.dead_letter($1, array[$2::bigint], 'bad')"} {
			if err := z.try(t, sql, token, position); err == nil {
				t.Errorf("%s took %q for a claim", sql, token)
			}
		}
		// With a real token, the position is what is strange.
		for _, sql := range []string{"select millrace.ack_messages($1, array[$2::bigint])", "select millrace.nack($1, array[$2::bigint])",
			"select millrace.dead_letter($1, array[$2::bigint, null], 'bad')"} {
			if err := z.try(t, sql, z.held, position); err == nil && (position < 1 || position > 3) {
				t.Errorf("%s settled position %d, which the claim does not hold", sql, position)
			}
		}
	})
}

func FuzzSpecifications(f *testing.F) {
	z := newFuzzed(f)
	for _, seed := range []string{
		``, `null`, `[]`, `"orders"`, `1`, `{}`, `{"name": null}`, `{"name": "orders"}`, `{"name": "x", "stream": "orders"}`, `{"name": "g", "stream": "orders", "mode": "Ordered"}`,
		`{"name": "new", "stream": "orders", "start": {"from": "Position", "position": -5}}`, `{"name": "new", "stream": "orders", "start": {"from": "Time", "time": "never"}}`,
		`{"name": "new", "stream": "orders", "start": "Earliest"}`, `{"name": "new", "stream": "orders", "start": {"from": "Position", "position": 99999999999999999999}}`,
		`{"name": "new", "stream": "orders", "ack_wait_ms": 0}`, `{"name": "new", "stream": "orders", "ack_wait_ms": 9223372036854775807}`,
		`{"name": "g", "stream": "orders", "ack_wait_ms": 9223372036854775807, "max_attempts": -1}`, `{"name": "g", "stream": "orders", "filter": {"keys": "x"}}`,
		`{"name": "g", "stream": "orders", "filter": []}`, `{"name": "g", "stream": "orders", "failure_policy": "Explode"}`, `{"name": "g", "stream": "orders", "id": 5, "stream_id": 7}`,
		`{"name": "new", "partitions": 0}`, `{"name": "new", "partitions": 1025}`, `{"name": "new", "partitions": "many"}`, `{"name": "new", "segments": 17}`, `{"name": "new", "segments": 1}`,
		`{"name": "new", "retention_policy": "Never"}`, `{"name": "new", "max_bytes": -1}`, `{"name": "new", "max_age_seconds": 9223372036854775807}`, `{"name": "new", "payload_type": "XML"}`,
		`{"name": "new", "priorities": 9}`, `{"name": "orders", "priorities": 3, "partitions": 4}`, `{"name": "orders", "segments": 2}`, `{"name": "a.p1"}`, `{"name": "New"}`, `{"name": "orders", "id": 7}`,
		`{"name": "orders", "owner": 5}`, `{"name": "orders", "dedupe_window_seconds": -5}`, `{"name": "orders", "created_at": "never"}`, `{"name": "orders", "parent_id": 1, "priority": 3}`,
		`{"name": "orders", "incarnation": "x"}`, `{"name": "orders", "first_position": 50}`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, spec string) {
		z.mu.Lock()
		defer z.mu.Unlock()
		_ = z.try(t, "select millrace_engine.apply_stream($1::text::jsonb)", spec)
		_ = z.try(t, "select millrace_engine.apply_group($1::text::jsonb)", spec)
		// What was accepted works.
		_ = z.try(t, "select millrace_engine.apply_group($1::text::jsonb), millrace_engine.progress(array[1])", spec)
		_ = z.try(t, "select millrace.publish('orders', to_jsonb(millrace_engine.apply_stream($1::text::jsonb)))", spec)
	})
}

func FuzzFilters(f *testing.F) {
	z := newFuzzed(f)
	for _, seed := range []string{`null`, `{}`, `[]`, `5`, `{"headers": {}}`, `{"headers": {"a": {"b": 1}}}`, `{"headers": []}`, `{"keys": []}`, `{"keys": [null]}`, `{"keys": ["k1", "k2"]}`,
		`{"keys": [1, true]}`, `{"key_prefix": ""}`, `{"key_prefix": "k"}`, `{"key_prefix": 7}`, `{"nonsense": 1}`, `{"positions": [1, 2]}`, `{"positions": [null, null]}`,
		`{"positions": [99999999999999999999, 1]}`, `{"positions": 5}`, `{"reason": "%"}`, `{"reason": null}`, `{"dead_after": "yesterday"}`, `{"dead_after": "infinity"}`, `{"dead_before": 7}`} {
		f.Add(seed, "k1", `{"a": 1}`)
	}
	f.Fuzz(func(t *testing.T, filter, key, headers string) {
		z.mu.Lock()
		defer z.mu.Unlock()
		_ = z.try(t, "select millrace_engine.matches(millrace_engine.checked_filter($1::text::jsonb), $2, $3::text::jsonb)", filter, key, headers)
		_ = z.try(t, "select millrace_engine.apply_group(jsonb_build_object('stream', 'orders', 'name', 'g', 'filter', $1::text::jsonb))", filter)
		_ = z.try(t, "select * from millrace.read('orders', 1, 10, null, $1::text::jsonb)", filter)
		_ = z.try(t, "select * from millrace.dead_letters('orders', 'g', $1::text::jsonb)", filter)
		_ = z.try(t, "select millrace.redrive('orders', 'g', $1::text::jsonb)", filter)
		_ = z.try(t, "select millrace.purge_dead_letters('orders', 'g', $1::text::jsonb)", filter)
		_ = z.try(t, "select millrace.purge_deliveries('orders', 'g', $1::text::jsonb)", filter)
	})
}

func FuzzPublish(f *testing.F) {
	z := newFuzzed(f)
	for _, seed := range []struct{ payload, key, headers, dedupe string }{
		{"{}", "k", "{}", ""}, {"", "", "", ""}, {"\x00\xff", "\x00", "[]", "\x00"}, {`"\u0000"`, "k\xff", `{"a": "\u0000"}`, "d"}, {`"\ud800"`, strings.Repeat("k", 9000), "null", strings.Repeat("d", 5000)},
		{"1e400000", "k", `{"a": 1e999999}`, "d"}, {strings.Repeat("[", 7000), "k", "{}", "d"}, {`{"a": 1, "a": 2}`, "ключ", `{"ключ": "значение"}`, "ключ"},
	} {
		f.Add([]byte(seed.payload), seed.key, seed.headers, seed.dedupe)
	}
	f.Fuzz(func(t *testing.T, payload []byte, key, headers, dedupe string) {
		z.mu.Lock()
		defer z.mu.Unlock()
		ctx := z.e.ctx
		for _, c := range []struct{ stream, function, cast string }{
			{"raw", "millrace.publish_bytes", "$1::bytea"},
			{"orders", "millrace.publish", "convert_from($1::bytea, 'UTF8')::jsonb"},
		} {
			tx, err := z.conn.Begin(ctx)
			if err != nil {
				t.Fatal(err)
			}
			var position *int64
			err = tx.QueryRow(ctx, "select "+c.function+"($2, "+c.cast+", $3, $4::text::jsonb, p_dedupe_key => $5)", payload, c.stream, key, headers, dedupe).Scan(&position)
			switch {
			case !answers(err):
				t.Errorf("%s of %q with key %q, headers %q: %v", c.function, payload, key, headers, err)
			case err == nil && !utf8.ValidString(key+headers+dedupe):
				t.Errorf("%s accepted text that is not UTF-8", c.function)
			case err == nil:
				var same bool
				if err := tx.QueryRow(ctx, `select payload = `+c.cast+` and key = $2 and headers = $3::text::jsonb from millrace.`+c.stream+` where "position" = $4`,
					payload, key, headers, position).Scan(&same); err != nil || !same {
					t.Errorf("%s stored something else than %q with key %q, headers %q: %v", c.function, payload, key, headers, err)
				}
			}
			if err := tx.Rollback(ctx); err != nil {
				t.Fatalf("the connection is lost: %v", err)
			}
		}
	})
}

func FuzzRanges(f *testing.F) {
	z := newFuzzed(f)
	for _, n := range []int64{0, 1, -1, 5, 6, math.MaxInt64, math.MinInt64, 1 << 40, math.MaxInt32 + 1} {
		for _, x := range []float64{0, 1, -1, 1e-300, 1e300, math.Inf(1), math.NaN()} {
			f.Add(n, n/2, x, "Earliest")
		}
		f.Add(n, int64(1), 1.0, "Position")
	}
	f.Add(int64(1), int64(1), 1.0, "Time")
	f.Add(int64(1), int64(1), 1.0, "nowhere")
	f.Fuzz(func(t *testing.T, a, b int64, x float64, from string) {
		z.mu.Lock()
		defer z.mu.Unlock()
		small := int32(b) //nolint:gosec // whatever is left of it
		_ = z.try(t, "select * from millrace.read('orders', $1, $2, $3)", a, small, b)
		_ = z.try(t, "select millrace.trim('orders', $1)", a)
		_ = z.try(t, "select millrace.trim('orders', null, $1, $2)", a, x)
		_ = z.try(t, "select millrace.reset_group('orders', 'g', $1, $2)", from, a)
		_ = z.try(t, "select millrace.reset_group('orders', 'o', $1, null, to_timestamp($2))", from, x)
		_ = z.try(t, "select millrace.position_at('orders', to_timestamp($1))", x)
		_ = z.try(t, "select millrace.extend($1, $2)", z.held, x)
		_ = z.try(t, "select millrace.nack($1, array[2]::bigint[], $2)", z.held, x)
		_ = z.try(t, "select * from millrace.receive('orders', 'g', 'm', $1, $2)", small, x)
		_ = z.try(t, "select * from millrace.receive('orders', 'o', 'm', $1, $2)", small, x)
		_ = z.try(t, "select millrace.publish('orders', '{}', p_delay_seconds => $1)", x)
		_ = z.try(t, "select millrace.publish('orders', '{}', p_priority => $1)", small)
		_ = z.try(t, "select millrace.redrive('orders', 'g', null, $1, $2)", a, x)
	})
}
