package pipeline

import (
	"errors"
	"fmt"
	"unicode/utf8"

	"github.com/google/cel-go/common/types/ref"
	"github.com/tidwall/gjson"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/expression"
)

// codec turns the bytes of an item into a document, and the document into values.
type codec interface {
	// open checks the bytes of an item.
	open(it *Item) (document, error)
	// fill gives the columns that have a path their values. Columns that it finds nothing for keep their zero value.
	fill(d document, it *Item) error
	// value is the document as expressions see it.
	value(d document, it *Item) ref.Val
}

// document is an item that a codec has opened. Which parts are set is the codec's affair.
type document struct {
	json    gjson.Result
	message protoreflect.Message
	event   *event
}

// newCodec returns the codec of the configuration. Its errors are of class ClassConfiguration.
func newCodec(t *Transform, c *config.Codec) (codec, error) {
	switch c.Type {
	case config.CodecFields:
		return fieldsCodec{t}, nil
	case config.CodecCloudEvents:
		return cloudEventsCodec{t, c.Field}, nil
	case config.CodecProtobuf:
		return newProtobufCodec(t, c)
	}
	return jsonCodec{t, c.Field}, nil
}

// body returns the bytes that hold the document: a message's payload, or one field of a Redis entry.
func body(it *Item, field string) (string, error) {
	if field == "" {
		return it.Payload, nil
	}
	doc, ok := fieldOf(it, field)
	if !ok {
		return "", fmt.Errorf("the entry has no field %q", field)
	}
	return doc, nil
}

// fieldOf returns the last field of a name, as PostgreSQL's jsonb would.
func fieldOf(it *Item, name string) (string, bool) {
	for i := len(it.Fields) - 1; i >= 0; i-- {
		if it.Fields[i].Field == name {
			return it.Fields[i].Value, true
		}
	}
	return "", false
}

// jsonCodec reads one JSON object.
type jsonCodec struct {
	t     *Transform
	field string
}

func (c jsonCodec) open(it *Item) (document, error) {
	doc, err := body(it, c.field)
	if err != nil {
		return document{}, err
	}
	root, err := parseObject(doc)
	return document{json: root}, err
}

func parseObject(doc string) (gjson.Result, error) {
	if err := validJSON(doc); err != nil {
		return gjson.Result{}, err
	}
	root := gjson.Parse(doc)
	if !root.IsObject() {
		return gjson.Result{}, errors.New("the document is not a JSON object")
	}
	return root, nil
}

func validJSON(doc string) error {
	switch {
	case !utf8.ValidString(doc):
		return errors.New("the document is not UTF-8")
	case tooDeep(doc):
		return fmt.Errorf("the document is nested deeper than %d", maxDepth)
	case !gjson.Valid(doc):
		return errors.New("the document is not valid JSON")
	}
	return nil
}

func (c jsonCodec) fill(d document, it *Item) error { return c.t.walk(&c.t.tree, d.json, it.Row) }

func (c jsonCodec) value(d document, _ *Item) ref.Val { return expression.JSON(d.json) }

// fieldsCodec takes each field of a Redis entry for a value.
type fieldsCodec struct{ t *Transform }

func (c fieldsCodec) open(*Item) (document, error) { return document{}, nil }

func (c fieldsCodec) fill(_ document, it *Item) error {
	for _, f := range it.Fields {
		for _, i := range c.t.byField[f.Field] {
			v, err := fromField(f.Value, &c.t.columns[i].Column)
			if err != nil {
				return fmt.Errorf("column %q: %w", c.t.columns[i].Name, err)
			}
			it.Row[i] = v
		}
	}
	return nil
}

func (c fieldsCodec) value(_ document, it *Item) ref.Val {
	members := make([]expression.Member, len(it.Fields))
	for i, f := range it.Fields {
		members[i] = expression.Member{Name: f.Field, Value: expression.TextOrBytes(f.Value)}
	}
	return expression.NewObject(members...)
}
