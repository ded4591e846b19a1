package pipeline_test

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// onceSink is a sink that shows what it has made durable as the relation orders, every copy of it: nothing in it would hide a
// second one.
type onceSink struct {
	name, sink string // under sink: in the configuration
	prepare    func(w *world)
	// order is a query for the number of orders of a customer that came out before one with a lower position.
	order string
}

var onceSinks = []onceSink{
	{"sql", `{sql: {statement: "with big as (select * from batch) insert into orders select order_id, amount, customer, position from big"}}`,
		(*world).createOrders, outOfOrder},
	{"stream", "{stream: {stream: shipments}}", (*world).newShipments,
		`select count(*) from (select position < lag(position) over (partition by customer order by shipped) as back from orders) x where back`},
}

// newShipments makes a stream that shows its messages as orders.
func (w *world) newShipments() {
	w.t.Helper()
	w.createStream("shipments", pgstream.StreamSpec{})
	_, err := w.db.Exec(w.ctx, `create view orders as select payload ->> 'order_id' as order_id, (payload ->> 'amount')::numeric as amount,
		key as customer, (payload ->> 'position')::bigint as position, "position" as shipped from millrace.shipments`)
	if err != nil {
		w.t.Fatal(err)
	}
}

// createStream makes a stream of JSON messages.
func (w *world) createStream(name string, spec pgstream.StreamSpec) {
	w.t.Helper()
	spec.Name, spec.Partitions, spec.PayloadType = name, 8, pgstream.PayloadJSON
	plan, err := pgstream.PlanStream(w.ctx, w.db, spec)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := pgstream.ApplyStream(w.ctx, w.db, plan); err != nil {
		w.t.Fatal(err)
	}
}

func (s onceSink) config(mode pgstream.Mode, more string) string {
	text := strings.ReplaceAll(ordersConfig, "MODE", string(mode))
	return strings.ReplaceAll(text, "sink: {table: {name: orders, create: IfMissing}}", "sink: "+s.sink) + more
}

// As TestExactlyOnce_ProcessorKilledTwice, with the other sinks of the source's database. I1, I2, I7.
func TestExactlyOnce_EverySinkOfTheDatabase(t *testing.T) {
	for _, s := range onceSinks {
		for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
			t.Run(s.name+" from a group in mode "+string(mode), func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				w.newOrders(mode)
				s.prepare(w)
				configuration := s.config(mode, "")
				env := config.EnvSourceDatabaseURL + "=" + w.dsn
				seed := rand.Uint64()
				t.Logf("seed %d", seed)
				const total = 30_000

				p := w.start("first", configuration, env)
				p.ready()
				committed, publishing := w.publishers(total, seed)
				for i, after := range []int{3_000, 12_000} {
					eventually(t, time.Minute, func() (bool, string) { n := w.orderRows(); return n > after, fmt.Sprint(n, " rows") })
					p.kill()
					p = w.start([]string{"first", "second"}[i], configuration, env)
				}
				if err := <-publishing; err != nil {
					t.Fatal(err)
				}
				eventually(t, time.Minute, func() (bool, string) {
					unsettled, dead := w.backlog()
					return unsettled == 0, fmt.Sprintf("%d rows, %d unsettled, %d dead letters", w.orderRows(), unsettled, dead)
				})
				rows, distinct := w.orderRows(), w.count("select count(distinct order_id) from orders")
				t.Logf("committed %d, rows %d, distinct %d", committed.Load(), rows, distinct)
				if rows != total || distinct != total {
					t.Error("not exactly once")
				}
				if n := w.count("select count(*) from orders where amount <> 12345678901234567890.12"); n != 0 {
					t.Errorf("%d amounts have changed", n)
				}
				if mode == pgstream.ModeOrdered {
					if n := w.count(s.order); n != 0 {
						t.Errorf("%d of a key came out of order", n)
					}
				}
			})
		}
	}
}

// As TestExactlyOnce_CommitInDoubt, with the other sinks of the source's database. Claims are divided to find the rows that are
// refused. I7.
func TestExactlyOnce_CommitInDoubtOfEverySink(t *testing.T) {
	for _, s := range onceSinks {
		for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
			t.Run(s.name+" from a group in mode "+string(mode), func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				w.newOrders(mode)
				s.prepare(w)
				c, err := config.Parse([]byte(s.config(mode, "batch: {maxRows: 10}\n")))
				if err != nil {
					t.Fatal(err)
				}
				all := orders(0, 60)
				for n := 5; n < 60; n += 20 {
					all[n] = fmt.Sprintf(`{"order_id":"refused-%d","amount":-1,"padding":%q}`, n, strings.Repeat("x", 100))
				}
				if s.name == "stream" {
					_, err := w.db.Exec(w.ctx, "alter table millrace.shipments add constraint refuses check (payload ->> 'amount' <> '-1')")
					if err != nil {
						t.Fatal(err)
					}
				}
				w.order("k", all...)
				line, cuts := w.assembleOrders(c)
				line.run(w)
				eventually(t, time.Minute, func() (bool, string) {
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
}

// assembleOrders builds a pipeline from the group in this process. Every other commit of its sink breaks, now before it
// reaches the server and now after.
func (w *world) assembleOrders(c *config.Config) (line *assembled, cuts *atomic.Int64) {
	w.t.Helper()
	cuts = &atomic.Int64{}
	poolConfig := w.db.Config()
	poolConfig.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
		return &cutter{conn, func() (bool, bool) {
			n := cuts.Add(1)
			return n%4 == 1, n%4 == 3
		}}, err
	}
	pool, err := pgxpool.NewWithConfig(w.ctx, poolConfig)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(pool.Close)
	if err := pipeline.Migrate(w.ctx, w.db, c); err != nil {
		w.t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(w.t.Output(), nil))
	metrics, health := pipeline.NewMetrics(), pipeline.NewHealth()
	sink, err := pipeline.NewSink(w.ctx, pipeline.SinkOptions{Config: c, Pool: pool, Metrics: metrics, Logger: log})
	if err != nil {
		w.t.Fatal(err)
	}
	source, err := pipeline.NewStreamSource(w.ctx, w.db, w.db.Config().ConnConfig, "one", c, metrics, log)
	if err != nil {
		w.t.Fatal(err)
	}
	sink.(pipeline.TxSink).SettleWith(source)
	p, err := pipeline.New(pipeline.Options{Config: c, Source: source, Sink: sink, Metrics: metrics, Health: health, Logger: log})
	if err != nil {
		w.t.Fatal(err)
	}
	return &assembled{Pipeline: p, health: health}, cuts
}
