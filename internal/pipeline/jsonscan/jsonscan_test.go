package jsonscan

import (
	"testing"

	"github.com/tidwall/gjson"
)

// same checks one level of a document, and all below it, against gjson.
func same(t *testing.T, v gjson.Result) {
	t.Helper()
	if v.Type != gjson.JSON {
		return
	}
	s := Of(v.Raw)
	if s.IsArray() != v.IsArray() {
		t.Fatalf("%s: an array: %v", v.Raw, s.IsArray())
	}
	v.ForEach(func(key, want gjson.Result) bool {
		name, raw, ok := s.Next()
		if !ok || name != key.Str || raw != want.Raw {
			t.Fatalf("%s: %q %s, %v, want %q %s", v.Raw, name, raw, ok, key.Str, want.Raw)
		}
		if got := Value(raw); got.Type != want.Type || got.Str != want.Str || got.Raw != want.Raw {
			t.Fatalf("%+v, want %+v", got, want)
		}
		same(t, want)
		return true
	})
	if name, raw, ok := s.Next(); ok {
		t.Fatalf("%s: %q %s after the end", v.Raw, name, raw)
	}
}

var documents = []string{
	`{}`, ` [ ] `, `{"a":1}`, "\t{ \"a\" : [ 1 , -2.5e+3 , \"x\\\"]\" ] ,\n\"b\\u0041\\\\\" : { \"c\" : { } , \"}\" : \"{\" } , \"\" : null , \"t\" : true, \"f\":false } ",
	`{"a":1,"a":2}`, `[[[]],{"a":[{}]},"\\"]`, `{"é":"\u00e9\n","x":0}`,
}

func TestScannerAgreesWithGjson(t *testing.T) {
	for _, doc := range documents {
		if !gjson.Valid(doc) {
			t.Fatalf("%s is no JSON", doc)
		}
		same(t, gjson.Parse(doc))
	}
}

// Whatever valid JSON there is, the scanner sees in it what gjson sees.
func FuzzScanner(f *testing.F) {
	for _, doc := range documents {
		f.Add(doc)
	}
	f.Fuzz(func(t *testing.T, doc string) {
		if !gjson.Valid(doc) {
			t.Skip()
		}
		same(t, gjson.Parse(doc))
	})
}
