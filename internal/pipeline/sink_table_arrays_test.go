package pipeline_test

import (
	"testing"

	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// PostgreSQL reads every array back as it was meant, through an INSERT from unnest, and out again as JSON.
func TestTableSinkKeepsEveryArray(t *testing.T) {
	t.Parallel()
	c, err := config.Parse([]byte(`
name: arrays
source: {redis: {streams: [s], group: g}}
mapping:
  columns:
  - {name: id, path: "@id", type: text}
  - {name: t, path: t, type: "text[]"}
  - {name: n, path: n, type: "bigint[]"}
  - {name: d, path: d, type: "numeric[]"}
  - {name: at, path: at, type: "timestamptz[]"}
  - {name: u, path: u, type: "uuid[]"}
  - {name: f, path: f, type: "double precision[]"}
  - {name: b, path: b, type: "boolean[]", default: "[true]"}
sink: {table: {name: arrays, key: [id], create: IfMissing}}
`))
	if err != nil {
		t.Fatal(err)
	}
	sink, pool := openSink(t, postgres.NewDatabase(t), c)
	tr, err := pipeline.NewTransform(c)
	if err != nil {
		t.Fatal(err)
	}
	var items []*pipeline.Item
	for i, doc := range []string{
		`{"t":["a","b\"\\,{}'","",null,"NULL"," é\n"],"n":[[9223372036854775807,-1],[null,0]],"d":[1.10,123456789012345678901234567890.5],
			"at":["2026-01-02T03:04:05.123456+02:00",null],"u":["00112233-4455-6677-8899-aabbccddeeff"],"f":[0.1,1e300],"b":[true,false]}`,
		`{"t":[],"n":[],"d":null}`,
	} {
		it := &pipeline.Item{ID: string(rune('a' + i)), Row: make([]pipeline.Value, len(c.Mapping.Columns)), Fields: payload(doc)}
		if err := tr.Decode(it); err != nil {
			t.Fatal(err)
		}
		items = append(items, it)
	}
	if _, err := sink.Write(t.Context(), &pipeline.Batch{Items: items}); err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]string{
		"a": `{"b": [true, false], "d": [1.10, 123456789012345678901234567890.5], "f": [0.1, 1e+300], "n": [[9223372036854775807, -1], [null, 0]], "t": ["a", "b\"\\,{}'", "", null, "NULL", " é\n"], "u": ["00112233-4455-6677-8899-aabbccddeeff"], "at": ["2026-01-02T01:04:05.123456+00:00", null], "id": "a"}`,
		"b": `{"b": [true], "d": null, "f": null, "n": [], "t": [], "u": null, "at": null, "id": "b"}`,
	} {
		var same bool
		var got string
		if err := pool.QueryRow(t.Context(), "select to_jsonb(a) = $2::jsonb, to_jsonb(a)::text from arrays a where id = $1", id, want).Scan(&same, &got); err != nil || !same {
			t.Errorf("%v\n%s\nwant\n%s", err, got, want)
		}
	}
}
