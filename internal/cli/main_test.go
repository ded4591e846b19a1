package cli_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/cli"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// The tests run the program as a process: this very binary, which is the program when it is told so. What the Makefile builds is run by test/seeds.
const asProgram = "MILLRACE_TEST_CLI"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		os.Exit(cli.Run("test"))
	}
	code := postgres.Main(m, postgres.Options{})
	if err := stopKubernetes(); err != nil {
		code = 1
	}
	os.Exit(code)
}

// world is a database of one test's own, and the program in front of it.
type world struct {
	*pgxpool.Pool
	t   *testing.T
	ctx context.Context
	dsn string
	dir string // holds the program by its names
	env []string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := worldOn(t, postgres.NewClone(t, schema.SQL(), func(ctx context.Context, dsn string) error {
		conn, err := pgx.Connect(ctx, dsn)
		if err != nil {
			return err
		}
		_, err = schema.Migrate(ctx, conn, schema.Options{})
		return errors.Join(err, conn.Close(ctx))
	}))
	return w
}

// worldOn is a world without a schema of Millrace.
func worldOn(t *testing.T, dsn string) *world {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	pool, err := pgxpool.New(ctx, dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	w := &world{Pool: pool, t: t, ctx: ctx, dsn: dsn, dir: t.TempDir(),
		env: append(os.Environ(), asProgram+"=1", "MILLRACE_DATABASE_URL="+dsn, "TZ=UTC", "KUBECONFIG=/dev/null")}
	for _, name := range []string{"millrace", "kubectl-millrace"} {
		if err := os.Symlink(os.Args[0], filepath.Join(w.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// run executes SQL that must succeed.
func (w *world) run(sql string, args ...any) {
	w.t.Helper()
	if _, err := w.Exec(w.ctx, sql, args...); err != nil {
		w.t.Fatalf("%s: %v", sql, err)
	}
}

// one returns the single value of a query.
func one[T any](w *world, sql string, args ...any) T {
	w.t.Helper()
	var v T
	if err := w.QueryRow(w.ctx, sql, args...).Scan(&v); err != nil {
		w.t.Fatalf("%s: %v", sql, err)
	}
	return v
}

// result is what a finished program leaves.
type result struct {
	out, err string
	code     int
}

func (w *world) command(in io.Reader, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(w.ctx, filepath.Join(w.dir, "millrace"), args...)
	cmd.Env, cmd.Stdin = w.env, in
	return cmd
}

// millrace runs the program to its end.
func (w *world) millrace(args ...string) result { return w.piped("", args...) }

// piped is millrace with a standard input.
func (w *world) piped(in string, args ...string) result {
	w.t.Helper()
	cmd := w.command(strings.NewReader(in), args...)
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		w.t.Fatalf("millrace %s: %v", strings.Join(args, " "), err)
	}
	return result{out.String(), problems.String(), cmd.ProcessState.ExitCode()}
}

// ok is millrace that must succeed; it returns its output.
func (w *world) ok(args ...string) string {
	w.t.Helper()
	r := w.millrace(args...)
	if r.code != 0 {
		w.t.Fatalf("millrace %s: exit code %d\n%s%s", strings.Join(args, " "), r.code, r.out, r.err)
	}
	return r.out
}

// want compares exit code and output; in the output … stands for anything in a line.
func (w *world) want(code int, out string, args ...string) {
	w.t.Helper()
	w.wantPiped("", code, out, args...)
}

func (w *world) wantPiped(in string, code int, out string, args ...string) {
	w.t.Helper()
	r := w.piped(in, args...)
	if r.code != code || !like(r.out+r.err, out) {
		w.t.Errorf("millrace %s: exit code %d, want %d\n%s%swant\n%s", strings.Join(args, " "), r.code, code, r.out, r.err, out)
	}
}

// like compares texts; … in the pattern stands for anything within a line.
func like(text, pattern string) bool {
	lines, patterns := strings.Split(strings.TrimSpace(text), "\n"), strings.Split(strings.TrimSpace(pattern), "\n")
	if len(lines) != len(patterns) {
		return false
	}
	for i, line := range lines {
		pattern := strings.ReplaceAll(regexp.QuoteMeta(strings.TrimRight(patterns[i], " ")), "…", ".*")
		if !regexp.MustCompile("^" + pattern + "$").MatchString(strings.TrimRight(line, " ")) {
			return false
		}
	}
	return true
}

// decode reads the objects that -o json has printed.
func decode[T any](t *testing.T, text string) []T {
	t.Helper()
	var all []T
	d := json.NewDecoder(strings.NewReader(text))
	for {
		var v T
		if err := d.Decode(&v); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		all = append(all, v)
	}
}

// running is a program that has not ended.
type running struct {
	t     *testing.T
	cmd   *exec.Cmd
	lines *bufio.Scanner // of its standard output
	err   bytes.Buffer
}

func (w *world) start(in io.Reader, args ...string) *running {
	w.t.Helper()
	r := &running{t: w.t, cmd: w.command(in, args...)}
	r.cmd.Stderr = &r.err
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	r.lines = bufio.NewScanner(out)
	if err := r.cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = r.cmd.Process.Kill() })
	return r
}

// line waits for the next line of output.
func (r *running) line() string {
	r.t.Helper()
	if !r.lines.Scan() {
		r.t.Fatalf("it printed no further line: %v\n%s", r.lines.Err(), r.err.String())
	}
	return r.lines.Text()
}

// interrupt sends SIGINT and returns the exit code.
func (r *running) interrupt() int {
	r.t.Helper()
	if err := r.cmd.Process.Signal(syscall.SIGINT); err != nil {
		r.t.Fatal(err)
	}
	return r.wait()
}

func (r *running) wait() int {
	r.t.Helper()
	for r.lines.Scan() {
		continue // so that it can write on
	}
	_ = r.cmd.Wait() // its code is looked at
	return r.cmd.ProcessState.ExitCode()
}

// eventually repeats what is not true yet.
func (w *world) eventually(what string, true func() bool) {
	w.t.Helper()
	for !true() {
		select {
		case <-w.ctx.Done():
			w.t.Fatal("it never came: " + what)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
