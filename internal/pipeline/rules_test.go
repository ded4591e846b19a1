package pipeline

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func TestClassify(t *testing.T) {
	state := func(code string) error { return fmt.Errorf("write: %w", &pgconn.PgError{Code: code}) }
	for name, tc := range map[string]struct {
		err  error
		want Class
	}{
		"the connection broke":              {errors.New("unexpected EOF"), ClassTransient},
		"a time limit":                      {context.DeadlineExceeded, ClassTransient},
		"a deadlock":                        {state("40P01"), ClassTransient},
		"a serialization failure":           {state("40001"), ClassTransient},
		"the server shuts down":             {state("57P01"), ClassTransient},
		"too many connections":              {state("53300"), ClassTransient},
		"a lock was not available":          {state("55P03"), ClassTransient},
		"a failover to a standby":           {state("25006"), ClassTransient},
		"a value out of range":              {state("22003"), ClassRow},
		"a null":                            {state("23502"), ClassRow},
		"another unique constraint":         {state("23505"), ClassRow},
		"an exclusion constraint":           {state("23P01"), ClassRow},
		"a trigger's exception":             {state("P0001"), ClassRow},
		"a key too long for its index":      {state("54000"), ClassRow},
		"no such column":                    {state("42703"), ClassConfiguration},
		"no privilege":                      {state("42501"), ClassConfiguration},
		"a wrong password":                  {state("28P01"), ClassConfiguration},
		"no such database":                  {state("3D000"), ClassConfiguration},
		"no such group":                     {fmt.Errorf("join: %w", pgstream.ErrNotFound), ClassConfiguration},
		"a claim that ended":                {fmt.Errorf("ack: %w", pgstream.ErrFenced), ClassFenced},
		"a state that is no state":          {state("?"), ClassTransient},
		"an unknown state is not the row's": {state("XX000"), ClassTransient},
	} {
		if got := Classify(tc.err); got != tc.want {
			t.Errorf("%s: %s, want %s", name, got, tc.want)
		}
	}
}

func TestCommitInDoubt(t *testing.T) {
	for name, tc := range map[string]struct {
		err  error
		want bool
	}{
		"the connection broke":            {errors.New("unexpected EOF"), true},
		"the server shut down":            {&pgconn.PgError{Code: "57P01"}, true},
		"the server does not know either": {&pgconn.PgError{Code: "40003"}, true},
		"a serialization failure":         {&pgconn.PgError{Code: "40001"}, false},
		"a deferred constraint":           {&pgconn.PgError{Code: "23505"}, false},
		"it was rolled back":              {pgx.ErrTxCommitRollback, false},
	} {
		if got := commitInDoubt(tc.err); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestReasonLeavesOutTheRow(t *testing.T) {
	got := reason(&pgconn.PgError{Code: "23514", Message: "violates check", ConstraintName: "positive", Detail: "Failing row contains (secret)"})
	if got != "violates check (constraint positive) (SQLSTATE 23514)" {
		t.Errorf("%q", got)
	}
}

func TestBackoffDoublesUpToItsBound(t *testing.T) {
	for attempt, want := range map[int]time.Duration{1: 25, 2: 50, 3: 100, 7: 1600, 8: 2500, 100: 2500} {
		if got := backoff(50*time.Millisecond, 5*time.Second, attempt, 0); got != want*time.Millisecond {
			t.Errorf("attempt %d: at least %s, want %dms", attempt, got, want)
		}
		if got := backoff(50*time.Millisecond, 5*time.Second, attempt, 0.999); got > 2*want*time.Millisecond {
			t.Errorf("attempt %d: at most %s", attempt, got)
		}
	}
}

// I4: what is in flight never exceeds the bound on entries, and reading resumes when something is settled.
func TestPermitsBoundWhatIsInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPermits(10, 1000)
		if n := p.reserve(t.Context(), 8); n != 8 {
			t.Fatalf("reserved %d of 8", n)
		}
		if n := p.reserve(t.Context(), 8); n != 2 {
			t.Fatalf("reserved %d of the last 2", n)
		}
		p.use(8, 8, 80)
		p.use(2, 0, 0)
		got := make(chan int)
		p.reserve(t.Context(), 2)
		go func() { got <- p.reserve(t.Context(), 5) }()
		synctest.Wait()
		select {
		case n := <-got:
			t.Fatalf("reserved %d more than there is", n)
		default:
		}
		p.free(3, 30)
		if n := <-got; n != 3 {
			t.Fatalf("reserved %d of the 3 given back", n)
		}
	})
}

func TestPermitsBoundBytes(t *testing.T) {
	p := newPermits(1000, 100)
	p.use(p.reserve(t.Context(), 10), 10, 90)
	if n := p.reserve(t.Context(), 10); n != 2 {
		t.Errorf("reserved %d entries of about 9 bytes with 10 bytes left", n)
	}
	p.use(2, 2, 40)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if n := p.reserve(ctx, 1); n != 0 {
		t.Errorf("reserved %d with more bytes in flight than allowed", n)
	}
}

func TestBreakerStopsABadMigrationFromFloodingTheDeadLetters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBreaker(BreakerOptions{MinRows: 10, Cooldown: time.Second})
		if b.leave(1000, 9) || b.leave(100, 100) {
			t.Fatal("open below a fifth of the rows")
		}
		if !b.leave(0, 400) {
			t.Fatal("closed above a fifth of the rows")
		}
		began := time.Now()
		if !b.enter(t.Context()) || time.Since(began) != time.Second {
			t.Fatalf("the probe began after %s", time.Since(began))
		}
		second := make(chan time.Duration)
		go func() { b.enter(t.Context()); second <- time.Since(began) }()
		synctest.Wait()
		if !b.leave(1, 1) {
			t.Fatal("a probe of which half failed closed the breaker")
		}
		if waited := <-second; waited != 2*time.Second {
			t.Fatalf("the next probe began after %s", waited)
		}
		if b.leave(10, 0) || b.isOpen() {
			t.Fatal("a good probe left the breaker open")
		}
	})
}

func TestBreakerForgetsAfterItsWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBreaker(BreakerOptions{MinRows: 10})
		b.leave(0, 9)
		time.Sleep(61 * time.Second)
		if b.leave(0, 9) {
			t.Error("failures of the last window were counted")
		}
	})
}

func TestHealthNamesWhatIsWrong(t *testing.T) {
	h := NewHealth()
	h.Clear("start")
	if ready, _ := h.Ready(); !ready {
		t.Fatal("not ready with nothing wrong")
	}
	if !h.Set("sink", "no table") || h.Set("sink", "no table") {
		t.Error("Set does not tell news from old")
	}
	if ready, text := h.Ready(); ready || text != "sink: no table" {
		t.Errorf("%v, %q", ready, text)
	}
}
