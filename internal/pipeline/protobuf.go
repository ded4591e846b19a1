package pipeline

import (
	"encoding/base64"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/google/cel-go/common/types/ref"
	"github.com/tidwall/gjson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/expression"
)

// protobufCodec reads one protobuf message, described by a descriptor set. Paths are names of fields.
//
// A field that can be set or not, and is not, is a missing value; one that cannot has its default. A path goes on into maps by
// key and into lists by index.
type protobufCodec struct {
	t     *Transform
	field string
	kind  protoreflect.MessageType
	// fields are those of every node of the tree that the path reaches through messages alone. Below them it is JSON.
	fields map[*node]protoreflect.FieldDescriptor
}

func newProtobufCodec(t *Transform, c *config.Codec) (codec, error) {
	d, err := messageDescriptor(c.Protobuf)
	if err != nil {
		return nil, err
	}
	p := &protobufCodec{t: t, field: c.Field, kind: dynamicpb.NewMessageType(d), fields: map[*node]protoreflect.FieldDescriptor{}}
	return p, p.bind(&t.tree, d)
}

// messageDescriptor reads the descriptor set and finds the message in it.
func messageDescriptor(p *config.ProtobufCodec) (protoreflect.MessageDescriptor, error) {
	var data []byte
	var err error
	if p.DescriptorSetFile != "" {
		if data, err = os.ReadFile(p.DescriptorSetFile); err != nil {
			return nil, NewConfigurationError("codec.protobuf.descriptorSetFile: %v", err)
		}
	} else if data, err = base64.StdEncoding.DecodeString(p.DescriptorSet); err != nil {
		return nil, NewConfigurationError("codec.protobuf.descriptorSet is not base64; write what base64 -w0 prints of the file")
	}
	var set descriptorpb.FileDescriptorSet
	if err := proto.Unmarshal(data, &set); err != nil {
		return nil, NewConfigurationError("codec.protobuf: this is not a descriptor set; make it with protoc --include_imports --descriptor_set_out=set.pb")
	}
	files, err := protodesc.NewFiles(&set)
	if err != nil {
		return nil, NewConfigurationError("codec.protobuf: the descriptor set cannot be linked (%v); make it with protoc --include_imports", err)
	}
	found, err := files.FindDescriptorByName(protoreflect.FullName(p.Message))
	if d, ok := found.(protoreflect.MessageDescriptor); ok && err == nil {
		return d, nil
	}
	return nil, NewConfigurationError("codec.protobuf.message: the descriptor set has no message %s; write the full name of one", p.Message)
}

// bind finds the field of every name in the tree.
func (p *protobufCodec) bind(n *node, d protoreflect.MessageDescriptor) error {
	for i := range n.children {
		child := &n.children[i]
		fd := d.Fields().ByName(protoreflect.Name(child.name))
		if fd == nil {
			column := p.t.columns[slices.Concat(child.node.columns, child.node.below)[0]]
			return NewConfigurationError("column %q: message %s has no field %s; write one of %s", column.Name, d.FullName(), child.name, fieldNames(d))
		}
		p.fields[child.node] = fd
		switch {
		case isPlainMessage(fd):
			if err := p.bind(child.node, fd.Message()); err != nil {
				return err
			}
		case len(child.node.children) > 0 && !fd.IsList() && !fd.IsMap() && fd.Message() == nil:
			return NewConfigurationError("column %q: field %s of %s has no parts", p.t.columns[child.node.below[0]].Name, child.name, d.FullName())
		}
	}
	return nil
}

// isPlainMessage says whether a path goes on into the fields of the field's message.
func isPlainMessage(fd protoreflect.FieldDescriptor) bool {
	return !fd.IsList() && !fd.IsMap() && fd.Message() != nil && expression.IsPlain(fd.Message())
}

func fieldNames(d protoreflect.MessageDescriptor) string {
	names := make([]string, d.Fields().Len())
	for i := range names {
		names[i] = string(d.Fields().Get(i).Name())
	}
	return strings.Join(names, ", ")
}

func (p *protobufCodec) open(it *Item) (document, error) {
	data, err := body(it, p.field)
	if err != nil {
		return document{}, err
	}
	m := p.kind.New()
	// A nil resolver: extensions are not part of the mapping. The error of the library tells nothing about the place.
	if err := (proto.UnmarshalOptions{RecursionLimit: maxDepth, AllowPartial: true}).Unmarshal([]byte(data), m.Interface()); err != nil {
		return document{}, fmt.Errorf("the document is not a message of type %s", p.kind.Descriptor().FullName())
	}
	return document{message: m}, nil
}

func (p *protobufCodec) fill(d document, it *Item) error { return p.walk(&p.t.tree, d.message, it.Row) }

func (p *protobufCodec) walk(n *node, m protoreflect.Message, row []Value) error {
	for i := range n.children {
		child := n.children[i].node
		fd := p.fields[child]
		if fd.HasPresence() && !m.Has(fd) {
			continue
		}
		if err := p.place(child, fd, m.Get(fd), row); err != nil {
			return err
		}
	}
	return nil
}

// place gives the columns at and below one field their values.
func (p *protobufCodec) place(n *node, fd protoreflect.FieldDescriptor, v protoreflect.Value, row []Value) error {
	for _, i := range n.columns {
		col := &p.t.columns[i].Column
		var err error
		if fd.Kind() == protoreflect.EnumKind && !fd.IsList() && isInteger(col.Type) {
			row[i], err = fromText(fmt.Sprint(v.Enum()), col)
		} else {
			row[i], err = fromCEL(expression.FieldValue(fd, v), col)
		}
		if err != nil {
			return fmt.Errorf("column %q: %w", col.Name, err)
		}
	}
	switch {
	case len(n.children) == 0:
		return nil
	case isPlainMessage(fd):
		return p.walk(n, v.Message(), row)
	}
	text, err := expression.AppendJSON(nil, expression.FieldValue(fd, v))
	if err != nil {
		return err
	}
	return p.t.walk(n, gjson.ParseBytes(text), row)
}

func isInteger(t config.ColumnType) bool {
	return t == config.TypeSmallint || t == config.TypeInteger || t == config.TypeBigint
}

func (p *protobufCodec) value(d document, _ *Item) ref.Val { return expression.Message(d.message) }
