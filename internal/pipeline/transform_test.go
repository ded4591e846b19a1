package pipeline

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

// transformOf compiles columns written as YAML flow mappings.
func transformOf(t testing.TB, codec string, columns ...string) (*Transform, *config.Config) {
	t.Helper()
	text := "name: t\nsource: {redis: {streams: [s], group: g}}\ncodec: {type: " + codec + "}\nmapping:\n  columns:\n" +
		"  - {name: id, path: '@id', type: text}\n"
	for _, c := range columns {
		text += "  - {" + c + "}\n"
	}
	text += "sink: {table: {name: t, key: [id]}}\n"
	c, err := config.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	tr, err := NewTransform(c)
	if err != nil {
		t.Fatal(err)
	}
	return tr, c
}

func decode(tr *Transform, it *Item) ([]Value, error) {
	it.Row = make([]Value, len(tr.columns))
	err := tr.Decode(it)
	return it.Row, err
}

func entry(fields ...string) *Item {
	it := &Item{ID: "1-1", Stream: "s", Received: time.UnixMicro(1_700_000_000_000_001)}
	for i := 0; i < len(fields); i += 2 {
		it.Fields = append(it.Fields, redisstream.Field{Field: fields[i], Value: fields[i+1]})
	}
	return it
}

func TestDecodeConvertsEveryType(t *testing.T) {
	micros := func(s string) Value {
		at, err := time.Parse(time.RFC3339Nano, s)
		if err != nil {
			t.Fatal(err)
		}
		return intValue(at.UnixMicro())
	}
	cases := []struct {
		name, column, json string
		want               Value
		wrong              string // part of the error, when there is one
	}{
		{"a text keeps its escapes' meaning", "type: text", `"a\nb\u00e9"`, textValue("a\nbé"), ""},
		{"a number as text keeps its digits", "type: text", `1.10`, textValue("1.10"), ""},
		{"an object as text is as it was written", "type: text", `{"a": 1}`, textValue(`{"a": 1}`), ""},
		{"a zero byte cannot be text", "type: text", `"a\u0000b"`, Value{}, "holds a zero byte"},
		{"null is missing", "type: text", `null`, Value{}, ""},
		{"true", "type: boolean", `true`, intValue(1), ""},
		{"false as a text", "type: boolean", `"false"`, intValue(0), ""},
		{"a boolean is no yes", "type: boolean", `"yes"`, Value{}, `"yes" is not true or false`},
		{"the largest smallint", "type: smallint", `32767`, intValue(32767), ""},
		{"a smallint overflows", "type: smallint", `32768`, Value{}, "fits smallint"},
		{"an integer overflows", "type: integer", `-2147483649`, Value{}, "fits integer"},
		{"a bigint beyond 2^53 is exact", "type: bigint", `9007199254740993`, intValue(9007199254740993), ""},
		{"a bigint as a text, as JavaScript writes it", "type: bigint", `"9223372036854775807"`, intValue(math.MaxInt64), ""},
		{"a bigint overflows", "type: bigint", `9223372036854775808`, Value{}, "fits bigint"},
		{"a whole number with an exponent", "type: bigint", `1.5e3`, intValue(1500), ""},
		{"a fraction is no whole number", "type: bigint", `1.5`, Value{}, "fits bigint"},
		{"a huge exponent is refused at once", "type: bigint", `1e999999999`, Value{}, "fits bigint"},
		{"a boolean is no number", "type: bigint", `true`, Value{}, "is a boolean"},
		{"a numeric keeps every digit", "type: numeric", `123456789012345678901234567890.10`, textValue("123456789012345678901234567890.10"), ""},
		{"a numeric as a text", "type: numeric", `"-0.5e-3"`, textValue("-0.5e-3"), ""},
		{"a word is no numeric", "type: numeric", `"NaN"`, Value{}, "is not a numeric"},
		{"a double", "type: double precision", `52.52`, doubleValue(52.52), ""},
		{"a double overflows", "type: double precision", `1e400`, Value{}, "is not a double precision"},
		{"a hexadecimal text is no double", "type: double precision", `"0x1p2"`, Value{}, "is not a double precision"},
		{"a real", "type: real", `1.5`, realValue(1.5), ""},
		{"a time", "type: timestamptz", `"2026-01-02T03:04:05.123456+02:00"`, micros("2026-01-02T01:04:05.123456Z"), ""},
		{"a time is cut to microseconds, not rounded", "type: timestamptz", `"2026-01-02T03:04:05.1234569Z"`, micros("2026-01-02T03:04:05.123456Z"), ""},
		{"a time before 1970 is cut towards the past", "type: timestamptz, timeFormat: UnixSeconds", `-1.0000001`, intValue(-1_000_001), ""},
		{"a number is no RFC 3339 time", "type: timestamptz", `1700000000`, Value{}, "is a number, not an RFC 3339 time"},
		{"a date is no time", "type: timestamptz", `"2026-01-02"`, Value{}, "is not an RFC 3339 time"},
		{"unix seconds", "type: timestamptz, timeFormat: UnixSeconds", `1700000000`, intValue(1_700_000_000_000_000), ""},
		{"unix seconds with a fraction", "type: timestamptz, timeFormat: UnixSeconds", `1700000000.1234567`, intValue(1_700_000_000_123_456), ""},
		{"unix milliseconds as a text", "type: timestamptz, timeFormat: UnixMillis", `"1700000000123"`, intValue(1_700_000_000_123_000), ""},
		{"unix milliseconds with an exponent", "type: timestamptz, timeFormat: UnixMillis", `1.7e12`, intValue(1_700_000_000_000_000), ""},
		{"unix microseconds", "type: timestamptz, timeFormat: UnixMicros", `1700000000123456`, intValue(1_700_000_000_123_456), ""},
		{"a time out of range", "type: timestamptz, timeFormat: UnixSeconds", `99999999999999`, Value{}, "outside the range"},
		{"jsonb is as it was written", "type: jsonb", `{"n": 9007199254740993, "d": 1.10}`, textValue(`{"n": 9007199254740993, "d": 1.10}`), ""},
		{"a JSON text is jsonb", "type: jsonb", `"a"`, textValue(`"a"`), ""},
		{"a Buffer of Node inside jsonb", "type: jsonb", `{"io":{"type":"Buffer","data":[1,2,255]},"n":[{"data":[104,105],"type":"Buffer"}]}`, textValue(`{"io":"AQL/","n":["aGk="]}`), ""},
		{"an object that only looks like a Buffer stays", "type: jsonb", `{"type":"Buffer","data":[1],"more":1}`, textValue(`{"type":"Buffer","data":[1],"more":1}`), ""},
		{"base64", "type: bytea", `"AQL/"`, textValue("\x01\x02\xff"), ""},
		{"base64 for URLs without padding", "type: bytea", `"AQL_"`, textValue("\x01\x02\xff"), ""},
		{"a Buffer of Node", "type: bytea", `{"type":"Buffer","data":[1,2,255]}`, textValue("\x01\x02\xff"), ""},
		{"a Buffer with more than bytes", "type: bytea", `{"type":"Buffer","data":[256]}`, Value{}, "is neither base64"},
		{"no base64", "type: bytea", `"*"`, Value{}, "is not base64"},
		{"a UUID", "type: uuid", `"00112233-4455-6677-8899-AABBCCDDEEFF"`, textValue("\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff"), ""},
		{"no UUID", "type: uuid", `"00112233-4455"`, Value{}, "is not a uuid"},
		{"an object is no number", "type: bigint", `{}`, Value{}, "is an object or array"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			tr, _ := transformOf(t, "JSON", "name: v, path: a.v, "+tc.column)
			row, err := decode(tr, entry("payload", `{"b":0,"a":{"w":1,"v":`+tc.json+`}}`))
			if tc.wrong != "" {
				if err == nil || !strings.Contains(err.Error(), tc.wrong) || !strings.Contains(err.Error(), `column "v"`) {
					t.Fatalf("error %v, want %q", err, tc.wrong)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if row[1] != tc.want {
				t.Errorf("%+v, want %+v", row[1], tc.want)
			}
		})
	}
}

func TestDecodeRefusesWhatIsNoDocument(t *testing.T) {
	tr, _ := transformOf(t, "JSON", "name: v, path: v, type: text, required: true")
	deep := strings.Repeat(`{"v":`, maxDepth+1) + "1" + strings.Repeat("}", maxDepth+1)
	for name, tc := range map[string]struct {
		it   *Item
		want string
	}{
		"no such field":           {entry("other", "{}"), `no field "payload"`},
		"not JSON":                {entry("payload", `{"v":`), "not valid JSON"},
		"not an object":           {entry("payload", `[1]`), "not a JSON object"},
		"not UTF-8":               {entry("payload", "{\"v\":\"\xff\"}"), "not UTF-8"},
		"nested without end":      {entry("payload", deep), "nested deeper"},
		"a required value is not": {entry("payload", `{"w":1}`), `column "v": no value at v`},
		"a required value's null": {entry("payload", `{"v":null}`), `column "v": no value at v`},
	} {
		if _, err := decode(tr, tc.it); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error %v, want %q", name, err, tc.want)
		}
	}
}

func TestDecodeFollowsPaths(t *testing.T) {
	tr, _ := transformOf(t, "JSON",
		`name: nested, path: a.b.c, type: bigint`, `name: whole, path: a.b, type: jsonb`, `name: second, path: "list.1", type: text`,
		`name: dotted, path: 'x\.y', type: text`, `name: received, path: "@received_at", type: timestamptz`, `name: stream, path: "@stream", type: text`,
		`name: fallback, path: missing, type: timestamptz, timeFormat: UnixMillis, default: "1970-01-01T00:00:01Z"`)
	// As in jsonb, the last of several members with one name counts, and what stood below the earlier ones is gone.
	row, err := decode(tr, entry("payload", `{"a":{"b":{"c":1}},"list":["x","y"],"x.y":"z","a":{"b":{"d":2}}}`))
	if err != nil {
		t.Fatal(err)
	}
	want := []Value{textValue("1-1"), {}, textValue(`{"d":2}`), textValue("y"), textValue("z"), intValue(1_700_000_000_000_001), textValue("s"), intValue(1_000_000)}
	for i := range want {
		if row[i] != want[i] {
			t.Errorf("column %d: %+v, want %+v", i, row[i], want[i])
		}
	}
}

func TestDecodeReadsFields(t *testing.T) {
	tr, _ := transformOf(t, "Fields", `name: n, path: n, type: bigint`, `name: raw, path: raw, type: bytea`, `name: doc, path: doc, type: jsonb`)
	row, err := decode(tr, entry("n", "1", "raw", "\x00\xff", "doc", `{"b":{"type":"Buffer","data":[1]}}`, "n", "2"))
	if err != nil {
		t.Fatal(err)
	}
	if row[1] != intValue(2) || row[2] != textValue("\x00\xff") || row[3] != textValue(`{"b":"AQ=="}`) {
		t.Errorf("%+v", row)
	}
	if _, err := decode(tr, entry("doc", "{")); err == nil {
		t.Error("a field that is not JSON was taken for jsonb")
	}
}

// Whatever an entry holds, decoding ends without a panic and fills every column.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{`{"a":{"b":1}}`, `{"t":"2026-01-01T00:00:00Z","n":1e5,"j":{"type":"Buffer","data":[1]}}`, `[[[`, "\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		tr, _ := transformOf(t, "JSON", "name: b, path: a.b, type: bigint", "name: t, path: t, type: timestamptz",
			"name: u, path: t, type: timestamptz, timeFormat: UnixSeconds", "name: n, path: n, type: numeric",
			"name: j, path: j, type: jsonb", "name: y, path: j, type: bytea", "name: i, path: u, type: uuid")
		row, err := decode(tr, entry("payload", s))
		if err == nil && !row[0].Valid {
			t.Fatal("a row without its id")
		}
	})
}
