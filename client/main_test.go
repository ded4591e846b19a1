package client_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/client"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

func TestMain(m *testing.M) { os.Exit(postgres.Main(m, postgres.Options{})) }

// limit is for a machine with much else to do; everything waits for what it needs and not for time.
const limit = 3 * time.Minute

// database is a database of one test's own.
type database struct {
	*pgxpool.Pool
	t   testing.TB
	ctx context.Context
	dsn string
}

func newDatabase(t testing.TB) *database {
	t.Helper()
	dsn := postgres.NewClone(t, schema.SQL(), migrate)
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	pool, err := pgxpool.New(ctx, dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return &database{pool, t, ctx, dsn}
}

func migrate(ctx context.Context, dsn string) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	_, err = schema.Migrate(ctx, conn, schema.Options{})
	return errors.Join(err, conn.Close(ctx))
}

// client opens a client that is closed with the test.
func (d *database) client(o client.Options) *client.Client {
	d.t.Helper()
	c, err := client.Open(d.ctx, d.dsn, o)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(c.Close)
	return c
}

// run executes SQL that must succeed.
func (d *database) run(sql string, args ...any) {
	d.t.Helper()
	if _, err := d.Exec(d.ctx, sql, args...); err != nil {
		d.t.Fatalf("%s: %v", sql, err)
	}
}

// one returns the single value of a query.
func one[T any](d *database, sql string, args ...any) T {
	d.t.Helper()
	var v T
	if err := d.QueryRow(d.ctx, sql, args...).Scan(&v); err != nil {
		d.t.Fatalf("%s: %v", sql, err)
	}
	return v
}

// becomes waits until a query for a text gives what is wanted.
func (d *database) becomes(want, sql string, args ...any) {
	d.t.Helper()
	for {
		got := one[string](d, sql, args...)
		if got == want {
			return
		}
		select {
		case <-d.ctx.Done():
			d.t.Fatalf("%s gives %s, want %s", sql, got, want)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// consuming is a Consume in the background.
type consuming struct {
	t    testing.TB
	stop context.CancelFunc
	done chan struct{}
	err  error
}

func (d *database) consume(c *client.Client, stream, group string, handler client.Handler, o client.ConsumeOptions) *consuming {
	d.t.Helper()
	ctx, stop := context.WithCancel(d.ctx)
	r := &consuming{t: d.t, stop: stop, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		r.err = c.Consume(ctx, stream, group, handler, o)
	}()
	d.t.Cleanup(func() { stop(); <-r.done })
	return r
}

// ends stops it, and returns what Consume returned.
func (r *consuming) ends() error {
	r.t.Helper()
	r.stop()
	select {
	case <-r.done:
	case <-time.After(limit):
		r.t.Fatal("Consume does not end")
	}
	return r.err
}

// databaseURL is where the examples' database is. The first call makes it.
var databaseURL = sync.OnceValue(func() string {
	url, err := postgres.ExampleDatabase("client_examples")
	if err == nil {
		err = migrate(context.Background(), url)
	}
	if err != nil {
		panic(err)
	}
	return url
})

// declare makes the streams and groups of an example, as Kubernetes resources or whoever owns the schema would.
func declare(ctx context.Context, statements ...string) {
	conn, err := pgx.Connect(ctx, databaseURL())
	if err != nil {
		panic(err)
	}
	defer conn.Close(ctx)
	for _, sql := range statements {
		if _, err := conn.Exec(ctx, sql); err != nil {
			panic(fmt.Sprintf("%s: %v", sql, err))
		}
	}
}
