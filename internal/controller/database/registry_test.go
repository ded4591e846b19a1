package database

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clocktesting "k8s.io/utils/clock/testing"

	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

func TestMain(m *testing.M) { os.Exit(postgres.Main(m, postgres.Options{})) }

func get(t *testing.T, r *Registry, dsn string) *Database {
	t.Helper()
	d, err := r.Get(dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.close)
	return d
}

func ping(ctx context.Context, db pgstream.DB) error {
	_, err := db.Exec(ctx, "select 1")
	return err
}

// D6: the first call finds the schema in place, however many come at once, and it is brought there once.
func TestFirstUseMigratesOnce(t *testing.T) {
	t.Parallel()
	var migrations atomic.Int32
	r := NewRegistry(Options{Migrated: func(*Database, []int) { migrations.Add(1) }})
	d := get(t, r, postgres.NewDatabase(t))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				err := d.Do(t.Context(), func(ctx context.Context, db pgstream.DB) error {
					_, err := pgstream.Stats(ctx, db)
					return err
				})
				if phase.IsAgain(err) {
					<-time.After(10 * time.Millisecond)
					continue
				}
				if err != nil {
					t.Error(err)
				}
				return
			}
		})
	}
	wg.Wait()
	if n := migrations.Load(); n != 1 {
		t.Errorf("migrated %d times", n)
	}
}

// D3: a call that the server does not answer ends by itself, and the next is refused at once.
func TestACallToAHungDatabaseEnds(t *testing.T) {
	t.Parallel()
	server := postgres.NewServer(t, postgres.Options{})
	const callTimeout = 4 * time.Second
	// A clock that stands still: the breaker stays open, however long the machine does other things.
	r := NewRegistry(Options{CallTimeout: callTimeout, ConnectTimeout: callTimeout, Clock: clocktesting.NewFakePassiveClock(time.Unix(0, 0))})
	d := get(t, r, server.DSN("postgres"))
	if err := d.Do(t.Context(), ping); err != nil {
		t.Fatal(err)
	}
	if err := server.Pause(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Resume(); err != nil {
			t.Error(err)
		}
	})
	start := time.Now()
	if err := d.Do(t.Context(), ping); phase.Reason(err, "") != "DatabaseUnreachable" {
		t.Errorf("%v", err)
	}
	if took := time.Since(start); took > time.Minute {
		t.Errorf("it took %s", took)
	}
	start = time.Now()
	if err := d.Do(t.Context(), ping); phase.Reason(err, "") != "DatabaseUnreachable" {
		t.Errorf("%v", err)
	}
	if took := time.Since(start); took > callTimeout/2 { // a call would have taken all of it
		t.Errorf("an open breaker took %s to say so", took)
	}
}

// Upkeep that takes long must not look like a database that is lost.
func TestLongUpkeepOpensNoBreaker(t *testing.T) {
	t.Parallel()
	r := NewRegistry(Options{CallTimeout: 50 * time.Millisecond, StatementTimeout: time.Minute})
	d := get(t, r, postgres.NewDatabase(t))
	if err := d.do(t.Context(), time.Minute, true, ping); err != nil {
		t.Fatal(err)
	}
	err := d.do(t.Context(), 200*time.Millisecond, true, func(ctx context.Context, db pgstream.DB) error {
		_, err := db.Exec(ctx, "select pg_sleep(30)")
		return err
	})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%v", err)
	}
	if ok, _, _ := d.breaker.admit(); !ok {
		t.Error("the breaker is open")
	}
}

// A pool that nobody asks for is closed; one that is followed stays.
func TestIdlePoolsAreClosed(t *testing.T) {
	t.Parallel()
	clock := clocktesting.NewFakePassiveClock(time.Unix(0, 0))
	r := NewRegistry(Options{Clock: clock, IdleAfter: time.Minute})
	idle, followed := get(t, r, postgres.NewDatabase(t)), get(t, r, postgres.NewDatabase(t))
	for _, d := range []*Database{idle, followed} {
		if err := d.Do(t.Context(), ping); err != nil {
			t.Fatal(err)
		}
	}
	clock.SetTime(time.Unix(50, 0))
	followed.Touch()
	clock.SetTime(time.Unix(70, 0))
	r.evict()
	if len(r.Active()) != 1 || idle.Do(t.Context(), ping) == nil {
		t.Error("the idle pool is open")
	}
	if err := followed.Do(t.Context(), ping); err != nil {
		t.Errorf("the followed one: %v", err)
	}
}

// D3: the server itself ends a statement that takes too long and a wait for a lock, so that nothing of ours is left running there; and such an
// end says nothing against the database.
func TestTheServerEndsStatementsAndWaits(t *testing.T) {
	t.Parallel()
	r := NewRegistry(Options{StatementTimeout: 2 * time.Second, LockTimeout: 100 * time.Millisecond})
	dsn := postgres.NewDatabase(t)
	d, other := get(t, r, dsn), get(t, NewRegistry(Options{}), dsn)
	sleep := func(ctx context.Context, db pgstream.DB) error {
		_, err := db.Exec(ctx, "select pg_sleep(60)")
		return err
	}
	// The other one has installed the schema, which takes longer than these bounds.
	if err := other.Do(t.Context(), ping); err != nil {
		t.Fatal(err)
	}
	if err := d.Do(t.Context(), sleep); phase.Reason(err, "") != "Progressing" || !strings.Contains(err.Error(), "did not end within 2s") {
		t.Errorf("%v", err)
	}
	err := other.Do(t.Context(), func(ctx context.Context, db pgstream.DB) error {
		return pgstream.Exclusively(ctx, db, "orders", func(pgstream.DB) error {
			err := d.Do(ctx, func(ctx context.Context, db pgstream.DB) error {
				return pgstream.Exclusively(ctx, db, "orders", func(pgstream.DB) error { return nil })
			})
			if phase.Reason(err, "") != "Progressing" || !strings.Contains(err.Error(), "a lock did not come within 100ms") {
				t.Errorf("%v", err)
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	if !d.Reachable() {
		t.Error("the breaker is open")
	}
}

// D6: Look installs nothing, says so, and works once somebody has installed it.
func TestLookInstallsNothing(t *testing.T) {
	t.Parallel()
	r := NewRegistry(Options{})
	d := get(t, r, postgres.NewDatabase(t))
	called := false
	look := func() error {
		return d.Look(t.Context(), func(context.Context, pgstream.DB) error { called = true; return nil })
	}
	for range 2 {
		if err := look(); !errors.Is(err, ErrNoSchema) || !phase.IsAgain(err) || called {
			t.Fatalf("%v, called %t", err, called)
		}
	}
	if err := d.Do(t.Context(), ping); err != nil {
		t.Fatal(err)
	}
	if err := look(); err != nil || !called {
		t.Errorf("%v, called %t", err, called)
	}
}
