package pipeline

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/expression"
)

// pipelineOf compiles a pipeline from the given parts of its configuration, with its state.
func pipelineOf(t testing.TB, parts string) (*Transform, *State, *config.Config) {
	t.Helper()
	c, err := config.Parse([]byte("name: t\n" + parts + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	tr, err := NewTransform(c)
	if err != nil {
		t.Fatal(err)
	}
	s := NewState(c)
	if err := tr.Remember(s, c); err != nil {
		t.Fatal(err)
	}
	return tr, s, c
}

const fromRedis = "source: {redis: {streams: [s], group: g}}\n"

func TestDecodeComputesColumns(t *testing.T) {
	const doc = `{"speed":12,"price":19.99,"qty":3,"big":9007199254740993,"name":"a","at":"2026-01-02T03:04:05.1234569Z","list":[1,2.50],"o":{"d":1.10},"raw":"AQI=","unix":1700000000}`
	for _, tc := range []struct{ column, expression, want string }{
		{"type: numeric", `doc.speed * 3.6`, "43.2"},
		{"type: numeric", `doc.price * doc.qty`, "59.97"},
		{"type: bigint", `doc.big + 1`, "9007199254740994"},
		{"type: bigint", `doc.speed / 2.5`, `error: column "v": "4.8" is not a whole number`},
		{"type: text", `stream + "/" + doc.name + "/" + string(doc.qty)`, `"s/a/3"`},
		{"type: text", `doc.o`, `"{\"d\":1.10}"`},
		{"type: boolean", `doc.speed > 10`, "true"},
		{"type: bigint", `doc.speed > 10`, "error: is a boolean"},
		{"type: timestamptz", `timestamp(doc.at) + duration("1s")`, `"2026-01-02T03:04:06.123456Z"`},
		{"type: timestamptz, timeFormat: UnixSeconds", `doc.unix + 1`, `"2023-11-14T22:13:21Z"`},
		{"type: timestamptz", `doc.unix`, "error: is a number, not an RFC 3339 time"},
		{"type: timestamptz", `received_at`, `"2023-11-14T22:13:20.000001Z"`},
		{"type: text", `received_at`, `"2023-11-14T22:13:20.000001Z"`},
		{"type: jsonb", `{"a": doc.list, "b": doc.o, "c": [null, received_at]}`, `{"a":[1,2.50],"b":{"d":1.10},"c":[null,"2023-11-14T22:13:20.000001Z"]}`},
		{"type: jsonb", `doc.name`, `"a"`},
		{"type: 'numeric[]'", `doc.list.map(x, x * 2)`, `[2,5]`},
		{"type: 'text[]'", `[doc.name, stream]`, `["a","s"]`},
		{"type: bytea", `b"\001\002"`, `"AQI="`},
		{"type: bytea", `doc.raw`, `"AQI="`},
		{"type: text", `b"ab"`, "error: is bytes"},
		{"type: text", `doc.?missing`, "null"},
		{"type: text, default: d", `doc.?missing`, `"d"`},
		{"type: text, required: true", `doc.?missing`, `error: column "v": its expression gives no value`},
		{"type: text", `doc.missing`, `error: column "v": no such key: missing; write doc.?name or has(doc.name)`},
		{"type: text", `headers.trace`, `"t1"`},
	} {
		t.Run(tc.expression, func(t *testing.T) {
			tr, _, c := pipelineOf(t, fromRedis+"mapping:\n  columns:\n  - {name: id, path: '@id', type: text}\n  - {name: v, expression: '"+tc.expression+"', "+tc.column+"}\nsink: {table: {name: t, key: [id]}}")
			it := entry("trace", "t1", "payload", doc)
			it.Deliveries = 1
			row, err := decode(tr, it)
			if wrong, ok := strings.CutPrefix(tc.want, "error: "); ok {
				if err == nil || !strings.Contains(err.Error(), wrong) {
					t.Fatalf("error %v, want %s", err, wrong)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := string(appendValue(nil, c.Mapping.Columns[1].Type, row[1])); got != tc.want {
				t.Errorf("%s, want %s", got, tc.want)
			}
		})
	}
}

// What the filter leaves out need not have the columns; what it cannot decide is undecodable, and not left out.
func TestFilterComesBeforeTheMapping(t *testing.T) {
	tr, s, _ := pipelineOf(t, fromRedis+`
mapping:
  filter: doc.type == "position" && doc.?speed.orValue(0) >= 0
  columns:
  - {name: device, path: device, type: text, required: true}
  - {name: ts, path: ts, type: timestamptz, timeFormat: UnixSeconds, required: true}
state: {key: device, time: ts}
sink: {table: {name: t, key: [device, ts]}}`)
	for doc, want := range map[string]string{
		`{"type":"position","device":"a","ts":1}`:            "written",
		`{"type":"hello"}`:                                   "filtered",
		`{"type":"position","speed":-1,"device":"b","ts":1}`: "filtered",
		`{"type":"position","device":"a"}`:                   `column "ts": no value`,
		`{"device":"a","ts":1}`:                              "filter: no such key: type",
		`{"type":"position","speed":"fast"}`:                 "filter: no such overload",
	} {
		it := entry("payload", doc)
		_, err := decode(tr, it)
		switch got := map[bool]string{true: "filtered", false: "written"}[it.Filtered]; {
		case err != nil && !strings.Contains(err.Error(), want):
			t.Errorf("%s: %v, want %s", doc, err, want)
		case err == nil && got != want:
			t.Errorf("%s: %s, want %s", doc, got, want)
		case err != nil && it.Filtered:
			t.Errorf("%s: an item without a verdict is left out", doc)
		}
	}
	if _, ok := s.Get("b"); ok {
		t.Error("what was left out is in the state")
	}
}

const changes = fromRedis + `
mapping:
  filter: state == null || state.last.v != doc.v || received_at < state.last_seen
  columns:
  - {name: device, path: device, type: text, required: true}
  - {name: ts, path: ts, type: timestamptz, timeFormat: UnixSeconds, required: true}
  - {name: v, path: v, type: numeric}
  - {name: delta, expression: 'state == null ? null : doc.v - state.last.v', type: numeric}
  - {name: n, expression: 'state == null ? 0 : state.count', type: bigint}
state: {key: device, time: ts}
sink: {table: {name: t, key: [device, ts]}}`

// Expressions see the state as it was before the item, and what a filter leaves out does not change it.
func TestExpressionsSeeTheState(t *testing.T) {
	tr, _, c := pipelineOf(t, changes)
	for i, tc := range []struct{ doc, want string }{
		{`{"device":"a","ts":1,"v":1.5}`, `{"device":"a","ts":"1970-01-01T00:00:01Z","v":1.5,"delta":null,"n":0}`},
		{`{"device":"a","ts":2,"v":1.5}`, "filtered"},
		{`{"device":"b","ts":2,"v":1}`, `{"device":"b","ts":"1970-01-01T00:00:02Z","v":1,"delta":null,"n":0}`},
		{`{"device":"a","ts":3,"v":4}`, `{"device":"a","ts":"1970-01-01T00:00:03Z","v":4,"delta":2.5,"n":1}`},
		{`{"device":"a","ts":4}`, "error: filter: no such key: v"},
		{`{"device":"a","ts":5,"v":3}`, `{"device":"a","ts":"1970-01-01T00:00:05Z","v":3,"delta":-1,"n":2}`},
	} {
		it := entry("payload", tc.doc)
		it.ID = fmt.Sprintf("1-%d", i)
		row, err := decode(tr, it)
		got := string(appendRow(nil, c.Mapping.Columns, row))
		if it.Filtered {
			got = "filtered"
		}
		if err != nil {
			got = "error: " + err.Error()
		}
		if got != tc.want && !(err != nil && strings.HasPrefix(got, tc.want)) {
			t.Errorf("%d: %s, want %s", i, got, tc.want)
		}
	}
}

// I2: an item that comes again is never left out because of itself, whatever its source says about its deliveries: a claim
// that is given back counts none.
func TestRedeliveryIsNotLeftOutBecauseOfItself(t *testing.T) {
	tr, _, _ := pipelineOf(t, changes)
	at := func(stream, id, doc string, deliveries int) *Item {
		it := entry("payload", doc)
		it.Stream, it.ID, it.Deliveries = stream, id, deliveries
		if _, err := decode(tr, it); err != nil {
			t.Fatal(err)
		}
		return it
	}
	items := []struct{ stream, id, doc string }{
		{"s", "1-1", `{"device":"a","ts":1,"v":1}`},
		{"s", "1-2", `{"device":"a","ts":2,"v":2}`},
		{"s", "2-0", `{"device":"a","ts":1,"v":3}`}, // late
		{"r", "1-1", `{"device":"a","ts":3,"v":4}`},
	}
	for n := range items {
		for again := range 3 {
			for _, i := range items[:n+1] {
				if it := at(i.stream, i.id, i.doc, again); it.Filtered {
					t.Errorf("%v is left out when it comes for the %d. time", i, again+2)
				}
			}
		}
	}
	if it := at("r", "1-2", `{"device":"a","ts":3,"v":4}`, 2); !it.Filtered {
		t.Error("an entry further in the stream is taken for one that has been seen")
	}
	if it := at("q", "1-1", `{"device":"a","ts":4,"v":4}`, 2); !it.Filtered {
		t.Error("an entry that is newer than everything is taken for one that has been seen")
	}
}

func TestStateCannotDependOnItself(t *testing.T) {
	c, err := config.Parse([]byte("name: t\n" + fromRedis + `
mapping:
  columns:
  - {name: device, expression: 'state == null ? "a" : "b"', type: text, required: true}
  - {name: ts, path: ts, type: timestamptz, required: true}
state: {key: device, time: ts}
sink: {table: {name: t, key: [device, ts]}}`))
	if err != nil {
		return // found even earlier
	}
	tr, err := NewTransform(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := tr.Remember(NewState(c), c); Classify(err) != ClassConfiguration {
		t.Errorf("%v", err)
	}
}

// A sink's expressions see the row, and everything the mapping saw.
func TestSinkExpressionsSeeTheRow(t *testing.T) {
	tr, _, c := pipelineOf(t, fromRedis+`
mapping:
  columns:
  - {name: device, path: device, type: text, required: true}
  - {name: ts, path: ts, type: timestamptz, timeFormat: UnixSeconds, required: true}
  - {name: n, path: n, type: bigint}
  - {name: d, path: d, type: numeric}
  - {name: r, path: r, type: real}
  - {name: j, path: j, type: jsonb}
  - {name: "y", path: "y", type: bytea}
  - {name: a, path: a, type: "bigint[]"}
  - {name: none, path: none, type: text}
state: {key: device, time: ts}
sink: {table: {name: t, key: [device, ts]}}`)
	it := entry("payload", `{"device":"x","ts":1,"n":9007199254740993,"d":1.10,"r":0.1,"j":{"k":[1.0]},"y":"AQI=","a":[1,null],"extra":true}`)
	if _, err := decode(tr, it); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		`row.device + "/" + string(row.n)`:                   `"x/9007199254740993"`,
		`row.ts + duration("1s")`:                            `"1970-01-01T00:00:02Z"`,
		`[row.d, row.r, row.j.k[0], row.y, row.a, row.none]`: `[1.1,0.1,1,"AQI=",[1,null],null]`,
		`doc.extra`: `true`,
		`row`:       `{"device":"x","ts":"1970-01-01T00:00:01Z","n":9007199254740993,"d":1.1,"r":0.1,"j":{"k":[1.0]},"y":"AQI=","a":[1,null],"none":null}`,
	} {
		p, err := expression.Compile(text, expression.Value, expression.AfterMapping)
		if err != nil {
			t.Fatal(err)
		}
		got, err := p.EvalJSON(it.Variables(c.Mapping.Columns))
		if err != nil || string(got) != want {
			t.Errorf("%s: %s, %v, want %s", text, got, err, want)
		}
	}
	if doc, err := expression.AppendJSON(nil, it.Variables(nil).Variable(expression.VarDoc)); err != nil || !strings.HasPrefix(string(doc), `{"device":"x","ts":1,"n":9007199254740993,"d":1.10`) {
		t.Errorf("%s, %v", doc, err)
	}
}

// A message's variables are those of its headers, key and position.
func TestExpressionsSeeAMessage(t *testing.T) {
	tr, _, c := pipelineOf(t, `
source: {consumerGroup: {stream: s, group: g}}
mapping:
  columns:
  - {name: v, expression: '[key, headers.h, string(position), string(created_at), doc.a]', type: jsonb}
sink: {table: {name: t}}`)
	key := "k"
	it := &Item{Key: &key, Headers: []byte(`{"h":"x"}`), Position: 7, Created: time.Unix(0, 0), Payload: `{"a":1.0}`}
	row, err := decode(tr, it)
	if err != nil || row[0].S != `["k","x","7","1970-01-01T00:00:00Z",1]` {
		t.Errorf("%v, %v, %v", row, err, c.Name)
	}
}
