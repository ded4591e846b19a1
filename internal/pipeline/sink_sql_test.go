package pipeline_test

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// openSQL opens a sink with a statement in a database where a script was run before.
func openSQL(t *testing.T, script, statement string) (pipeline.Sink, *pgxpool.Pool, error) {
	t.Helper()
	return openScripted(t, script, "{sql: {statement: select from batch}}", func(s *config.Sink) { s.SQL.Statement = statement })
}

// openScripted opens a sink in a database where a script was run before.
func openScripted(t *testing.T, script, text string, change func(*config.Sink)) (pipeline.Sink, *pgxpool.Pool, error) {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), postgres.NewDatabase(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	if _, err := pool.Exec(t.Context(), script); err != nil {
		t.Fatal(err)
	}
	c, err := config.Parse([]byte(strings.ReplaceAll(suiteConfig, "{table: {name: suite, key: [k, n], create: IfMissing}}", text)))
	if err != nil {
		t.Fatal(err)
	}
	change(&c.Sink)
	sink, err := pipeline.NewSink(t.Context(), pipeline.SinkOptions{Config: c, Pool: pool, Metrics: pipeline.NewMetrics()})
	return sink, pool, err
}

func TestSQLSinkReadsTheBatch(t *testing.T) {
	t.Parallel()
	const totals = "create table totals (k text primary key, n bigint, v text[] check (k <> 'refused'))"
	const upsert = "insert into totals as t select k, sum(n), array_agg(v) from batch group by k on conflict (k) do update set n = t.n + excluded.n, v = t.v || excluded.v"
	for name, statement := range map[string]string{
		"alone":                          upsert,
		"after comments":                 "-- one line\n/* two /* nested */ */ " + upsert + ";",
		"beside another with":            "With big as (select * from batch where n > 0) " + strings.ReplaceAll(upsert, "from batch", "from big"),
		"beside a with that is material": "WITH/* */big as materialized (select * from batch) " + strings.ReplaceAll(upsert, "from batch", "from big"),
		"beside a recursive with": "with recursive steps(i) as (select 1 union all select i + 1 from steps where i < 1) " +
			strings.ReplaceAll(upsert, "from batch", "from batch cross join steps"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sink, pool, err := openSQL(t, totals, statement)
			if err != nil {
				t.Fatal(err)
			}
			for _, b := range []*pipeline.Batch{batch("a/1=x", "b/2=y", "a/3"), batch("a/10=z", "c/1=x")} {
				os, err := sink.Write(t.Context(), b)
				if err != nil {
					t.Fatal(err)
				}
				for i, o := range os {
					if o.Result != pipeline.Written {
						t.Errorf("item %d: %s", i, o.Result)
					}
				}
			}
			_, err = sink.Write(t.Context(), batch("a/1=x", "refused/1=y"))
			if pipeline.Classify(err) != pipeline.ClassRow {
				t.Errorf("a refused row: %v", err)
			}
			var got string
			if err := pool.QueryRow(t.Context(), "select string_agg(concat(k, '=', n, v), ' ' order by k) from totals").Scan(&got); err != nil {
				t.Fatal(err)
			}
			if got != "a=14{x,NULL,z} b=2{y} c=1{x}" {
				t.Error(got)
			}
		})
	}
}

// A statement that the database does not take ends the start, with the reason.
func TestSQLSinkRefusesStatements(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct{ statement, reason string }{
		"a table that is not there":    {"insert into nowhere select k from batch", `relation "nowhere" does not exist`},
		"a column that is not mapped":  {"insert into t select missing from batch", `column "missing" does not exist`},
		"a type that does not fit":     {"insert into t (at) select n from batch; ", `is of type date but expression is of type integer`},
		"a conflict without a key":     {"insert into t select k from batch on conflict (k) do nothing", "no unique or exclusion constraint"},
		"two statements":               {"insert into t select k from batch; delete from t", "cannot insert multiple commands"},
		"something that reads nothing": {"truncate t /* batch */", "syntax error"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, _, err := openSQL(t, "create table t (k text, at date)", tc.statement)
			if err == nil || pipeline.Classify(err) != pipeline.ClassConfiguration || !strings.Contains(err.Error(), tc.reason) ||
				!strings.Contains(err.Error(), "sink.sql.statement") {
				t.Errorf("error %v", err)
			}
		})
	}
}

// A table that changes while the statement is prepared is found out, and the same batch succeeds. So it is in a branch of a
// fan-out, whichever it is.
func TestSQLSinkSurvivesAChangeOfItsTable(t *testing.T) {
	const insert = "insert into t select k from batch returning *"
	t.Run("alone", func(t *testing.T) {
		t.Parallel()
		sink, pool, err := openSQL(t, "create table t (k text)", insert)
		if err != nil {
			t.Fatal(err)
		}
		survivesAChange(t, sink, pool)
	})
	t.Run("in the second branch of a fan-out", func(t *testing.T) {
		t.Parallel()
		sink, pool, err := openScripted(t, "create table t (k text); create table other (k text)", `{fanOut: [
			{name: one, sql: {statement: insert into other select k from batch}}, {name: two, sql: {statement: `+insert+`}}]}`, func(*config.Sink) {})
		if err != nil {
			t.Fatal(err)
		}
		survivesAChange(t, sink, pool)
	})
}

func survivesAChange(t *testing.T, sink pipeline.Sink, pool *pgxpool.Pool) {
	t.Helper()
	if _, err := sink.Write(t.Context(), batch("a/1=x")); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), "alter table t add column n int"); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() (bool, string) {
		_, err := sink.Write(t.Context(), batch("b/1=x"))
		if err != nil && pipeline.Classify(err) != pipeline.ClassTransient {
			t.Fatal(err)
		}
		return err == nil, "the batch cannot be written"
	})
}
