package pipeline_test

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// projectionConfig is what the manager writes for a Processor with sink.projection (TestProcessorRunsTheProjectionOfItsGroup).
const projectionConfig = `
name: GROUP
source: {consumerGroup: {stream: carts, group: GROUP, mode: Ordered}}
mapping: {columns: [{name: position, path: "@position", type: bigint}]}
sink: {sql: {statement: "select millrace.project('carts', 'GROUP', array_agg(position)) from batch"}}
batch: {maxRows: 40}
`

// evolveCart keeps the order of what it is given, so that a message that is missing, double or out of order shows. One kind of message deletes the document.
const evolveCart = `create function public.evolve_cart(document jsonb, payload jsonb, headers jsonb) returns jsonb language sql as
	$$ select case when headers ->> 'type' = 'Abandoned' then null
		else jsonb_build_object('items', coalesce(document -> 'items', '[]') || (payload -> 'n'), 'by', payload -> 'product') end $$`

// cartsFold is what the documents have to be: the log, folded by the same function in plain SQL. IDs is the document's key.
const cartsFold = `with recursive h as (
		select id, payload, headers, row_number() over (partition by id order by position) n from (select IDS as id, * from millrace.carts) m where FILTER),
	f as (select id, n, public.evolve_cart(null, payload, headers) document from h where n = 1
		union all select h.id, h.n, public.evolve_cart(f.document, h.payload, h.headers) from f join h on h.id = f.id and h.n = f.n + 1)
	select coalesce(jsonb_object_agg(id, document), '{}')::text from (select distinct on (id) * from f order by id, n desc) x where document is not null`

func (w *world) sameDocuments(table, ids, filter string) {
	w.t.Helper()
	want, got := w.text(strings.NewReplacer("IDS", ids, "FILTER", filter).Replace(cartsFold)),
		w.text("select coalesce(jsonb_object_agg(key, document), '{}')::text from "+table)
	if got != want || len(want) < 20 {
		w.t.Errorf("%s has\n%.2000s\nand the log makes\n%.2000s", table, got, want)
	}
}

// carts makes an event store with these projections and their groups.
func (w *world) carts(partitions int, projections ...pgstream.ProjectionSpec) {
	w.t.Helper()
	if _, err := schema.Migrate(w.ctx, w.connect(), schema.Options{}); err != nil {
		w.t.Fatal(err)
	}
	w.exec(evolveCart)
	w.declareCarts(partitions)
	for _, p := range projections {
		w.group(p.Group, "")
	}
	w.declareCarts(partitions, projections...)
	for _, p := range projections { // of nothing yet, as the manager does
		if finished, err := pgstream.RebuildStep(w.ctx, w.db, "carts", p.Name, 100); err != nil || !finished {
			w.t.Fatal(finished, err)
		}
	}
}

func (w *world) group(name, eventType string) {
	w.t.Helper()
	g := pgstream.GroupSpec{Stream: "carts", Name: name, Mode: pgstream.ModeOrdered, AckWait: 3 * time.Second, BackoffInitial: 50 * time.Millisecond, BackoffMax: time.Second}
	if eventType != "" {
		g.Filter = pgstream.Filter{Headers: map[string]any{"type": eventType}}
	}
	if err := pgstream.ApplyGroup(w.ctx, w.db, g); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) declareCarts(partitions int, projections ...pgstream.ProjectionSpec) {
	w.t.Helper()
	plan, err := pgstream.PlanStream(w.ctx, w.db, pgstream.StreamSpec{Name: "carts", Partitions: partitions, Versions: true, Projections: projections})
	if err == nil {
		err = pgstream.ApplyStream(w.ctx, w.db, plan)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// shop appends n messages, two at a time, to 20 carts.
func (w *world) shop(from, n int) {
	w.t.Helper()
	for i := from; i < from+n; i += 2 {
		var ms []pgstream.NewMessage
		for j := i; j < i+2; j++ {
			kind := "Added"
			if j%37 == 0 {
				kind = "Abandoned"
			}
			ms = append(ms, pgstream.NewMessage{
				Payload: fmt.Appendf(nil, `{"n": %d, "product": "p%d"}`, j, j%7), Headers: fmt.Appendf(nil, `{"type": %q}`, kind),
			})
		}
		if _, err := pgstream.Append(w.ctx, w.db, "carts", fmt.Sprintf("cart-%d", i%20), pgstream.AnyVersion, ms); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *world) projected(group string) {
	w.t.Helper()
	eventually(w.t, func() (bool, string) {
		return w.count(`select lag + in_flight + retrying from millrace.stats('carts') where "group" = $1`, group) == 0, group + " is behind"
	})
}

// A projection that runs in processors: filtered by type, in batches, with its checkpoint in the transaction of its documents, stopped and started, killed, and
// rebuilt meanwhile by somebody who dies as well. A reactor beside it.
func TestSeed_E05_ConsumersWithProjectorsAndReactors(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	spec := pgstream.ProjectionSpec{Name: "cart-items", Function: "public.evolve_cart", Documents: "public.cart_items", Group: "projector"}
	w.carts(8, spec)
	w.group("reactor", "Abandoned")
	w.exec("create table mail (n int)")
	env := config.EnvSourceDatabaseURL + "=" + w.dsn
	projector := strings.ReplaceAll(projectionConfig, "GROUP", "projector")
	reactor := strings.NewReplacer("GROUP", "reactor", `{name: position, path: "@position", type: bigint}`, "{name: n, path: n, type: integer}",
		"select millrace.project('carts', 'GROUP', array_agg(position)) from batch", "insert into mail select n from batch").Replace(projectionConfig)

	w.shop(0, 400)
	one, two := w.start("one", projector, env), w.start("two", projector, env)
	mails := w.start("mails", reactor, env)
	documents := func() int { return w.count("select coalesce(sum(version), 0) from cart_items") }
	eventually(t, func() (bool, string) { n := documents(); return n > 50, fmt.Sprint(n, " changes") })
	one.kill()
	w.shop(400, 400)
	one = w.start("one", projector, env)

	// A rebuild of which every other step is cut off, with the old documents live.
	spec.Revision = "2"
	w.declareCarts(8, spec)
	steps := 0
	for finished := false; !finished; steps++ {
		conn := w.connect()
		if steps%2 == 0 {
			tx, err := conn.Begin(w.ctx)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = tx.Exec(w.ctx, "select millrace.rebuild_step('carts', 'cart-items', 150)") // what it has done is lost with the connection
			w.exec("select pg_terminate_backend($1)", conn.PgConn().PID())
		} else {
			var err error
			if finished, err = pgstream.RebuildStep(w.ctx, conn, "carts", "cart-items", 150); err != nil {
				t.Log("step: ", err) // such as a deadlock with a batch: it is tried again
			}
		}
		_ = conn.Close(context.Background())
		w.shop(800+20*steps, 20)
		if steps == 3 {
			two.kill()
		}
	}
	if steps < 6 {
		t.Errorf("the rebuild took %d steps, and was not interrupted", steps)
	}
	w.projected("projector")
	w.sameDocuments("cart_items", "key", "true")

	// Stopped, it goes on where it was; what is redelivered changes nothing.
	one.signal(syscall.SIGTERM)
	one.exited(patience)
	before := documents()
	w.shop(5000, 200)
	// The lag of several lanes is an estimate: a lane whose next message comes later has that much less.
	if n, now := w.count(`select lag from millrace.stats('carts') where "group" = 'projector'`), documents(); n < 180 || n > 200 || now != before {
		t.Errorf("the lag is %d, and %d changes became %d, while nobody projects 200 events", n, before, now)
	}
	w.start("three", projector, env)
	w.projected("projector")
	w.sameDocuments("cart_items", "key", "true")

	// The reactor has got its type only, each once.
	w.projected("reactor")
	mails.signal(syscall.SIGTERM)
	if want, got := w.text("select string_agg(payload ->> 'n', ',' order by payload ->> 'n') from millrace.carts where headers ->> 'type' = 'Abandoned'"),
		w.text("select string_agg(n::text, ',' order by n::text) from mail"); want != got {
		t.Errorf("the reactor was told of %s and not of %s", got, want)
	}
}

// Documents of one entity each, documents with an id of their own that many entities change, and raw SQL; all of them asynchronous.
func TestSeed_E08_ProjectionsToDocumentsAndRawSQL(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.carts(1, // one partition: what many entities change is changed in the order of the stream
		pgstream.ProjectionSpec{Name: "by-cart", Function: "public.evolve_cart", Documents: "public.by_cart", Group: "by_cart"},
		pgstream.ProjectionSpec{Name: "by-product", Function: "public.evolve_cart", Documents: "public.by_product", DocumentID: []string{"product"}, Group: "by_product"})
	w.group("raw", "")
	w.exec(`create table sold (product text, position bigint, stream text, key text, version bigint);
		create function public.sell(stream text, key text, version bigint, "position" bigint, payload jsonb, headers jsonb) returns void language sql
			as $$ insert into public.sold values (payload ->> 'product', "position", stream, key, version) $$`)
	w.exec("select millrace.create_projection('carts', 'raw', 'public.sell', p_group => 'raw')")
	w.shop(0, 300)
	for _, group := range []string{"by_cart", "by_product", "raw"} {
		w.start(group, strings.ReplaceAll(projectionConfig, "GROUP", group), config.EnvSourceDatabaseURL+"="+w.dsn)
	}
	w.shop(300, 100)
	for _, group := range []string{"by_cart", "by_product", "raw"} {
		w.projected(group)
	}
	w.sameDocuments("by_cart", "key", "true")
	w.sameDocuments("by_product", "payload ->> 'product'", "true")
	if bad := w.count(`select count(*) from (select payload ->> 'product', position, 'carts', key, version from millrace.carts except all select * from sold) x`); bad != 0 || w.count("select count(*) from sold") != 400 {
		t.Errorf("the raw projection has %d of 400 rows, and %d are missing", w.count("select count(*) from sold"), bad)
	}
}
