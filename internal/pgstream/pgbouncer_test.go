package pgstream_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/test/env/pgbouncer"
)

// newPooledEngine is an engine whose pool goes through PgBouncer, where few server connections serve everybody by turns. dsn is the direct one.
func newPooledEngine(t *testing.T) (pooled, direct *engine) {
	t.Helper()
	direct = newEngine(t)
	b := pgbouncer.New(t, direct.dsn, pgbouncer.Options{})
	cfg, err := pgxpool.ParseConfig(b.DSN())
	must(t, err)
	cfg.MaxConns = 20 // many more than PgBouncer has
	pgstream.FitProxies(cfg)
	pool, err := pgxpool.NewWithConfig(direct.ctx, cfg)
	must(t, err)
	t.Cleanup(pool.Close)
	return &engine{Pool: pool, t: t, ctx: direct.ctx, dsn: b.DSN()}, direct
}

// The whole life of messages, by many clients at once, whose sessions are each other's.
func TestThroughPgBouncer(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, direct := newPooledEngine(t)
		e.stream("orders")
		must(t, pgstream.ApplyGroup(e.ctx, e, pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, MaxAttempts: 0}))
		e.run("create table effect (n bigint primary key)")
		e.scoutOn(e, pgstream.ScoutConfig{Interval: 5 * time.Millisecond}, func(err error) { t.Errorf("the scout reports: %v", err) })
		work, stop := context.WithTimeout(e.ctx, soak(t, 3*time.Second))
		defer stop()
		var wg sync.WaitGroup
		var mu sync.Mutex
		want := map[int64]bool{}
		published := func(positions ...int64) {
			mu.Lock()
			defer mu.Unlock()
			for _, p := range positions {
				want[p] = true
			}
		}
		failed := func(what string, err error) {
			if err != nil && !errors.Is(err, pgstream.ErrFenced) {
				t.Errorf("%s: %v", what, err)
			}
		}
		for range 4 {
			wg.Go(func() {
				key := "k"
				ms := []pgstream.NewMessage{{Key: &key, Payload: []byte(`{}`), Headers: []byte(`{"a": "b"}`)}, {Payload: []byte(`{}`)}}
				for work.Err() == nil {
					tx, err := e.Begin(e.ctx)
					if err != nil {
						failed("begin", err)
						return
					}
					p, err := pgstream.Publish(e.ctx, tx, "orders", ms[0])
					failed("publish", err)
					// Settings of a session, and the guard's own if it leaked: the next client has them.
					_, err = tx.Exec(e.ctx, "select set_config('millrace.guard_1', 'b' || pg_current_xact_id()::text, false)")
					failed("leak", err)
					if p%3 == 0 {
						failed("rollback", tx.Rollback(e.ctx))
					} else {
						failed("commit", tx.Commit(e.ctx))
						published(p)
					}
					ps, err := pgstream.PublishBatch(e.ctx, e, "orders", ms)
					failed("batch", err)
					published(ps...)
					failed("COPY", pgstream.PublishCopy(e.ctx, e, "orders", ms))
				}
			})
		}
		for m := range 3 {
			wg.Go(func() {
				c, err := pgstream.NewConsumer(e.ctx, e.Pool, pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: fmt.Sprint("m", m), MaxMessages: 20})
				failed("consumer", err)
				for n := 0; work.Err() == nil; n++ {
					claim, err := c.TryReceive(e.ctx)
					failed("receive", err)
					if claim == nil {
						continue
					}
					_, err = c.Extend(e.ctx, claim.Token, time.Minute)
					failed("extend", err)
					switch n % 5 {
					case 0:
						failed("nack", c.Nack(e.ctx, claim.Token, positions(claim)[:1], 0, "again"))
						failed("release", c.Release(e.ctx, claim.Token))
					case 1:
						failed("leave", c.Leave(e.ctx))
					default:
						failed("ack", exactlyOnce(e, c, claim))
					}
				}
				failed("leave", c.Leave(e.ctx))
			})
		}
		wg.Go(func() {
			for work.Err() == nil {
				if _, err := pgstream.Maintain(e.ctx, e); err != nil {
					failed("maintain", err)
				}
				_, err := pgstream.Stats(e.ctx, e)
				failed("stats", err)
			}
		})
		wg.Wait()

		// What is left, and then everything is there once.
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "last"})
		e.eventually("nothing is left", func() bool {
			if claim := receive(e, c); claim != nil {
				must(t, exactlyOnce(e, c, claim))
			}
			s := direct.stats("orders", "g")
			return s.Lag+s.InFlight+s.Retrying == 0
		})
		if n := one[int](direct, "select count(*) from millrace.orders m full join effect e on e.n = m.position where e.n is null or m.position is null"); n != 0 {
			t.Errorf("%d of the messages have no effect, or the other way round", n)
		}
		for p := range want {
			if !one[bool](direct, "select exists (select from effect where n = $1)", p) {
				t.Fatalf("position %d was published and has no effect", p)
			}
		}
		if n := one[int](direct, "select count(*) from pg_stat_activity where datname = current_database() and application_name = '' and pid <> pg_backend_pid()"); n > 10 {
			t.Errorf("there are %d connections: nothing was shared", n)
		}
	})
}

// exactlyOnce notes the claim's messages and acks them in one transaction. The effect table refuses a second effect.
func exactlyOnce(e *engine, c *pgstream.Consumer, claim *pgstream.Claim) error {
	return pgx.BeginFunc(e.ctx, e.Pool, func(tx pgx.Tx) error {
		if err := c.AckTx(e.ctx, tx, claim.Token); err != nil {
			return err
		}
		_, err := tx.Exec(e.ctx, "insert into effect select unnest($1::bigint[])", positions(claim))
		return err
	})
}

func TestAListenerThroughPgBouncerIsFoundSilentAndConsumersPoll(t *testing.T) {
	t.Parallel()
	e, direct := newPooledEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	cfg, err := pgx.ParseConfig(e.dsn)
	must(t, err)
	l := pgstream.NewListener(cfg)
	l.ProbeTimeout = 300 * time.Millisecond
	reports := make(chan error, 100)
	l.Report = func(err error) { reports <- err }
	e.listen(l)
	e.eventually("the listener notices that it hears nothing", func() bool {
		if l.Alive() {
			t.Fatal("it takes itself for one that hears")
		}
		return len(reports) > 0
	})
	if err := <-reports; !errors.Is(err, pgstream.ErrSilent) || !strings.Contains(err.Error(), "transaction-pooling proxy") {
		t.Errorf("reported: %v", err)
	}
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", PollInterval: 20 * time.Millisecond, Listener: l})
	if woken, err := pgstream.WaitForMessages(e.ctx, c); woken || err != nil {
		t.Errorf("woken %t, %v", woken, err)
	}
	for n := range 20 {
		if l.Alive() {
			t.Fatal("it takes itself for one that hears")
		}
		publishIn(direct, direct, "orders")
		claim, err := c.Receive(e.ctx)
		must(t, err)
		if len(claim.Messages) != 1 {
			t.Errorf("message %d: %v", n, positions(claim))
		}
		must(t, c.Ack(e.ctx, claim.Token))
	}
	if n := len(reports); n > 0 {
		t.Errorf("it was reported %d more times", n)
	}
	if one[int64](direct, "select pg_sequence_last_value('millrace_engine.state_1') >> 4") != 0 {
		t.Error("a consumer asked publishers to notify whom nobody hears")
	}
}

// The remedy: the pool stays behind PgBouncer, and the listener has a connection string of its own.
func TestADirectListenerServesAPoolBehindPgBouncer(t *testing.T) {
	t.Parallel()
	e, direct := newPooledEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", PollInterval: never, Listener: direct.listener()})
	for range 20 {
		done := e.waiting(c)
		publishIn(e, e, "orders")
		must(t, c.Ack(e.ctx, e.mustWake(done).Token))
	}
}

// A session pool is a proxy that LISTEN survives.
func TestAListenerHearsThroughASessionPool(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	b := pgbouncer.New(t, e.dsn, pgbouncer.Options{Settings: map[string]string{"pool_mode": "session"}})
	cfg, err := pgx.ParseConfig(b.DSN())
	must(t, err)
	l := pgstream.NewListener(cfg)
	l.Report = func(err error) { t.Errorf("the listener reports: %v", err) }
	e.listen(l)
	e.eventually("the listener listens", l.Alive)
}

// Whoever makes a pool without FitProxies is told what to set.
func TestPreparedStatementsThroughPgBouncerAreExplained(t *testing.T) {
	t.Parallel()
	e, _ := newPooledEngine(t)
	e.stream("orders")
	var got error
	for range 2 { // both get the one server connection, and prepare there under one name
		pool, err := pgxpool.New(e.ctx, e.dsn)
		must(t, err)
		defer pool.Close()
		for range 10 {
			if _, err := pgstream.Publish(e.ctx, pool, "orders", pgstream.NewMessage{Payload: []byte(`{}`)}); err != nil {
				got = err
			}
		}
	}
	if got == nil || !strings.Contains(got.Error(), "default_query_exec_mode=cache_describe") {
		t.Errorf("the error is %v; it should say what to set", got)
	}
}

func TestMigratingThroughPgBouncer(t *testing.T) {
	t.Parallel()
	_, direct := newPooledEngine(t)
	direct.run("drop schema millrace cascade; drop schema millrace_engine cascade")
	b := pgbouncer.New(t, direct.dsn, pgbouncer.Options{Settings: map[string]string{"default_pool_size": "1"}})
	cfg, err := pgx.ParseConfig(b.DSN())
	must(t, err)
	cfg.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
	conn, err := pgx.ConnectConfig(direct.ctx, cfg)
	must(t, err)
	defer func() { _ = conn.Close(direct.ctx) }()
	if _, err := schema.Migrate(direct.ctx, conn, schema.Options{}); err != nil {
		t.Fatal(err)
	}
	direct.stream("orders")
}
