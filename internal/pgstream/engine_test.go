package pgstream_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// engine is a migrated database of one test's own.
type engine struct {
	*pgxpool.Pool
	t   testing.TB
	ctx context.Context
	dsn string
}

func newEngine(t testing.TB) *engine {
	t.Helper()
	return engineOn(t, newDatabase(t))
}

// newDatabase makes a database of the newest schema. It is a copy, because migrating takes ten times as long.
func newDatabase(t testing.TB) string {
	t.Helper()
	return postgres.NewClone(t, schema.SQL(), func(ctx context.Context, dsn string) error {
		conn, err := pgx.Connect(ctx, dsn)
		if err != nil {
			return err
		}
		_, err = schema.Migrate(ctx, conn, schema.Options{})
		return errors.Join(err, conn.Close(ctx))
	})
}

func engineOn(t testing.TB, dsn string) *engine {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	config, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	config.MaxConns = 16 // whatever the machine has: some tests hold several transactions
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return &engine{Pool: pool, t: t, ctx: ctx, dsn: dsn}
}

// connect opens a connection beside the pool; it is closed with the test.
func (e *engine) connect() *pgx.Conn {
	e.t.Helper()
	conn, err := pgx.Connect(e.ctx, e.dsn)
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// run executes SQL that must succeed.
func (e *engine) run(sql string, args ...any) {
	e.t.Helper()
	if _, err := e.Exec(e.ctx, sql, args...); err != nil {
		e.t.Fatalf("%s: %v", sql, err)
	}
}

// one returns the single value of a query.
func one[T any](e *engine, sql string, args ...any) T {
	e.t.Helper()
	var v T
	if err := e.QueryRow(e.ctx, sql, args...).Scan(&v); err != nil {
		e.t.Fatalf("%s: %v", sql, err)
	}
	return v
}

func (e *engine) stream(name string) {
	e.t.Helper()
	e.run("select millrace.create_stream($1)", name)
}

func (e *engine) group(spec pgstream.GroupSpec) {
	e.t.Helper()
	if err := pgstream.ApplyGroup(e.ctx, e.Pool, spec); err != nil {
		e.t.Fatal(err)
	}
}

func (e *engine) consumer(cfg pgstream.ConsumerConfig) *pgstream.Consumer {
	e.t.Helper()
	c, err := pgstream.NewConsumer(e.ctx, e.Pool, cfg)
	if err != nil {
		e.t.Fatal(err)
	}
	return c
}

func (e *engine) publish(stream string, n int) []int64 {
	e.t.Helper()
	ms := make([]pgstream.NewMessage, n)
	for i := range ms {
		key := fmt.Sprintf("k%d", i%10)
		ms[i] = pgstream.NewMessage{Key: &key, Payload: fmt.Appendf(nil, `{"n": %d}`, i)}
	}
	positions, err := pgstream.PublishBatch(e.ctx, e.Pool, stream, ms)
	if err != nil {
		e.t.Fatal(err)
	}
	return positions
}

// forget is a crash that loses the asynchronous commit of a claim: nothing that was written with it is there any more.
func (e *engine) forget(token string) {
	e.t.Helper()
	for _, table := range []string{"claim", "settlement"} {
		e.run("delete from millrace_engine."+table+" where claim >= split_part($1, '.', 3)::bigint", token)
	}
}

// drain receives and acks until nothing is left, and returns the positions in the order of delivery.
func drain(e *engine, c *pgstream.Consumer) []int64 {
	e.t.Helper()
	var got []int64
	token := ""
	for {
		claim, err := c.AckAndTryReceive(e.ctx, token)
		if err != nil {
			e.t.Fatal(err)
		}
		if claim == nil {
			return got
		}
		token = claim.Token
		for _, m := range claim.Messages {
			got = append(got, m.Position)
		}
	}
}

func TestMessagesArePublishedAndConsumedOnce(t *testing.T) {
	t.Parallel()
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stream("orders")
			e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
			want := e.publish("orders", 2500)
			got := drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"}))
			if len(got) != len(want) {
				t.Fatalf("got %d messages, want %d", len(got), len(want))
			}
			for i := range want {
				if got[i] != want[i] {
					t.Fatalf("message %d is position %d, want %d", i, got[i], want[i])
				}
			}
			stats, err := pgstream.Stats(e.ctx, e.Pool)
			if err != nil {
				t.Fatal(err)
			}
			if s := stats[0]; s.Lag != 0 || s.InFlight != 0 || s.AckFloor != 2500 || s.OldestAge != 0 {
				t.Errorf("stats after a drain: %+v", s)
			}
		})
	}
}
