package expression

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"
)

// Kind is what an expression has to give.
type Kind int

// Kinds.
const (
	Boolean Kind = iota // true or false: a filter
	Text                // a text, a number or a boolean, which become text, or null: a key, a header, a route
	Value               // anything: a column, a payload
)

// Names of the variables.
const (
	VarDoc        = "doc"         // map: the decoded document
	VarID         = "id"          // string
	VarStream     = "stream"      // string
	VarKey        = "key"         // string or null
	VarHeaders    = "headers"     // map
	VarPosition   = "position"    // int
	VarReceivedAt = "received_at" // timestamp
	VarCreatedAt  = "created_at"  // timestamp
	VarDeliveries = "deliveries"  // int
	VarState      = "state"       // null, or a map of last (map), last_seen (timestamp) and count (int)
	VarRow        = "row"         // map: the mapped columns; only AfterMapping
)

// Scope is where an expression stands.
type Scope int

// Scopes.
const (
	InMapping    Scope = iota // filter and columns
	AfterMapping              // sinks, which also see row
)

// Bounds of one expression.
const (
	maxExpression = 64 << 10  // bytes of its text
	maxCost       = 1_000_000 // units of CEL's cost model; about a tenth of a second
	maxNesting    = 250
)

// Variables gives an expression the values of its variables. It is asked only for those that the expression uses, and
// for each of them every time it stands in the expression.
type Variables interface {
	// Variable returns the value of a variable, never nil.
	Variable(name string) ref.Val
}

// Program is a compiled expression. It is safe for concurrent use.
type Program struct {
	text    string
	kind    Kind
	program cel.Program
	uses    map[string]bool
}

// Check says what is wrong with an expression: nil when it can be compiled.
func Check(text string, kind Kind, scope Scope) error {
	_, _, err := check(text, kind, scope)
	return err
}

// Compile compiles an expression. Its error says what is wrong, where, and fits on one line.
func Compile(text string, kind Kind, scope Scope) (*Program, error) {
	e, checked, err := check(text, kind, scope)
	if err != nil {
		return nil, err
	}
	program, err := e.Program(checked, cel.EvalOptions(cel.OptOptimize), cel.CostLimit(maxCost))
	if err != nil {
		return nil, fmt.Errorf("cannot be compiled: %s", oneLine(err.Error()))
	}
	p := &Program{text: text, kind: kind, program: program, uses: map[string]bool{}}
	for _, r := range checked.NativeRep().ReferenceMap() {
		if r.Name != "" {
			p.uses[r.Name] = true
		}
	}
	return p, nil
}

func check(text string, kind Kind, scope Scope) (*cel.Env, *cel.Ast, error) {
	if strings.TrimSpace(text) == "" {
		return nil, nil, errors.New("is blank; write a CEL expression, such as doc.speed > 0")
	}
	if len(text) > maxExpression {
		return nil, nil, fmt.Errorf("has %d bytes; it may have %d", len(text), maxExpression)
	}
	e, err := environment(scope)
	if err != nil {
		return nil, nil, err
	}
	checked, issues := e.Compile(text)
	if issues.Err() != nil {
		return nil, nil, explain(text, issues)
	}
	if err := kind.accepts(checked.OutputType()); err != nil {
		return nil, nil, err
	}
	return e, checked, nil
}

// accepts checks the type of the result as far as it is known before there is a document.
func (k Kind) accepts(t *cel.Type) error {
	switch t.Kind() {
	case types.DynKind, types.AnyKind, types.NullTypeKind:
		if k != Boolean || t.Kind() != types.NullTypeKind {
			return nil
		}
	}
	switch k {
	case Boolean:
		if t.Kind() != types.BoolKind {
			return fmt.Errorf("gives %s; write an expression that is true or false, such as doc.speed > 0", t)
		}
	case Text:
		switch t.Kind() {
		case types.ListKind, types.MapKind, types.TypeKind, types.StructKind:
			return fmt.Errorf("gives %s; write an expression that gives a text, such as string(doc.id)", t)
		}
	case Value:
		if t.Kind() == types.TypeKind {
			return errors.New("gives the name of a type; write an expression that gives a value")
		}
	}
	return nil
}

// environments are made once: that takes about a millisecond.
var environments = [...]func() (*cel.Env, error){
	InMapping: sync.OnceValues(func() (*cel.Env, error) { return newEnvironment() }),
	AfterMapping: sync.OnceValues(func() (*cel.Env, error) {
		return newEnvironment(cel.Variable(VarRow, types.NewMapType(types.StringType, types.DynType)))
	}),
}

func environment(s Scope) (*cel.Env, error) { return environments[s]() }

func newEnvironment(more ...cel.EnvOption) (*cel.Env, error) {
	anyMap := types.NewMapType(types.StringType, types.DynType)
	options := append(language(),
		cel.ParserRecursionLimit(maxNesting), cel.ParserExpressionSizeLimit(maxExpression),
		cel.ASTValidators(cel.ValidateDurationLiterals(), cel.ValidateTimestampLiterals(), cel.ValidateRegexLiterals()),
		cel.Variable(VarDoc, anyMap),
		cel.Variable(VarID, types.StringType),
		cel.Variable(VarStream, types.StringType),
		cel.Variable(VarKey, types.NewNullableType(types.StringType)),
		cel.Variable(VarHeaders, anyMap),
		cel.Variable(VarPosition, types.IntType),
		cel.Variable(VarReceivedAt, types.TimestampType),
		cel.Variable(VarCreatedAt, types.TimestampType),
		cel.Variable(VarDeliveries, types.IntType),
		cel.Variable(VarState, types.DynType),
	)
	return cel.NewCustomEnv(append(options, more...)...)
}

// explain makes one line of what the checker found, with the place where the text has more than a few words.
func explain(text string, issues *cel.Issues) error {
	var lines []string
	for _, e := range issues.Errors() {
		message := oneLine(strings.ReplaceAll(e.Message, " (in container '')", ""))
		if e.Location != nil && e.Location.Line() > 0 {
			at := fmt.Sprintf("at character %d: ", e.Location.Column()+1)
			if strings.Contains(strings.TrimSpace(text), "\n") {
				at = fmt.Sprintf("at line %d, character %d: ", e.Location.Line(), e.Location.Column()+1)
			}
			message = at + message
		}
		lines = append(lines, message)
		if len(lines) == 3 {
			break // the others often follow from these
		}
	}
	return errors.New(strings.Join(lines, "; "))
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// String is the text of the expression.
func (p *Program) String() string { return p.text }

// Uses says whether the expression has a variable in it.
func (p *Program) Uses(variable string) bool { return p.uses[variable] }

// activation shows Variables to the interpreter.
type activation struct{ Variables }

// ResolveName implements cel.Activation.
func (a activation) ResolveName(name string) (any, bool) {
	return a.Variable(name), true
}

// Parent implements cel.Activation.
func (a activation) Parent() cel.Activation { return nil }

// Eval returns the expression's value. An optional value is taken out of its wrapping; one that is not there is null. The
// error says what stands in the way, and names nothing of the document but names and short pieces of values.
func (p *Program) Eval(vars Variables) (ref.Val, error) {
	v, _, err := p.program.Eval(activation{vars})
	if err != nil {
		return nil, evaluationError(err)
	}
	for {
		o, ok := v.(*types.Optional)
		if !ok {
			return v, nil
		}
		if !o.HasValue() {
			return types.NullValue, nil
		}
		v = o.GetValue()
	}
}

func evaluationError(err error) error {
	text := oneLine(err.Error())
	switch {
	case strings.Contains(text, "actual cost limit exceeded"):
		return errors.New("the expression takes too long; make it do less, or give it smaller documents")
	case strings.HasPrefix(text, "no such key: "):
		return fmt.Errorf("%s; write doc.?name or has(doc.name) where a name may be missing", short(text))
	case strings.HasPrefix(text, "no such overload"):
		return fmt.Errorf("%s: the types of the values do not go together; convert with int(), double(), string() or timestamp()", short(text))
	}
	return errors.New(short(text))
}

// short bounds an error that holds a piece of the document.
func short(s string) string {
	const most = 200
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// EvalBool returns the value of a Boolean expression. Null, and an optional value that is not there, are an error.
func (p *Program) EvalBool(vars Variables) (bool, error) {
	v, err := p.Eval(vars)
	if err != nil {
		return false, err
	}
	b, ok := v.(types.Bool)
	if !ok {
		return false, fmt.Errorf("the expression gave %s, not true or false", v.Type().TypeName())
	}
	return bool(b), nil
}

// EvalText returns the value of a Text expression; ok is false for null.
func (p *Program) EvalText(vars Variables) (text string, ok bool, err error) {
	v, err := p.Eval(vars)
	if err != nil {
		return "", false, err
	}
	if _, null := v.(types.Null); null {
		return "", false, nil
	}
	text, ok = TextOf(v)
	if !ok {
		return "", false, fmt.Errorf("the expression gave %s, not a text; write string(…) around it", v.Type().TypeName())
	}
	return text, true, nil
}

// TextOf returns the text of a single value, such as a number or a time; ok is false for null, bytes, lists and maps.
func TextOf(v ref.Val) (text string, ok bool) {
	switch x := v.(type) {
	case types.String:
		return string(x), true
	case types.Int:
		return strconv.FormatInt(int64(x), 10), true
	case types.Uint:
		return strconv.FormatUint(uint64(x), 10), true
	case types.Double:
		if f := float64(x); !math.IsNaN(f) && !math.IsInf(f, 0) {
			return string(appendDouble(nil, f)), true
		}
		return strconv.FormatFloat(float64(x), 'g', -1, 64), true
	case Decimal:
		return string(x), true
	case types.Bool:
		return strconv.FormatBool(bool(x)), true
	case types.Timestamp:
		return x.Time.UTC().Format(time.RFC3339Nano), true
	case types.Duration:
		return x.Duration.String(), true
	}
	return "", false
}

// EvalJSON returns the value of an expression as JSON.
func (p *Program) EvalJSON(vars Variables) ([]byte, error) {
	v, err := p.Eval(vars)
	if err != nil {
		return nil, err
	}
	return AppendJSON(nil, v)
}

// TextValue is a string.
func TextValue(s string) ref.Val { return types.String(s) }

// TextOrBytes is a string, or where that is not UTF-8, bytes.
func TextOrBytes(s string) ref.Val {
	if utf8.ValidString(s) {
		return types.String(s)
	}
	return types.Bytes(s)
}

// IntValue is an int.
func IntValue(n int64) ref.Val { return types.Int(n) }

// TimeValue is a timestamp.
func TimeValue(t time.Time) ref.Val { return types.Timestamp{Time: t} }

// Null is the null value.
func Null() ref.Val { return types.NullValue }
