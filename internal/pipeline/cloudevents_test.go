package pipeline

import (
	"strings"
	"testing"

	"github.com/tidwall/gjson"

	"github.com/millrace-dev/millrace/internal/pipeline/expression"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

const eventColumns = `
codec: {type: CloudEvents}
mapping:
  columns:
  - {name: id, path: id, type: text, required: true}
  - {name: type, path: type, type: text}
  - {name: at, path: time, type: timestamptz}
  - {name: ext, path: tenant, type: jsonb}
  - {name: n, path: data.n, type: bigint}
  - {name: data, path: data, type: TYPE}
  - {name: computed, expression: 'string(doc.type) + "/" + (type(doc.?data.orValue(0)) == map ? string(doc.data.n) : "")', type: text}
sink: {table: {name: t, key: [id]}}`

func TestDecodeReadsCloudEvents(t *testing.T) {
	attributes := []string{"ce_specversion", "1.0", "ce-id", "1", "Ce-Source", "/s", "ce_type", "created", "ce_time", "2026-01-02T03:04:05Z", "ce_tenant", "acme"}
	with := func(more ...string) []string { return append(append([]string{}, attributes...), more...) }
	for name, tc := range map[string]struct {
		dataType string
		fields   []string
		want     string
	}{
		"structured": {"jsonb", []string{"payload", `{"specversion":"1.0","id":"1","source":"/s","type":"created","time":"2026-01-02T03:04:05Z","tenant":{"a":1},"data":{"n":9007199254740993}}`},
			`{"id":"1","type":"created","at":"2026-01-02T03:04:05Z","ext":{"a":1},"n":9007199254740993,"data":{"n":9007199254740993},"computed":"created/9007199254740993"}`},
		"structured, announced by its content type": {"jsonb", []string{"content-type", "application/cloudevents+json; charset=utf-8", "payload", `{"specversion":"1.0","id":"1","source":"/s","type":"x"}`},
			`{"id":"1","type":"x","at":null,"ext":null,"n":null,"data":null,"computed":"x/"}`},
		"structured with JSON in base64": {"jsonb", []string{"payload", `{"specversion":"1.0","id":"1","source":"/s","type":"x","datacontenttype":"application/json","data_base64":"eyJuIjo3fQ=="}`},
			`{"id":"1","type":"x","at":null,"ext":null,"n":7,"data":{"n":7},"computed":"x/7"}`},
		"structured with bytes": {"bytea", []string{"payload", `{"specversion":"1.0","id":"1","source":"/s","type":"x","data_base64":"AQL/"}`},
			`{"id":"1","type":"x","at":null,"ext":null,"n":null,"data":"AQL/","computed":"x/"}`},
		"binary": {"jsonb", with("payload", `{"n":7}`),
			`{"id":"1","type":"created","at":"2026-01-02T03:04:05Z","ext":"acme","n":7,"data":{"n":7},"computed":"created/7"}`},
		"binary with a type of JSON": {"jsonb", with("payload", `{"n":7}`, "content-type", "application/vnd.x+json; charset=utf-8"),
			`{"id":"1","type":"created","at":"2026-01-02T03:04:05Z","ext":"acme","n":7,"data":{"n":7},"computed":"created/7"}`},
		"binary with text": {"text", with("payload", `{"n":7}`, "content_type", "text/plain"),
			`{"id":"1","type":"created","at":"2026-01-02T03:04:05Z","ext":"acme","n":null,"data":"{\"n\":7}","computed":"created/"}`},
		"binary with bytes": {"bytea", with("payload", "\x01\x02\xff", "ce_datacontenttype", "application/octet-stream"),
			`{"id":"1","type":"created","at":"2026-01-02T03:04:05Z","ext":"acme","n":null,"data":"AQL/","computed":"created/"}`},
		"binary with text that is base64 for bytes": {"bytea", with("payload", "AQL/", "ce_datacontenttype", "text/plain"),
			`{"id":"1","type":"created","at":"2026-01-02T03:04:05Z","ext":"acme","n":null,"data":"QVFMLw==","computed":"created/"}`},
		"binary without data":                 {"jsonb", with(), `{"id":"1","type":"created","at":"2026-01-02T03:04:05Z","ext":"acme","n":null,"data":null,"computed":"created/"}`},
		"no event":                            {"jsonb", []string{"payload", `{"n":1}`}, "error: this is no CloudEvent"},
		"no id":                               {"jsonb", []string{"payload", `{"specversion":"1.0","source":"/s","type":"x"}`}, "error: the CloudEvent has no id"},
		"an id that is no text":               {"jsonb", []string{"payload", `{"specversion":"1.0","id":1,"source":"/s","type":"x"}`}, "error: the CloudEvent has no id"},
		"another version":                     {"jsonb", []string{"ce_specversion", "2.0", "ce_id", "1", "ce_source", "s", "ce_type", "t"}, `error: specversion "2.0"`},
		"a batch":                             {"jsonb", []string{"payload", `[{"specversion":"1.0"}]`}, "error: a batch of CloudEvents"},
		"data twice":                          {"jsonb", []string{"payload", `{"specversion":"1.0","id":"1","source":"/s","type":"x","data":1,"data_base64":""}`}, "error: both data and data_base64"},
		"data that is not what its type says": {"jsonb", with("payload", `{`), "error: the event's data: the document is not valid JSON"},
		"data that is no base64":              {"jsonb", []string{"payload", `{"specversion":"1.0","id":"1","source":"/s","type":"x","data_base64":"*"}`}, "error: not base64"},
	} {
		t.Run(name, func(t *testing.T) {
			tr, _, c := pipelineOf(t, fromRedis+strings.ReplaceAll(eventColumns, "TYPE", tc.dataType))
			row, err := decode(tr, entry(tc.fields...))
			if wrong, ok := strings.CutPrefix(tc.want, "error: "); ok {
				if err == nil || !strings.Contains(err.Error(), wrong) {
					t.Fatalf("error %v, want %s", err, wrong)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := string(appendRow(nil, c.Mapping.Columns, row)); got != tc.want {
				t.Errorf("%s, want %s", got, tc.want)
			}
		})
	}
}

func TestDecodeReadsCloudEventsFromMessages(t *testing.T) {
	tr, _, c := pipelineOf(t, "source: {consumerGroup: {stream: s, group: g}}"+strings.ReplaceAll(eventColumns, "TYPE", "jsonb"))
	for _, it := range []*Item{
		{Headers: []byte(`{"ce_specversion":"1.0","ce_id":"1","ce_source":"/s","ce_type":"x"}`), Payload: `{"n":7}`},
		{Payload: `{"specversion":"1.0","id":"1","source":"/s","type":"x","data":{"n":7}}`},
	} {
		row, err := decode(tr, it)
		const want = `{"id":"1","type":"x","at":null,"ext":null,"n":7,"data":{"n":7},"computed":"x/7"}`
		if got := string(appendRow(nil, c.Mapping.Columns, row)); err != nil || got != want {
			t.Errorf("%s, %v, want %s", got, err, want)
		}
	}
}

// Whatever an entry holds, decoding it as a CloudEvent ends without a panic, and its document is JSON.
func FuzzCloudEvents(f *testing.F) {
	f.Add("1.0", `{"n":7}`, "application/json")
	f.Add("", `{"specversion":"1.0","id":"1","source":"/s","type":"x","data_base64":"eyJuIjo3fQ=="}`, "")
	f.Add("1.0", "\xff", "text/plain")
	f.Fuzz(func(t *testing.T, version, body, contentType string) {
		tr, _, c := pipelineOf(t, fromRedis+strings.ReplaceAll(eventColumns, "TYPE", "jsonb"))
		it := entry("ce_id", "1", "ce_source", "s", "ce_type", "t", "content-type", contentType, "payload", body)
		if version != "" {
			it.Fields = append(it.Fields, redisstream.Field{Field: "ce_specversion", Value: version})
		}
		if row, err := decode(tr, it); err == nil {
			doc, err := expression.AppendJSON(nil, it.Variables(nil).Variable(expression.VarDoc))
			if err != nil || !gjson.ValidBytes(doc) {
				t.Fatalf("%s, %v", doc, err)
			}
			if text := appendRow(nil, c.Mapping.Columns, row); !gjson.ValidBytes(text) {
				t.Fatalf("%s", text)
			}
			_ = it.Variables(c.Mapping.Columns).Variable(expression.VarHeaders)
		}
	})
}
