package pipeline_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// A real processor with a filter, computed columns and an array: what the filter leaves out is acknowledged and counted,
// what it cannot decide becomes a dead letter, and the rest are rows.
func TestProcessorFiltersAndComputes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const columns = `
  - {name: kmh, expression: 'doc.?speed.orValue(0) * 3.6', type: numeric}
  - {name: tags, path: tags, type: "text[]"}
  - {name: origin, expression: 'stream + "/" + headers.?source.orValue("none")', type: text}`
	configuration := w.configText("mapping:\n", "mapping:\n  filter: doc.type == \"position\"\n", "\n  - {name: source_id", columns+"\n  - {name: source_id", "maxDeliveries: 3", "maxDeliveries: 1")
	p := w.start("one", configuration)
	p.ready()
	const n = 200
	for i := range n {
		doc := strings.TrimSuffix(position(i, 1), "}")
		w.add(doc+`,"type":"position","speed":12.5,"tags":["a","b\"{"]}`, doc+`,"type":"hello"}`, `{"type":"hello"}`, doc+`}`)
	}
	w.do(w.redis.B().Xadd().Key(w.stream).Id("*").FieldValue().FieldValue("source", "x").
		FieldValue("payload", strings.TrimSuffix(position(n, 1), "}")+`,"type":"position"}`).Build())
	eventually(t, func() (bool, string) {
		rows, pending, undelivered, dead := w.rows(), w.pending(), w.undelivered(), w.deadLetters()
		return rows == n+1 && pending == 0 && undelivered == 0 && dead == n, fmt.Sprintf("rows %d, pending %d, undelivered %d, dead letters %d", rows, pending, undelivered, dead)
	})
	if got := w.count(`select count(*) from positions where kmh = 45 and tags = array['a', 'b"{'] and origin = $1`, w.stream+"/none"); got != n {
		t.Errorf("%d rows have their computed columns, want %d", got, n)
	}
	if got := w.count(`select count(*) from positions where kmh = 0 and tags is null and origin = $1`, w.stream+"/x"); got != 1 {
		t.Error("the entry with a header has another row")
	}
	if got := w.count(`select count(*) from millrace_dead_letter where reason like '%filter: no such key: type%'`); got != n {
		t.Errorf("%d dead letters say what the filter lacks, want %d", got, n)
	}
	want := fmt.Sprintf("result=\"filtered\"} %d", 2*n)
	eventually(t, func() (bool, string) { // counted after the commit, which is what was waited for
		_, metrics := p.get("/metrics")
		return strings.Contains(metrics, want), "the metrics lack " + want
	})
}

// Only changes are written: whatever dies in between, the rows tell every value at every time. I2, I6.
func TestProcessorWritesOnlyChanges(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	configuration := w.configText("mapping:\n", "mapping:\n  filter: state == null || state.last.odometer != doc.odometer\n")
	random := rand.New(rand.NewPCG(rand.Uint64(), 1))
	const devices, seconds = 50, 400
	value := make([]int, devices)
	var all []string
	for s := range seconds {
		for d := range devices {
			if random.IntN(4) == 0 {
				value[d]++
			}
			at := time.Unix(int64(s), 0).UTC().Format(time.RFC3339)
			all = append(all, fmt.Sprintf(`{"device_id":"%d","timestamp":%q,"odometer":%d}`, d, at, value[d]))
		}
	}
	p := w.start("one", configuration)
	p.ready()
	half := len(all) / 2
	w.addAll(all[:half])
	eventually(t, func() (bool, string) { n := w.rows(); return n > 500, fmt.Sprint(n, " rows") })
	p.kill()
	w.addAll(all[half:])
	w.start("one", configuration)
	eventually(t, func() (bool, string) {
		pending, undelivered := w.pending(), w.undelivered()
		return pending == 0 && undelivered == 0, fmt.Sprintf("pending %d, undelivered %d", pending, undelivered)
	})
	rows := w.rows()
	t.Logf("%d entries, %d rows", len(all), rows)
	if rows > len(all)/2 {
		t.Error("hardly anything was left out")
	}
	// The value at a time is that of the last row until then.
	for d := range devices {
		want := make([]string, 0, seconds)
		for s := range seconds {
			doc := all[s*devices+d]
			want = append(want, doc[strings.LastIndexByte(doc, ':')+1:len(doc)-1])
		}
		var got string
		err := w.db.QueryRow(w.ctx, `select string_agg((select odometer from positions p where device_id = $1 and p.ts <= to_timestamp(s) order by p.ts desc limit 1)::text, ' ' order by s)
			from generate_series(0, $2 - 1) s`, fmt.Sprint(d), seconds).Scan(&got)
		if err != nil {
			t.Fatal(err)
		}
		if got != strings.Join(want, " ") {
			t.Fatalf("device %d: the rows tell\n%s\nwant\n%s", d, got, strings.Join(want, " "))
		}
	}
}

// addAll appends many entries.
func (w *world) addAll(payloads []string) {
	w.t.Helper()
	const page = 1000
	for len(payloads) > 0 {
		n := min(page, len(payloads))
		w.add(payloads[:n]...)
		payloads = payloads[n:]
	}
}

// CloudEvents in binary mode, as producers write them with XADD.
func TestProcessorReadsCloudEvents(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("one", fmt.Sprintf(`
name: events
source: {redis: {streams: [%q], group: positions}}
codec: {type: CloudEvents, field: data}
mapping:
  columns:
  - {name: source, path: source, type: text, required: true}
  - {name: id, path: id, type: text, required: true}
  - {name: at, path: time, type: timestamptz}
  - {name: n, path: data.n, type: bigint}
  - {name: subject, expression: 'doc.?subject.orValue(doc.type)', type: text}
sink: {table: {name: positions, key: [source, id], create: IfMissing}}
`, w.stream))
	p.ready()
	add := func(fields ...string) {
		fv := w.redis.B().Xadd().Key(w.stream).Id("*").FieldValue()
		for i := 0; i < len(fields); i += 2 {
			fv = fv.FieldValue(fields[i], fields[i+1])
		}
		w.do(fv.Build())
	}
	binary := []string{"ce_specversion", "1.0", "ce_id", "1", "ce_source", "/a", "ce_type", "t", "ce_time", "2026-01-02T03:04:05Z", "data", `{"n":9007199254740993}`}
	add(binary...)
	add(binary...) // the same event twice is one row
	add("data", `{"specversion":"1.0","id":"2","source":"/a","type":"t","subject":"s","data":{"n":2}}`)
	eventually(t, func() (bool, string) {
		rows, pending := w.rows(), w.pending()
		return rows == 2 && pending == 0 && w.undelivered() == 0, fmt.Sprintf("rows %d, pending %d", rows, pending)
	})
	if got := w.count(`select count(*) from positions where (id, n, subject) in (('1', 9007199254740993, 't'), ('2', 2, 's'))`); got != 2 {
		t.Errorf("%d rows hold their values", got)
	}
}
