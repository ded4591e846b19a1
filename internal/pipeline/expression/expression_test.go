package expression

import (
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"
	"github.com/tidwall/gjson"
)

// variables are those of one document, and count how often each is asked for.
type variables struct {
	doc   string
	value ref.Val // of the doc
	asked map[string]int
}

func (v *variables) Variable(name string) ref.Val {
	if v.asked == nil {
		v.asked = map[string]int{}
	}
	v.asked[name]++
	switch name {
	case VarDoc:
		if v.value == nil {
			v.value = JSON(gjson.Parse(v.doc))
		}
		return v.value
	case VarID:
		return TextValue("1-1")
	case VarStream:
		return TextValue("s")
	case VarPosition, VarDeliveries:
		return IntValue(1)
	case VarReceivedAt, VarCreatedAt:
		return TimeValue(time.Unix(1_700_000_000, 123456000))
	case VarHeaders:
		return NewObject(Member{"a", TextValue("b")})
	case VarRow:
		return NewObject(Member{"n", IntValue(1)}, Member{"t", TextValue("é\"\n\x01")})
	}
	return Null()
}

func compileT(t testing.TB, text string) *Program {
	t.Helper()
	p, err := Compile(text, Value, AfterMapping)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return p
}

// E1, E2: what JSON says is what comes out, digit for digit, whatever it is compared or calculated with.
func TestEvaluate(t *testing.T) {
	const doc = `{"i":3,"f":3.5,"m":3.0,"big":9007199254740993,"max":9223372036854775807,"u":18446744073709551615,"huge":123456789012345678901234567890,
		"price":19.99,"exact":1234567890.12345678901,"tiny":1e-400,"s":"a.b.c","é":"日本","o":{"a":{"b":[1,2.50,{"c":null}]}},"t":"2026-01-02T03:04:05Z","n":null,"dup":1,"dup":2}`
	for text, want := range map[string]string{
		`doc.i`:                                `3`,
		`doc.big`:                              `9007199254740993`,
		`doc.max`:                              `9223372036854775807`,
		`doc.max + 1`:                          `9223372036854775808`,
		`-9223372036854775807 - 2`:             `-9223372036854775809`,
		`doc.u`:                                `18446744073709551615`,
		`doc.u + 1`:                            `18446744073709551616`,
		`doc.huge`:                             `123456789012345678901234567890`,
		`doc.huge - doc.huge + doc.i`:          `3`,
		`doc.huge > doc.u && doc.u < doc.huge`: `true`,
		`doc.exact`:                            `1234567890.12345678901`,
		`doc.exact * 10`:                       `12345678901.2345678901`,
		`doc.exact > 1234567890.12345678`:      `true`,
		`1234567890 < doc.exact`:               `true`,
		`doc.exact == doc.exact`:               `true`,
		`doc.tiny`:                             `1e-400`,
		`doc.tiny > 0`:                         `true`,
		`doc.price * doc.i`:                    `59.97`,
		`0.1 + 0.2`:                            `0.3`,
		`0.1 + 0.2 == 0.3`:                     `true`,
		`doc.i * 3.6`:                          `10.8`,
		`doc.f * 2`:                            `7`,
		`doc.f * 2 / 2 == doc.f`:               `true`,
		`doc.i / 2`:                            `1`,
		`doc.i / 2.0`:                          `1.5`,
		`1.0 / 3.0`:                            `0.3333333333333333`,
		`doc.m == 3 && 3 == doc.m`:             `true`,
		`doc.m`:                                `3`,
		`doc.i > 2.5 && 2.5 < doc.i`:           `true`,
		`doc.f in [3.5]`:                       `true`,
		`math.round(doc.price * 100)`:          `1999`,
		`math.round(-2.5)`:                     `-3`,
		`math.floor(-2.5)`:                     `-3`,
		`math.ceil(doc.f)`:                     `4`,
		`math.trunc(-2.5)`:                     `-2`,
		`math.abs(-2.5)`:                       `2.5`,
		`int(doc.f)`:                           `3`,
		`double(doc.exact)`:                    `1234567890.1234567`,
		`string(doc.exact)`:                    `"1234567890.12345678901"`,
		`-doc.exact`:                           `-1234567890.12345678901`,
		`int("12")`:                            `12`,
		`doc.s + "!"`:                          `"a.b.c!"`,
		`doc.s.split(".").join("-")`:           `"a-b-c"`,
		`doc.s.replace(".", "").upperAscii()`:  `"ABC"`,
		`doc["é"].substring(1)`:                `"本"`,
		`doc.s.indexOf("c")`:                   `4`,
		`doc.s.substring(2, 3)`:                `"b"`,
		`doc.o`:                                `{"a":{"b":[1,2.50,{"c":null}]}}`,
		`doc.o.a.b`:                            `[1,2.50,{"c":null}]`,
		`doc.o.a.b[1]`:                         `2.5`,
		`doc.o.a.b.map(x, x)`:                  `[1,2.5,{"c":null}]`,
		`doc.o.a.b.size() + size(doc.o)`:       `4`,
		`doc.o.a.b + [4]`:                      `[1,2.5,{"c":null},4]`,
		`doc.dup`:                              `2`,
		`doc.?missing.?x`:                      `null`,
		`doc.?missing.orValue(5)`:              `5`,
		`has(doc.missing) || has(doc.i)`:       `true`,
		`"i" in doc`:                           `true`,
		`doc.n == null`:                        `true`,
		`doc.missing`:                          `error: no such key: missing; write doc.?name`,
		`doc.s > 1`:                            `error: no such overload`,
		`doc.i / 0`:                            `error: division by zero`,
		`doc.s == 1`:                           `false`,
		`{"b": doc.i, "a": [doc.n, b"ab"]}`:    `{"a":[null,"YWI="],"b":3}`,
		`timestamp(doc.t) + duration("1h")`:    `"2026-01-02T04:04:05Z"`,
		`received_at - created_at`:             `"0s"`,
		`created_at`:                           `"2023-11-14T22:13:20.123456Z"`,
		`created_at.getFullYear()`:             `2023`,
		`headers.a + stream + id`:              `"bs1-1"`,
		`row`:                                  `{"n":1,"t":"é\"\n\u0001"}`,
		`row.n + position`:                     `2`,
		`state == null ? "first" : "later"`:    `"first"`,
		`key == null`:                          `true`,
		`doc.s.matches("^a")`:                  `true`,
		`doc.o.a.b.exists(x, x == 2.5)`:        `true`,
		`doc.o.map(k, k)`:                      `["a"]`,
		`doc.o == {"a": {"b": [1, 2.5, {"c": null}]}}`: `true`,
		`int(doc.exact)`:      `1234567890`,
		`int(doc.huge)`:       `error: 123456789012345678901234567890 does not fit int`,
		`double("nan") > 1.0`: `false`,
		`double("nan") + 1`:   `error: NaN has no form in JSON`,
	} {
		t.Run(text, func(t *testing.T) {
			got := ""
			if v, err := compileT(t, text).EvalJSON(&variables{doc: doc}); err != nil {
				got = "error: " + err.Error()
			} else {
				got = string(v)
			}
			if want != got && !(strings.HasPrefix(want, "error") && strings.HasPrefix(got, want)) {
				t.Errorf("%s, want %s", got, want)
			}
		})
	}
}

// A mistake is found before there is a document, and said on one line.
func TestCheckSaysWhatIsWrong(t *testing.T) {
	for _, tc := range []struct {
		text  string
		kind  Kind
		scope Scope
		want  string // "" when nothing is wrong
	}{
		{"doc.a > 1", Boolean, InMapping, ""},
		{"doc.a", Boolean, InMapping, ""},
		{"doc.a + 1", Boolean, InMapping, ""},
		{"1 + 1", Boolean, InMapping, "gives int; write an expression that is true or false"},
		{"null", Boolean, InMapping, "true or false"},
		{"doc.a >", Boolean, InMapping, "at character 8: Syntax error"},
		{"dok.a", Value, InMapping, "at character 1: undeclared reference to 'dok'"},
		{"doc.a ==\n dok", Value, InMapping, "at line 2, character 2: undeclared reference"},
		{"row.a", Value, InMapping, "undeclared reference to 'row'"},
		{"row.a", Text, AfterMapping, ""},
		{"[row.a]", Text, AfterMapping, "gives list(dyn); write an expression that gives a text"},
		{"stream + 1", Text, AfterMapping, "no matching overload"},
		{"received_at > 'x'", Boolean, InMapping, "no matching overload"},
		{"stream.matches('[')", Boolean, InMapping, "invalid matches argument"},
		{"  ", Boolean, InMapping, "is blank"},
		{strings.Repeat("(", 300) + "1" + strings.Repeat(")", 300), Value, InMapping, "recursion"},
		{`"` + strings.Repeat("a", maxExpression) + `"`, Value, InMapping, "it may have 65536"},
	} {
		err := Check(tc.text, tc.kind, tc.scope)
		switch {
		case tc.want == "" && err != nil:
			t.Errorf("%q: %v", tc.text, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n")):
			t.Errorf("%q: %v, want %q", clip(tc.text), err, tc.want)
		}
	}
}

// E3: whatever an expression does with a document, it ends, and does not grow without bounds. Without bounds some of these would run for hours: the
// timeout of the tests is what sees that.
func TestEvaluationIsBounded(t *testing.T) {
	list := "[" + strings.Repeat("1,", 4000) + "1]"
	text := strings.Repeat("a", 1<<20)
	for name, tc := range map[string]struct{ text, doc string }{
		"nested loops":      {`doc.l.exists(a, doc.l.exists(b, doc.l.exists(c, a + b + c < 0)))`, `{"l":` + list + `}`},
		"a doubling text":   {`[doc.s]` + strings.Repeat(`.map(x, x + x)`, 40), `{"s":"ab"}`},
		"a doubling list":   {`[doc.l]` + strings.Repeat(`.map(x, x + x)`, 40), `{"l":[1]}`},
		"a growing replace": {`doc.s.replace("a", doc.s)`, `{"s":"` + text + `"}`},
		"a growing join":    {`doc.l.map(x, doc.s).join("")`, `{"l":` + list + `,"s":"` + text + `"}`},
		"a growing value":   {`doc.l.map(x, doc.s)`, `{"l":` + list + `,"s":"` + text + `"}`},
		"a growing number":  {`[doc.n]` + strings.Repeat(`.map(x, x * x)`, 40), `{"n":1.23456789}`},
		"a huge exponent":   {`doc.n + 1`, `{"n":1e999999999}`},
		"a slow pattern":    {`doc.s.matches("(a*)*b" + doc.s.substring(0, 100000))`, `{"s":"` + text + `"}`},
	} {
		t.Run(name, func(t *testing.T) {
			v, err := compileT(t, tc.text).EvalJSON(&variables{doc: tc.doc})
			if err == nil {
				t.Fatalf("it gave %d bytes", len(v))
			}
			if len(err.Error()) > 400 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

func TestEvalText(t *testing.T) {
	for text, want := range map[string]string{`doc.s`: "x", `doc.n`: "9007199254740993", `doc.d`: "1234567890.12345678901", `true`: "true", `received_at`: "2023-11-14T22:13:20.123456Z"} {
		got, ok, err := compileT(t, text).EvalText(&variables{doc: `{"s":"x","n":9007199254740993,"d":1234567890.12345678901,"l":[]}`})
		if got != want || !ok || err != nil {
			t.Errorf("%s: %q, %v, %v", text, got, ok, err)
		}
	}
	if _, ok, err := compileT(t, `doc.?s`).EvalText(&variables{doc: `{}`}); ok || err != nil {
		t.Error("a missing value is no null")
	}
	if _, _, err := compileT(t, `doc.l`).EvalText(&variables{doc: `{"l":[]}`}); err == nil {
		t.Error("a list passed for a text")
	}
}

// A variable that the expression does not use is not made.
func TestVariablesAreLazy(t *testing.T) {
	p := compileT(t, `stream == "t" && doc.a == 1`)
	if !p.Uses(VarDoc) || !p.Uses(VarStream) || p.Uses(VarState) {
		t.Error("Uses is wrong")
	}
	v := &variables{doc: "{}"}
	if ok, err := p.EvalBool(v); ok || err != nil {
		t.Fatal(ok, err)
	}
	if v.asked[VarDoc] != 0 || v.asked[VarStream] != 1 {
		t.Errorf("asked for %v", v.asked)
	}
}

func TestTextIsJSON(t *testing.T) {
	for s, want := range map[string]string{"\xff<é\u2028\"\\\x00": `"` + "\ufffd<é\u2028" + `\"\\\u0000"`, "": `""`} {
		if got := string(AppendText(nil, s)); got != want || !gjson.Valid(got) {
			t.Errorf("%q: %s, want %s", s, got, want)
		}
	}
}

// Numbers survive the way through an expression unchanged in value, and what comes out is JSON.
func FuzzNumber(f *testing.F) {
	for _, s := range []string{"0", "-0.0", "1.10", "1e5", "123456789012345678901234567890.5", "9007199254740993", "1e-400", "21700000000000000000", "5e-324", "1E+400"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if !gjson.Valid(s) || gjson.Parse(s).Type != gjson.Number {
			t.Skip()
		}
		s = strings.TrimSpace(s)
		out, err := AppendJSON(nil, Number(s))
		if err != nil || !gjson.ValidBytes(out) {
			t.Fatalf("%s became %s, %v", s, out, err)
		}
		if split(s) != split(string(out)) {
			t.Fatalf("%s became %s", s, out)
		}
		x, finite, err := exactOf(Number(s))
		if err == nil && finite {
			if sum := add(x, exact{m: new(big.Int), whole: true}); sum.Equal(Number(s)) != types.True {
				t.Fatalf("%s + 0 is %v", s, sum)
			}
		}
	})
}

// Whatever the document and the expression, evaluation ends without a panic, and its value is JSON.
func FuzzEval(f *testing.F) {
	for _, text := range []string{`doc.a + doc.b`, `doc.a.map(x, x * 2)`, `doc.?a.orValue({"b": [1.5, b"x", doc]})`, `string(doc.a) + doc.b.replace("a", "b").substring(1)`,
		`math.round(doc.a / doc.b) < 3u`, `{doc.a: doc.b}`, `timestamp(doc.a) - duration(doc.b)`} {
		f.Add(text, `{"a":1.5,"b":"x","a":[1,{"c":null}]}`)
	}
	f.Fuzz(func(t *testing.T, text, doc string) {
		begin := time.Now()
		p, err := Compile(text, Value, InMapping)
		if took := time.Since(begin); took > 5*time.Second {
			t.Fatalf("%s took %v to compile", text, took)
		}
		if err != nil || !gjson.Valid(doc) || !gjson.Parse(doc).IsObject() {
			t.Skip()
		}
		begin = time.Now()
		out, err := p.EvalJSON(&variables{doc: doc})
		if took := time.Since(begin); took > 5*time.Second {
			t.Fatalf("%s of %s took %v", text, doc, took)
		}
		if err == nil && !gjson.ValidBytes(out) {
			t.Fatalf("%s of %s is %s", text, doc, out)
		}
	})
}

const position = `{"device_id":"device-0417","ts":"2026-03-01T12:00:00.123Z","position":{"lat":52.520008,"lon":13.404954,"speed":12.5,"satellites":11},"io":{"ignition":true,"odometer":123456789}}`

func BenchmarkEval(b *testing.B) {
	for _, text := range []string{`doc.position.speed > 0`, `doc.position.speed * 3.6`, `doc.device_id + "/" + string(doc.io.odometer)`, `stream == "s"`} {
		p := compileT(b, text)
		b.Run(text, func(b *testing.B) {
			b.ReportAllocs()
			for range b.N {
				if _, err := p.Eval(lazyDoc(position)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

type lazyDoc string

func (d lazyDoc) Variable(name string) ref.Val {
	if name == VarDoc {
		return JSON(gjson.Parse(string(d)))
	}
	return TextValue("s")
}
