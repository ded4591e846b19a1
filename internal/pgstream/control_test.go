package pgstream_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// What tests need to steer a database by hand: its clock, its transactions, and the sight of who waits for whom.

// stopClock makes the engine's clock stand still in this database until jump moves it, so that every lease ends when the test says so.
func (e *engine) stopClock() {
	e.t.Helper()
	if one[bool](e, `select to_regclass('public.test_clock') is not null`) {
		return // a function that is replaced again makes every session plan everything again
	}
	e.run(`create table public.test_clock (now timestamptz primary key)`)
	e.run(`insert into public.test_clock values (clock_timestamp())`)
	e.run(`create or replace function millrace_engine.clock() returns timestamptz language sql volatile parallel safe
		as 'select now from public.test_clock'`)
}

// jump moves the engine's clock of this database. The clock stands still from then on.
func (e *engine) jump(d time.Duration) {
	e.t.Helper()
	e.stopClock()
	e.run(`update public.test_clock set now = now + $1::float8 * interval '1 second'`, d.Seconds())
}

// mutate replaces text in a function of this database, to see a checker fail when a mechanism is missing. The text must be there, or
// the test would prove nothing.
func (e *engine) mutate(function, old, replacement string) {
	e.t.Helper()
	def := one[string](e, `select pg_get_functiondef(p.oid) from pg_proc p where p.oid::regproc::text = $1`, function)
	if !strings.Contains(def, old) {
		e.t.Fatalf("function %s has no text %q; change this test with it:\n%s", function, old, def)
	}
	e.run(strings.ReplaceAll(def, old, replacement))
}

// begin opens a transaction on a connection of its own. It is rolled back with the test.
func (e *engine) begin() pgx.Tx {
	e.t.Helper()
	return e.beginAs(pgx.TxOptions{})
}

func (e *engine) beginAs(options pgx.TxOptions) pgx.Tx {
	e.t.Helper()
	tx, err := e.connect().BeginTx(e.ctx, options)
	if err != nil {
		e.t.Fatal(err)
	}
	return tx
}

// exec runs SQL that must succeed.
func exec(e *engine, db pgstream.DB, sql string, args ...any) {
	e.t.Helper()
	if _, err := db.Exec(e.ctx, sql, args...); err != nil {
		e.t.Fatalf("%s: %v", sql, err)
	}
}

func commit(e *engine, tx pgx.Tx) {
	e.t.Helper()
	if err := tx.Commit(e.ctx); err != nil {
		e.t.Fatalf("commit: %v", err)
	}
}

func rollback(e *engine, tx pgx.Tx) {
	e.t.Helper()
	if err := tx.Rollback(e.ctx); err != nil {
		e.t.Fatalf("rollback: %v", err)
	}
}

// publishIn publishes one message inside tx and returns its position.
func publishIn(e *engine, db pgstream.DB, stream string) int64 {
	e.t.Helper()
	position, err := pgstream.Publish(e.ctx, db, stream, pgstream.NewMessage{Payload: []byte(`{}`)})
	if err != nil {
		e.t.Fatal(err)
	}
	return position
}

// patience is how long tests wait for what must come. It is long because test machines can be busy.
const patience = time.Minute

// eventually polls a condition until it holds.
func (e *engine) eventually(what string, holds func() bool) {
	e.t.Helper()
	deadline := time.Now().Add(patience)
	for !holds() {
		if time.Now().After(deadline) {
			e.t.Fatalf("gave up waiting until %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// waitsForLock waits until the backend stands at a lock.
func (e *engine) waitsForLock(pid uint32) {
	e.t.Helper()
	e.eventually(fmt.Sprintf("backend %d waits for a lock", pid), func() bool {
		return one[bool](e, `select exists (select from pg_stat_activity where pid = $1 and wait_event_type = 'Lock')`, pid)
	})
}

// blocked runs what has to wait for a lock, in the session with that pid, and returns when it does. How it ended can be received.
func (e *engine) blocked(pid uint32, f func() error) <-chan error {
	e.t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	e.waitsForLock(pid)
	return done
}

// waits is blocked for SQL.
func (e *engine) waits(conn *pgx.Conn, sql string, args ...any) <-chan error {
	e.t.Helper()
	return e.blocked(conn.PgConn().PID(), func() error {
		_, err := conn.Exec(e.ctx, sql, args...)
		return err
	})
}

// pass is what a function that a test has wrapped does to stand at the gate.
const pass = "perform pg_advisory_xact_lock(42, 42)"

// gate keeps whoever wants to pass until the test opens it. reached waits until somebody stands there.
func (e *engine) gate() (reached, open func()) {
	e.t.Helper()
	tx := e.begin()
	_, err := tx.Exec(e.ctx, "select pg_advisory_xact_lock(42, 42)")
	must(e.t, err)
	return func() {
			e.eventually("somebody stands at the gate", func() bool {
				return one[bool](e, `select exists (select from pg_locks where locktype = 'advisory' and classid = 42 and not granted
					and database = (select oid from pg_database where datname = current_database()))`)
			})
		}, func() {
			commit(e, tx)
		}
}

func pid(tx pgx.Tx) uint32 { return tx.Conn().PgConn().PID() }

// receive returns the next claim, nil when there is none.
func receive(e *engine, c *pgstream.Consumer) *pgstream.Claim {
	e.t.Helper()
	claim, err := c.TryReceive(e.ctx)
	if err != nil {
		e.t.Fatal(err)
	}
	return claim
}

// mustReceive fails the test when there is nothing to receive.
func mustReceive(e *engine, c *pgstream.Consumer) *pgstream.Claim {
	e.t.Helper()
	claim := receive(e, c)
	if claim == nil {
		e.t.Fatal("there was nothing to receive")
	}
	return claim
}

// mustBeFenced fails the test unless err says that the claim has ended.
func mustBeFenced(t testing.TB, what string, err error) {
	t.Helper()
	if !errors.Is(err, pgstream.ErrFenced) {
		t.Errorf("%s: %v; want ErrFenced", what, err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func positions(claim *pgstream.Claim) []int64 {
	if claim == nil {
		return nil
	}
	var all []int64
	for _, m := range claim.Messages {
		all = append(all, m.Position)
	}
	return all
}

// same fails the test unless got is want, in order.
func same[T comparable](t testing.TB, what string, got, want []T) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: got %v, want %v", what, got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("%s: got %v, want %v", what, got, want)
		}
	}
}

func sqlState(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code
	}
	return ""
}

func hint(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Hint
	}
	return ""
}

func (e *engine) stats(stream, group string) pgstream.GroupStats {
	e.t.Helper()
	all, err := pgstream.Stats(e.ctx, e.Pool)
	must(e.t, err)
	for _, s := range all {
		if s.Stream == stream && s.Group == group {
			return s
		}
	}
	e.t.Fatalf("no statistics of group %s of stream %s", group, stream)
	return pgstream.GroupStats{}
}

// random returns a generator whose seed is printed when the test fails, and can be given by MILLRACE_SEED.
func random(t testing.TB) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("MILLRACE_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("MILLRACE_SEED=%q is not a number", s)
		}
		seed = n
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("repeat with: MILLRACE_SEED=%d go test ./internal/pgstream -run '^%s$'", seed, t.Name())
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

// soak is how long random tests run: short, or as MILLRACE_SOAK says.
func soak(t testing.TB, short time.Duration) time.Duration {
	t.Helper()
	s := os.Getenv("MILLRACE_SOAK")
	if s == "" {
		return short
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatalf("MILLRACE_SOAK=%q: %v", s, err)
	}
	return d
}

// extendDeadline gives the test as much time as a soak needs, which may take longer to consume what it has published than to publish it.
func (e *engine) extendDeadline(d time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*d+5*time.Minute)
	e.t.Cleanup(cancel)
	e.ctx = ctx
}

func sorted(all []int64) []int64 {
	slices.Sort(all)
	return all
}

// newRand gives a goroutine a generator of its own.
func newRand(r *rand.Rand) *rand.Rand { return rand.New(rand.NewPCG(r.Uint64(), r.Uint64())) }
