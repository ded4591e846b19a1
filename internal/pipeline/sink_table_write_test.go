package pipeline_test

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// meteredTable opens the table of the suite in a database, with the metrics that tell how rows went in.
func meteredTable(t *testing.T, dsn string, replacements ...string) (testedSink, func(name string) float64) {
	t.Helper()
	c, err := config.Parse([]byte(strings.NewReplacer(replacements...).Replace(suiteConfig)))
	if err != nil {
		t.Fatal(err)
	}
	pool, err := pipeline.OpenPool(t.Context(), config.Fixed("DSN", dsn), c.Name, 6)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	if err := pipeline.Migrate(t.Context(), pool, c); err != nil {
		t.Fatal(err)
	}
	metrics := pipeline.NewMetrics()
	sink, err := pipeline.NewSink(t.Context(), pipeline.SinkOptions{Config: c, Pool: pool, Metrics: metrics})
	if err != nil {
		t.Fatal(err)
	}
	count := func(name string) float64 {
		families, err := metrics.Gatherer().Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == "millrace_processor_"+name {
				return f.GetMetric()[0].GetCounter().GetValue()
			}
		}
		t.Fatalf("there is no metric %s", name)
		return 0
	}
	return testedSink{sink, pool, func() string { return suiteContent(t, pool) }}, count
}

func suiteContent(t *testing.T, pool *pgxpool.Pool) string {
	t.Helper()
	var text string
	err := pool.QueryRow(context.Background(), "select coalesce(string_agg(k || '/' || n || '=' || coalesce(v, 'null'), ' ' order by k, n, v), '') from suite").Scan(&text)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// several returns n rows with the keys k/0 to k/n-1 and an outcome: enough for a COPY, which small batches are not worth.
func several(k string, n int, outcome string) []string {
	rows := make([]string, n)
	for i := range rows {
		rows[i] = fmt.Sprintf("%s/%d=x %s", k, i, outcome)
	}
	return rows
}

func TestRowsWithNewKeysAreCopied(t *testing.T) {
	t.Parallel()
	s, count := meteredTable(t, postgres.NewDatabase(t))
	write(t, s, "small/1=x w")
	if n := count("copied_rows_total"); n != 0 {
		t.Errorf("%v rows of a small batch were copied", n)
	}
	write(t, s, several("a", 60, "w")...)
	if n := count("copied_rows_total"); n != 60 {
		t.Errorf("%v rows were copied", n)
	}
	// Keys that came by are looked up, and those that are not in the table are copied with the rest.
	if _, err := s.pool.Exec(t.Context(), "delete from suite where k = 'a' and n < 10"); err != nil {
		t.Fatal(err)
	}
	write(t, s, append(append(several("b", 60, "w"), several("a", 10, "w")...), "a/10=z d", "a/20=z d", "small/1=z d")...)
	if n := count("copied_rows_total"); n != 130 {
		t.Errorf("%v rows were copied", n)
	}
	if n := count("copy_replays_total"); n != 0 {
		t.Errorf("%v copies failed", n)
	}
	if got := strings.Count(s.content(), "=x"); got != 121 || strings.Contains(s.content(), "z") {
		t.Errorf("%d rows: %s", got, s.content())
	}
}

// After a restart nobody remembers the keys of what was written and not acknowledged; that it is delivered again says enough.
func TestARestartedProcessorLooksRedeliveriesUp(t *testing.T) {
	t.Parallel()
	dsn := postgres.NewDatabase(t)
	before, _ := meteredTable(t, dsn)
	write(t, before, several("a", 60, "w")...)
	s, count := meteredTable(t, dsn)
	b := &pipeline.Batch{}
	for _, r := range several("a", 100, "") {
		text, _, _ := strings.Cut(r, " ")
		it := row(text)
		it.Deliveries = 0 // only the source would know: its own from an earlier life
		b.Items = append(b.Items, it)
	}
	os, err := s.Write(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	for i, o := range os {
		if (o.Result == pipeline.Duplicate) != (i < 60) {
			t.Errorf("item %d is %s", i, o.Result)
		}
	}
	if replays, copied := count("copy_replays_total"), count("copied_rows_total"); replays != 0 || copied != 40 {
		t.Errorf("%v copies failed, %v rows were copied", replays, copied)
	}
}

// A key that nobody here knows makes the COPY fail. Its batch is inserted, and keys are looked up for a while; when that
// fails as well, because another processor writes the same keys at the same time, batches are inserted for a while.
func TestACopyThatFailsIsReplayed(t *testing.T) {
	t.Parallel()
	dsn := postgres.NewDatabase(t)
	other, _ := meteredTable(t, dsn)
	write(t, other, several("a", 60, "w")...)
	s, count := meteredTable(t, dsn) // remembers nothing
	expect := func(replays, copied float64) {
		t.Helper()
		if r, c := count("copy_replays_total"), count("copied_rows_total"); r != replays || c != copied {
			t.Errorf("%v copies failed, %v rows were copied; want %v and %v", r, c, replays, copied)
		}
	}
	write(t, s, append(several("b", 60, "w"), "a/1=z d")...)
	expect(1, 0)
	write(t, s, append(several("c", 60, "w"), "a/2=z d")...) // looked up
	expect(1, 60)
	write(t, s, append(several("d", 60, "w"), "a/3=z d")...) // not any more
	expect(2, 60)
	// What a lookup cannot see: a row of a transaction that is still open, and then commits.
	tx, err := s.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	if _, err := tx.Exec(t.Context(), "insert into suite values ('e', 0, 'theirs')"); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		write(t, s, append([]string{"e/0=x d"}, several("f", 60, "w")...)...)
	}()
	eventually(t, func() (bool, string) {
		var waiting int
		err := s.pool.QueryRow(t.Context(), "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'").Scan(&waiting)
		return err == nil && waiting == 1, fmt.Sprintf("%d sessions wait, %v", waiting, err)
	})
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-done
	expect(3, 60)
	write(t, s, several("g", 60, "w")...) // inserted
	expect(3, 60)
	write(t, s, several("h", 60, "w")...) // copied
	expect(3, 120)
	if strings.Contains(s.content(), "z") || strings.Count(s.content(), "=") != 7*60+1 {
		t.Errorf("the table has %s", s.content())
	}
}

// What COPY refuses or would do otherwise than INSERT is inserted.
func TestTablesThatAreNotCopiedInto(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]string{
		"a column of another type": "create table suite (k varchar(5), n integer, v text, primary key (k, n))",
		"rules":                    "create table suite (k text, n integer, v text, primary key (k, n)); create rule r as on delete to suite do also nothing",
		"a view":                   "create table base (k text, n integer, v text, primary key (k, n)); create view suite as select * from base",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dsn := postgres.NewDatabase(t)
			pool, err := pgxpool.New(t.Context(), dsn)
			if err != nil {
				t.Fatal(err)
			}
			defer pool.Close()
			if _, err := pool.Exec(t.Context(), prepare); err != nil {
				t.Fatal(err)
			}
			s, count := meteredTable(t, dsn)
			write(t, s, several("a", 60, "w")...)
			write(t, s, several("a", 60, "d")...)
			if n := count("copied_rows_total"); n != 0 {
				t.Errorf("%v rows were copied", n)
			}
		})
	}
}

// Two processors with the same keys in their own orders: every COPY may meet the other's rows. I3, I8.
func TestProcessorsThatCopyTheSameKeysDoNotDeadlock(t *testing.T) {
	t.Parallel()
	dsn := postgres.NewDatabase(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	const processors, batches, rows = 3, 60, 300
	var written [processors]int
	var wg sync.WaitGroup
	for p := range processors {
		s, _ := meteredTable(t, dsn)
		wg.Go(func() {
			random := rand.New(rand.NewPCG(seed, uint64(p)))
			for b := range batches {
				var keys []string
				for _, n := range random.Perm(rows) {
					keys = append(keys, fmt.Sprintf("k/%d=%d", b*rows/2+n, p))
				}
				os, err := s.Write(t.Context(), batch(keys...))
				if err != nil {
					t.Errorf("processor %d: %v", p, err)
					return
				}
				for _, o := range os {
					if o.Result == pipeline.Written {
						written[p]++
					}
				}
			}
		})
	}
	wg.Wait()
	s, _ := meteredTable(t, dsn)
	var n int
	if err := s.pool.QueryRow(t.Context(), "select count(*) from suite").Scan(&n); err != nil {
		t.Fatal(err)
	}
	if total := written[0] + written[1] + written[2]; n != (batches+1)*rows/2 || n != total {
		t.Errorf("%d rows, of which %d count as written; want %d", n, total, (batches+1)*rows/2)
	}
}

func TestTheNewestRowOfAKeyStays(t *testing.T) {
	t.Parallel()
	for _, newer := range []string{"text", "integer", "numeric", "double precision", "timestamptz"} {
		t.Run(newer, func(t *testing.T) {
			t.Parallel()
			s, _ := meteredTable(t, postgres.NewDatabase(t), "{name: v, path: v, type: text}", "{name: v, path: v, type: text}\n  - {name: at, path: at, type: "+newer+", required: true}",
				"create: IfMissing", "create: IfMissing, conflict: {action: UpdateIfNewer, newer: at}")
			at := func(row string, n int64) *pipeline.Item {
				b := batch(row)
				v := pipeline.Value{N: n, Valid: true}
				switch newer {
				case "text", "numeric":
					v = pipeline.Value{S: fmt.Sprint(n), Valid: true}
				case "double precision":
					v = pipeline.Value{N: int64(math.Float64bits(float64(n))), Valid: true}
				}
				b.Items[0].Row = append(b.Items[0].Row, v)
				return b.Items[0]
			}
			wantOutcomes := func(want string, items ...*pipeline.Item) {
				t.Helper()
				os, err := s.Write(t.Context(), &pipeline.Batch{Items: items})
				if err != nil {
					t.Fatal(err)
				}
				got := ""
				for _, o := range os {
					got += o.Result.String()[:1]
				}
				if got != want {
					t.Errorf("outcomes %s, want %s", got, want)
				}
			}
			wantOutcomes("dwdw", at("a/1=old", 3), at("a/1=new", 5), at("a/1=same", 5), at("b/1=x", 1))
			want(t, s, "a/1=new b/1=x")
			wantOutcomes("ddw", at("a/1=older", 4), at("a/1=equal", 5), at("b/1=y", 2))
			want(t, s, "a/1=new b/1=y")
			wantOutcomes("w", at("a/1=newest", 6))
			want(t, s, "a/1=newest b/1=y")
		})
	}
}

// Two orders of the same rows end in the same table: a late record never replaces a newer one.
func TestUpdateIfNewerDoesNotDependOnOrder(t *testing.T) {
	t.Parallel()
	s, _ := meteredTable(t, postgres.NewDatabase(t), "{name: v, path: v, type: text}", "{name: v, path: v, type: text, required: true}",
		"create: IfMissing", "create: IfMissing, conflict: {action: UpdateIfNewer, newer: v}")
	random := rand.New(rand.NewPCG(3, 4))
	for range 20 {
		var rows []string
		for _, n := range random.Perm(100) {
			rows = append(rows, fmt.Sprintf("k/%d=%03d", n%10, n))
		}
		if _, err := s.Write(t.Context(), batch(rows[:37]...)); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Write(t.Context(), batch(rows[37:]...)); err != nil {
			t.Fatal(err)
		}
	}
	want(t, s, "k/0=090 k/1=091 k/2=092 k/3=093 k/4=094 k/5=095 k/6=096 k/7=097 k/8=098 k/9=099")
}

func TestDuplicatesWithOtherContentAreDetected(t *testing.T) {
	t.Parallel()
	s, _ := meteredTable(t, postgres.NewDatabase(t), "create: IfMissing", "create: IfMissing, conflict: {detectMismatch: true}")
	// In the batch itself, and against rows that are there; null against a value too.
	if got := mismatches(t, s, "a/1=x", "a/1=x", "a/1=y", "b/1", "c/1=x"); got != "a/1=y" {
		t.Errorf("in a batch: %q", got)
	}
	if got := mismatches(t, s, "a/1=x", "a/1=z", "b/1", "b/1=v", "c/1", "d/1=new"); got != "a/1=z b/1=v c/1" {
		t.Errorf("against rows: %q", got)
	}
	want(t, s, "a/1=x b/1=null c/1=x d/1=new")
}

// mismatches writes rows and returns those that were reported as duplicates with other content.
func mismatches(t *testing.T, s testedSink, rows ...string) string {
	t.Helper()
	os, err := s.Write(t.Context(), batch(rows...))
	if err != nil {
		t.Fatal(err)
	}
	found := ""
	for i, o := range os {
		if o.Mismatch {
			found += rows[i] + " "
		}
	}
	return strings.TrimSpace(found)
}

// A row that one branch of a fan-out has with other content is reported, also when it is new for another branch.
func TestFanOutReportsDuplicatesWithOtherContent(t *testing.T) {
	t.Parallel()
	s := openTable(t, "", "type: text}\nsink", "type: text, required: true}\nsink", "{table: {name: suite, key: [k, n], create: IfMissing}}", `{fanOut: [
		{name: one, table: {name: suite, key: [k, n], create: IfMissing, conflict: {detectMismatch: true}}},
		{name: all, table: {name: everything, key: [k, n, v], create: IfMissing}}]}`)
	if got := mismatches(t, s, "a/1=x", "b/1=x"); got != "" {
		t.Errorf("of new rows: %q", got)
	}
	if got := mismatches(t, s, "a/1=x", "a/1=y", "b/1=z", "c/1=x"); got != "a/1=y b/1=z" {
		t.Errorf("of rows that are there: %q", got)
	}
	want(t, s, "a/1=x b/1=x c/1=x")
}

// With the ledger an entry is written once, whatever the row: without a key, and after its row has gone. I3.
func TestLedgerWritesAnEntryOnce(t *testing.T) {
	t.Parallel()
	s, _ := meteredTable(t, postgres.NewDatabase(t), "key: [k, n], create: IfMissing", "create: IfMissing, idempotency: Ledger")
	write(t, s, "a/1=x w", "a/1=x d", "b/1=y w") // the id is the text, so the second is the same entry
	write(t, s, "a/1=x d", "a/1=z w")
	want(t, s, "a/1=x a/1=z b/1=y")
	// An id that comes again with other fields is another entry, from a Redis that lost its data.
	b := batch("a/1=x")
	b.Items[0].Fields = append(b.Items[0].Fields, redisstream.Field{Field: "payload", Value: "other"})
	if os, err := s.Write(t.Context(), b); err != nil || os[0].Result != pipeline.Written {
		t.Errorf("%v, %v", os, err)
	}
	// A batch that fails leaves nothing in the ledger.
	if _, err := s.pool.Exec(t.Context(), "alter table suite add constraint no_refused check (k <> 'refused')"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Write(t.Context(), batch("c/1=x", "refused/1=x")); err == nil {
		t.Fatal("a row at fault was written")
	}
	write(t, s, "c/1=x w")
	want(t, s, "a/1=x a/1=x a/1=z b/1=y c/1=x")
}

// An old entry that comes again does not undo a newer one, as it would with Update alone.
func TestLedgerKeepsARedeliveryFromUpdating(t *testing.T) {
	t.Parallel()
	s, _ := meteredTable(t, postgres.NewDatabase(t), "create: IfMissing", "create: IfMissing, idempotency: Ledger, conflict: {action: Update}")
	write(t, s, "a/1=old w")
	write(t, s, "a/1=new w")
	write(t, s, "a/1=newest w", "a/1=old d")
	want(t, s, "a/1=newest")
}

func TestConcurrentRedeliveriesAreWrittenOnceWithALedger(t *testing.T) {
	t.Parallel()
	dsn := postgres.NewDatabase(t)
	const processors, batches, rows = 3, 20, 100
	var wg sync.WaitGroup
	for p := range processors {
		s, _ := meteredTable(t, dsn, "key: [k, n], create: IfMissing", "create: IfMissing, idempotency: Ledger")
		wg.Go(func() {
			random := rand.New(rand.NewPCG(5, uint64(p)))
			for b := range batches {
				var items []string
				for _, n := range random.Perm(rows) {
					items = append(items, fmt.Sprintf("k/%d=v", b*rows+n))
				}
				if _, err := s.Write(t.Context(), batch(items...)); err != nil {
					t.Errorf("processor %d: %v", p, err)
					return
				}
			}
		})
	}
	wg.Wait()
	s, _ := meteredTable(t, dsn, "key: [k, n], create: IfMissing", "create: IfMissing, idempotency: Ledger")
	var total, distinct int
	if err := s.pool.QueryRow(t.Context(), "select count(*), count(distinct (k, n)) from suite").Scan(&total, &distinct); err != nil {
		t.Fatal(err)
	}
	if total != batches*rows || distinct != total {
		t.Errorf("%d rows, %d distinct, want %d", total, distinct, batches*rows)
	}
}

type settledAt map[string]time.Time

func (s settledAt) SettledBefore(context.Context) (map[string]time.Time, error) { return s, nil }

// The ledger forgets what cannot come again: what is older than everything pending, and was not written just now.
func TestLedgerIsPruned(t *testing.T) {
	t.Parallel()
	s, _ := meteredTable(t, postgres.NewDatabase(t), "create: IfMissing", "create: IfMissing, idempotency: Ledger")
	at := func(row string, millis int64) *pipeline.Batch {
		b := batch(row)
		b.Items[0].Created = time.UnixMilli(millis)
		return b
	}
	for i, row := range []string{"a/1=x", "b/1=x", "c/1=x", "d/1=x"} {
		if _, err := s.Write(t.Context(), at(row, int64(1000*i))); err != nil {
			t.Fatal(err)
		}
	}
	// All but a and d were written an hour ago; everything before 2,000 ms is settled.
	if _, err := s.pool.Exec(t.Context(), "update millrace_ledger set written_at = now() - interval '1 hour' where entry_id not in ('a/1=x', 'd/1=x')"); err != nil {
		t.Fatal(err)
	}
	if err := s.Sink.(pipeline.Upkeeper).Upkeep(t.Context(), settledAt{"s": time.UnixMilli(2000), "other": time.Now()}); err != nil {
		t.Fatal(err)
	}
	var left string
	if err := s.pool.QueryRow(t.Context(), "select string_agg(entry_id, ' ' order by entry_id) from millrace_ledger").Scan(&left); err != nil {
		t.Fatal(err)
	}
	if left != "a/1=x c/1=x d/1=x" {
		t.Errorf("left are %s", left)
	}
}

// A column that changes its type under a processor is not filled with the bytes of the old one: the rows are inserted, and
// keep their values. A bigint and a double precision have the same size, so COPY would not notice.
func TestTableSinkDoesNotCopyIntoAnotherType(t *testing.T) {
	t.Parallel()
	for _, change := range []string{"bigint", "double precision", "numeric"} {
		t.Run("from bigint to "+change, func(t *testing.T) {
			t.Parallel()
			s := openTable(t, "", "{name: n, path: n, type: integer, required: true}", "{name: n, path: n, type: bigint, required: true}")
			var rows []string
			total := 0
			more := func() {
				rows = rows[:0]
				for range 200 {
					total++
					rows = append(rows, fmt.Sprintf("k/%d=v", total))
				}
				_, err := s.Write(t.Context(), batch(rows...))
				if err != nil && pipeline.Classify(err) == pipeline.ClassTransient {
					_, err = s.Write(t.Context(), batch(rows...)) // prepared for the old type; by now forgotten
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			more()
			if _, err := s.pool.Exec(t.Context(), "alter table suite alter column n type "+change); err != nil {
				t.Fatal(err)
			}
			more()
			more()
			var sum, count int
			if err := s.pool.QueryRow(t.Context(), "select sum(n)::bigint, count(*) from suite").Scan(&sum, &count); err != nil {
				t.Fatal(err)
			}
			if count != total || sum != total*(total+1)/2 {
				t.Errorf("%d rows with the sum %d, want %d with %d", count, sum, total, total*(total+1)/2)
			}
		})
	}
}
