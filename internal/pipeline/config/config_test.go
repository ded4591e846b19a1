package config

import (
	"encoding/base64"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
)

const positions = `
name: telemetry
source:
  redis:
    streams: ["telemetry:t"]
    group: positions
codec: {type: JSON, field: payload}
mapping:
  columns:
  - {name: device_id, path: device_id, type: text, required: true}
  - {name: ts, path: timestamp, type: timestamptz, required: true}
  - {name: latitude, path: latitude, type: "double precision"}
  - {name: satellites, path: position.satellites, type: int}
  - {name: attributes, path: attributes, type: jsonb, default: "{}"}
  - {name: source_id, path: "@id", type: text}
state: {key: device_id, time: ts}
sink:
  table:
    name: positions
    key: [device_id, ts]
    create: IfMissing
drain: {timeout: 20s}
`

const orders = `
name: orders
source: {consumerGroup: {stream: orders, group: orders_sink}}
mapping:
  columns:
  - {name: order_id, path: order_id, type: text, required: true}
  - {name: position, path: "@position", type: bigint}
sink: {table: {name: orders, key: [order_id]}}
`

// complete uses every setting.
const complete = `
name: complete
source:
  redis: {streams: [a, b], group: g, start: Latest, reclaimAfter: 1m, afterAck: Trim, ownership: Exclusive}
codec: {type: CloudEvents, field: event}
mapping:
  filter: doc.type == 'position'
  columns:
  - {name: device, path: data.device, type: text, required: true}
  - {name: ts, path: time, type: timestamptz, required: true}
  - {name: speed, expression: double(doc.data.speed) * 3.6, type: double precision}
  - {name: tags, path: data.tags, type: "varchar[]", default: '["a", null]'}
  - {name: seen, path: data.seen, type: "timestamptz[]", timeFormat: UnixMillis}
state: {key: device, time: ts}
sink:
  fanOut:
  - name: latest
    table: {name: latest, key: [device], conflict: {action: UpdateIfNewer, newer: ts}}
  - name: archive
    table: {schema: logs, name: archive, idempotency: Ledger, create: IfMissing}
    mapping:
      filter: doc.data.archive
      columns: [{name: id, path: "@id", type: text}]
  - name: strict
    table: {name: strict, key: [device, ts], conflict: {detectMismatch: true}}
  - name: totals
    sql: {statement: "insert into totals select device, count(*) from batch group by device on conflict do nothing"}
  - name: onward
    stream: {route: "'positions_' + doc.region", key: row.device, headers: {origin: "'redis'", x.y: stream}, payload: doc.data}
  - name: web
    http: {url: "https://example.org/events", mode: Batch, type: org.example.position, data: row, headers: {X-Tenant: acme}, timeout: 3s, maxConcurrent: 2}
batch: {maxRows: 10, writers: 1}
`

func TestParseFillsInTheDefaults(t *testing.T) {
	c, err := Parse([]byte(positions))
	if err != nil {
		t.Fatal(err)
	}
	if got := c.Source.Redis.ReclaimAfter; got != DefaultReclaimAfter {
		t.Errorf("reclaimAfter is %s", got)
	}
	if got := time.Duration(c.Drain.Timeout); got != 20*time.Second {
		t.Errorf("drain timeout is %s", got)
	}
	if got := c.Mapping.Columns[3].Type; got != TypeInteger {
		t.Errorf("int became %s", got)
	}
	if got := c.Batch.MaxInFlight; got != 80_000 {
		t.Errorf("maxInFlight is %d", got)
	}
	if r, table := c.Source.Redis, c.Sink.Table; r.AfterAck != AfterAckKeep || r.Ownership != OwnershipShared || table.Idempotency != IdempotencyKey {
		t.Errorf("afterAck %s, ownership %s, idempotency %s", r.AfterAck, r.Ownership, table.Idempotency)
	}
	all, err := Parse([]byte(complete))
	if err != nil {
		t.Fatal(err)
	}
	if tags, seen := all.Mapping.Columns[3], all.Mapping.Columns[4]; tags.Type != "text[]" || seen.TimeFormat != TimeUnixMillis {
		t.Errorf("%+v, %+v", tags, seen)
	}
	if archive := all.Sink.FanOut[1]; archive.Table.Conflict.Action != ConflictNothing || archive.Table.Schema != "logs" {
		t.Errorf("%+v", archive.Table)
	}
	g, err := Parse([]byte(orders))
	if err != nil {
		t.Fatal(err)
	}
	if g.Source.ConsumerGroup.Mode != ModeShared || g.Codec.Field != "" {
		t.Errorf("consumer group: %+v, codec %+v", g.Source.ConsumerGroup, g.Codec)
	}
}

// C3: what Marshal writes, Parse reads back, and both are stable.
func TestMarshalAndParseAreInverse(t *testing.T) {
	for _, text := range []string{positions, orders, complete, descriptors(t)} {
		c, err := Parse([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		first, err := c.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse(first)
		if err != nil {
			t.Fatalf("%s\n%s", err, first)
		}
		if !reflect.DeepEqual(c, again) {
			t.Errorf("not equal after a round trip:\n%s", first)
		}
		if second, _ := again.Marshal(); string(first) != string(second) {
			t.Errorf("unstable:\n%s\n%s", first, second)
		}
	}
}

// C2: every problem has its path and line and tells what to write.
func TestParseExplainsWhatIsWrong(t *testing.T) {
	cases := []struct {
		name, old, new string
		want           []string
	}{
		{"an unknown field names the known ones", "group: positions", "group: positions\n    grup: x", []string{"line 7: source.redis.grup: unknown field; write one of afterAck, group, ownership, reclaimAfter, start, streams"}},
		{"a field that stands twice", "name: telemetry", "name: telemetry\nname: other", []string{"line 3: name: the field stands here a second time"}},
		{"a list where one value belongs", "group: positions", "group: [positions]", []string{"line 6: source.redis.group: this is a list; write a single value"}},
		{"a number where a string belongs", `default: "{}"`, "default: 7", []string{`mapping.columns[4].default: 7 is not a string; put it in quotes: "7"`}},
		{"a duration without a unit", "timeout: 20s", "timeout: 20", []string{`drain.timeout: "20" is not a duration: write a number with a unit`}},
		{"an unknown type", "type: int}", "type: int128}", []string{`line 13: mapping.columns[3].type: "int128" is not allowed; write one of text, boolean`}},
		{"a key that is not mapped", "key: [device_id, ts]", "key: [device, ts]", []string{`line 20: sink.table.key[0]: "device" is not a mapped column; write one of device_id, ts`}},
		{"a key that may be null", "type: text, required: true", "type: text", []string{"may be null, which identifies nothing; write required: true"}},
		{"two problems at once", "group: positions", "start: Middle", []string{"source.redis.group: is empty", `source.redis.start: "Middle" is not allowed; write one of Earliest, Latest`}},
		{"a position of a Redis entry", `path: "@id"`, `path: "@position"`, []string{"a Redis entry has no @position"}},
		{"an unknown property", `path: "@id"`, `path: "@identity"`, []string{`"@identity" is unknown; write one of @id`}},
		{"an empty name in a path", "path: position.satellites", "path: position..satellites", []string{"has an empty name"}},
		{"a default that is not of its type", `default: "{}"`, `default: "{"`, []string{`"{" is not a JSON document`}},
		{"a state over a column that is no time", "time: ts", "time: latitude", []string{`state.time: "latitude" is not a mapped timestamptz; write one of ts`}},
		{"a source that is missing", "redis:", "consumerGroup:", []string{"unknown field"}},
		{"bounds", "drain: {timeout: 20s}", "batch: {maxRows: 0, writers: 65, linger: 1m}", []string{"batch.writers: 65 is out of range; write 1 to 64", "batch.linger: 1m0s is out of range"}},
		{"merge keys", "codec: {type: JSON, field: payload}", "codec: {<<: {type: JSON}}", []string{"merge keys (<<) are not supported"}},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			text := strings.Replace(positions, tc.old, tc.new, 1)
			if text == positions {
				t.Fatal("the case changes nothing")
			}
			_, err := Parse([]byte(text))
			var ps Problems
			if !errors.As(err, &ps) {
				t.Fatalf("error is %v", err)
			}
			for _, want := range tc.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("want %q in\n%s", want, err)
				}
			}
			for _, p := range ps {
				if p.Line == 0 {
					t.Errorf("no line: %s", p)
				}
			}
		})
	}
}

func TestParseRefusesWhatIsNotOnePipeline(t *testing.T) {
	for name, text := range map[string]string{
		"an empty file":    "",
		"a list":           "- a",
		"two documents":    orders + "\n---\n" + orders,
		"a broken file":    "name: [",
		"a file too large": strings.Repeat("#", maxFileBytes+1),
		"itself":           "a: &a {b: *a}",
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Parse([]byte(text)); err == nil {
				t.Fatal("accepted")
			}
		})
	}
}

func TestSplitPath(t *testing.T) {
	for path, want := range map[string][]string{
		"a":      {"a"},
		"a.b.0":  {"a", "b", "0"},
		`a\.b.c`: {"a.b", "c"},
		`a\\b`:   {`a\b`},
		`\@id`:   {"@id"},
		".a":     nil, "a.": nil, "": nil, `a\`: nil,
	} {
		got, err := SplitPath(path)
		if !reflect.DeepEqual(got, want) || (err == nil) != (want != nil) {
			t.Errorf("%q: %q, %v", path, got, err)
		}
	}
}

// C2 for the settings that complete uses.
func TestParseExplainsWhatIsWrongWithSinks(t *testing.T) {
	cases := []struct {
		name, old, new string
		want           string
	}{
		{"afterAck", "afterAck: Trim", "afterAck: Drop", `line 4: source.redis.afterAck: "Drop" is not allowed; write one of Keep, Delete, Trim`},
		{"ownership", "ownership: Exclusive", "ownership: Mine", "write one of Shared, Exclusive"},
		{"a codec", "type: CloudEvents", "type: Avro", "write one of JSON, Fields, CloudEvents, Protobuf"},
		{"protobuf without description", "type: CloudEvents", "type: Protobuf", "codec.protobuf: is missing; write descriptorSet and message"},
		{"description without protobuf", "field: event}", "field: event, protobuf: {message: a.B}}", "codec.protobuf: belongs to type Protobuf"},
		{"a blank filter", "filter: doc.data.archive", "filter: ' '", "line 22: sink.fanOut[1].mapping.filter: is blank"},
		{"a filter that gives no boolean", "filter: doc.data.archive", "filter: size(doc)", "line 22: sink.fanOut[1].mapping.filter: gives int"},
		{"a variable that is not known", "double(doc.data.speed) * 3.6", "double(doc.data.speed) * factor", "mapping.columns[2].expression: at character 26: undeclared reference to 'factor'"},
		{"a row before it is there", "double(doc.data.speed) * 3.6", "row.speed", "undeclared reference to 'row'"},
		{"a position that is not there", "double(doc.data.speed) * 3.6", "position", "mapping.columns[2].expression: a Redis entry has no position; use id"},
		{"path and expression", "path: data.device", "path: data.device, expression: doc.device", "mapping.columns[0].expression: stands beside a path; keep one of the two"},
		{"an array without elements", `"varchar[]"`, `"jsonb[]"`, `mapping.columns[3].type: "jsonb[]" is not allowed; write one of text[], boolean[]`},
		{"a default that is no array", `'["a", null]'`, `'{a}'`, `"{a}" is not a JSON array; write, for example, "[]"`},
		{"an element that does not fit", `type: "varchar[]", default: '["a", null]'`, `type: "int[]", default: '[1, "x"]'`, "is not an array whose elements are a whole number that fits integer"},
		{"an array as key", "key: [device, ts], conflict", "key: [tags], conflict", "sink.fanOut[2].table.key[0]: an array cannot identify a row"},
		{"a computed key that may be null", "key: [device, ts], conflict", "key: [speed], conflict", `column "speed" may be null`},
		{"no column to compare", "action: UpdateIfNewer, newer: ts", "action: UpdateIfNewer", "sink.fanOut[0].table.conflict.newer: is empty; write the column that tells which row is newer, one of ts, speed"},
		{"a key column to compare", "newer: ts", "newer: device", "is part of the key"},
		{"a null to compare", "newer: ts", "newer: speed", "may be null, which is neither older nor newer"},
		{"newer without its action", "action: UpdateIfNewer, newer", "newer", "belongs to action UpdateIfNewer"},
		{"a mismatch of what is updated", "conflict: {detectMismatch: true}", "conflict: {action: Update, detectMismatch: true}", "detectMismatch: Update writes what differs"},
		{"neither key nor ledger", "idempotency: Ledger, ", "", "sink.fanOut[1].table.key: is empty; write the columns of a unique constraint, which make redelivery harmless, or idempotency: Ledger"},
		{"no sink", "name: onward\n    stream:", "name: onward\n    strom:", "unknown field; write one of http, mapping, name, sql, stream, table"},
		{"two sinks in a branch", "name: onward\n", "name: onward\n    sql: {statement: select from batch}\n", "sink.fanOut[4]: there are 2 sinks"},
		{"two sinks beside each other", "sink:\n", "sink:\n  sql: {statement: select from batch}\n", "sink: there are 2; write exactly one of table, stream, sql, http and fanOut"},
		{"a branch without a name", "name: web", "name: Web!", `sink.fanOut[5].name: "Web!" is not a name`},
		{"two branches of one name", "name: web", "name: onward", "is the name of two branches"},
		{"stream and route", "route: \"'positions_' + doc.region\"", "stream: s, route: a", "write exactly one of stream, a name, and route, an expression"},
		{"a header without value", `x.y: stream`, `x.y: ""`, "sink.fanOut[4].stream.headers.x.y: is empty"},
		{"a header that is a list", `x.y: stream`, `x.y: [stream]`, "sink.fanOut[4].stream.headers.x.y: this is a list; write a single value"},
		{"a header twice", `x.y: stream`, `x.y: stream, x.y: key`, "sink.fanOut[4].stream.headers.x.y: the field stands here a second time"},
		{"a statement that ignores the batch", "from batch group by device", "from other", "line 27: sink.fanOut[3].sql.statement: reads nothing of the batch"},
		{"a URL of no web server", "https://example.org/events", "ftp://example.org", "sink.fanOut[5].http.url: is not the address of a web server"},
		{"a URL with a password", "https://example.org", "https://user:secret@example.org", "holds credentials; put them into MILLRACE_HTTP_AUTHORIZATION or the whole address into MILLRACE_HTTP_URL"},
		{"a secret header", "X-Tenant: acme", "authorization: acme", "is a secret; put it into the environment variable MILLRACE_HTTP_AUTHORIZATION"},
		{"a header of the sink", "X-Tenant: acme", "Ce-Id: acme", "is written by the sink"},
		{"a header that is none", "X-Tenant: acme", "'X Tenant': acme", "is not the name of a header"},
		{"a timeout", "timeout: 3s", "timeout: 1h", "sink.fanOut[5].http.timeout: 1h0m0s is out of range; write 100ms to 5m0s"},
		{"columns that a sink needs", "columns: [{name: id, path: \"@id\", type: text}]", "columns: []", "sink.fanOut[1].mapping.columns: is empty; write the columns that the sink fills"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			text := strings.Replace(complete, tc.old, tc.new, 1)
			if text == complete {
				t.Fatal("the case changes nothing")
			}
			_, err := Parse([]byte(text))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("want %q in\n%v", tc.want, err)
			}
			if err != nil && strings.Contains(err.Error(), "secret@") {
				t.Errorf("it repeats a password:\n%v", err)
			}
		})
	}
}

func TestParseExplainsWhatIsWrongWithAMemory(t *testing.T) {
	const web, statement, group = `sink: {http: {url: "https://a"}}`, "sink: {sql: {statement: select from batch}}", "source: {consumerGroup: {stream: s, group: g}}"
	for _, tc := range []struct{ memory, sink, source, want string }{
		{"{name: Flows}", web, group, `memory.name: "Flows" is not a name`},
		{"{}", web, group, `memory.name: "" is not a name`},
		{"{name: flows}", "sink: {table: {name: t}}", group, "memory: belongs to a sql or http sink"},
		{"{name: flows}", web, "source: {redis: {streams: [s], group: g}}", "memory: belongs to a consumer group"},
		{"{name: flows}", `sink: {http: {url: "https://a", mode: Batch}}`, group, "sink.http.mode: with a memory each event has a request of its own"},
		{"{name: flows, subject: key}", statement, group, "memory.subject: a statement names its subjects itself"},
		{"{name: flows, subject: doc.}", web, group, "memory.subject: "},
		{"{name: flows, create: Always}", web, group, `memory.create: "Always" is not allowed; write one of Never, IfMissing`},
		{"{name: flows, table: t}", web, group, "memory.table: belongs to create: IfMissing"},
		{"{name: flows, keepCompleted: 1h}", web, group, "memory.keepCompleted: belongs to create: IfMissing"},
		{"{name: flows, create: IfMissing, keepCompleted: 1ms}", web, group, "memory.keepCompleted: 1ms is out of range; write 1s"},
		{"{name: flows, create: IfMissing, keepCompleted: 720h, table: public.flows}", statement, group, ""},
		{"{name: flows, subject: doc.order.id}", web, group, ""},
	} {
		_, err := Parse([]byte("name: a\n" + tc.source + "\nmemory: " + tc.memory + "\nmapping: {columns: [{name: a, path: a, type: text}]}\n" + tc.sink))
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("memory %s: want %q in\n%v", tc.memory, tc.want, err)
		}
	}
}

func TestTheStateIsNotKeptByItself(t *testing.T) {
	text := strings.Replace(complete, "{name: device, path: data.device,", "{name: device, expression: state.last.device,", 1)
	_, err := Parse([]byte(text))
	if want := "line 9: mapping.columns[0].expression: the state is kept by this column"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("want %q in %v", want, err)
	}
}

func TestExpressionsAreCheckedWithWhatIsAroundThem(t *testing.T) {
	for name, tc := range map[string]struct{ columns, key, more, want string }{
		"a state that is not kept":         {`{name: n, expression: state == null, type: boolean}`, "id", "", "mapping.columns[1].expression: uses state, and the pipeline keeps none"},
		"a key that redelivery changes":    {`{name: n, expression: deliveries, type: int, required: true}`, "n", "", `column "n" is computed with deliveries, which differs on redelivery`},
		"what is newer by redelivery":      {`{name: n, expression: received_at, type: timestamptz, required: true}`, "id", "conflict: {action: UpdateIfNewer, newer: n}", `column "n" is computed with received_at, which differs on redelivery`},
		"a key that is computed for good":  {`{name: n, expression: id + '-1', type: text, required: true}`, "n", "", ""},
		"what is newer by the entry alone": {`{name: n, expression: created_at, type: timestamptz, required: true}`, "id", "conflict: {action: UpdateIfNewer, newer: n}", ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse([]byte(`
name: x
source: {redis: {streams: [s], group: g}}
mapping: {columns: [{name: id, path: "@id", type: text}, ` + tc.columns + `]}
sink: {table: {name: t, key: [` + tc.key + `], ` + tc.more + `}}
`))
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("want %q in %v", tc.want, err)
			}
		})
	}
}

// descriptors is a pipeline of protobuf messages.
func descriptors(t testing.TB) string {
	t.Helper()
	set := &descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{{
		Name: new("position.proto"), Package: new("telemetry.v1"), Syntax: new("proto3"),
		MessageType: []*descriptorpb.DescriptorProto{
			{Name: new("Position"), Field: []*descriptorpb.FieldDescriptorProto{
				protoField("device_id", 1, descriptorpb.FieldDescriptorProto_TYPE_STRING, ""),
				protoField("timestamp", 2, descriptorpb.FieldDescriptorProto_TYPE_STRING, ""),
				protoField("latitude", 3, descriptorpb.FieldDescriptorProto_TYPE_DOUBLE, ""),
				protoField("position", 4, descriptorpb.FieldDescriptorProto_TYPE_MESSAGE, ".telemetry.v1.Fix"),
				protoField("attributes", 5, descriptorpb.FieldDescriptorProto_TYPE_STRING, ""),
			}},
			{Name: new("Fix"), Field: []*descriptorpb.FieldDescriptorProto{protoField("satellites", 1, descriptorpb.FieldDescriptorProto_TYPE_INT32, "")}},
		},
		EnumType: []*descriptorpb.EnumDescriptorProto{{Name: new("Kind"), Value: []*descriptorpb.EnumValueDescriptorProto{{
			Name: new("KIND_UNSPECIFIED"), Number: new(int32(0)),
		}}}},
	}}}
	data, err := proto.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	codec := "codec: {type: Protobuf, protobuf: {message: telemetry.v1.Position, descriptorSet: " + base64.StdEncoding.EncodeToString(data) + "}}"
	return strings.Replace(positions, "codec: {type: JSON, field: payload}", codec, 1)
}

func protoField(name string, number int32, kind descriptorpb.FieldDescriptorProto_Type, message string) *descriptorpb.FieldDescriptorProto {
	f := &descriptorpb.FieldDescriptorProto{
		Name: &name, Number: &number, Type: &kind, Label: new(descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL),
	}
	if message != "" {
		f.TypeName = &message
	}
	return f
}

func TestADescriptorSetIsLookedInto(t *testing.T) {
	good := descriptors(t)
	if _, err := Parse([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct{ old, new, want string }{
		"another message":      {"v1.Position", "v1.Speed", "the descriptor set has no telemetry.v1.Speed"},
		"an enum":              {"v1.Position", "v1.Kind", "telemetry.v1.Kind is not a message"},
		"no name":              {"telemetry.v1.Position", "a/b", `"a/b" is not the full name of a message`},
		"not base64":           {"descriptorSet: ", "descriptorSet: =", "is not base64"},
		"not a descriptor set": {"descriptorSet: ", "descriptorSet: AAAA", "is not a descriptor set"},
		"an unknown field":     {"path: latitude", "path: lat", "line 12: mapping.columns[2].path: message telemetry.v1.Position has no field lat; write one of device_id, timestamp"},
		"an unknown part":      {"path: position.satellites", "path: position.sats", "message telemetry.v1.Fix has no field sats; write one of satellites"},
		"a part of a number":   {"path: latitude", "path: latitude.degrees", "field telemetry.v1.Position.latitude has no parts"},
		"a file beside it":     {"descriptorSet: ", "descriptorSetFile: /a.pb, descriptorSet: ", "write exactly one of descriptorSet"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse([]byte(strings.Replace(good, tc.old, tc.new, 1)))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("want %q in %v", tc.want, err)
			}
		})
	}
}

func TestBranchesAreTheSinksInOneForm(t *testing.T) {
	all, err := Parse([]byte(complete))
	if err != nil {
		t.Fatal(err)
	}
	bs := all.Branches()
	if len(bs) != 6 || bs[0].Mapping != &all.Mapping || bs[1].Mapping == &all.Mapping || bs[5].HTTP == nil {
		t.Errorf("%+v", bs)
	}
	if all.Sink.FanOut[0].Mapping != nil {
		t.Error("Branches changed the configuration")
	}
	one, err := Parse([]byte(orders))
	if err != nil {
		t.Fatal(err)
	}
	if bs := one.Branches(); len(bs) != 1 || bs[0].Name != "" || bs[0].Table != one.Sink.Table || bs[0].Mapping != &one.Mapping {
		t.Errorf("%+v", bs)
	}
}

// C1 and C3 for any input: no panic, and what is accepted survives a round trip.
func FuzzParse(f *testing.F) {
	f.Add([]byte(positions))
	f.Add([]byte(orders))
	f.Add([]byte(complete))
	f.Add([]byte(descriptors(f)))
	f.Add([]byte(`{"name":"x","source":{"redis":{"streams":["s"],"group":"g"}}}`))
	f.Add([]byte("a: &a [*a]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse(data)
		if err != nil {
			var ps Problems
			if !errors.As(err, &ps) || len(ps) == 0 {
				t.Fatalf("an error that is no problem: %v", err)
			}
			return
		}
		out, err := c.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse(out)
		if err != nil {
			t.Fatalf("refused what it wrote: %v\n%s", err, out)
		}
		if !reflect.DeepEqual(c, again) {
			t.Fatalf("changed on a round trip:\n%s", out)
		}
	})
}

func TestADefaultIsNotReported(t *testing.T) {
	_, err := Parse([]byte(strings.Replace(positions, "drain:", "batch: {writers: 65}\ndrain:", 1)))
	if err == nil || !strings.Contains(err.Error(), "batch.writers: 65 is out of range") || strings.Contains(err.Error(), "maxInFlight") {
		t.Errorf("%v", err)
	}
}

func TestThePlaceOfAReceiverHoldsNoSecret(t *testing.T) {
	for address, want := range map[string]string{
		"":                                     "",
		"https://example.org/events":           "https://example.org/events",
		"https://example.org/events?token=abc": "https://example.org/events?(hidden)",
		"https://user:secret@example.org/":     "https://example.org/",
		"https://user:secret@[example.org/":    "(hidden)",
	} {
		if got := (&HTTPSink{URL: address}).Place(); got != want {
			t.Errorf("%s: %s, want %s", address, got, want)
		}
	}
}
