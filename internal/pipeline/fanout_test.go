package pipeline_test

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

// fanOutSink writes positions into a table, into an audit with a mapping of its own, and publishes them.
const fanOutSink = `sink:
  fanOut:
  - {name: rows, table: {name: positions, key: [device_id, ts], create: IfMissing}}
  - name: audit
    mapping: {columns: [{name: id, path: "@id", type: text}, {name: odometer, path: odometer, type: bigint, default: "0"}]}
    table: {name: audit, key: [id], create: IfMissing}
  - {name: ship, stream: {stream: shipments}}
`

// fanOut is the seed's pipeline with several sinks; the stream remembers dedupe keys.
func (w *world) fanOut(replacements ...string) string {
	w.t.Helper()
	if _, err := schema.Migrate(w.ctx, w.connect(), schema.Options{}); err != nil {
		w.t.Fatal(err)
	}
	w.createStream("shipments", pgstream.StreamSpec{DedupeWindow: time.Hour})
	return w.configText(append([]string{"sink:\n  table: {name: positions, key: [device_id, ts], create: IfMissing}\n", fanOutSink}, replacements...)...)
}

// Every branch has every entry exactly once, while the processor is killed twice, and what one branch refuses is a dead letter
// of this branch alone. F1, I2, I3.
func TestFanOut_ProcessorKilledTwice(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	configuration := w.fanOut()
	l := seeded(t, &load{total: 30_000, duplicates: 0.05, undecodable: 0.001, poison: 0.003})
	w.createPositions("check (odometer >= 0)")
	producing := make(chan error, 1)
	p := w.start("first", configuration)
	p.ready()
	go func() { producing <- l.produce(w.ctx, w.redis, w.stream) }()
	for i, after := range []int{3_000, 12_000} {
		eventually(t, func() (bool, string) { n := w.rows(); return n > after, fmt.Sprint(n, " rows") })
		p.kill()
		p = w.start([]string{"first", "second"}[i], configuration)
	}
	if err := <-producing; err != nil {
		t.Fatal(err)
	}
	broken, poisoned := int(l.broken.Load()), int(l.poisoned.Load())
	decodable := l.total - broken
	letters := func(branch string) int {
		return w.count("select count(*) from millrace_dead_letter where branch = $1", branch)
	}
	eventually(t, func() (bool, string) {
		rows, undelivered, pending := w.rows(), w.undelivered(), w.pending()
		return rows == int(l.valid.Load()) && undelivered == 0 && pending == 0 && letters("") == broken && letters("rows") == poisoned,
			fmt.Sprintf("rows %d of %d, undelivered %d, pending %d, dead letters %d of %d, of the branch %d of %d",
				rows, l.valid.Load(), undelivered, pending, letters(""), broken, letters("rows"), poisoned)
	})
	audit, messages := w.count("select count(*) from audit"), w.count("select count(*) from millrace.shipments")
	distinct := w.count("select count(distinct payload ->> 'source_id') from millrace.shipments")
	t.Logf("%s; audit %d, messages %d of %d entries", w.ledger(l), audit, messages, distinct)
	if audit != decodable || messages != decodable || distinct != decodable {
		t.Errorf("%d entries can be decoded, so that is what each branch must have", decodable)
	}
	if n := w.count("select count(*) from millrace_dead_letter"); n != broken+poisoned {
		t.Errorf("%d dead letters, want %d", n, broken+poisoned)
	}
}

// A branch whose table is gone stops everything: nothing is acknowledged, nothing is set aside, the processor is unready and
// says which branch it is. When the table is back, it goes on, and nobody has anything twice. F1, I9.
func TestFanOut_ADeadBranch(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("one", w.fanOut("state: {key: device_id, time: ts}", "batch: {maxRows: 100}"))
	p.ready()
	var first, more []string
	for n := range 500 {
		first, more = append(first, position(n, 0)), append(more, position(n, 1))
	}
	w.add(first...)
	becomes(t, "messages", 500, func() int { return w.count("select count(*) from millrace.shipments") })
	if _, err := w.db.Exec(w.ctx, "alter table audit rename to gone"); err != nil {
		t.Fatal(err)
	}
	w.add(more...)
	eventually(t, func() (bool, string) {
		code, text := p.get("/readyz")
		return code == http.StatusServiceUnavailable && text == "sink: branch audit: relation \"public.audit\" does not exist (SQLSTATE 42P01)\n", text
	})
	// It is unready with the first batch that fails, and reads the rest of the entries meanwhile.
	becomes(t, "pending", 500, w.pending)
	if rows, messages := w.rows(), w.count("select count(*) from millrace.shipments"); rows != 500 || messages != 500 {
		t.Errorf("rows %d, messages %d while a branch is dead", rows, messages)
	}
	if _, err := w.db.Exec(w.ctx, "alter table gone rename to audit"); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() (bool, string) {
		code, text := p.get("/readyz")
		rows, audit, messages, pending := w.rows(), w.count("select count(*) from audit"), w.count("select count(*) from millrace.shipments"), w.pending()
		return rows == 1000 && audit == 1000 && messages == 1000 && pending == 0 && code == http.StatusOK,
			fmt.Sprintf("rows %d, audit %d, messages %d, pending %d, %s", rows, audit, messages, pending, text)
	})
	if n := w.deadLetters(); n != 0 {
		t.Errorf("%d dead letters", n)
	}
}

// With the policy Pending an entry that a branch refuses is written by none, and stays pending until the branch takes it.
func TestFanOut_PolicyPending(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.createPositions("check (odometer >= 0)")
	p := w.start("one", w.fanOut("policy: DeadLetter", "policy: Pending", "reclaimAfter: 1s", "reclaimAfter: 200ms"))
	p.ready()
	ids := w.add(position(1, 0), `{"device_id":"poison","timestamp":"2026-01-01T00:00:00Z","odometer":-1}`, position(2, 0))
	eventually(t, func() (bool, string) {
		n := w.deliveries(ids[1])
		return n > 4, fmt.Sprint(n, " deliveries")
	})
	if rows, audit, messages := w.rows(), w.count("select count(*) from audit"), w.count("select count(*) from millrace.shipments"); rows != 2 || audit != 2 || messages != 2 {
		t.Errorf("rows %d, audit %d, messages %d", rows, audit, messages)
	}
	if _, err := w.db.Exec(w.ctx, "alter table positions drop constraint rule"); err != nil {
		t.Fatal(err)
	}
	becomes(t, "pending", 0, w.pending)
	if rows, audit, messages := w.rows(), w.count("select count(*) from audit"), w.count("select count(*) from millrace.shipments"); rows != 3 || audit != 3 || messages != 3 {
		t.Errorf("rows %d, audit %d, messages %d", rows, audit, messages)
	}
}
