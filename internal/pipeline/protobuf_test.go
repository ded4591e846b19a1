package pipeline

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidwall/gjson"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/expression"
)

// positionProto is telemetry.v1.Position, as protoc would describe it:
//
//	message Position {
//	  string device = 1; int64 odometer = 2; uint64 serial = 3; double latitude = 4; float speed = 5; bool ignition = 6;
//	  bytes raw = 7; Status status = 8; google.protobuf.Timestamp at = 9; Place place = 10; repeated int64 counts = 11;
//	  map<string, string> labels = 12; optional int32 floor = 13; google.protobuf.Struct extra = 14;
//	  google.protobuf.Int64Value wrapped = 15; google.protobuf.Duration took = 16;
//	}
//	message Place { string city = 1; Place parent = 2; }
//	enum Status { UNKNOWN = 0; ACTIVE = 1; }
const positionProto = `
name: "position.proto" package: "telemetry.v1" syntax: "proto3"
dependency: ["google/protobuf/timestamp.proto", "google/protobuf/struct.proto", "google/protobuf/wrappers.proto", "google/protobuf/duration.proto"]
message_type: {
  name: "Position"
  field: {name: "device" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL}
  field: {name: "odometer" number: 2 type: TYPE_INT64 label: LABEL_OPTIONAL}
  field: {name: "serial" number: 3 type: TYPE_UINT64 label: LABEL_OPTIONAL}
  field: {name: "latitude" number: 4 type: TYPE_DOUBLE label: LABEL_OPTIONAL}
  field: {name: "speed" number: 5 type: TYPE_FLOAT label: LABEL_OPTIONAL}
  field: {name: "ignition" number: 6 type: TYPE_BOOL label: LABEL_OPTIONAL}
  field: {name: "raw" number: 7 type: TYPE_BYTES label: LABEL_OPTIONAL}
  field: {name: "status" number: 8 type: TYPE_ENUM type_name: ".telemetry.v1.Status" label: LABEL_OPTIONAL}
  field: {name: "at" number: 9 type: TYPE_MESSAGE type_name: ".google.protobuf.Timestamp" label: LABEL_OPTIONAL}
  field: {name: "place" number: 10 type: TYPE_MESSAGE type_name: ".telemetry.v1.Place" label: LABEL_OPTIONAL}
  field: {name: "counts" number: 11 type: TYPE_INT64 label: LABEL_REPEATED}
  field: {name: "labels" number: 12 type: TYPE_MESSAGE type_name: ".telemetry.v1.Position.LabelsEntry" label: LABEL_REPEATED}
  field: {name: "floor" number: 13 type: TYPE_INT32 label: LABEL_OPTIONAL proto3_optional: true oneof_index: 0}
  field: {name: "extra" number: 14 type: TYPE_MESSAGE type_name: ".google.protobuf.Struct" label: LABEL_OPTIONAL}
  field: {name: "wrapped" number: 15 type: TYPE_MESSAGE type_name: ".google.protobuf.Int64Value" label: LABEL_OPTIONAL}
  field: {name: "took" number: 16 type: TYPE_MESSAGE type_name: ".google.protobuf.Duration" label: LABEL_OPTIONAL}
  oneof_decl: {name: "_floor"}
  nested_type: {
    name: "LabelsEntry" options: {map_entry: true}
    field: {name: "key" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL}
    field: {name: "value" number: 2 type: TYPE_STRING label: LABEL_OPTIONAL}
  }
}
message_type: {
  name: "Place"
  field: {name: "city" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL}
  field: {name: "parent" number: 2 type: TYPE_MESSAGE type_name: ".telemetry.v1.Place" label: LABEL_OPTIONAL}
}
enum_type: {name: "Status" value: {name: "UNKNOWN" number: 0} value: {name: "ACTIVE" number: 1}}
`

// descriptorSet is what protoc --include_imports --descriptor_set_out writes.
func descriptorSet(t testing.TB) []byte {
	t.Helper()
	file := &descriptorpb.FileDescriptorProto{}
	if err := prototext.Unmarshal([]byte(positionProto), file); err != nil {
		t.Fatal(err)
	}
	set := &descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{
		protodesc.ToFileDescriptorProto(timestamppb.File_google_protobuf_timestamp_proto), protodesc.ToFileDescriptorProto(structpb.File_google_protobuf_struct_proto),
		protodesc.ToFileDescriptorProto(wrapperspb.File_google_protobuf_wrappers_proto), protodesc.ToFileDescriptorProto(durationpb.File_google_protobuf_duration_proto), file,
	}}
	data, err := proto.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// protobufOf compiles a pipeline of protobuf messages.
func protobufOf(t testing.TB, columns string) (*Transform, *config.Config) {
	t.Helper()
	tr, _, c := pipelineOf(t, fromRedis+"codec: {type: Protobuf, protobuf: {message: telemetry.v1.Position, descriptorSet: '"+base64.StdEncoding.EncodeToString(descriptorSet(t))+
		"'}}\nmapping:\n  columns:\n  - {name: id, path: '@id', type: text}\n"+columns+"\nsink: {table: {name: t, key: [id]}}")
	return tr, c
}

// position writes a message in the text format as bytes.
func position(t testing.TB, text string) string {
	t.Helper()
	d, err := messageDescriptor(&config.ProtobufCodec{DescriptorSet: base64.StdEncoding.EncodeToString(descriptorSet(t)), Message: "telemetry.v1.Position"})
	if err != nil {
		t.Fatal(err)
	}
	m := dynamicpb.NewMessage(d)
	if err := prototext.Unmarshal([]byte(text), m); err != nil {
		t.Fatal(err)
	}
	data, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

const fullPosition = `device: "d1" odometer: 9007199254740993 serial: 18446744073709551615 latitude: 52.52 speed: 0.1 ignition: true raw: "\001\377" status: ACTIVE
	at: {seconds: 1700000000 nanos: 123456789} place: {city: "B" parent: {city: "D"}} counts: [9223372036854775807, -1] labels: {key: "b" value: "2"} labels: {key: "a" value: "1"}
	floor: 0 extra: {fields: {key: "k" value: {list_value: {values: {number_value: 1.5} values: {null_value: NULL_VALUE}}}}} wrapped: {value: 7} took: {seconds: 1 nanos: 500000000}`

func TestDecodeReadsProtobuf(t *testing.T) {
	for _, tc := range []struct{ column, full, empty string }{
		{"path: device, type: text", `"d1"`, `""`},
		{"path: odometer, type: bigint", `9007199254740993`, `0`},
		{"path: serial, type: numeric", `18446744073709551615`, `0`},
		{"path: serial, type: bigint", `error: fits bigint`, `0`},
		{"path: latitude, type: double precision", `52.52`, `0`},
		{"path: speed, type: real", `0.1`, `0`},
		{"path: speed, type: numeric", `0.1`, `0`},
		{"path: ignition, type: boolean", `true`, `false`},
		{"path: raw, type: bytea", `"Af8="`, `""`},
		{"path: raw, type: jsonb", `"Af8="`, `""`},
		{"path: raw, type: text", `error: is bytes`, `error: is bytes`},
		{"path: status, type: text", `"ACTIVE"`, `"UNKNOWN"`},
		{"path: status, type: smallint", `1`, `0`},
		{"path: at, type: timestamptz", `"2023-11-14T22:13:20.123456Z"`, `null`},
		{"path: at, type: text", `"2023-11-14T22:13:20.123456789Z"`, `null`},
		{"path: place.parent.city, type: text", `"D"`, `null`},
		{"path: place, type: jsonb", `{"city":"B","parent":{"city":"D"}}`, `null`},
		{"path: counts, type: 'bigint[]'", `[9223372036854775807,-1]`, `[]`},
		{"path: counts.1, type: bigint", `-1`, `null`},
		{"path: labels.a, type: text", `"1"`, `null`},
		{"path: labels, type: jsonb", `{"a":"1","b":"2"}`, `{}`},
		{"path: floor, type: integer", `0`, `null`},
		{"path: floor, type: integer, default: '-1'", `0`, `-1`},
		{"path: extra.k.0, type: numeric", `1.5`, `null`},
		{"path: extra, type: jsonb", `{"k":[1.5,null]}`, `null`},
		{"path: wrapped, type: bigint", `7`, `null`},
		{"path: took, type: text", `"1.5s"`, `null`},
		{"expression: 'doc.odometer + size(doc.counts)', type: bigint", `9007199254740995`, `0`},
		{"expression: 'doc.?at.orValue(received_at) > timestamp(\"2023-11-14T22:13:20.1Z\")', type: boolean", `true`, `false`},
		{"expression: 'doc.status + doc.?place.?parent.?city.orValue(\"\")', type: text", `"ACTIVED"`, `"UNKNOWN"`},
		{"expression: doc, type: jsonb", `{"device":"d1","odometer":9007199254740993,"serial":18446744073709551615,"latitude":52.52,"speed":0.1,"ignition":true,"raw":"Af8=","status":"ACTIVE","at":"2023-11-14T22:13:20.123456789Z","place":{"city":"B","parent":{"city":"D"}},"counts":[9223372036854775807,-1],"labels":{"a":"1","b":"2"},"floor":0,"extra":{"k":[1.5,null]},"wrapped":7,"took":"1.5s"}`,
			`{"device":"","odometer":0,"serial":0,"latitude":0,"speed":0,"ignition":false,"raw":"","status":"UNKNOWN","counts":[],"labels":{}}`},
	} {
		t.Run(tc.column, func(t *testing.T) {
			tr, c := protobufOf(t, "  - {name: v, "+tc.column+"}")
			for text, want := range map[string]string{fullPosition: tc.full, "": tc.empty} {
				row, err := decode(tr, entry("payload", position(t, text)))
				if wrong, ok := strings.CutPrefix(want, "error: "); ok {
					if err == nil || !strings.Contains(err.Error(), wrong) {
						t.Errorf("error %v, want %s", err, wrong)
					}
					continue
				}
				if err != nil {
					t.Error(err)
				} else if got := string(appendValue(nil, c.Mapping.Columns[1].Type, row[1])); got != want {
					t.Errorf("%s, want %s", got, want)
				}
			}
		})
	}
}

// A time that PostgreSQL has no place for is refused, and does not become another.
func TestDecodeRefusesTimesOutOfRange(t *testing.T) {
	tr, _ := protobufOf(t, "  - {name: v, path: at, type: timestamptz}")
	for seconds, fits := range map[string]bool{"253402300799": true, "-62135596800": true, "9223372036853": true, "9223372036854": false, "-210866803201": false, "9223372036854775807": false} {
		_, err := decode(tr, entry("payload", position(t, "at: {seconds: "+seconds+"}")))
		if fits != (err == nil) {
			t.Errorf("%s: %v", seconds, err)
		}
	}
}

func TestDecodeRefusesWhatIsNoMessage(t *testing.T) {
	tr, _ := protobufOf(t, "  - {name: v, path: device, type: text}")
	for _, payload := range []string{"\x0a\xff", "{}", "\x0a\x01\xff", strings.Repeat("\x52\x7f", 100)} {
		if _, err := decode(tr, entry("payload", payload)); err == nil || !strings.Contains(err.Error(), "is not a message of type telemetry.v1.Position") {
			t.Errorf("%q: %v", payload, err)
		}
	}
}

// A mistake in the mapping of a message is found before there is one.
func TestProtobufChecksPaths(t *testing.T) {
	set := base64.StdEncoding.EncodeToString(descriptorSet(t))
	file := filepath.Join(t.TempDir(), "set.pb")
	if err := os.WriteFile(file, descriptorSet(t), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		codec config.ProtobufCodec
		path  string
		want  string // "" when nothing is wrong
	}{
		"right":                 {config.ProtobufCodec{DescriptorSet: set, Message: "telemetry.v1.Position"}, "place.city", ""},
		"from a file":           {config.ProtobufCodec{DescriptorSetFile: file, Message: "telemetry.v1.Position"}, "labels.x", ""},
		"no such field":         {config.ProtobufCodec{DescriptorSet: set, Message: "telemetry.v1.Position"}, "place.town", "message telemetry.v1.Place has no field town; write one of city, parent"},
		"a field without parts": {config.ProtobufCodec{DescriptorSet: set, Message: "telemetry.v1.Position"}, "device.x", "has no parts"},
		"no such message":       {config.ProtobufCodec{DescriptorSet: set, Message: "telemetry.v1.Positions"}, "x", "has no message telemetry.v1.Positions"},
		"no such file":          {config.ProtobufCodec{DescriptorSetFile: file + "x", Message: "telemetry.v1.Position"}, "x", "no such file"},
		"no descriptor set":     {config.ProtobufCodec{DescriptorSet: "AAAA", Message: "x.Y"}, "x", "is not a descriptor set"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := NewTransform(&config.Config{
				Codec:   config.Codec{Type: config.CodecProtobuf, Field: "payload", Protobuf: &tc.codec},
				Mapping: config.Mapping{Columns: []config.Column{{Name: "v", Path: tc.path, Type: config.TypeText}}},
			})
			if tc.want == "" && err != nil || tc.want != "" && (Classify(err) != ClassConfiguration || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
}

// A file does not grow a message's place in the limits: nesting is bounded.
func TestProtobufNestingIsBounded(t *testing.T) {
	tr, _ := protobufOf(t, "  - {name: v, path: place, type: jsonb}")
	inner := []byte{}
	for range maxDepth + 10 {
		inner = protoField(2, inner)
	}
	begin := time.Now()
	if _, err := decode(tr, entry("payload", string(protoField(10, inner)))); err == nil {
		t.Error("a message nested without end was taken")
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
}

// protoField writes a field of bytes.
func protoField(number byte, data []byte) []byte {
	out := []byte{number<<3 | 2}
	for n := len(data); ; n >>= 7 {
		if n < 0x80 {
			out = append(out, byte(n))
			break
		}
		out = append(out, byte(n)|0x80)
	}
	return append(out, data...)
}

// Whatever the bytes, decoding ends without a panic, and the document is JSON.
func FuzzProtobuf(f *testing.F) {
	f.Add([]byte(position(f, fullPosition)))
	f.Add([]byte{})
	tr, c := protobufOf(f, "  - {name: p, path: place, type: jsonb}\n  - {name: c, path: counts, type: 'bigint[]'}\n  - {name: l, path: labels.a, type: text}\n  - {name: x, path: extra.k.0, type: jsonb}\n  - {name: t, path: at, type: timestamptz}")
	f.Fuzz(func(t *testing.T, data []byte) {
		it := entry("payload", string(data))
		row, err := decode(tr, it)
		if err != nil {
			return
		}
		if text := appendRow(nil, c.Mapping.Columns, row); !gjson.ValidBytes(text) {
			t.Fatalf("%s", text)
		}
		if doc, err := expression.AppendJSON(nil, it.Variables(nil).Variable(expression.VarDoc)); err == nil && !gjson.ValidBytes(doc) {
			t.Fatalf("%s", doc)
		}
	})
}
