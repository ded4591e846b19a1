package pgstream_test

import (
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
)

// As in fuzz_test.go, for names and for what the verbs of event stores, frames and workflows take.

// names are seeds for whatever is looked up by its name.
var names = []string{"", " ", "orders", "Orders", "orders.p1", "millrace.orders", `"orders"`, "a..b", "a.b.c.d", "'", `\`, "%", "%s", "\x00", "\xff", "\n", "--", "$$", "ё", "orders; drop table x",
	strings.Repeat("n", 64), strings.Repeat("n", 5000)}

func FuzzNames(f *testing.F) {
	z := newFuzzed(f)
	for _, name := range names {
		f.Add(name, "g", "m", "k")
		f.Add("orders", name, "m", "k")
		f.Add("orders", "g", name, name)
		f.Add("orders", "o", name, name)
	}
	f.Fuzz(func(t *testing.T, stream, group, member, key string) {
		z.mu.Lock()
		defer z.mu.Unlock()
		_ = z.try(t, "select * from millrace.receive($1, $2, $3)", stream, group, member)
		_ = z.try(t, "select millrace.leave($1, $2, $3)", stream, group, member)
		_ = z.try(t, "select * from millrace.retry($1, $2, p_member => $3)", stream, group, member)
		_ = z.try(t, "select millrace.redrive($1, $2, p_to => $3)", stream, group, member)
		_ = z.try(t, "select millrace.publish($1, '{}', $2, p_serialize => true)", stream, key)
		_ = z.try(t, "select * from millrace.stats($1), millrace.stream_stats($1)", stream)
		_ = z.try(t, "select * from millrace.features($1)", stream)
		_ = z.try(t, "select millrace.create_stream($1)", stream)
		_ = z.try(t, "select millrace.create_group($1, $2)", stream, group)
		if stream == "orders" && group == "g" {
			return // these hold the claim of other targets
		}
		_ = z.try(t, "select millrace.drop_group($1, $2)", stream, group)
	})
}

func FuzzHistories(f *testing.F) {
	z := newFuzzed(f)
	z.e.run("select millrace.create_stream('carts', p_versions => true), millrace.append('carts', 'k', array['{}', '{}']::jsonb[])")
	z.e.run("create function evolve(jsonb, jsonb, jsonb) returns jsonb language sql return $2")
	for _, name := range names {
		f.Add(name, "evolve", "{}", int64(1))
		f.Add("k", name, "{}", int64(0))
	}
	for _, n := range []int64{-2, -1, 0, 2, 3, math.MaxInt64, math.MinInt64} {
		f.Add("k", "evolve", "[]", n)
	}
	f.Fuzz(func(t *testing.T, key, name, payload string, version int64) {
		z.mu.Lock()
		defer z.mu.Unlock()
		_ = z.try(t, "select * from millrace.append('carts', $1, array[$2::text::jsonb, '{}'], $3, array['{}', $2::text::jsonb])", key, payload, version)
		_ = z.try(t, "select * from millrace.read_entity('carts', $1, $2, $3)", key, version, version)
		_ = z.try(t, "select millrace.add_tenant('carts', $1), millrace.append('carts', $1 || '/1', array['{}']::jsonb[]), millrace.drop_tenant('carts', $1)", name)
		_ = z.try(t, "select millrace.create_projection('carts', $1, 'evolve', 'folded', array[$2])", name, key)
		// Of a name that cannot be one, PostgreSQL says so.
		z.tryName(t, "select * from millrace.aggregate('carts', $1, $2, $3::text::jsonb, $4)", key, name, payload, version)
		z.tryName(t, "select millrace.create_projection('carts', 'p', $1, $2)", name, key)
		z.tryName(t, "select millrace.create_projection('carts', 'p', 'evolve', $1)", name)
	})
}

func FuzzFrames(f *testing.F) {
	z := newFuzzed(f)
	z.e.run("select millrace.create_stream('runs', p_frames => '{}'), millrace.append_frame('runs', 'k', '{}')")
	for _, cursor := range []string{"", "-", "+", "0", "1-", "-1", "1-1-1", "1767225600000-0", "(1767225600000-0", "99999999999999999999", "1-99999999999", "9223372036854775807-1048575",
		" 1", "1.5", "1e3", "NaN"} {
		f.Add("k", cursor, "Durable", "{}")
	}
	for _, mode := range []string{"DurableSummary", "BestEffortLive", "durable", ""} {
		for _, json := range []string{"", "null", "[]", "1", `{"a": {"b": null}}`, `{"a": "\u0000"}`, strings.Repeat("[", 7000)} {
			f.Add("k", "-", mode, json)
		}
	}
	for _, name := range names {
		f.Add(name, "-", "DurableSummary", `{"a": 1}`)
	}
	f.Fuzz(func(t *testing.T, key, cursor, mode, json string) {
		z.mu.Lock()
		defer z.mu.Unlock()
		_ = z.try(t, "select * from millrace.append_frame('runs', $1, $2::text::jsonb, $3, $4, $4, $2::text::jsonb)", key, json, mode, cursor)
		_ = z.try(t, "select * from millrace.read_frames('runs', $1, $2, '+'), millrace.read_summary('runs', $1)", key, cursor)
		_ = z.try(t, "select * from millrace.read_frames('runs', $1, '-', $2)", key, cursor)
		_ = z.try(t, "select * from millrace.tail_frames('runs', $1, $2)", key, cursor)
		_ = z.try(t, "select millrace.wait_for_frames('runs', $1)", key)
		_ = z.try(t, "select millrace.merge_patch($1::text::jsonb, $1::text::jsonb)", json)
		_ = z.try(t, "select millrace.create_stream('others', p_frames => $1::text::jsonb)", json)
	})
}

func FuzzWorkflows(f *testing.F) {
	z := newFuzzed(f)
	z.e.run("select millrace.create_memory('flows'), millrace.write_memory('flows', 's', '{}')")
	for _, name := range names {
		f.Add(name, "s", "{}", int64(1), 1.0)
		f.Add("flows", name, "{}", int64(0), 60.0)
	}
	for _, n := range []int64{-1, 0, 1, 2, math.MaxInt64, math.MinInt64} {
		for _, x := range []float64{0, -1, 1e-300, 86400, 1e300, math.Inf(1), math.NaN()} {
			f.Add("flows", "s", `{"a": 1}`, n, x)
		}
	}
	f.Add("flows", "s", "null", int64(1), 1.0)
	f.Fuzz(func(t *testing.T, memory, subject, json string, n int64, x float64) {
		z.mu.Lock()
		defer z.mu.Unlock()
		_ = z.try(t, "select millrace.write_memory($1, $2, $3::text::jsonb, $4)", memory, subject, json, n)
		_ = z.try(t, "select millrace.write_memory($1, 's', '{}', p_parent => $2, p_metadata => $3::text::jsonb, p_token => $4)", memory, subject, json, n)
		_ = z.try(t, "select * from millrace.lock_memory($1, $2, $3, $2), millrace.read_memory($1, $2)", memory, subject, x)
		_ = z.try(t, "select millrace.extend_memory($1, $2, $3, $4)", memory, subject, n, x)
		_ = z.try(t, "select millrace.unlock_memory($1, $2, $3)", memory, subject, n)
		_ = z.try(t, "select millrace.delete_memory($1, $2, $3), millrace.drop_memory($1)", memory, subject, n)
		_ = z.try(t, "select * from millrace.memory_children($1, $2), millrace.memory_descendants($1, $2)", memory, subject)
		_ = z.try(t, "select millrace.create_memory($1, p_keep_completed_seconds => $2)", memory, n)
		z.tryName(t, "select millrace.create_memory('others', $1)", subject)
	})
}

// tryName is try for calls with the name of a function or a table, which may be one that PostgreSQL refuses to read, or that is in no schema.
func (z *fuzzed) tryName(t *testing.T, sql string, args ...any) {
	t.Helper()
	tx, err := z.conn.Begin(z.e.ctx)
	must(t, err)
	_, err = tx.Exec(z.e.ctx, sql, args...)
	var pg *pgconn.PgError
	if known := errors.As(err, &pg) && (pg.Code == "42601" || pg.Code == "42602" || pg.Code == "3F000" || pg.Code == "0A000" || pg.Code == "42P01" || pg.Code == "42704"); !known && !answers(err) {
		t.Errorf("%s with %q: %v", sql, args, err)
	}
	must(t, tx.Rollback(z.e.ctx))
}
