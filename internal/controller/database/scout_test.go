package database

import (
	"context"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// Without any processor, the manager moves delayed messages; and it leaves its place when it stops.
func TestScoutsMoveDelayedMessages(t *testing.T) {
	t.Parallel()
	r := NewRegistry(Options{})
	d := get(t, r, postgres.NewDatabase(t))
	run := func(sql string, result any) {
		t.Helper()
		if err := d.Do(t.Context(), func(ctx context.Context, db pgstream.DB) error { return db.QueryRow(ctx, sql).Scan(result) }); err != nil {
			t.Fatal(err)
		}
	}
	var none any
	run("select millrace.create_stream('orders')::text", &none)
	run("select millrace.publish('orders', '{}', p_delay_seconds => 0.1)", &none)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- (&Scouts{Registry: r}).Run(ctx) }()
	for moved := 0; moved == 0; {
		run("select count(*) from millrace.orders", &moved)
		select {
		case <-t.Context().Done():
			t.Fatal("nothing was moved")
		case <-time.After(10 * time.Millisecond):
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	held := true
	run("select expires_at > now() from millrace_engine.scout", &held)
	if held {
		t.Error("the lease is still held")
	}
}

// A database that is back is noticed without a caller, and whoever wants to know is told of its loss and of its return, once.
func TestScoutsNoticeThatADatabaseIsBack(t *testing.T) {
	t.Parallel()
	server := postgres.NewServer(t, postgres.Options{})
	changes := make(chan bool, 10)
	r := NewRegistry(Options{Changed: func(d *Database) { changes <- d.Reachable() }})
	d := get(t, r, server.DSN("postgres"))
	for range 2 {
		if err := d.Do(t.Context(), ping); err != nil {
			t.Fatal(err)
		}
	}
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := d.Do(t.Context(), ping); phase.Reason(err, "") != "DatabaseUnreachable" {
			t.Fatal(err)
		}
	}
	// Now it counts as dead, and callers are kept off for as long as they ever are.
	for range 10 {
		d.breaker.report(d.breaker.cause)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error)
	go func() { done <- (&Scouts{Registry: r}).Run(ctx) }()
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, want := range []bool{false, true} {
		select {
		case reachable := <-changes:
			if reachable != want {
				t.Errorf("change %d: reachable is %t", i, reachable)
			}
		case <-time.After(2 * time.Minute):
			t.Fatal("nothing was noticed")
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if len(changes) > 0 {
		t.Errorf("%d changes too many", len(changes))
	}
}
