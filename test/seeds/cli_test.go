package seeds

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// millrace is the program, built as a user builds it, once for all tests.
var millrace = sync.OnceValues(func() (string, error) {
	path, err := filepath.Abs(filepath.Join("..", "..", "bin", "test", "millrace"))
	if err != nil {
		return "", err
	}
	out, err := exec.CommandContext(context.Background(), "go", "build", "-o", path, "../../cmd/millrace").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build the program: %w\n%s", err, out)
	}
	return path, nil
})

// shell runs the program against a database.
type shell struct {
	t            *testing.T
	ctx          context.Context
	program, dsn string
	conn         *pgx.Conn
}

func newShell(t *testing.T) *shell {
	t.Helper()
	program, err := millrace()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	s := &shell{t: t, ctx: ctx, program: program, dsn: postgres.NewDatabase(t)}
	if s.conn, err = pgx.Connect(ctx, s.dsn); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.conn.Close(context.Background()) })
	return s
}

// says runs the program, and compares its exit code and a part of what it says.
func (s *shell) says(code int, part string, args ...string) string {
	s.t.Helper()
	cmd := exec.CommandContext(s.ctx, s.program, args...)
	cmd.Env = append(os.Environ(), "MILLRACE_DATABASE_URL="+s.dsn)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatal(err)
	}
	if got := cmd.ProcessState.ExitCode(); got != code || !strings.Contains(string(out), part) {
		s.t.Errorf("millrace %s: exit code %d, want %d and %q\n%.2000s", strings.Join(args, " "), got, code, part, out)
	}
	return string(out)
}

// version is that of the schema; 0: there is none.
func (s *shell) version() int {
	s.t.Helper()
	state, err := schema.Compare(s.ctx, s.conn, schema.Options{})
	if err != nil {
		s.t.Fatal(err)
	}
	return state.Version
}

func (s *shell) run(sql string) {
	s.t.Helper()
	if _, err := s.conn.Exec(s.ctx, sql); err != nil {
		s.t.Fatalf("%s: %v", sql, err)
	}
}

// Migration policies: none, create if it is missing, and force, which arvo does without a question: here it is guarded.
func TestSeed_A12_MigrationPolicies(t *testing.T) {
	t.Parallel()
	s := newShell(t)
	s.says(3, "there is no Millrace schema", "migrate", "run", "--policy", "none")
	if v := s.version(); v != 0 {
		t.Errorf("none has made version %d", v)
	}
	s.says(0, "now", "migrate", "run", "--policy", "create")
	s.run("select millrace.create_stream('orders'), millrace.publish('orders', '{}')")
	s.run("update millrace_engine.schema_version set functions = 'of another build'")
	s.says(0, "it is left as it is", "migrate", "run", "--policy", "create")
	s.says(3, "not this program's", "migrate", "run", "--policy", "none")
	s.says(0, "now", "migrate", "run")
	s.says(0, "already", "migrate", "run", "--policy", "none")

	s.says(1, "nothing was dropped", "migrate", "run", "--policy", "recreate")
	s.says(1, "nothing was dropped", "migrate", "run", "--policy", "recreate", "--confirm", "another")
	s.says(0, `"position":1`, "tail", "orders", "--from", "earliest", "--no-follow", "-o", "json")
	s.says(0, "everything was dropped", "migrate", "run", "--policy", "recreate", "--confirm", s.conn.Config().Database)
	s.says(1, "There are no streams", "tail", "orders")
	if v := s.version(); v != schema.Version() {
		t.Errorf("the schema has version %d", v)
	}
}

// The command line runs migrations and prints their SQL, which makes the same database; emmett's commands are stubs.
func TestSeed_E09_MigrationsFromTheCommandLine(t *testing.T) {
	t.Parallel()
	printed, migrated := newShell(t), newShell(t)
	printed.run(printed.says(0, "create table millrace_engine.stream", "migrate", "sql"))
	printed.says(0, "already", "migrate", "run", "--policy", "none")

	dry := migrated.says(0, "create table millrace_engine.stream", "migrate", "run", "--dry-run")
	if v := migrated.version(); v != 0 {
		t.Errorf("a dry run has made version %d", v)
	}
	migrated.says(0, "now", "migrate", "run")
	migrated.says(0, "would run nothing", "migrate", "run", "--dry-run")
	dried := newShell(t)
	dried.run(dry)
	dried.says(0, "already", "migrate", "run", "--policy", "none")

	// An older database gets what it lacks, and keeps what it has.
	for _, byHand := range []bool{false, true} {
		s := newShell(t)
		old, err := os.ReadFile("../../internal/pgstream/schema/testdata/v1.sql")
		if err != nil {
			t.Fatal(err)
		}
		s.run(string(old))
		s.run("select millrace.create_stream('orders'); select millrace.publish('orders', '{}')")
		s.says(3, "the schema has version 1, and lacks 0002_ledger_ring, ", "migrate", "run", "--policy", "none")
		if byHand {
			s.run(s.says(0, "begin;", "migrate", "run", "--dry-run"))
		} else {
			s.says(0, "now", "migrate", "run", "--policy", "create-or-update")
		}
		s.says(0, "already", "migrate", "run", "--policy", "none")
		s.says(0, `"position":1`, "tail", "orders", "--from", "earliest", "--no-follow", "-o", "json")
	}
}
