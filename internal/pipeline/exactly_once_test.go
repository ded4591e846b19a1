package pipeline_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// ordersConfig has no key on purpose: the table would keep every duplicate, so a row count proves that none was made.
const ordersConfig = `
name: orders
source: {consumerGroup: {stream: orders, group: orders_sink, mode: MODE}}
mapping:
  columns:
  - {name: order_id, path: order_id, type: text, required: true}
  - {name: amount, path: amount, type: numeric}
  - {name: customer, path: "@key", type: text}
  - {name: position, path: "@position", type: bigint}
sink: {table: {name: orders, create: IfMissing}}
errors: {maxDeliveries: 3}
`

// newOrders makes the stream and the group in the world's database.
func (w *world) newOrders(mode pgstream.Mode) {
	w.t.Helper()
	if _, err := schema.Migrate(w.ctx, w.connect(), schema.Options{}); err != nil {
		w.t.Fatal(err)
	}
	plan, err := pgstream.PlanStream(w.ctx, w.db, pgstream.StreamSpec{Name: "orders", Partitions: 8, PayloadType: pgstream.PayloadJSON})
	if err != nil {
		w.t.Fatal(err)
	}
	if err := pgstream.ApplyStream(w.ctx, w.db, plan); err != nil {
		w.t.Fatal(err)
	}
	err = pgstream.ApplyGroup(w.ctx, w.db, pgstream.GroupSpec{
		Stream: "orders", Name: "orders_sink", Mode: mode, StartFrom: pgstream.StartEarliest, AckWait: 3 * time.Second,
		MaxAttempts: 20, BackoffInitial: 100 * time.Millisecond, BackoffMax: time.Second, FailurePolicy: pgstream.FailureBlock,
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// publishers publishes orders from ten connections at once, in transactions of which every fifth is rolled back.
func (w *world) publishers(total int, seed uint64) (committed *atomic.Int64, done <-chan error) {
	committed = &atomic.Int64{}
	errs := make(chan error, 1)
	var wg sync.WaitGroup
	var failed atomic.Pointer[error]
	for p := range 10 {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(seed, uint64(p)))
			for n := 0; n < total/10 && failed.Load() == nil; {
				size := min(1+random.IntN(200), total/10-n)
				rollback := random.IntN(5) == 0
				if err := w.publish(w.ctx, p, n, size, rollback); err != nil {
					failed.Store(&err)
					return
				}
				if !rollback {
					n += size
					committed.Add(int64(size))
				}
			}
		})
	}
	go func() {
		wg.Wait()
		if err := failed.Load(); err != nil {
			errs <- *err
		}
		close(errs)
	}()
	return committed, errs
}

// publish publishes one transaction's orders. Those of a publisher have consecutive numbers once committed.
func (w *world) publish(ctx context.Context, publisher, first, size int, rollback bool) error {
	tx, err := w.db.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	ms := make([]pgstream.NewMessage, size)
	for i := range ms {
		key := fmt.Sprintf("customer-%d-%d", publisher, (first+i)%37)
		ms[i] = pgstream.NewMessage{Key: &key, Payload: fmt.Appendf(nil, `{"order_id":"%d-%d","amount":12345678901234567890.12}`, publisher, first+i)}
	}
	if _, err := pgstream.PublishBatch(ctx, tx, "orders", ms); err != nil {
		return err
	}
	if rollback {
		return nil
	}
	return tx.Commit(ctx)
}

// Done means 4 at process level: 100,000 messages published by ten concurrent transactions with rollbacks arrive exactly
// once while the processor is killed twice. I1, I2, I7.
func TestExactlyOnce_ProcessorKilledTwice(t *testing.T) {
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		t.Run("from a group in mode "+string(mode), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.newOrders(mode)
			configuration := strings.ReplaceAll(ordersConfig, "MODE", string(mode))
			env := config.EnvSourceDatabaseURL + "=" + w.dsn
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			const total = 100_000
			orders := func() int { return w.count("select count(*) from orders") }

			p := w.start("first", configuration, env)
			p.ready()
			committed, publishing := w.publishers(total, seed)
			eventually(t, func() (bool, string) { n := orders(); return n > 10_000, fmt.Sprint(n, " rows") })
			p.kill()
			p = w.start("first", configuration, env)
			eventually(t, func() (bool, string) { n := orders(); return n > 40_000, fmt.Sprint(n, " rows") })
			p.kill()
			w.start("second", configuration, env)
			if err := <-publishing; err != nil {
				t.Fatal(err)
			}
			if n := committed.Load(); n != total {
				t.Fatalf("committed %d messages", n)
			}
			eventually(t, func() (bool, string) { n := orders(); return n >= total, fmt.Sprint(n, " rows") })
			distinct := w.count("select count(distinct order_id) from orders")
			t.Logf("committed %d, rows %d, distinct %d", total, orders(), distinct)
			if orders() != total || distinct != total {
				t.Fatal("not exactly once")
			}
			// The digits of a numeric are kept.
			if n := w.count("select count(*) from orders where amount <> 12345678901234567890.12"); n != 0 {
				t.Errorf("%d amounts have changed", n)
			}
			if mode == pgstream.ModeOrdered {
				// Rows of a key were written in the order of their positions: ctid grows with insertion into this table.
				if n := w.count(`select count(*) from (select position < lag(position) over (partition by customer order by xmin::text::bigint, ctid) as back from orders) x where back`); n != 0 {
					t.Errorf("%d rows of a key were written out of order", n)
				}
			}
		})
	}
}

// PostgreSQL is killed in mid-commit, twice. Where the fate of a commit is unknown, the engine's ledger, which is in the same
// database, decides. I2, I7.
func TestExactlyOnce_PostgresKilledInMidCommit(t *testing.T) {
	t.Parallel()
	server := postgres.NewServer(t, postgres.Options{Settings: map[string]string{"fsync": "on"}})
	w := newWorldAt(t, server.DSN("postgres"), sharedRedis.URL())
	w.newOrders(pgstream.ModeShared)
	const total = 40_000
	committed, publishing := w.publishers(total, rand.Uint64())
	if err := <-publishing; err != nil || committed.Load() != total {
		t.Fatalf("committed %d, %v", committed.Load(), err)
	}
	p := w.start("one", strings.ReplaceAll(ordersConfig, "MODE", "Shared")+"batch: {maxRows: 100}\n", config.EnvSourceDatabaseURL+"="+w.dsn)
	p.ready()
	for _, after := range []int{3_000, 15_000} {
		eventually(t, func() (bool, string) { n := w.orderRows(); return n > after, fmt.Sprint(n, " rows") })
		before := len(p.messages())
		if err := server.Kill(); err != nil {
			t.Fatal(err)
		}
		// Which part notices first depends on what it was doing.
		eventually(t, func() (bool, string) {
			for _, l := range p.messages()[before:] {
				if strings.HasSuffix(l.msg(), "failed; trying again") {
					return true, ""
				}
			}
			return false, "nothing failed"
		})
		if err := server.Restart(w.ctx); err != nil {
			t.Fatal(err)
		}
		w.db.Reset()
	}
	eventually(t, func() (bool, string) {
		unsettled, dead := w.backlog()
		return unsettled == 0, fmt.Sprintf("%d rows, %d unsettled, %d dead letters", w.orderRows(), unsettled, dead)
	})
	rows, distinct := w.orderRows(), w.count("select count(distinct order_id) from orders")
	t.Logf("committed %d, rows %d, distinct %d", total, rows, distinct)
	if rows != total || distinct != total {
		t.Error("not exactly once")
	}
}
