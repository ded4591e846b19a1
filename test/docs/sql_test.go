// Package docs runs what the documentation shows, so that it cannot go stale.
package docs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/millrace-dev/millrace/internal/cli"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		os.Exit(cli.Run("test"))
	}
	code := postgres.Main(m, postgres.Options{Settings: map[string]string{"max_prepared_transactions": "2"}}) // for what sql-api.md shows
	if err := stopKubernetes(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// TestEverySQLBlockRuns runs the blocks of each document in order, on a database of its own. A row's columns become variables for
// the blocks after it, as \gset does in psql: :'claim' is the quoted value, :position the bare one. What a comment behind a statement says is compared:
//
//	select …;   -- → 1, a; 2, …          returns these rows (no rows: none); … stands for anything
//	select …;   -- MR004: no such thing  fails with that SQLSTATE and message
func TestEverySQLBlockRuns(t *testing.T) {
	t.Parallel()
	ran := 0
	for _, path := range documents(t) {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		blocks := regexp.MustCompile("(?ms)^```sql\n(.*?)^```$").FindAllStringSubmatch(string(text), -1)
		if len(blocks) == 0 || filepath.Base(path) == pipelines || filepath.Base(path) == scaling {
			continue
		}
		ran += len(blocks)
		t.Run(filepath.Base(path), func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			conn, err := pgx.Connect(ctx, postgres.NewDatabase(t))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = conn.Close(context.Background()) })
			if _, err := schema.Migrate(ctx, conn, schema.Options{}); err != nil {
				t.Fatal(err)
			}
			variables := map[string]string{}
			for _, block := range blocks {
				for _, x := range examples(t, block[1]) {
					x.run(ctx, t, conn, variables)
				}
			}
		})
	}
	if ran == 0 {
		t.Fatal("found no SQL in the documentation")
	}
}

// TestWhoIsOnCallNeedsTheApplicationsRoleOnly runs the SQL of the troubleshooting page as the runtime role, but for what makes the examples.
func TestWhoIsOnCallNeedsTheApplicationsRoleOnly(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, postgres.NewDatabase(t))
	must(t, err)
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	var role string
	must(t, conn.QueryRow(ctx, "select 'on_call_' || substr(md5(random()::text), 1, 12)").Scan(&role)) // roles belong to the server
	_, err = conn.Exec(ctx, "create role "+role)
	must(t, err)
	t.Cleanup(func() {
		if _, err := conn.Exec(context.Background(), "reset role; drop owned by "+role+"; drop role "+role); err != nil {
			t.Error(err)
		}
	})
	_, err = schema.Migrate(ctx, conn, schema.Options{RuntimeRole: role})
	must(t, err)
	text, err := os.ReadFile("../../docs/troubleshooting.md")
	must(t, err)
	ran, variables := 0, map[string]string{}
	for _, block := range regexp.MustCompile("(?ms)^```sql\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
		for _, x := range examples(t, block[1]) {
			user := "set role " + role
			if strings.HasPrefix(x.sql, "-- for this example") {
				user = "reset role"
			}
			_, err := conn.Exec(ctx, user)
			must(t, err)
			x.run(ctx, t, conn, variables)
			ran++
		}
	}
	if ran == 0 {
		t.Fatal("the page has no SQL")
	}
}

// documents lists what users read.
func documents(t *testing.T) []string {
	t.Helper()
	paths, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	return append(paths, "../../README.md")
}

// example is a statement of a document.
type example struct {
	sql   string
	rows  string // of a COPY
	gives string // what the document says it returns
	fails string // or with which SQLSTATE and message it fails
}

var (
	lastLine = regexp.MustCompile(`(?:;| \\gset) *(?:-- *(.*))?$`)
	failure  = regexp.MustCompile(`^[A-Z0-9]{5}: `)
)

// examples are the statements of a block. Each ends with its line, so none runs in a transaction together with the next.
func examples(t *testing.T, block string) []example {
	t.Helper()
	var found []example
	var lines []string
	copying, quoted := false, false
	for line := range strings.Lines(block) {
		line = strings.TrimSuffix(line, "\n")
		if copying {
			if copying = line != `\.`; copying {
				found[len(found)-1].rows += line + "\n"
			}
			continue
		}
		if lines = append(lines, line); strings.Count(line, "$$")%2 == 1 {
			quoted = !quoted
		}
		end := lastLine.FindStringSubmatch(line)
		if end == nil || quoted || strings.HasPrefix(line, "--") {
			continue
		}
		x := example{sql: strings.ReplaceAll(strings.Join(lines, "\n"), ` \gset`, ";")}
		if gives, ok := strings.CutPrefix(end[1], "→ "); ok {
			x.gives = gives
		} else if failure.MatchString(end[1]) {
			x.fails = end[1]
		}
		found, lines = append(found, x), nil
		copying = strings.HasPrefix(x.sql, "copy ")
	}
	if rest := strings.TrimSpace(strings.Join(lines, "\n")); rest != "" {
		t.Errorf("no statement ends here:\n%s", rest)
	}
	return found
}

func substitute(statement string, variables map[string]string) string {
	for name, value := range variables {
		statement = strings.ReplaceAll(statement, ":'"+name+"'", "'"+strings.ReplaceAll(value, "'", "''")+"'")
		statement = regexp.MustCompile(`([^:]):`+name+`\b`).ReplaceAllString(statement, "${1}"+value)
	}
	return statement
}

func (x example) run(ctx context.Context, t *testing.T, conn *pgx.Conn, variables map[string]string) {
	t.Helper()
	if x.rows != "" {
		if _, err := conn.PgConn().CopyFrom(ctx, strings.NewReader(x.rows), x.sql); err != nil {
			t.Fatalf("%s\n%v", x.sql, err)
		}
		return
	}
	statement := substitute(x.sql, variables)
	results, err := conn.PgConn().Exec(ctx, statement).ReadAll()
	if x.fails != "" {
		var refused *pgconn.PgError
		if !errors.As(err, &refused) || refused.Code+": "+refused.Message != x.fails {
			t.Errorf("%s\nfails with %v, and the document says %s", statement, err, x.fails)
		}
		return
	}
	if err != nil {
		t.Fatalf("%s\n%v", statement, err)
	}
	for _, result := range results {
		if got := rowsAsText(result.Rows); x.gives != "" && !like(got, x.gives) {
			t.Errorf("%s\ngives %s", statement, got)
		}
		if len(result.Rows) == 0 {
			if x.gives == "" && strings.Contains(statement, "millrace.receive(") {
				t.Errorf("the document shows a receive that brings nothing:\n%s", statement)
			}
			continue
		}
		for i, field := range result.FieldDescriptions {
			variables[field.Name] = string(result.Rows[0][i])
		}
	}
}

// rowsAsText writes rows as comments of the documentation do.
func rowsAsText(rows [][][]byte) string {
	if len(rows) == 0 {
		return "no rows"
	}
	var written []string
	for _, row := range rows {
		var columns []string
		for _, value := range row {
			if value == nil {
				value = []byte("null")
			}
			columns = append(columns, string(value))
		}
		written = append(written, strings.Join(columns, ", "))
	}
	return strings.Join(written, "; ")
}

// TestTheSQLPageListsEveryFunctionAndEveryError compares the two tables at the end of the page with the schema.
func TestTheSQLPageListsEveryFunctionAndEveryError(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/sql-api.md")
	must(t, err)
	errorTable, functionTable, found := strings.Cut(string(page[strings.Index(string(page), "\n## Errors\n"):]), "\n## Functions\n")
	if !found {
		t.Fatal("the page has no functions after its errors")
	}
	conn, err := pgx.Connect(t.Context(), postgres.NewDatabase(t))
	must(t, err)
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	_, err = schema.Migrate(t.Context(), conn, schema.Options{})
	must(t, err)

	listed := map[string]string{}
	for _, f := range regexp.MustCompile("`(?:millrace\\.)?(\\w+)\\(([^`]*)\\)`").FindAllStringSubmatch(functionTable, -1) {
		listed[f[1]] = f[2]
	}
	rows, err := conn.Query(t.Context(), `select p.proname, array(select regexp_replace(x, '^p_', '') from unnest(p.proargnames[:p.pronargs]) x) from pg_proc p
		where p.pronamespace = 'millrace'::regnamespace`)
	must(t, err)
	n := 0
	for ; rows.Next(); n++ {
		var name string
		var parameters []string
		must(t, rows.Scan(&name, &parameters))
		shown, ok := listed[name]
		if !ok {
			t.Errorf("the page does not list %s(%s)", name, strings.Join(parameters, ", "))
			continue
		}
		if strings.HasPrefix(shown, "…") || shown == "" && len(parameters) == 0 {
			continue // as the one before it
		}
		for i, part := range strings.Split(shown, ", ") {
			// Some show the type only: jsonb[].
			if first, _, _ := strings.Cut(part, " "); i >= len(parameters) || first != parameters[i] && !strings.HasSuffix(first, "[]") {
				t.Errorf("the page lists %s(%s); it is %s(%s)", name, shown, name, strings.Join(parameters, ", "))
				break
			}
		}
		if strings.Count(shown, ", ")+1 < len(parameters) {
			t.Errorf("the page lists %s(%s), which has %s, too", name, shown, parameters[strings.Count(shown, ", ")+1])
		}
	}
	must(t, rows.Err())
	if n < 40 {
		t.Errorf("the schema has %d functions", n)
	}

	rows, err = conn.Query(t.Context(), `select distinct m[1] from pg_proc p, regexp_matches(p.prosrc, '''(MR[0-9]{3})''', 'g') m
		where p.pronamespace in ('millrace'::regnamespace, 'millrace_engine'::regnamespace)`)
	must(t, err)
	codes, err := pgx.CollectRows(rows, pgx.RowTo[string])
	must(t, err)
	codes = slices.DeleteFunc(codes, func(code string) bool { return code == "MR000" || code == "MR901" }) // each is caught where it is raised
	for _, code := range codes {
		if !strings.Contains(errorTable, "| `"+code+"` |") {
			t.Errorf("the page does not list error %s", code)
		}
	}
	for _, code := range regexp.MustCompile("\\| `(MR[0-9]{3})` \\|").FindAllStringSubmatch(errorTable, -1) {
		if !slices.Contains(codes, code[1]) {
			t.Errorf("the page lists error %s, which nothing raises", code[1])
		}
	}
}
