package database

import (
	"context"
	"testing"
	"time"

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
