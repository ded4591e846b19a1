package pipeline_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// suiteConfig is what every sink of the suite is asked to write.
const suiteConfig = `
name: suite
source: {redis: {streams: [s], group: g}}
mapping:
  columns:
  - {name: k, path: k, type: text, required: true}
  - {name: n, path: n, type: integer, required: true}
  - {name: v, path: v, type: text}
sink: {table: {name: suite, key: [k, n], create: IfMissing}}
`

// testedSink is a sink of the suite with a way to look at what it has made durable.
type testedSink struct {
	pipeline.Sink
	pool *pgxpool.Pool
	// content returns k/n=v for every row, in order of k and n.
	content func() string
}

// sinkSuite is what every sink must do. A new sink adds one row to TestSinks.
func sinkSuite(t *testing.T, open func(t *testing.T) testedSink) {
	cases := []struct {
		name string
		run  func(t *testing.T, s testedSink)
	}{
		{"rows are written once, and found again as duplicates", func(t *testing.T, s testedSink) {
			write(t, s, "a/1=x w", "b/1=y w")
			write(t, s, "a/1=z d", "c/1=z w", "b/1=y d")
			want(t, s, "a/1=x b/1=y c/1=z")
		}},
		{"of rows with one key in a batch the first is written", func(t *testing.T, s testedSink) {
			write(t, s, "a/2=later w", "a/1=first w", "a/1=second d", "b/1=z w", "a/1=third d")
			want(t, s, "a/1=first a/2=later b/1=z")
		}},
		{"outcomes keep the order of the items", func(t *testing.T, s testedSink) {
			write(t, s, "z/1=1 w", "m/1=1 w", "a/1=1 w")
			write(t, s, "z/2=1 w", "m/1=1 d", "b/1=1 w", "a/1=1 d")
		}},
		{"a missing value is null", func(t *testing.T, s testedSink) {
			write(t, s, "a/1 w")
			want(t, s, "a/1=null")
		}},
		{"a row at fault is reported as such, and nothing of its batch is written", func(t *testing.T, s testedSink) {
			_, err := s.Write(t.Context(), batch("a/1=x", "refused/1=x", "b/1=x"))
			if err == nil || pipeline.Classify(err) != pipeline.ClassRow {
				t.Fatalf("error %v", err)
			}
			want(t, s, "")
			write(t, s, "a/1=x w", "b/1=x w")
		}},
		{"a batch larger than the protocol's number of parameters", func(t *testing.T, s testedSink) {
			var items []string
			for i := range 30_000 {
				items = append(items, fmt.Sprintf("k/%d=v w", i))
			}
			write(t, s, items...)
		}},
		{"many writers in opposite orders of key never deadlock", oppositeOrders},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			tc.run(t, open(t))
		})
	}
}

// row reads "k/n=v"; without =v the value is null.
func row(text string) *pipeline.Item {
	key, value, valued := strings.Cut(text, "=")
	k, n, _ := strings.Cut(key, "/")
	number, _ := strconv.ParseInt(n, 10, 64) // a test's own literal
	return &pipeline.Item{ID: text, Stream: "s", Deliveries: 1, Created: time.UnixMilli(1), Row: []pipeline.Value{
		{S: k, Valid: true}, {N: number, Valid: true}, {S: value, Valid: valued},
	}}
}

func batch(rows ...string) *pipeline.Batch {
	b := &pipeline.Batch{}
	for _, r := range rows {
		b.Items = append(b.Items, row(r))
	}
	return b
}

// write writes rows, each followed by the outcome it must have: w for written, d for duplicate.
func write(t *testing.T, s testedSink, rows ...string) {
	t.Helper()
	b := &pipeline.Batch{}
	var wanted []pipeline.Result
	for _, r := range rows {
		text, outcome, _ := strings.Cut(r, " ")
		b.Items = append(b.Items, row(text))
		wanted = append(wanted, map[string]pipeline.Result{"w": pipeline.Written, "d": pipeline.Duplicate}[outcome])
	}
	os, err := s.Write(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	for i, o := range os {
		if o.Result != wanted[i] {
			t.Errorf("%s: %s, want %s", rows[i], o.Result, wanted[i])
		}
	}
}

func want(t *testing.T, s testedSink, content string) {
	t.Helper()
	if got := s.content(); got != content {
		t.Errorf("%q, want %q", got, content)
	}
}

// oppositeOrders lets writers write overlapping keys, each in its own order. I8.
func oppositeOrders(t *testing.T, s testedSink) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	const writers, batches, rows = 4, 40, 200
	for w := range writers {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(seed, uint64(w)))
			for b := range batches {
				var keys []string
				for _, n := range random.Perm(rows) {
					keys = append(keys, fmt.Sprintf("k/%d=%d", b/4*rows+n, w))
				}
				if _, err := s.Write(t.Context(), batch(keys...)); err != nil {
					t.Errorf("writer %d: %v", w, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestSinks(t *testing.T) {
	t.Run("table", func(t *testing.T) { sinkSuite(t, func(t *testing.T) testedSink { return openTable(t, "") }) })
	t.Run("table with a ledger", func(t *testing.T) {
		sinkSuite(t, func(t *testing.T) testedSink {
			return openTable(t, "", "create: IfMissing", "create: IfMissing, idempotency: Ledger")
		})
	})
	t.Run("table that compares duplicates", func(t *testing.T) {
		sinkSuite(t, func(t *testing.T) testedSink {
			return openTable(t, "", "create: IfMissing", "create: IfMissing, conflict: {detectMismatch: true}")
		})
	})
	t.Run("table without prepared statements, as through a pooler", func(t *testing.T) {
		sinkSuite(t, func(t *testing.T) testedSink { return openTable(t, "default_query_exec_mode=exec") })
	})
	t.Run("fan-out to two tables", func(t *testing.T) {
		sinkSuite(t, func(t *testing.T) testedSink {
			return openTable(t, "", "{table: {name: suite, key: [k, n], create: IfMissing}}", `{fanOut: [
				{name: one, table: {name: suite, key: [k, n], create: IfMissing}},
				{name: two, table: {name: second, key: [n, k], create: IfMissing}}]}`)
		})
	})
}

// openTable opens a table sink whose table refuses rows with the key "refused".
func openTable(t *testing.T, parameters string, replacements ...string) testedSink {
	t.Helper()
	dsn := postgres.NewDatabase(t)
	if parameters != "" {
		separator := "?"
		if strings.Contains(dsn, "?") {
			separator = "&"
		}
		dsn += separator + parameters
	}
	text := suiteConfig
	for i := 0; i < len(replacements); i += 2 {
		text = strings.ReplaceAll(text, replacements[i], replacements[i+1])
	}
	c, err := config.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	sink, pool := openSink(t, dsn, c)
	if _, err := pool.Exec(t.Context(), "alter table suite add constraint no_refused check (k <> 'refused')"); err != nil {
		t.Fatal(err)
	}
	return testedSink{sink, pool, func() string {
		var text string
		err := pool.QueryRow(context.Background(), "select coalesce(string_agg(k || '/' || n || '=' || coalesce(v, 'null'), ' ' order by k, n), '') from suite").Scan(&text)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}}
}

func openSink(t *testing.T, dsn string, c *config.Config) (pipeline.Sink, *pgxpool.Pool) {
	t.Helper()
	pool, err := pipeline.OpenPool(t.Context(), config.Fixed("DSN", dsn), c.Name, 6)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	if err := pipeline.Migrate(t.Context(), pool, c); err != nil {
		t.Fatal(err)
	}
	sink, err := pipeline.NewSink(t.Context(), pipeline.SinkOptions{
		Config: c, Pool: pool, Metrics: pipeline.NewMetrics(), Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	return sink, pool
}

func TestTableSinkUpdatesWithTheLastRowOfAKey(t *testing.T) {
	t.Parallel()
	s := openTable(t, "", "create: IfMissing", "create: IfMissing, conflict: {action: Update}")
	write(t, s, "a/1=first d", "a/1=second w", "b/1=x w")
	write(t, s, "a/1=third w")
	want(t, s, "a/1=third b/1=x")
}

// Every type arrives as it was sent, also into columns of another type than the mapping's.
func TestTableSinkKeepsEveryValue(t *testing.T) {
	t.Parallel()
	dsn := postgres.NewDatabase(t)
	c, err := config.Parse([]byte(`
name: types
source: {redis: {streams: [s], group: g}}
codec: {type: JSON}
mapping:
  columns:
  - {name: t, path: t, type: text, required: true}
  - {name: b, path: b, type: boolean, required: true}
  - {name: i2, path: i2, type: smallint, required: true}
  - {name: i4, path: i4, type: int, required: true}
  - {name: i8, path: i8, type: bigint, required: true}
  - {name: num, path: num, type: numeric, required: true}
  - {name: f4, path: f4, type: real, required: true}
  - {name: f8, path: f8, type: double, required: true}
  - {name: ts, path: ts, type: timestamptz, required: true}
  - {name: j, path: j, type: jsonb, required: true}
  - {name: y, path: "y", type: bytea, required: true}
  - {name: u, path: u, type: uuid, required: true}
  - {name: mood, path: mood, type: text, required: true}
  - {name: local, path: ts, type: timestamptz, required: true}
  - {name: short, path: short, type: text}
sink: {table: {name: types, key: [t, b, i2, i4, i8, num, f4, f8, ts, y, u, mood, local]}}
`))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	_, err = conn.Exec(t.Context(), `create type mood as enum ('calm', 'wild');
		create table types (t text, b boolean, i2 smallint, i4 int, i8 bigint, num numeric, f4 real, f8 float8, ts timestamptz, j jsonb, y bytea, u uuid,
			mood mood, local timestamp, short varchar(3), unique (t, b, i2, i4, i8, num, f4, f8, ts, y, u, mood, local))`)
	if err != nil {
		t.Fatal(err)
	}
	sink, pool := openSink(t, dsn, c)
	tr, err := pipeline.NewTransform(c)
	if err != nil {
		t.Fatal(err)
	}
	item := func(short string) *pipeline.Item {
		it := &pipeline.Item{Row: make([]pipeline.Value, len(c.Mapping.Columns)), Fields: payload(`{"t":"ü","b":true,"i2":-7,"i4":-70000,"i8":9007199254740993,
			"num":12345678901234567890.5,"f4":1.5,"f8":-0.1,"ts":"2026-01-02T03:04:05.678901+01:00","j":{"n":9007199254740993,"d":1.10},"y":"AP8=",
			"u":"00112233-4455-6677-8899-aabbccddeeff","mood":"wild","short":"` + short + `"}`)}
		if err := tr.Decode(it); err != nil {
			t.Fatal(err)
		}
		return it
	}
	for round, want := range []pipeline.Result{pipeline.Written, pipeline.Duplicate} {
		os, err := sink.Write(t.Context(), &pipeline.Batch{Items: []*pipeline.Item{item("abc")}})
		if err != nil || os[0].Result != want {
			t.Fatalf("round %d: %v, %v", round, os, err)
		}
	}
	var text string
	if err := pool.QueryRow(t.Context(), "select types::text from types").Scan(&text); err != nil {
		t.Fatal(err)
	}
	const wanted = `(ü,t,-7,-70000,9007199254740993,12345678901234567890.5,1.5,-0.1,"2026-01-02 02:04:05.678901+00","{""d"": 1.10, ""n"": 9007199254740993}","\\x00ff",00112233-4455-6677-8899-aabbccddeeff,wild,"2026-01-02 02:04:05.678901",abc)`
	if text != wanted {
		t.Errorf("%s\nwant\n%s", text, wanted)
	}
	// A text that does not fit is an error and is not cut off.
	it := item("abcd")
	it.Row[0].S = "other"
	if _, err := sink.Write(t.Context(), &pipeline.Batch{Items: []*pipeline.Item{it}}); pipeline.Classify(err) != pipeline.ClassRow {
		t.Errorf("a text that is too long: %v", err)
	}
}

// The start says what is wrong with a table and what to do.
func TestTableSinkExplainsATableThatDoesNotFit(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct{ table, want string }{
		"no table":                     {"select 1", "table public.suite does not exist; create it, or write sink.table.create: IfMissing"},
		"a missing column":             {"create table suite (k text, n int, primary key (k, n))", `column "v" does not exist: ALTER TABLE … ADD COLUMN "v" text`},
		"a column nobody fills":        {"create table suite (k text, n int, v text, x int not null, primary key (k, n))", `column "x" is NOT NULL without a default`},
		"a generated column":           {"create table suite (k text, n int, v text generated always as ('v') stored, primary key (k, n))", `column "v" is generated always`},
		"no unique constraint":         {"create table suite (k text, n int, v text, primary key (k))", "has no primary key or unique index over exactly (k, n)"},
		"a type that takes no such":    {"create table suite (k text, n int[], v text, primary key (k, n))", "does not take the mapped columns"},
		"no privilege on one's column": {"create table suite (k text, n int, v text, primary key (k, n)); create role NOBODY; grant usage on schema public to NOBODY; grant select on suite to NOBODY; alter database DATABASE set role NOBODY", `no permission to insert into column "k"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dsn := postgres.NewDatabase(t)
			c, err := config.Parse([]byte(strings.Replace(suiteConfig, "create: IfMissing", "create: Never", 1)))
			if err != nil {
				t.Fatal(err)
			}
			conn, err := pgx.Connect(t.Context(), dsn)
			if err != nil {
				t.Fatal(err)
			}
			database := conn.Config().Database
			if _, err := conn.Exec(t.Context(), strings.NewReplacer("DATABASE", database, "NOBODY", "r_"+database).Replace(tc.table)); err != nil {
				t.Fatal(err)
			}
			if strings.Contains(tc.table, "create role") {
				t.Cleanup(func() {
					ctx := context.Background()
					_, _ = conn.Exec(ctx, "reset role; drop owned by r_"+database+"; drop role r_"+database)
					_ = conn.Close(ctx)
				})
			} else {
				defer conn.Close(context.Background())
			}
			pool, err := pipeline.OpenPool(t.Context(), config.Fixed("DSN", dsn), "t", 2)
			if err != nil {
				t.Fatal(err)
			}
			defer pool.Close()
			_, err = pipeline.NewTableSink(t.Context(), pool, c)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("error %v, want %q", err, tc.want)
			}
			if pipeline.Classify(err) != pipeline.ClassConfiguration {
				t.Errorf("class %s", pipeline.Classify(err))
			}
		})
	}
}

// ALTER TABLE while the processor runs: a new column does no harm, and a changed type costs one attempt.
func TestTableSinkSurvivesAlterTable(t *testing.T) {
	t.Parallel()
	s := openTable(t, "")
	write(t, s, "a/1=x w")
	for _, ddl := range []string{"alter table suite add column extra int", "alter table suite alter column n type bigint"} {
		if _, err := s.pool.Exec(t.Context(), ddl); err != nil {
			t.Fatal(err)
		}
		var err error
		for range 20 { // every connection of the pool has its own prepared statement
			if _, err = s.Write(t.Context(), batch("b/1=x")); err != nil && pipeline.Classify(err) != pipeline.ClassTransient {
				t.Fatalf("%s: %v is %s", ddl, err, pipeline.Classify(err))
			}
		}
		if err != nil {
			t.Fatalf("%s: still %v", ddl, err)
		}
	}
}

// T11, for the table: twenty processors that start at once create it once.
func TestMigrateCreatesTheTableOnce(t *testing.T) {
	t.Parallel()
	dsn := postgres.NewDatabase(t)
	c, err := config.Parse([]byte(suiteConfig))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			pool, err := pipeline.OpenPool(t.Context(), config.Fixed("DSN", dsn), "t", 1)
			if err != nil {
				t.Error(err)
				return
			}
			defer pool.Close()
			if err := pipeline.Migrate(t.Context(), pool, c); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	openSink(t, dsn, c)
}

// No secret in an error, whatever is wrong with the connection string.
func TestOpenPoolNeverShowsThePassword(t *testing.T) {
	for _, dsn := range []string{"postgres://u:secret@h:port/d", "postgres://u:sec%zzret@h/d", "secret", "host=h password=secret port=x", "postgres://u:secret@127.0.0.1:1/d?connect_timeout=1"} {
		pool, err := pipeline.OpenPool(t.Context(), config.Fixed("MILLRACE_SINK_DATABASE_URL", dsn), "t", 1)
		if err == nil {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			err = pool.Ping(ctx)
			cancel()
			pool.Close()
		}
		if err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v", dsn, err)
		}
	}
	if _, err := pipeline.OpenPool(t.Context(), config.Fixed("X", ""), "t", 1); errors.As(err, new(*pipeline.ConfigurationError)) == false {
		t.Errorf("%v", err)
	}
}

func payload(document string) []redisstream.Field {
	return []redisstream.Field{{Field: "payload", Value: document}}
}
