// Package docs runs what the documentation shows, so that it cannot go stale.
package docs

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/cli"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		os.Exit(cli.Run("test"))
	}
	code := postgres.Main(m, postgres.Options{})
	if err := stopKubernetes(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// TestEverySQLBlockRuns runs the blocks of each document in order, on a database of its own. A row's columns become variables for
// the blocks after it, as \gset does in psql: :'claim' is the quoted value, :position the bare one.
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
				for statement := range strings.SplitSeq(strings.ReplaceAll(block[1], " \\gset\n", ";\n"), ";\n") {
					run(ctx, t, conn, substitute(statement, variables), variables)
				}
			}
		})
	}
	if ran == 0 {
		t.Fatal("found no SQL in the documentation")
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

func substitute(statement string, variables map[string]string) string {
	for name, value := range variables {
		statement = strings.ReplaceAll(statement, ":'"+name+"'", "'"+strings.ReplaceAll(value, "'", "''")+"'")
		statement = regexp.MustCompile(`([^:]):`+name+`\b`).ReplaceAllString(statement, "${1}"+value)
	}
	return statement
}

func run(ctx context.Context, t *testing.T, conn *pgx.Conn, statement string, variables map[string]string) {
	t.Helper()
	results, err := conn.PgConn().Exec(ctx, statement).ReadAll()
	if err != nil {
		t.Fatalf("%s\n%v", statement, err)
	}
	for _, result := range results {
		if len(result.Rows) == 0 {
			if strings.Contains(statement, "millrace.receive(") {
				t.Errorf("the document shows a receive that brings nothing:\n%s", statement)
			}
			continue
		}
		for i, field := range result.FieldDescriptions {
			variables[field.Name] = string(result.Rows[0][i])
		}
	}
}
