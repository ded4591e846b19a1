package pipeline

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"
	"github.com/tidwall/gjson"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/expression"
)

// cloudEventsCodec reads CloudEvents 1.0, in both of their modes:
//
//   - structured: the document is a JSON object that holds attributes and data;
//   - binary: attributes are fields of the Redis entry, or headers of the message, that begin with ce_ or ce-, the content
//     type is content-type or content_type, and the document is the data.
//
// Paths are the names of attributes, and data. Data that is JSON can be looked into; other data is one value.
type cloudEventsCodec struct {
	t     *Transform
	field string
}

// event is a CloudEvent whose data does not stand in its document as JSON does.
type event struct {
	attributes []attribute // in binary mode
	data       string      // as it came
	hasData    bool
	isJSON     bool // data is a JSON document
	isText     bool // data is text; when it is neither, it is bytes
}

type attribute struct{ name, value string }

const (
	attributePrefix = "ce_" // or ce-, as HTTP writes it
	structuredType  = "application/cloudevents"
)

func (c cloudEventsCodec) open(it *Item) (document, error) {
	attributes, contentType := c.attributes(it)
	if attributes == nil || strings.HasPrefix(contentType, structuredType) {
		return c.openStructured(it, attributes != nil)
	}
	e := &event{attributes: attributes}
	if err := complete(func(name string) (string, bool) { return e.attribute(name) }); err != nil {
		return document{}, err
	}
	declared, ok := e.attribute("datacontenttype")
	if !ok && contentType != "" {
		declared = contentType
		e.attributes = append(e.attributes, attribute{"datacontenttype", contentType})
	}
	if e.data, e.hasData = it.Payload, it.Fields == nil && it.Payload != ""; it.Fields != nil {
		e.data, e.hasData = fieldOf(it, c.field)
	}
	return e.open(declared)
}

// open finds out by its type what the data is, never by the data: else a few bytes that happen to be a text would be another
// value than others. Without a type it is JSON.
func (e *event) open(contentType string) (document, error) {
	if !e.hasData || !isJSONType(contentType) {
		e.isText = isTextType(contentType) && utf8.ValidString(e.data)
		return document{event: e}, nil
	}
	if err := validJSON(e.data); err != nil {
		return document{}, fmt.Errorf("the event's data: %w; its datacontenttype is %q", err, contentType)
	}
	e.isJSON = true
	return document{event: e}, nil
}

func (c cloudEventsCodec) openStructured(it *Item, announced bool) (document, error) {
	doc, err := body(it, c.field)
	if err != nil {
		return document{}, err
	}
	root, err := parseObject(doc)
	if err != nil {
		if gjson.Valid(doc) && gjson.Parse(doc).IsArray() {
			return document{}, errors.New("the document is a batch of CloudEvents; publish one event per entry")
		}
		return document{}, err
	}
	values := root.Map()
	if _, ok := values["specversion"]; !ok && !announced {
		return document{}, errors.New("this is no CloudEvent: there is neither ce_specversion beside the document nor specversion in it")
	}
	if err := complete(func(name string) (string, bool) { return values[name].Str, values[name].Type == gjson.String }); err != nil {
		return document{}, err
	}
	encoded, ok := values["data_base64"]
	if !ok || encoded.Type == gjson.Null {
		return document{json: root}, nil
	}
	if _, both := values["data"]; both {
		return document{}, errors.New("the event has both data and data_base64")
	}
	data, ok := decodeBase64(encoded.Str)
	if !ok || encoded.Type != gjson.String {
		return document{}, errors.New("the event's data_base64 is not base64")
	}
	e := &event{data: asString(data), hasData: true}
	if declared := values["datacontenttype"].Str; declared != "" {
		if d, err := e.open(declared); err != nil {
			return d, err
		}
	}
	return document{json: root, event: e}, nil
}

// complete checks the attributes that every event has.
func complete(attribute func(name string) (string, bool)) error {
	for _, name := range []string{"specversion", "id", "source", "type"} {
		if value, ok := attribute(name); !ok || value == "" {
			return fmt.Errorf("the CloudEvent has no %s", name)
		}
	}
	if version, _ := attribute("specversion"); !strings.HasPrefix(version, "1.") {
		return fmt.Errorf("the CloudEvent has specversion %s; only 1.0 is known", short(version))
	}
	return nil
}

// attributes returns what an entry's fields or a message's headers say about its event: nil when there is no specversion.
func (c cloudEventsCodec) attributes(it *Item) (as []attribute, contentType string) {
	found := false
	take := func(name, value string) {
		switch name = strings.ToLower(strings.ReplaceAll(name, "-", "_")); {
		case strings.HasPrefix(name, attributePrefix):
			name = strings.TrimPrefix(name, attributePrefix)
			found = found || name == "specversion"
			as = append(as, attribute{name, value})
		case name == "content_type":
			contentType = strings.ToLower(value)
		}
	}
	for _, f := range it.Fields {
		if f.Field != c.field {
			take(f.Field, f.Value)
		}
	}
	if len(it.Headers) > 0 {
		gjson.ParseBytes(it.Headers).ForEach(func(key, value gjson.Result) bool {
			take(key.Str, value.String())
			return true
		})
	}
	if !found {
		as = nil
	}
	return as, contentType
}

// isTextType says whether a content type that is not JSON means text.
func isTextType(contentType string) bool {
	lower := strings.ToLower(contentType)
	media, _, _ := strings.Cut(lower, ";")
	media = strings.TrimSpace(media)
	return strings.HasPrefix(media, "text/") || strings.HasSuffix(media, "/xml") || strings.HasSuffix(media, "+xml") || strings.Contains(lower, "charset=")
}

func (e *event) attribute(name string) (string, bool) {
	for i := len(e.attributes) - 1; i >= 0; i-- {
		if e.attributes[i].name == name {
			return e.attributes[i].value, true
		}
	}
	return "", false
}

// isJSONType says whether a content type means JSON. So does none at all.
func isJSONType(contentType string) bool {
	media, _, _ := strings.Cut(strings.ToLower(contentType), ";")
	media = strings.TrimSpace(media)
	return media == "" || strings.HasSuffix(media, "/json") || strings.HasSuffix(media, "+json")
}

func (c cloudEventsCodec) fill(d document, it *Item) error {
	if d.json.Exists() {
		if err := c.t.walk(&c.t.tree, d.json, it.Row); err != nil {
			return err
		}
	}
	if d.event == nil {
		return nil
	}
	for i := range c.t.tree.children {
		child := &c.t.tree.children[i]
		var err error
		if child.name == "data" {
			err = c.fillData(d.event, child.node, it.Row)
		} else if value, ok := d.event.attribute(child.name); ok {
			err = c.t.fillCEL(child.node, expression.TextOrBytes(value), it.Row)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (c cloudEventsCodec) fillData(e *event, n *node, row []Value) error {
	if !e.hasData {
		return nil
	}
	if e.isJSON {
		return c.t.place(n, gjson.Parse(e.data), row)
	}
	for _, i := range n.columns {
		col := &c.t.columns[i].Column
		var err error
		if col.Type == config.TypeJSONB {
			row[i], err = fromCEL(e.value(), col)
		} else {
			row[i], err = fromField(e.data, col)
		}
		if err != nil {
			return fmt.Errorf("column %q: %w", col.Name, err)
		}
	}
	return nil
}

// value is the data as expressions see it.
func (e *event) value() ref.Val {
	switch {
	case e.isJSON:
		return expression.JSON(gjson.Parse(e.data))
	case e.isText:
		return types.String(e.data)
	}
	return types.Bytes(e.data)
}

func (c cloudEventsCodec) value(d document, _ *Item) ref.Val {
	if d.event == nil {
		return expression.JSON(d.json)
	}
	var o *expression.Object
	if d.json.Exists() {
		o, _ = expression.JSON(d.json).(*expression.Object)
	}
	if o == nil {
		members := make([]expression.Member, len(d.event.attributes))
		for i, a := range d.event.attributes {
			members[i] = expression.Member{Name: a.name, Value: expression.TextOrBytes(a.value)}
		}
		o = expression.NewObject(members...)
	}
	if d.event.hasData {
		o.Set("data", d.event.value())
	}
	return o
}
