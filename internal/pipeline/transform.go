package pipeline

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"github.com/google/cel-go/common/types/ref"
	"github.com/tidwall/gjson"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/expression"
	"github.com/millrace-dev/millrace/internal/pipeline/jsonscan"
)

// Transform decodes items into rows. It is compiled once and safe for concurrent use.
type Transform struct {
	columns []column
	codec   codec
	field   string // of a Redis entry, that holds the document
	// tree holds the paths into the document, so that one pass over it finds every value.
	tree node
	// byField is the column list of each field, with the Fields codec.
	byField map[string][]int

	filter *expression.Program // nil: every item is wanted
	// computed are the columns with an expression: first those that can be computed without the state.
	computed, stateful []int
	state              *State // nil: none, or not this transform's affair
	asksState          bool   // there is a state, and an expression, here or in a sink, asks for it
}

type column struct {
	config.Column
	fallback Value               // used when the value is missing
	program  *expression.Program // nil: the column has a path
}

// node is one place in a document.
type node struct {
	columns  []int // that take their value from here
	children []child
	below    []int // columns of all children, which start anew when a document repeats a name
}

type child struct {
	name  string
	index int // of an array; -1 when the name is no number
	node  *node
}

// maxDepth of a document's nesting. PostgreSQL's jsonb gives up in the same region, and the scanner is recursive.
const maxDepth = 5000

// NewTransform compiles codec and mapping. The configuration must be valid.
func NewTransform(c *config.Config) (*Transform, error) {
	t := &Transform{field: c.Codec.Field, byField: map[string][]int{}}
	for i, col := range c.Mapping.Columns {
		if err := t.addColumn(i, col, c.Codec.Type); err != nil {
			return nil, err
		}
	}
	var err error
	if c.Mapping.Filter != "" {
		if t.filter, err = expression.Compile(c.Mapping.Filter, expression.Boolean, expression.InMapping); err != nil {
			return nil, NewConfigurationError("mapping.filter %v", err)
		}
	}
	t.codec, err = newCodec(t, &c.Codec)
	return t, err
}

func (t *Transform) addColumn(i int, col config.Column, codec config.CodecType) error {
	at := fmt.Sprintf("mapping.columns[%d]", i)
	compiled := column{Column: col}
	var err error
	if col.Default != nil {
		asText := col
		asText.TimeFormat = config.TimeRFC3339
		if compiled.fallback, err = fromText(*col.Default, &asText); err != nil {
			return NewConfigurationError("%s.default: %v", at, err)
		}
	}
	if col.Expression != "" {
		if compiled.program, err = expression.Compile(col.Expression, expression.Value, expression.InMapping); err != nil {
			return NewConfigurationError("%s.expression %v", at, err)
		}
		if compiled.program.Uses(expression.VarState) {
			t.stateful = append(t.stateful, i)
		} else {
			t.computed = append(t.computed, i)
		}
	}
	t.columns = append(t.columns, compiled)
	if col.Expression != "" || config.IsProperty(col.Path) {
		return nil
	}
	names, err := config.SplitPath(col.Path)
	if err != nil {
		return NewConfigurationError("%s.path: %v", at, err)
	}
	if codec == config.CodecFields {
		t.byField[names[0]] = append(t.byField[names[0]], i)
		return nil
	}
	n := &t.tree
	for _, name := range names {
		n.below = append(n.below, i)
		n = n.child(name)
	}
	n.columns = append(n.columns, i)
	return nil
}

// Remember makes the transform keep the state up to date and show it to expressions. Its error, of class
// ClassConfiguration, says that the state's own columns depend on the state.
func (t *Transform) Remember(s *State, c *config.Config) error {
	if s == nil {
		return nil
	}
	for _, i := range t.stateful {
		if i == s.keyColumn || i == s.timeColumn {
			return NewConfigurationError("column %q: the state is kept by this column, so its expression cannot use state", t.columns[i].Name)
		}
	}
	t.state = s
	t.asksState = asksForState(c)
	s.asked = t.asksState
	return nil
}

// asksForState says whether an expression anywhere may use the state. One that only holds the word costs a little.
func asksForState(c *config.Config) bool {
	var texts []string
	for _, b := range append(c.Branches(), config.Branch{Mapping: &c.Mapping}) {
		texts = append(texts, b.Mapping.Filter)
		for _, col := range b.Mapping.Columns {
			texts = append(texts, col.Expression)
		}
		if s := b.Stream; s != nil {
			texts = append(texts, s.Route, s.Key, s.Payload)
			for _, h := range s.Headers {
				texts = append(texts, h)
			}
		}
		if b.HTTP != nil {
			texts = append(texts, b.HTTP.Data)
		}
	}
	return slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(text, expression.VarState) })
}

func (n *node) child(name string) *node {
	for _, c := range n.children {
		if c.name == name {
			return c.node
		}
	}
	index, err := strconv.Atoi(name)
	if err != nil {
		index = -1
	}
	n.children = append(n.children, child{name: name, index: index, node: &node{}})
	return n.children[len(n.children)-1].node
}

// Decode fills in the item's row, which must have one zero value per column, or marks the item as Filtered. Its error says
// why the item cannot be decoded, and holds nothing of the item but short pieces of single values.
//
// The filter comes before the mapping: what it leaves out need not have the columns. A filter that asks for the state comes
// after the columns that do not.
func (t *Transform) Decode(it *Item) error {
	it.decoder = t
	d, err := t.codec.open(it)
	if err != nil {
		return err
	}
	if t.filter == nil && len(t.computed)+len(t.stateful) == 0 && !t.asksState {
		err = t.fill(d, it)
	} else {
		err = t.evaluate(d, it)
	}
	if err == nil && t.state != nil && !it.Filtered {
		t.state.Update([]*Item{it})
	}
	return err
}

// fill fills in the columns with a path, and what stands in for missing values.
func (t *Transform) fill(d document, it *Item) error {
	if err := t.codec.fill(d, it); err != nil {
		return err
	}
	for i := range t.columns {
		col := &t.columns[i]
		if col.program != nil {
			continue
		}
		if config.IsProperty(col.Path) {
			it.Row[i] = property(it, col)
		}
		if it.Row[i].Valid {
			continue
		}
		if col.Required {
			return fmt.Errorf("column %q: no value at %s", col.Name, col.Path)
		}
		it.Row[i] = col.fallback
	}
	return nil
}

// evaluate is Decode with expressions.
func (t *Transform) evaluate(d document, it *Item) error {
	vars := &variables{it: it, opened: &d}
	filter := t.filter
	if filter != nil && !filter.Uses(expression.VarState) {
		if wanted, err := t.wanted(filter, vars); err != nil || !wanted {
			it.Filtered = err == nil
			return err
		}
		filter = nil
	}
	problem := t.fill(d, it)
	if problem == nil {
		problem = t.compute(t.computed, vars, it)
	}
	if t.asksState {
		it.before = t.state.Before(it)
	}
	if filter != nil {
		// What the filter leaves out may lack columns.
		if wanted, err := t.wanted(filter, vars); err == nil && !wanted {
			it.Filtered = true
			return nil
		} else if problem == nil {
			problem = err
		}
	}
	if problem != nil {
		return problem
	}
	return t.compute(t.stateful, vars, it)
}

func (t *Transform) wanted(filter *expression.Program, vars *variables) (bool, error) {
	wanted, err := filter.EvalBool(vars)
	if err != nil {
		return false, fmt.Errorf("filter: %w", err)
	}
	return wanted, nil
}

// compute fills in columns with an expression.
func (t *Transform) compute(columns []int, vars *variables, it *Item) error {
	for _, i := range columns {
		col := &t.columns[i]
		v, err := col.program.Eval(vars)
		if err == nil {
			it.Row[i], err = fromCEL(v, &col.Column)
		}
		switch {
		case err != nil:
			return fmt.Errorf("column %q: %w", col.Name, err)
		case it.Row[i].Valid:
		case col.Required:
			return fmt.Errorf("column %q: its expression gives no value", col.Name)
		default:
			it.Row[i] = col.fallback
		}
	}
	return nil
}

// walk visits every member of v once and fills in the columns that take their value from below it. As in PostgreSQL's
// jsonb, the last of several members with one name counts.
func (t *Transform) walk(n *node, v gjson.Result, row []Value) error {
	if v.Type != gjson.JSON {
		return nil
	}
	members := jsonscan.Of(v.Raw)
	array := members.IsArray()
	for index := 0; ; index++ {
		name, raw, ok := members.Next()
		if !ok {
			return nil
		}
		for i := range n.children {
			c := &n.children[i]
			if array && c.index != index || !array && c.name != name {
				continue
			}
			if err := t.place(c.node, jsonscan.Value(raw), row); err != nil {
				return err
			}
			break
		}
	}
}

// place fills in the columns at and below one place of the document.
func (t *Transform) place(n *node, v gjson.Result, row []Value) error {
	for _, col := range n.columns {
		var err error
		if row[col], err = fromJSON(v, &t.columns[col].Column); err != nil {
			return fmt.Errorf("column %q: %w", t.columns[col].Name, err)
		}
	}
	if len(n.children) == 0 {
		return nil
	}
	for _, col := range n.below {
		row[col] = Value{}
	}
	return t.walk(n, v, row)
}

// fillCEL fills in the columns at one place that has no parts.
func (t *Transform) fillCEL(n *node, v ref.Val, row []Value) error {
	for _, col := range n.columns {
		var err error
		if row[col], err = fromCEL(v, &t.columns[col].Column); err != nil {
			return fmt.Errorf("column %q: %w", t.columns[col].Name, err)
		}
	}
	return nil
}

// tooDeep guards the recursive scanner against entries that are nothing but brackets. Short documents cannot be deep enough
// to matter, so they are not looked at.
func tooDeep(doc string) bool {
	if len(doc) <= maxDepth {
		return false
	}
	depth, text := 0, false
	for i := 0; i < len(doc); i++ {
		switch c := doc[i]; {
		case text:
			if c == '\\' {
				i++
			} else if c == '"' {
				text = false
			}
		case c == '"':
			text = true
		case c == '{' || c == '[':
			if depth++; depth > maxDepth {
				return true
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return false
}

func property(it *Item, col *column) Value {
	switch col.Path {
	case config.PropertyID:
		return textValue(it.ID)
	case config.PropertyStream:
		return textValue(it.Stream)
	case config.PropertyReceivedAt:
		return timeValue(it.Received)
	case config.PropertyKey:
		if it.Key == nil {
			return Value{}
		}
		return textValue(*it.Key)
	case config.PropertyPosition:
		if col.Type == config.TypeText {
			return textValue(strconv.FormatInt(it.Position, 10))
		}
		return intValue(it.Position)
	}
	panic("pipeline: unknown property " + col.Path + " passed validation")
}

// timeValue cuts off what is smaller than a microsecond, also before 1970.
func timeValue(t time.Time) Value { return intValue(t.UnixMicro()) }

// asString views bytes that nobody changes any more as a string, without a copy.
func asString(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }
