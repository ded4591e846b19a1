package pipeline

import (
	"errors"
	"fmt"
	"strconv"
	"time"
	"unicode/utf8"
	"unsafe"

	"github.com/tidwall/gjson"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// Transform decodes items into rows. It is compiled once and safe for concurrent use.
type Transform struct {
	columns []column
	codec   config.CodecType
	field   string // of a Redis entry, with the JSON codec
	// tree holds the paths into the document, so that one pass over it finds every value.
	tree node
	// byField is the column list of each field, with the Fields codec.
	byField map[string][]int
}

type column struct {
	config.Column
	fallback Value // used when the value is missing
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
	t := &Transform{codec: c.Codec.Type, field: c.Codec.Field, byField: map[string][]int{}}
	for i, col := range c.Mapping.Columns {
		compiled := column{Column: col}
		if col.Default != nil {
			var err error
			asText := col
			asText.TimeFormat = config.TimeRFC3339
			if compiled.fallback, err = fromText(*col.Default, &asText); err != nil {
				return nil, NewConfigurationError("mapping.columns[%d].default: %v", i, err)
			}
		}
		t.columns = append(t.columns, compiled)
		if config.IsProperty(col.Path) {
			continue
		}
		names, err := config.SplitPath(col.Path)
		if err != nil {
			return nil, NewConfigurationError("mapping.columns[%d].path: %v", i, err)
		}
		if t.codec == config.CodecFields {
			t.byField[names[0]] = append(t.byField[names[0]], i)
			continue
		}
		n := &t.tree
		for _, name := range names {
			n.below = append(n.below, i)
			n = n.child(name)
		}
		n.columns = append(n.columns, i)
	}
	return t, nil
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

// Decode fills in the item's row, which must have one zero value per column. Its error says why the item cannot be
// decoded, and holds nothing of the item but short pieces of single values.
func (t *Transform) Decode(it *Item) error {
	if err := t.document(it); err != nil {
		return err
	}
	for i := range t.columns {
		col := &t.columns[i]
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

func (t *Transform) document(it *Item) error {
	if t.codec == config.CodecFields {
		for _, f := range it.Fields {
			for _, i := range t.byField[f.Field] {
				v, err := fromField(f.Value, &t.columns[i].Column)
				if err != nil {
					return fmt.Errorf("column %q: %w", t.columns[i].Name, err)
				}
				it.Row[i] = v
			}
		}
		return nil
	}
	doc := it.Payload
	if t.field != "" {
		var ok bool
		if doc, ok = field(it, t.field); !ok {
			return fmt.Errorf("the entry has no field %q", t.field)
		}
	}
	if !utf8.ValidString(doc) {
		return errors.New("the document is not UTF-8")
	}
	if tooDeep(doc) {
		return fmt.Errorf("the document is nested deeper than %d", maxDepth)
	}
	if !gjson.Valid(doc) {
		return errors.New("the document is not valid JSON")
	}
	root := gjson.Parse(doc)
	if !root.IsObject() {
		return errors.New("the document is not a JSON object")
	}
	return t.walk(&t.tree, root, it.Row)
}

// walk visits every member of v once and fills in the columns that take their value from below it. As in PostgreSQL's
// jsonb, the last of several members with one name counts.
func (t *Transform) walk(n *node, v gjson.Result, row []Value) error {
	array := v.IsArray()
	index := 0
	var failed error
	v.ForEach(func(key, val gjson.Result) bool {
		for i := range n.children {
			c := &n.children[i]
			if array && c.index != index || !array && c.name != key.Str {
				continue
			}
			for _, col := range c.node.columns {
				if row[col], failed = fromJSON(val, &t.columns[col].Column); failed != nil {
					failed = fmt.Errorf("column %q: %w", t.columns[col].Name, failed)
					return false
				}
			}
			if len(c.node.children) > 0 {
				for _, col := range c.node.below {
					row[col] = Value{}
				}
				if val.Type == gjson.JSON {
					if failed = t.walk(c.node, val, row); failed != nil {
						return false
					}
				}
			}
			break
		}
		index++
		return true
	})
	return failed
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

// field returns the last field of a name, as PostgreSQL's jsonb would.
func field(it *Item, name string) (string, bool) {
	for i := len(it.Fields) - 1; i >= 0; i-- {
		if it.Fields[i].Field == name {
			return it.Fields[i].Value, true
		}
	}
	return "", false
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
