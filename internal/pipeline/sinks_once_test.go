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

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// onceSink is a sink that shows what it has made durable as relations like orders, every copy of it: nothing in them would hide
// a second one.
type onceSink struct {
	name, sink string // under sink: in the configuration
	prepare    func(w *world)
	shown      []relation
}

// relation is a table or view with the columns order_id, amount, customer and position.
type relation struct {
	name  string
	order string // what tells when a row was written
}

// Rows that are neither updated nor vacuumed are in the order of their transactions and places.
var (
	asRows     = relation{"orders", "xmin::text::bigint, ctid"}
	asMessages = relation{"shipped", "shipped"}
	asAudit    = relation{"audit", "xmin::text::bigint, ctid"}
)

var onceSinks = []onceSink{
	{"sql", `{sql: {statement: "with big as (select * from batch) insert into orders select order_id, amount, customer, position from big"}}`,
		(*world).createOrders, []relation{asRows}},
	{"stream", "{stream: {stream: shipments}}", (*world).newShipments, []relation{asMessages}},
	{"fan-out", `{fanOut: [{name: rows, table: {name: orders}}, {name: ship, stream: {stream: shipments}},
		{name: audit, sql: {statement: insert into audit select * from batch}}]}`,
		func(w *world) {
			w.createOrders()
			w.newShipments()
			if _, err := w.db.Exec(w.ctx, "create table audit (like orders)"); err != nil {
				w.t.Fatal(err)
			}
		}, []relation{asRows, asMessages, asAudit}},
}

// exactlyOnce checks what a sink shows of orders whose ids are all different.
func (w *world) exactlyOnce(s onceSink, mode pgstream.Mode, total int) {
	w.t.Helper()
	for _, r := range s.shown {
		rows, distinct := w.count("select count(*) from "+r.name), w.count("select count(distinct order_id) from "+r.name)
		w.t.Logf("%s: rows %d, distinct %d", r.name, rows, distinct)
		if rows != total || distinct != total {
			w.t.Errorf("%s: not exactly once", r.name)
		}
		back := w.count("select count(*) from (select position < lag(position) over (partition by customer order by " + r.order + ") as back from " + r.name + ") x where back")
		if mode == pgstream.ModeOrdered && back != 0 {
			w.t.Errorf("%s: %d of a key came out of order", r.name, back)
		}
	}
}

// newShipments makes a stream that shows its messages as shipped.
func (w *world) newShipments() {
	w.t.Helper()
	w.createStream("shipments", pgstream.StreamSpec{})
	_, err := w.db.Exec(w.ctx, `create view shipped as select payload ->> 'order_id' as order_id, (payload ->> 'amount')::numeric as amount,
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
					eventually(t, func() (bool, string) {
						n := w.count("select count(*) from " + s.shown[0].name)
						return n > after, fmt.Sprint(n, " rows")
					})
					p.kill()
					p = w.start([]string{"first", "second"}[i], configuration, env)
				}
				if err := <-publishing; err != nil {
					t.Fatal(err)
				}
				eventually(t, func() (bool, string) {
					unsettled, dead := w.backlog()
					return unsettled == 0, fmt.Sprintf("%d unsettled, %d dead letters", unsettled, dead)
				})
				w.exactlyOnce(s, mode, int(committed.Load()))
				if n := w.count("select count(*) from " + s.shown[0].name + " where amount <> 12345678901234567890.12"); n != 0 {
					t.Errorf("%d amounts have changed", n)
				}
			})
		}
	}
}

// As TestExactlyOnce_CommitInDoubt, with the other sinks of the source's database. Claims are divided to find the items that
// are refused: by the sink, or by one branch, whose dead letters they become while the others write them. I7, F1.
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
					all[n] = fmt.Sprintf(`{"order_id":"refused-%d","amount":-1}`, n)
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
				want, wantDead, wantBranch := 57, 3, 0
				if s.name == "fan-out" {
					want, wantDead, wantBranch = 60, 0, 3
				}
				eventually(t, func() (bool, string) {
					unsettled, dead := w.backlog()
					branch := w.count("select count(*) from millrace_dead_letter where branch = 'rows' and reason like '%orders_amount_check%'")
					return unsettled == 0 && dead == wantDead && branch == wantBranch,
						fmt.Sprintf("%d dead letters, %d of the branch, %d unsettled", dead, branch, unsettled)
				})
				if s.name == "fan-out" {
					w.exactlyOnce(onceSink{shown: []relation{asRows}}, mode, 57)
					s.shown = s.shown[1:]
					if n := w.count("select count(*) from millrace_dead_letter"); n != 3 {
						t.Errorf("%d dead letters of branches, want 3", n)
					}
				}
				w.exactlyOnce(s, mode, want)
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
	sink.(pipeline.SettlingSink).SettleWith(source)
	p, err := pipeline.New(pipeline.Options{Config: c, Source: source, Sink: sink, Metrics: metrics, Health: health, Logger: log})
	if err != nil {
		w.t.Fatal(err)
	}
	return &assembled{Pipeline: p, health: health}, cuts
}
