package expression

import (
	"encoding/base64"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"
	"github.com/google/cel-go/common/types/traits"
	"github.com/tidwall/gjson"

	"github.com/millrace-dev/millrace/internal/pipeline/jsonscan"
)

// JSON returns the CEL value of a JSON document, which must be valid. Objects and arrays are taken apart when an expression
// looks into them, one level at a time.
func JSON(v gjson.Result) ref.Val {
	switch v.Type {
	case gjson.String:
		return types.String(v.Str)
	case gjson.Number:
		return Number(v.Raw)
	case gjson.True:
		return types.True
	case gjson.False:
		return types.False
	case gjson.JSON:
		if v.IsArray() {
			return &array{raw: v}
		}
		return &Object{raw: v}
	}
	return types.NullValue
}

// Member is one name and value of an object.
type Member struct {
	Name  string
	Value ref.Val
}

// Object is a JSON object. It is not safe for concurrent use.
type Object struct {
	raw     gjson.Result
	changed bool // members were set, so raw is not what the object holds
	members []lazyMember
	index   map[string]int // of larger objects
	looks   int            // into raw, one member each
	ready   bool
}

type lazyMember struct {
	name  string
	raw   string
	value ref.Val // nil until somebody looks
}

// NewObject returns an object of the given members. Of several with one name the last counts.
func NewObject(members ...Member) *Object {
	o := &Object{changed: true, ready: true, members: make([]lazyMember, len(members))}
	for i, m := range members {
		o.members[i] = lazyMember{name: m.Name, value: m.Value}
	}
	o.indexMembers()
	return o
}

// Set gives a member another value, or adds it.
func (o *Object) Set(name string, v ref.Val) {
	o.load()
	o.changed = true
	if i := o.find(name); i >= 0 {
		o.members[i] = lazyMember{name: name, value: v}
		return
	}
	o.members = append(o.members, lazyMember{name: name, value: v})
	o.indexMembers()
}

const (
	// fewMembers are found faster by looking at each.
	fewMembers = 16
	// fewLooks into a document cost less than taking it apart.
	fewLooks = 3
)

// load takes the object apart. As in PostgreSQL's jsonb, the last of several members with one name counts.
func (o *Object) load() {
	if o.ready {
		return
	}
	o.ready = true
	o.members = make([]lazyMember, 0, fewMembers)
	for s := jsonscan.Of(o.raw.Raw); ; {
		name, raw, ok := s.Next()
		if !ok {
			break
		}
		o.members = append(o.members, lazyMember{name: name, raw: raw})
	}
	o.indexMembers()
}

// indexMembers drops members that a later one of the same name replaces.
func (o *Object) indexMembers() {
	if len(o.members) <= fewMembers {
		kept := o.members[:0]
		for i, m := range o.members {
			if !slices.ContainsFunc(o.members[i+1:], func(later lazyMember) bool { return later.name == m.name }) {
				kept = append(kept, m)
			}
		}
		o.members = kept
		return
	}
	last := make(map[string]int, len(o.members))
	for i, m := range o.members {
		last[m.name] = i
	}
	kept := o.members[:0]
	for i, m := range o.members {
		if last[m.name] == i {
			last[m.name] = len(kept)
			kept = append(kept, m)
		}
	}
	o.members, o.index = kept, last
}

func (o *Object) find(name string) int {
	if o.index != nil {
		if i, ok := o.index[name]; ok {
			return i
		}
		return -1
	}
	for i := range o.members {
		if o.members[i].name == name {
			return i
		}
	}
	return -1
}

func (o *Object) value(i int) ref.Val {
	m := &o.members[i]
	if m.value == nil {
		m.value = JSON(jsonscan.Value(m.raw))
	}
	return m.value
}

// Find implements traits.Mapper.
func (o *Object) Find(key ref.Val) (ref.Val, bool) {
	name, ok := key.(types.String)
	if !ok {
		return types.MaybeNoSuchOverloadErr(key), false
	}
	if !o.ready && o.looks < fewLooks {
		o.looks++
		return o.look(string(name))
	}
	o.load()
	if i := o.find(string(name)); i >= 0 {
		return o.value(i), true
	}
	return nil, false
}

// look finds one member without taking the others apart.
func (o *Object) look(name string) (ref.Val, bool) {
	found := ""
	for s := jsonscan.Of(o.raw.Raw); ; {
		member, raw, ok := s.Next()
		if !ok {
			break
		}
		if member == name {
			found = raw
		}
	}
	if found == "" {
		return nil, false
	}
	return JSON(jsonscan.Value(found)), true
}

// Get implements traits.Indexer.
func (o *Object) Get(key ref.Val) ref.Val {
	v, ok := o.Find(key)
	switch {
	case ok:
		return v
	case v != nil:
		return v // an error
	}
	return types.NewErr("no such key: %v", key)
}

// Contains implements traits.Container.
func (o *Object) Contains(key ref.Val) ref.Val {
	v, ok := o.Find(key)
	if !ok && v != nil {
		return v
	}
	return types.Bool(ok)
}

// Size implements traits.Sizer.
func (o *Object) Size() ref.Val {
	o.load()
	return types.Int(len(o.members))
}

// Iterator implements traits.Iterable, over the names.
func (o *Object) Iterator() traits.Iterator { return o.standard().Iterator() }

// standard is the object as CEL's own map.
func (o *Object) standard() traits.Mapper {
	o.load()
	m := make(map[ref.Val]ref.Val, len(o.members))
	for i := range o.members {
		m[types.String(o.members[i].name)] = o.value(i)
	}
	return types.NewRefValMap(types.DefaultTypeAdapter, m)
}

// ConvertToNative implements ref.Val.
func (o *Object) ConvertToNative(t reflect.Type) (any, error) { return o.standard().ConvertToNative(t) }

// ConvertToType implements ref.Val.
func (o *Object) ConvertToType(t ref.Type) ref.Val { return o.standard().ConvertToType(t) }

// Equal implements ref.Val.
func (o *Object) Equal(other ref.Val) ref.Val { return o.standard().Equal(other) }

// Type implements ref.Val.
func (o *Object) Type() ref.Type { return types.MapType }

// Value implements ref.Val.
func (o *Object) Value() any { return o.standard().Value() }

// array is a JSON array.
type array struct {
	raw  gjson.Result
	list traits.Lister // nil until somebody looks
}

func (a *array) standard() traits.Lister {
	if a.list == nil {
		elems := []ref.Val{}
		for s := jsonscan.Of(a.raw.Raw); ; {
			_, raw, ok := s.Next()
			if !ok {
				break
			}
			elems = append(elems, JSON(jsonscan.Value(raw)))
		}
		a.list = types.NewRefValList(types.DefaultTypeAdapter, elems)
	}
	return a.list
}

func (a *array) Add(other ref.Val) ref.Val                   { return a.standard().Add(other) }
func (a *array) Contains(v ref.Val) ref.Val                  { return a.standard().Contains(v) }
func (a *array) Get(index ref.Val) ref.Val                   { return a.standard().Get(index) }
func (a *array) Iterator() traits.Iterator                   { return a.standard().Iterator() }
func (a *array) Size() ref.Val                               { return a.standard().Size() }
func (a *array) ConvertToNative(t reflect.Type) (any, error) { return a.standard().ConvertToNative(t) }
func (a *array) ConvertToType(t ref.Type) ref.Val            { return a.standard().ConvertToType(t) }
func (a *array) Equal(other ref.Val) ref.Val                 { return a.standard().Equal(other) }
func (a *array) Type() ref.Type                              { return types.ListType }
func (a *array) Value() any                                  { return a.standard().Value() }

// AppendJSON appends the JSON form of a value to dst. What came from a document is written as it came; numbers keep every
// digit; bytes become base64, times RFC 3339, durations their text. The names of a map that the expression made are sorted.
func AppendJSON(dst []byte, v ref.Val) ([]byte, error) {
	switch x := v.(type) {
	case nil, types.Null:
		return append(dst, "null"...), nil
	case types.Bool:
		return strconv.AppendBool(dst, bool(x)), nil
	case types.Int:
		return strconv.AppendInt(dst, int64(x), 10), nil
	case types.Uint:
		return strconv.AppendUint(dst, uint64(x), 10), nil
	case types.Double:
		if math.IsNaN(float64(x)) || math.IsInf(float64(x), 0) {
			return nil, fmt.Errorf("%v has no form in JSON", float64(x))
		}
		return appendDouble(dst, float64(x)), nil
	case Decimal:
		return append(dst, x...), nil
	case types.String:
		return AppendText(dst, string(x)), nil
	case types.Bytes:
		dst = append(dst, '"')
		dst = base64.StdEncoding.AppendEncode(dst, x)
		return append(dst, '"'), nil
	case types.Timestamp:
		dst = append(dst, '"')
		dst = x.Time.UTC().AppendFormat(dst, time.RFC3339Nano)
		return append(dst, '"'), nil
	case types.Duration:
		return AppendText(dst, x.Duration.String()), nil
	case *types.Optional:
		if !x.HasValue() {
			return append(dst, "null"...), nil
		}
		return AppendJSON(dst, x.GetValue())
	case *Object:
		return x.appendJSON(dst)
	case *array:
		if x.list == nil {
			return append(dst, x.raw.Raw...), nil
		}
		return appendList(dst, x.list)
	case traits.Mapper:
		return appendMap(dst, x)
	case traits.Lister:
		return appendList(dst, x)
	}
	return nil, fmt.Errorf("a value of type %s has no form in JSON", v.Type().TypeName())
}

func (o *Object) appendJSON(dst []byte) ([]byte, error) {
	if !o.changed {
		return append(dst, o.raw.Raw...), nil
	}
	dst = append(dst, '{')
	var err error
	for i := range o.members {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(AppendText(dst, o.members[i].name), ':')
		if dst, err = AppendJSON(dst, o.value(i)); err != nil {
			return nil, err
		}
	}
	return append(dst, '}'), nil
}

func appendList(dst []byte, l traits.Lister) ([]byte, error) {
	dst = append(dst, '[')
	var err error
	for it, first := l.Iterator(), true; it.HasNext() == types.True; first = false {
		if !first {
			dst = append(dst, ',')
		}
		if dst, err = AppendJSON(dst, it.Next()); err != nil {
			return nil, err
		}
		if len(dst) > maxText {
			return nil, errDocument
		}
	}
	return append(dst, ']'), nil
}

var errDocument = fmt.Errorf("the expression's value grows beyond %d MiB", maxText>>20)

func appendMap(dst []byte, m traits.Mapper) ([]byte, error) {
	var members []Member
	for it := m.Iterator(); it.HasNext() == types.True; {
		key := it.Next()
		name, ok := key.ConvertToType(types.StringType).(types.String)
		if !ok {
			return nil, fmt.Errorf("a key of type %s has no form in JSON", key.Type().TypeName())
		}
		members = append(members, Member{string(name), m.Get(key)})
	}
	slices.SortFunc(members, func(a, b Member) int { return strings.Compare(a.Name, b.Name) })
	dst = append(dst, '{')
	var err error
	for i, member := range members {
		if i > 0 {
			if member.Name == members[i-1].Name {
				return nil, fmt.Errorf("two keys of a map are %s in JSON", clip(strconv.Quote(member.Name)))
			}
			dst = append(dst, ',')
		}
		dst = append(AppendText(dst, member.Name), ':')
		if dst, err = AppendJSON(dst, member.Value); err != nil {
			return nil, err
		}
		if len(dst) > maxText {
			return nil, errDocument
		}
	}
	return append(dst, '}'), nil
}

// appendDouble writes a double the way JavaScript does: without an exponent where it is short.
func appendDouble(dst []byte, f float64) []byte {
	format := byte('f')
	if a := math.Abs(f); a != 0 && (a < 1e-6 || a >= 1e21) {
		format = 'e'
	}
	return strconv.AppendFloat(dst, f, format, -1, 64)
}

// AppendText appends a JSON string. What is not UTF-8 becomes U+FFFD.
func AppendText(dst []byte, s string) []byte {
	const hex = "0123456789abcdef"
	dst = append(dst, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= utf8.RuneSelf {
			r, size := utf8.DecodeRuneInString(s[i:])
			if r == utf8.RuneError && size == 1 {
				dst = append(append(dst, s[start:i]...), "\ufffd"...)
				start = i + 1
			}
			i += size
			continue
		}
		if c >= ' ' && c != '"' && c != '\\' {
			i++
			continue
		}
		dst = append(dst, s[start:i]...)
		switch c {
		case '"', '\\':
			dst = append(dst, '\\', c)
		case '\n':
			dst = append(dst, '\\', 'n')
		case '\r':
			dst = append(dst, '\\', 'r')
		case '\t':
			dst = append(dst, '\\', 't')
		default:
			dst = append(dst, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		}
		i++
		start = i
	}
	return append(append(dst, s[start:]...), '"')
}
