package pipeline

import (
	"strings"
	"testing"

	"github.com/tidwall/gjson"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

func TestDecodeConvertsArrays(t *testing.T) {
	for name, tc := range map[string]struct{ column, json, want string }{
		"texts":                      {"type: 'text[]'", `["a","b\"\\,{}","",null,1.10,true]`, `["a","b\"\\,{}","",null,"1.10","true"]`},
		"empty":                      {"type: 'bigint[]'", `[ ]`, `[]`},
		"bigints keep every digit":   {"type: 'bigint[]'", `[9223372036854775807, "1", 1e3]`, `[9223372036854775807,1,1000]`},
		"numerics keep every digit":  {"type: 'numeric[]'", `[1.10,123456789012345678901234567890.5]`, `[1.10,123456789012345678901234567890.5]`},
		"dimensions":                 {"type: 'integer[]'", `[[1,2],[3,null]]`, `[[1,2],[3,null]]`},
		"times":                      {"type: 'timestamptz[]', timeFormat: UnixMillis", `[1700000000123,null]`, `["2023-11-14T22:13:20.123Z",null]`},
		"uuids":                      {"type: 'uuid[]'", `["00112233445566778899AABBCCDDEEFF"]`, `["00112233-4455-6677-8899-aabbccddeeff"]`},
		"booleans":                   {"type: 'boolean[]'", `[true,"f"]`, `[true,false]`},
		"floats":                     {"type: 'double precision[]'", `[0.1,1e300]`, `[0.1,1e+300]`},
		"an array written as a text": {"type: 'integer[]'", `"[1,2]"`, `[1,2]`},
		"no array":                   {"type: 'integer[]'", `1`, `error: 1" is not a JSON array`},
		"an object":                  {"type: 'text[]'", `[{}]`, `error: an element is an object`},
		"an element of another type": {"type: 'integer[]'", `[1,"x"]`, `error: an element: "x" is not a whole number that fits integer`},
		"an element that overflows":  {"type: 'smallint[]'", `[32768]`, `error: fits smallint`},
		"ragged":                     {"type: 'integer[]'", `[[1,2],[3]]`, `error: parts of different lengths`},
		"ragged in depth":            {"type: 'integer[]'", `[[1],2]`, `error: parts of different lengths`},
		"ragged by null":             {"type: 'integer[]'", `[null,[1]]`, `error: parts of different lengths`},
		"too many dimensions":        {"type: 'integer[]'", `[[[[[[[1]]]]]]]`, `error: more than 6 dimensions`},
	} {
		t.Run(name, func(t *testing.T) {
			tr, _ := transformOf(t, "JSON", "name: v, path: v, "+tc.column)
			row, err := decode(tr, entry("payload", `{"v":`+tc.json+`}`))
			if wrong, ok := strings.CutPrefix(tc.want, "error: "); ok {
				if err == nil || !strings.Contains(err.Error(), wrong) {
					t.Fatalf("error %v, want %s", err, wrong)
				}
				return
			}
			if err != nil || row[1] != textValue(tc.want) {
				t.Errorf("%v, %v, want %s", row[1], err, tc.want)
			}
		})
	}
}

// What an array becomes is JSON and keeps its elements, whatever comes in.
func FuzzArray(f *testing.F) {
	f.Add(`[[1,2],[3,"4"]]`)
	f.Add(`["a",null,"{\""]`)
	f.Fuzz(func(t *testing.T, s string) {
		if !gjson.Valid(s) || tooDeep(s) {
			t.Skip()
		}
		for _, element := range []config.ColumnType{config.TypeText, config.TypeNumeric, config.TypeTimestamptz, config.TypeDouble} {
			col := config.Column{Type: element + "[]"}
			if v, err := fromJSON(gjson.Parse(s), &col); err == nil && v.Valid {
				if !gjson.Valid(v.S) {
					t.Fatalf("%s became %s", s, v.S)
				}
				appendLiteral(nil, gjson.Parse(v.S))
			}
		}
	})
}
