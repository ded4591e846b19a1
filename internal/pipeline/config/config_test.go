package config

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"
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
	if got := c.Batch.MaxInFlight; got != 8000 {
		t.Errorf("maxInFlight is %d", got)
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
	for _, text := range []string{positions, orders} {
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
		{"an unknown field names the known ones", "group: positions", "group: positions\n    grup: x", []string{"line 7: source.redis.grup: unknown field; write one of group, reclaimAfter, start, streams"}},
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
		{"what a later release brings", "create: IfMissing", "conflict: {action: UpdateIfNewer}", []string{"UpdateIfNewer is not available yet; write Nothing or Update"}},
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

// C1 and C3 for any input: no panic, and what is accepted survives a round trip.
func FuzzParse(f *testing.F) {
	f.Add([]byte(positions))
	f.Add([]byte(orders))
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
