package pipeline_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

func (w *world) streamSource(member string, mode pgstream.Mode) *pipeline.StreamSource {
	w.t.Helper()
	c, err := config.Parse([]byte(strings.ReplaceAll(ordersConfig, "MODE", string(mode))))
	if err != nil {
		w.t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(w.t.Output(), nil))
	s, err := pipeline.NewStreamSource(w.ctx, w.db, w.db.Config().ConnConfig, member, c, pipeline.NewMetrics(), log)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

func (w *world) next(s *pipeline.StreamSource) *pipeline.Batch {
	w.t.Helper()
	for {
		b, err := s.Next(w.ctx, 1000)
		if err != nil {
			w.t.Fatal(err)
		}
		if len(b.Items) > 0 {
			return b
		}
	}
}

// order publishes orders with the given payloads, each in a transaction of its own.
func (w *world) order(key string, payloads ...string) {
	w.t.Helper()
	for _, p := range payloads {
		if _, err := pgstream.Publish(w.ctx, w.db, "orders", pgstream.NewMessage{Key: &key, Payload: []byte(p)}); err != nil {
			w.t.Fatal(err)
		}
	}
}

func orders(from, to int) []string {
	var all []string
	for n := from; n < to; n++ {
		all = append(all, fmt.Sprintf(`{"order_id":"o-%03d","amount":%d}`, n, n))
	}
	return all
}

// createOrders makes the table, without a key, with a constraint.
func (w *world) createOrders() {
	w.t.Helper()
	_, err := w.db.Exec(w.ctx, "create table orders (order_id text not null, amount numeric check (amount >= 0), customer text, position bigint)")
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) orderRows() int { w.t.Helper(); return w.count("select count(*) from orders") }

// backlog is what the group has not settled, dead letters apart.
func (w *world) backlog() (unsettled, dead int) {
	w.t.Helper()
	all, err := pgstream.Stats(w.ctx, w.db)
	if err != nil {
		w.t.Fatal(err)
	}
	return int(all[0].Lag + all[0].InFlight + all[0].Retrying), int(all[0].DeadLetters)
}

// cutter breaks connections in the middle of a commit.
type cutter struct {
	net.Conn
	// cut decides, for each COMMIT that is sent, whether the connection breaks: before it reaches the server, or after.
	cut func() (before, after bool)
}

func (c *cutter) Write(b []byte) (int, error) {
	if !bytes.Contains(b, []byte("commit\x00")) {
		return c.Conn.Write(b)
	}
	before, after := c.cut()
	if before {
		_ = c.Conn.Close()
		return 0, net.ErrClosed
	}
	n, err := c.Conn.Write(b)
	if after {
		_ = c.Conn.Close() // its answer is lost; the server commits all the same
	}
	return n, err
}

// I7: when the answer to a commit is lost, whether it took place or not, every row is there once. Claims are divided to
// find the rows that the table refuses, and it has no key, so nothing else would stop a second row.
func TestExactlyOnce_CommitInDoubt(t *testing.T) {
	t.Parallel()
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		t.Run("from a group in mode "+string(mode), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.newOrders(mode)
			c, err := config.Parse([]byte(strings.ReplaceAll(ordersConfig, "MODE", string(mode)) + "batch: {maxRows: 10}\n"))
			if err != nil {
				t.Fatal(err)
			}
			var cuts atomic.Int64
			poolConfig := w.db.Config()
			poolConfig.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
				conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
				return &cutter{conn, func() (bool, bool) {
					n := cuts.Add(1) // every other commit breaks, now before and now after
					return n%4 == 1, n%4 == 3
				}}, err
			}
			pool, err := pgxpool.NewWithConfig(w.ctx, poolConfig)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(pool.Close)
			w.createOrders()
			all := orders(0, 60)
			for n := 5; n < 60; n += 20 {
				all[n] = fmt.Sprintf(`{"order_id":"refused-%d","amount":-1}`, n)
			}
			w.order("k", all...)
			sink, err := pipeline.NewTableSink(w.ctx, pool, c)
			if err != nil {
				t.Fatal(err)
			}
			log := slog.New(slog.NewTextHandler(t.Output(), nil))
			metrics, health := pipeline.NewMetrics(), pipeline.NewHealth()
			source, err := pipeline.NewStreamSource(w.ctx, w.db, w.db.Config().ConnConfig, "one", c, metrics, log)
			if err != nil {
				t.Fatal(err)
			}
			sink.SettleWith(source)
			line, err := pipeline.New(pipeline.Options{Config: c, Source: source, Sink: sink, Metrics: metrics, Health: health, Logger: log})
			if err != nil {
				t.Fatal(err)
			}
			(&assembled{Pipeline: line}).run(w)
			eventually(t, func() (bool, string) {
				unsettled, dead := w.backlog()
				return unsettled == 0 && dead == 3, fmt.Sprintf("%d rows, %d dead letters, %d unsettled", w.orderRows(), dead, unsettled)
			})
			if rows, distinct := w.orderRows(), w.count("select count(distinct order_id) from orders"); rows != 57 || distinct != 57 {
				t.Errorf("%d rows of %d orders, want 57 of 57", rows, distinct)
			}
			if n := cuts.Load(); n < 8 {
				t.Errorf("only %d commits, so too few were broken", n)
			}
		})
	}
}

// I7: a member that slept past its lease loses its claim, and what it writes then is rolled back.
func TestExactlyOnce_ZombieIsFenced(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeShared)
	configuration := strings.ReplaceAll(ordersConfig, "MODE", "Shared")
	env := config.EnvSourceDatabaseURL + "=" + w.dsn
	zombie := w.start("zombie", configuration, env)
	zombie.ready()
	conn := w.connect()
	if _, err := conn.Exec(w.ctx, "begin; lock table orders in share mode"); err != nil {
		t.Fatal(err)
	}
	w.order("k", orders(0, 50)...)
	zombie.waitFor("batch consumed")
	zombie.signal(syscall.SIGSTOP)
	if _, err := conn.Exec(w.ctx, "rollback"); err != nil {
		t.Fatal(err)
	}
	other := w.start("other", configuration, env)
	other.ready()
	becomes(t, "rows", 50, w.orderRows)
	zombie.signal(syscall.SIGCONT)
	zombie.waitFor("the right to some items was lost; dropping them")
	w.order("k", orders(50, 60)...)
	becomes(t, "rows", 60, w.orderRows)
	if n := w.count("select count(distinct order_id) from orders"); n != 60 {
		t.Errorf("%d distinct orders", n)
	}
}

// Messages that cannot be decoded or written become dead letters of the group; the others are rows, once. In an Ordered
// group nothing that comes after such a message is written before its fate is known.
func TestExactlyOnce_PoisonMessages(t *testing.T) {
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		t.Run("in a group in mode "+string(mode), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.newOrders(mode)
			w.createOrders()
			all := orders(0, 40)
			all[7] = `{"amount":1}`
			all[20] = `{"order_id":"refused","amount":-1}`
			w.order("k", all...)
			w.start("one", strings.ReplaceAll(ordersConfig, "MODE", string(mode)), config.EnvSourceDatabaseURL+"="+w.dsn).ready()
			eventually(t, func() (bool, string) {
				unsettled, dead := w.backlog()
				rows := w.orderRows()
				return rows == 38 && dead == 2 && unsettled == 0, fmt.Sprintf("%d rows, %d dead letters, %d unsettled", rows, dead, unsettled)
			})
			if n := w.count("select count(distinct order_id) from orders"); n != 38 {
				t.Errorf("%d distinct orders", n)
			}
			if mode == pgstream.ModeOrdered {
				if n := w.count("select count(*) from (select position < lag(position) over (order by xmin::text::bigint, ctid) as back from orders) x where back"); n != 0 {
					t.Errorf("%d rows were written out of order", n)
				}
			}
		})
	}
}

// In an Ordered group the messages after one that fails wait for it, undecodable or refused, and then follow in order.
func TestOrderedGroupWaitsForAFailedMessage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeOrdered)
	w.createOrders()
	all := orders(0, 40)
	all[20] = `{"order_id":"o-020","amount":-1}`
	w.order("k", all...)
	p := w.start("one", strings.NewReplacer("MODE", "Ordered", "maxDeliveries: 3", "maxDeliveries: 1000").Replace(ordersConfig), config.EnvSourceDatabaseURL+"="+w.dsn)
	p.ready()
	// It has been tried more than once, and still nothing after it is there.
	eventually(t, func() (bool, string) {
		n := p.metrics()[`millrace_processor_entries_total{result="rejected"}`]
		return n >= 3, fmt.Sprint(n, " rejections")
	})
	if rows, last := w.orderRows(), w.count("select count(*) from orders where order_id > 'o-020'"); rows != 20 || last != 0 {
		t.Errorf("%d rows, of which %d come after the one that failed", rows, last)
	}
	if _, err := w.db.Exec(w.ctx, "alter table orders drop constraint orders_amount_check"); err != nil {
		t.Fatal(err)
	}
	becomes(t, "rows", 40, w.orderRows)
	if n := w.count("select count(*) from (select position < lag(position) over (order by xmin::text::bigint, ctid) as back from orders) x where back"); n != 0 {
		t.Errorf("%d rows were written out of order", n)
	}
}

// A drain gives back what is unfinished, and the next member does not wait for the lease to end.
func TestStreamSourceReleasesOnDrain(t *testing.T) {
	t.Parallel()
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		t.Run("in a group in mode "+string(mode), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.newOrders(mode)
			if _, err := w.db.Exec(w.ctx, "update millrace_engine.consumer_group set ack_wait_ms = 3600000"); err != nil {
				t.Fatal(err)
			}
			w.order("k", orders(0, 10)...)
			first := w.streamSource("first", mode)
			if got := w.next(first); len(got.Items) != 10 {
				t.Fatalf("%d messages", len(got.Items))
			}
			if err := first.Release(w.ctx); err != nil {
				t.Fatal(err)
			}
			got := w.next(w.streamSource("second", mode))
			if len(got.Items) != 10 || got.Items[0].Deliveries != 1 {
				t.Errorf("%d messages, delivery %d", len(got.Items), got.Items[0].Deliveries)
			}
		})
	}
}

// With the sink in another database the ack follows the commit, and the key makes redelivery harmless.
func TestConsumerGroupIntoAnotherDatabase(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeShared)
	source := w.dsn
	sink := newWorldAt(t, postgres.NewDatabase(t), w.redisURL)
	configuration := strings.ReplaceAll(strings.ReplaceAll(ordersConfig, "MODE", "Shared"), "name: orders, create", "name: orders, key: [order_id], create")
	p := sink.start("one", configuration, config.EnvSourceDatabaseURL+"="+source)
	p.ready()
	if l := p.waitFor("delivery"); l["exactly_once"] != false {
		t.Errorf("%v", l)
	}
	w.order("k", orders(0, 30)...)
	becomes(t, "rows", 30, sink.orderRows)
	eventually(t, func() (bool, string) {
		unsettled, _ := w.backlog()
		return unsettled == 0, fmt.Sprint(unsettled, " unsettled")
	})
	// Without a key a redelivery would be a second row, so that is refused at the start.
	p = sink.start("two", strings.ReplaceAll(ordersConfig, "MODE", "Shared"), config.EnvSourceDatabaseURL+"="+source)
	if code := p.exited(patience); code != 1 || !strings.Contains(p.tail(2000), "write sink.table.key") {
		t.Errorf("exit code %d: %s", code, p.tail(2000))
	}
}

// A group that does not exist ends the processor with what to do.
func TestConsumerGroupMissing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeShared)
	p := w.start("one", strings.ReplaceAll(strings.ReplaceAll(ordersConfig, "MODE", "Shared"), "orders_sink", "nobody"), config.EnvSourceDatabaseURL+"="+w.dsn)
	if code := p.exited(patience); code != 1 || !strings.Contains(p.tail(2000), `consumer group \"nobody\" of stream \"orders\": not found; create it with`) {
		t.Errorf("exit code %d: %s", code, p.tail(2000))
	}
}
