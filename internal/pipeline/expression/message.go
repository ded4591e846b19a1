package expression

import (
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Message returns the CEL value of a protobuf message: a map of its fields by name, without those that are not set and
// could be. Enums are their names, integers keep every digit, and the messages of google.protobuf that stand for plain
// values (timestamps, durations, wrappers, structs) are those values.
func Message(m protoreflect.Message) ref.Val {
	if v, ok := wellKnown(m); ok {
		return v
	}
	fields := m.Descriptor().Fields()
	members := make([]Member, 0, fields.Len())
	for i := range fields.Len() {
		if fd := fields.Get(i); m.Has(fd) || !fd.HasPresence() {
			members = append(members, Member{string(fd.Name()), FieldValue(fd, m.Get(fd))})
		}
	}
	return NewObject(members...)
}

// FieldValue returns the CEL value of one field.
func FieldValue(fd protoreflect.FieldDescriptor, v protoreflect.Value) ref.Val {
	switch {
	case fd.IsList():
		l := v.List()
		elems := make([]ref.Val, l.Len())
		for i := range elems {
			elems[i] = single(fd, l.Get(i))
		}
		return types.NewRefValList(types.DefaultTypeAdapter, elems)
	case fd.IsMap():
		members := make([]Member, 0, v.Map().Len())
		v.Map().Range(func(key protoreflect.MapKey, value protoreflect.Value) bool {
			members = append(members, Member{key.String(), single(fd.MapValue(), value)})
			return true
		})
		slices.SortFunc(members, func(a, b Member) int { return strings.Compare(a.Name, b.Name) }) // a map has no order of its own
		return NewObject(members...)
	}
	return single(fd, v)
}

func single(fd protoreflect.FieldDescriptor, v protoreflect.Value) ref.Val {
	switch fd.Kind() {
	case protoreflect.BoolKind:
		return types.Bool(v.Bool())
	case protoreflect.EnumKind:
		if e := fd.Enum().Values().ByNumber(v.Enum()); e != nil {
			return types.String(e.Name())
		}
		return types.Int(v.Enum())
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind, protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return unsigned(v.Uint())
	case protoreflect.FloatKind:
		return float(v.Float())
	case protoreflect.DoubleKind:
		return types.Double(v.Float())
	case protoreflect.StringKind:
		return types.String(v.String())
	case protoreflect.BytesKind:
		return types.Bytes(v.Bytes())
	case protoreflect.MessageKind, protoreflect.GroupKind:
		return Message(v.Message())
	}
	return types.Int(v.Int())
}

// unsigned is an int where that is enough, as with JSON.
func unsigned(n uint64) ref.Val {
	if n <= math.MaxInt64 {
		return types.Int(n)
	}
	return types.Uint(n)
}

// float is the shortest number that stands for a float of 32 bits: 0.1, and not 0.10000000149011612.
func float(f float64) ref.Val {
	if math.IsNaN(f) || math.IsInf(f, 0) {
		return types.Double(f)
	}
	short, err := strconv.ParseFloat(strconv.FormatFloat(f, 'g', -1, 32), 64)
	if err != nil {
		return types.Double(f)
	}
	return types.Double(short)
}

// IsPlain says whether messages of this type are maps of their fields, and do not stand for a plain value.
func IsPlain(d protoreflect.MessageDescriptor) bool { return !isWellKnown[d.FullName()] }

var isWellKnown = map[protoreflect.FullName]bool{
	"google.protobuf.Timestamp": true, "google.protobuf.Duration": true, "google.protobuf.Struct": true, "google.protobuf.Value": true,
	"google.protobuf.ListValue": true, "google.protobuf.BoolValue": true, "google.protobuf.StringValue": true, "google.protobuf.BytesValue": true,
	"google.protobuf.Int32Value": true, "google.protobuf.Int64Value": true, "google.protobuf.UInt32Value": true, "google.protobuf.UInt64Value": true,
	"google.protobuf.FloatValue": true, "google.protobuf.DoubleValue": true,
}

// wellKnown returns the plain value that a message stands for.
func wellKnown(m protoreflect.Message) (v ref.Val, ok bool) {
	d := m.Descriptor()
	if IsPlain(d) {
		return nil, false
	}
	fields := d.Fields()
	switch d.Name() {
	case "Timestamp", "Duration":
		seconds, nanos := fields.ByName("seconds"), fields.ByName("nanos")
		if seconds == nil || nanos == nil {
			return nil, false
		}
		s, n := m.Get(seconds).Int(), m.Get(nanos).Int()
		if d.Name() == "Timestamp" {
			return types.Timestamp{Time: time.Unix(s, n).UTC()}, true
		}
		if s > math.MaxInt64/int64(time.Second)-1 || s < math.MinInt64/int64(time.Second)+1 {
			return nil, false
		}
		return types.Duration{Duration: time.Duration(s)*time.Second + time.Duration(n)}, true
	case "Value":
		for i := range fields.Len() {
			fd := fields.Get(i)
			if m.Has(fd) && fd.Kind() != protoreflect.EnumKind {
				return FieldValue(fd, m.Get(fd)), true
			}
		}
		return types.NullValue, true
	}
	// Struct, ListValue and the wrappers have one field, which is the value.
	if fields.Len() != 1 {
		return nil, false
	}
	return FieldValue(fields.Get(0), m.Get(fields.Get(0))), true
}
