package pipeline_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

// publishing is the seed's pipeline with a sink that publishes, into a database with the streams moving, standing and raw (bytes).
func (w *world) publishing(sink string, replacements ...string) string {
	w.t.Helper()
	if _, err := schema.Migrate(w.ctx, w.connect(), schema.Options{}); err != nil {
		w.t.Fatal(err)
	}
	w.createStream("moving", pgstream.StreamSpec{})
	w.createStream("standing", pgstream.StreamSpec{DedupeWindow: pgstream.NoDedupe})
	plan, err := pgstream.PlanStream(w.ctx, w.db, pgstream.StreamSpec{Name: "raw", Partitions: 1, PayloadType: pgstream.PayloadBytes})
	if err != nil {
		w.t.Fatal(err)
	}
	if err := pgstream.ApplyStream(w.ctx, w.db, plan); err != nil {
		w.t.Fatal(err)
	}
	return w.configText(append([]string{"sink:\n  table: {name: positions, key: [device_id, ts], create: IfMissing}\n", "sink:\n  stream: " + sink + "\n"}, replacements...)...)
}

func (w *world) text(sql string, args ...any) string {
	w.t.Helper()
	var text string
	if err := w.db.QueryRow(w.ctx, "select coalesce(("+sql+")::text, '')", args...).Scan(&text); err != nil {
		w.t.Fatal(err)
	}
	return text
}

// Stream, key, headers and payload come from expressions. What an expression has no value for, and what goes to a stream that
// does not exist, becomes a dead letter with the reason, and nothing else does.
func TestStreamSink_Expressions(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("one", w.publishing(`
    route: "doc.speed > 0 ? 'moving' : doc.?target.orValue('standing')"
    key: "doc.device_id"
    headers: {kind: "'position'", speed: doc.speed, note: "doc.?note.orValue(null)", from: stream}
    payload: "{'device': row.device_id, 'speed': doc.speed * 2, 'at': row.ts, 'odometer': row.odometer}"`))
	p.ready()
	entry := func(more string) string {
		return `{"device_id":"d","timestamp":"2026-01-01T00:00:00Z","odometer":9007199254740993` + more + `}`
	}
	w.add(entry(`,"speed":1.1,"note":"\"x\" ü"`), entry(`,"speed":0`), entry(``), entry(`,"speed":0,"target":"nowhere"`), entry(`,"speed":0,"target":"raw"`))
	becomes(t, "dead letters", 2, w.deadLetters)
	becomes(t, "pending", 0, w.pending)

	const row = "select string_agg(concat_ws(' ', key, headers - 'from', payload), '; ') from millrace."
	if got, want := w.text(row+"moving"), `d {"kind": "position", "note": "\"x\" ü", "speed": "1.1"} {"at": "2026-01-01T00:00:00Z", "speed": 2.2, "device": "d", "odometer": 9007199254740993}`; got != want {
		t.Errorf("moving: %s\nwant: %s", got, want)
	}
	if got, want := w.text(row+"standing"), `d {"kind": "position", "speed": "0"} {"at": "2026-01-01T00:00:00Z", "speed": 0, "device": "d", "odometer": 9007199254740993}`; got != want {
		t.Errorf("standing: %s\nwant: %s", got, want)
	}
	if got := w.text("select convert_from(payload, 'UTF8') from millrace.raw"); !strings.Contains(got, `"device":"d"`) {
		t.Errorf("raw: %s", got)
	}
	if got := w.text("select headers ->> 'from' from millrace.standing"); got != w.stream {
		t.Errorf("header from: %s", got)
	}
	for _, reason := range []string{`route: no such key: speed`, `route: stream "nowhere" does not exist`} {
		if n := w.count("select count(*) from millrace_dead_letter where reason like $1", reason+"%"); n != 1 {
			t.Errorf("%d dead letters because of %s; there are: %s", n, reason, w.text("select string_agg(reason, '; ') from millrace_dead_letter"))
		}
	}
}

// The messages of a key are in the order of their entries, whatever else is written beside; each entry is published once,
// although the processor is killed and a stream remembers for two minutes what it has.
func TestStreamSink_OrderPerKeyFromRedis(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	configuration := w.publishing(`{stream: moving, key: row.device_id}`, "state: {key: device_id, time: ts}", "batch: {writers: 4, maxRows: 50}")
	const devices, total = 50, 20_000
	p := w.start("one", configuration)
	p.ready()
	produced := make(chan struct{})
	go func() {
		defer close(produced)
		for n := 0; n < total; n += 500 {
			var entries []string
			for i := n; i < n+500; i++ {
				entries = append(entries, position(i%devices, i/devices))
			}
			w.add(entries...)
		}
	}()
	messages := func() int { return w.count("select count(*) from millrace.moving") }
	for _, after := range []int{2_000, 8_000} {
		eventually(t, func() (bool, string) { n := messages(); return n > after, fmt.Sprint(n, " messages") })
		p.kill()
		p = w.start("one", configuration)
	}
	<-produced
	eventually(t, func() (bool, string) {
		n, undelivered, pending := messages(), w.undelivered(), w.pending()
		return undelivered == 0 && pending == 0, fmt.Sprintf("%d messages, undelivered %d, pending %d", n, undelivered, pending)
	})
	distinct := w.count("select count(distinct payload ->> 'source_id') from millrace.moving")
	t.Logf("entries %d, messages %d, distinct %d", total, messages(), distinct)
	if messages() != total || distinct != total {
		t.Error("not exactly once")
	}
	back := w.count(`select count(*) from (select (payload ->> 'odometer')::bigint < lag((payload ->> 'odometer')::bigint) over (partition by key order by "position") as back
		from millrace.moving) x where back`)
	if back != 0 {
		t.Errorf("%d messages of a key are out of order", back)
	}
}

// Without columns a message is the document as it came.
func TestStreamSink_TheDocumentAsItCame(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	text := w.publishing(`{stream: raw}`, "state: {key: device_id, time: ts}\n", "")
	from, to := strings.Index(text, "mapping:"), strings.Index(text, "sink:")
	p := w.start("one", text[:from]+text[to:])
	p.ready()
	document := `{ "b": 1.0, "a":  "x" }`
	w.add(document)
	becomes(t, "messages", 1, func() int { return w.count("select count(*) from millrace.raw") })
	if got := w.text("select convert_from(payload, 'UTF8') from millrace.raw"); got != document {
		t.Errorf("%q, want %q", got, document)
	}
}

// A dedupe window that is taken away, or given, while messages are published fails none of them.
func TestStreamSink_AWindowThatChanges(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("one", w.publishing(`{stream: moving}`))
	p.ready()
	w.add(position(1, 1))
	messages := func() int { return w.count("select count(*) from millrace.moving") }
	becomes(t, "messages", 1, messages)
	for i, window := range []int{0, 60} {
		if _, err := w.db.Exec(w.ctx, "update millrace_engine.stream set dedupe_window_seconds = $1 where name = 'moving'", window); err != nil {
			t.Fatal(err)
		}
		w.add(position(1, 2+i))
		becomes(t, "messages", 2+i, messages)
	}
	if n := w.deadLetters(); n != 0 {
		t.Errorf("%d dead letters", n)
	}
}
