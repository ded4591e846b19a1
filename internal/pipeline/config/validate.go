package config

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/millrace-dev/millrace/internal/pipeline/expression"
)

// Bounds of what a configuration may ask for.
const (
	maxBatchRows   = 100_000
	maxBatchBytes  = 64 << 20
	maxWriters     = 64
	maxLinger      = Duration(10 * time.Second)
	maxColumns     = 500
	maxIdentifier  = 63 // bytes; PostgreSQL cuts longer names off in silence
	minReclaim     = Duration(100 * time.Millisecond)
	maxDeliveries  = 1000
	maxStateKeys   = 10_000_000
	maxInFlightTop = 10_000_000
)

var engineName = regexp.MustCompile(`^[a-z][a-z0-9_]{0,47}$`)

var columnTypes = []ColumnType{
	TypeText, TypeBoolean, TypeSmallint, TypeInteger, TypeBigint, TypeNumeric, TypeReal, TypeDouble, TypeTimestamptz,
	TypeJSONB, TypeBytea, TypeUUID,
}

// elementTypes are the types that have arrays.
var elementTypes = []ColumnType{
	TypeText, TypeBoolean, TypeSmallint, TypeInteger, TypeBigint, TypeNumeric, TypeReal, TypeDouble, TypeTimestamptz, TypeUUID,
}

func arrayTypes() []ColumnType {
	types := make([]ColumnType, len(elementTypes))
	for i, t := range elementTypes {
		types[i] = t + arraySuffix
	}
	return types
}

// Validate reports everything that is wrong, as Problems. It expects the defaults to be filled in.
func (c *Config) Validate() error {
	var ps Problems
	if c.Name == "" {
		ps.add("name", "is empty; write the processor's name")
	}
	c.validateSource(&ps)
	c.validateCodec(&ps)
	c.validateMapping(&ps, "mapping", &c.Mapping)
	c.validateState(&ps)
	c.validateMemory(&ps)
	c.validateSink(&ps)
	c.validateBounds(&ps)
	return ps.err()
}

func (c *Config) validateSource(ps *Problems) {
	r, g := c.Source.Redis, c.Source.ConsumerGroup
	if (r == nil) == (g == nil) {
		ps.add("source", "write exactly one of redis and consumerGroup")
	}
	if r != nil {
		if len(r.Streams) == 0 {
			ps.add("source.redis.streams", "is empty; write the keys of the Redis streams to read")
		}
		for i, s := range r.Streams {
			at := fmt.Sprintf("source.redis.streams[%d]", i)
			if s == "" {
				ps.add(at, "is empty; write the key of a Redis stream")
			} else if slices.Contains(r.Streams[:i], s) {
				ps.add(at, "%q is listed twice; keep one", s)
			}
		}
		if r.Group == "" {
			ps.add("source.redis.group", "is empty; write the name of the Redis consumer group")
		}
		oneOf(ps, "source.redis.start", r.Start, StartEarliest, StartLatest)
		if r.ReclaimAfter < minReclaim {
			ps.add("source.redis.reclaimAfter", "%s is too short; write at least %s", r.ReclaimAfter, minReclaim)
		}
		oneOf(ps, "source.redis.afterAck", r.AfterAck, AfterAckKeep, AfterAckDelete, AfterAckTrim)
		oneOf(ps, "source.redis.ownership", r.Ownership, OwnershipShared, OwnershipExclusive)
	}
	if g != nil {
		for _, f := range []struct{ at, name string }{
			{"source.consumerGroup.stream", g.Stream}, {"source.consumerGroup.group", g.Group},
		} {
			if !engineName.MatchString(f.name) {
				ps.add(f.at, "%q is not a name; write a lower-case letter followed by up to 47 letters, digits or underscores", f.name)
			}
		}
		oneOf(ps, "source.consumerGroup.mode", g.Mode, ModeShared, ModeOrdered)
	}
}

func (c *Config) validateCodec(ps *Problems) {
	oneOf(ps, "codec.type", c.Codec.Type, CodecJSON, CodecFields, CodecCloudEvents, CodecProtobuf)
	if c.Codec.Type == CodecFields && c.Codec.Field != "" {
		ps.add("codec.field", "has no meaning with type Fields; leave it out")
	}
	if c.Source.ConsumerGroup != nil {
		if c.Codec.Type == CodecFields {
			ps.add("codec.type", "a message has no fields; write JSON")
		}
		if c.Codec.Field != "" {
			ps.add("codec.field", "a message's payload is the document; leave it out")
		}
	}
	switch p := c.Codec.Protobuf; {
	case p == nil && c.Codec.Type == CodecProtobuf:
		ps.add("codec.protobuf", "is missing; write descriptorSet and message")
	case p != nil && c.Codec.Type != CodecProtobuf:
		ps.add("codec.protobuf", "belongs to type Protobuf; leave it out, or write codec.type: Protobuf")
	case p != nil:
		p.validateIn(ps, c)
	}
}

func (c *Config) validateMapping(ps *Problems, at string, m *Mapping) {
	if n := len(m.Columns); n > maxColumns {
		ps.add(at+".columns", "there are %d columns; write at most %d", n, maxColumns)
	}
	if m.Filter != "" {
		c.validateExpression(ps, at+".filter", m.Filter, asFilter)
	}
	names := map[string]bool{}
	for i := range m.Columns {
		col := &m.Columns[i]
		at := fmt.Sprintf("%s.columns[%d]", at, i)
		if msg := identifier(col.Name); msg != "" {
			ps.add(at+".name", "%s", msg)
		} else if names[col.Name] {
			ps.add(at+".name", "%q is mapped twice; keep one", col.Name)
		}
		names[col.Name] = true
		switch {
		case col.Path != "" && col.Expression != "":
			ps.add(at+".expression", "stands beside a path; keep one of the two")
		case col.Expression != "":
			c.validateExpression(ps, at+".expression", col.Expression, asColumn)
		default:
			c.validatePath(ps, at, col)
		}
		col.validateType(ps, at)
	}
}

func (col *Column) validateType(ps *Problems, at string) {
	element, array := col.Type.Element()
	if !array {
		element = col.Type
		oneOf(ps, at+".type", col.Type, columnTypes...)
	} else if !slices.Contains(elementTypes, element) {
		oneOf(ps, at+".type", col.Type, arrayTypes()...)
	}
	if element == TypeTimestamptz {
		oneOf(ps, at+".timeFormat", col.TimeFormat, TimeRFC3339, TimeUnixSeconds, TimeUnixMillis, TimeUnixMicros)
	} else if col.TimeFormat != "" {
		ps.add(at+".timeFormat", "only a timestamptz has a time format; leave it out")
	}
	if col.Default != nil {
		if col.Required {
			ps.add(at+".default", "a required column has no default; leave one of the two out")
		}
		if msg := defaultProblem(col); msg != "" {
			ps.add(at+".default", "%q is not %s", *col.Default, msg)
		}
	}
}

func (c *Config) validatePath(ps *Problems, at string, col *Column) {
	if !IsProperty(col.Path) {
		names, err := SplitPath(col.Path)
		if err != nil {
			ps.add(at+".path", "%s", err)
		} else if c.Codec.Type == CodecFields && len(names) > 1 {
			ps.add(at+".path", "a field has no parts; write the field's name, with \\. for a dot inside it")
		}
		return
	}
	types, ok := propertyTypes[col.Path]
	switch {
	case !ok:
		ps.add(at+".path", "%q is unknown; write one of @id, @stream, @received_at, @key, @position, or \\@ for a name that begins with @", col.Path)
	case c.Source.Redis != nil && (col.Path == PropertyKey || col.Path == PropertyPosition):
		ps.add(at+".path", "a Redis entry has no %s; write @id, or read from a consumer group", col.Path)
	case (slices.Contains(columnTypes, col.Type) || strings.HasSuffix(string(col.Type), arraySuffix)) && !slices.Contains(types, col.Type):
		ps.add(at+".type", "%s cannot be %s; write %s", col.Path, col.Type, types[0])
	}
}

func (c *Config) validateState(ps *Problems) {
	if c.State == nil {
		return
	}
	m := &c.Mapping
	if m.column(c.State.Key) == nil {
		ps.add("state.key", "%q is not a mapped column; write one of %s", c.State.Key, m.columnNames(nil))
	}
	if col := m.column(c.State.Time); col == nil || col.Type != TypeTimestamptz {
		ps.add("state.time", "%q is not a mapped timestamptz; write one of %s", c.State.Time,
			m.columnNames(func(col *Column) bool { return col.Type == TypeTimestamptz }))
	}
	for i := range m.Columns {
		if col := &m.Columns[i]; (col.Name == c.State.Key || col.Name == c.State.Time) && uses(col.Expression, expression.VarState) {
			ps.add(fmt.Sprintf("mapping.columns[%d].expression", i), "the state is kept by this column, so it cannot use state; compute it from doc")
		}
	}
	between(ps, "state.maxKeys", c.State.MaxKeys, 1, maxStateKeys)
}

func (c *Config) validateBounds(ps *Problems) {
	b := c.Batch
	between(ps, "batch.maxRows", b.MaxRows, 1, maxBatchRows)
	between(ps, "batch.maxBytes", b.MaxBytes, 1024, maxBatchBytes)
	between(ps, "batch.writers", b.Writers, 1, maxWriters)
	if b.MaxInFlight != 0 { // without a default, because what it is made of is out of range
		between(ps, "batch.maxInFlight", b.MaxInFlight, 1, maxInFlightTop)
	}
	between(ps, "batch.maxInFlightBytes", b.MaxInFlightBytes, 1024, math.MaxInt32)
	between(ps, "batch.linger", b.Linger, Duration(time.Microsecond), maxLinger)
	between(ps, "errors.maxDeliveries", c.Errors.MaxDeliveries, 1, maxDeliveries)
	oneOf(ps, "errors.policy", c.Errors.Policy, PolicyDeadLetter, PolicyPending)
	between(ps, "drain.timeout", c.Drain.Timeout, Duration(100*time.Millisecond), Duration(time.Hour))
}

// column finds a mapped column by name.
func (m *Mapping) column(name string) *Column {
	for i := range m.Columns {
		if m.Columns[i].Name == name {
			return &m.Columns[i]
		}
	}
	return nil
}

// columnNames lists the mapped columns that fit, or all of them.
func (m *Mapping) columnNames(fits func(*Column) bool) string {
	var names []string
	for i := range m.Columns {
		if fits == nil || fits(&m.Columns[i]) {
			names = append(names, m.Columns[i].Name)
		}
	}
	switch {
	case len(names) > 0:
		return strings.Join(names, ", ")
	case len(m.Columns) == 0:
		return "the columns under mapping.columns (there is none yet)"
	}
	return "a column that fits (there is none yet)"
}

// nullable says whether the column can be null. Properties are always there, but for the key of a message.
func (col *Column) nullable() bool {
	return !col.Required && col.Default == nil && (!IsProperty(col.Path) || col.Path == PropertyKey)
}

// identifier says what is wrong with a name of PostgreSQL.
func identifier(name string) string {
	switch {
	case name == "":
		return "is empty; write a name"
	case len(name) > maxIdentifier:
		return fmt.Sprintf("%q has %d bytes; PostgreSQL takes names of at most %d", name, len(name), maxIdentifier)
	case strings.ContainsRune(name, 0):
		return "contains a zero byte; write a name without"
	}
	return ""
}

var number = regexp.MustCompile(`^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?$`)

// defaultProblem says what a default should be, or nothing when it is fine. It accepts no text that the processor refuses.
func defaultProblem(col *Column) string {
	element, array := col.Type.Element()
	if !array {
		return defaultProblemOf(col.Type, *col.Default)
	}
	var items []any
	dec := json.NewDecoder(strings.NewReader(*col.Default))
	dec.UseNumber()
	if err := dec.Decode(&items); err != nil || items == nil || dec.More() {
		return "a JSON array; write, for example, \"[]\""
	}
	for _, item := range items {
		switch item := item.(type) {
		case nil:
		case map[string]any, []any:
			return fmt.Sprintf("an array of %s", element)
		default:
			if msg := defaultProblemOf(element, fmt.Sprint(item)); msg != "" {
				return "an array whose elements are " + msg
			}
		}
	}
	return ""
}

// defaultProblemOf does so for a value that is no array.
func defaultProblemOf(t ColumnType, text string) string {
	switch t {
	case TypeBoolean:
		if text != "true" && text != "false" {
			return "a boolean; write \"true\" or \"false\""
		}
	case TypeSmallint, TypeInteger, TypeBigint:
		bits := map[ColumnType]int{TypeSmallint: 16, TypeInteger: 32, TypeBigint: 64}[t]
		if _, err := strconv.ParseInt(text, 10, bits); err != nil {
			return fmt.Sprintf("a whole number that fits %s", t)
		}
	case TypeNumeric:
		if !number.MatchString(text) {
			return "a number"
		}
	case TypeReal, TypeDouble:
		bits := 64
		if t == TypeReal {
			bits = 32
		}
		if _, err := strconv.ParseFloat(text, bits); err != nil || !number.MatchString(text) {
			return fmt.Sprintf("a number that fits %s", t)
		}
	case TypeTimestamptz:
		if _, err := time.Parse(time.RFC3339Nano, text); err != nil {
			return "a time; write it as 2006-01-02T15:04:05Z, whatever the time format of the entries"
		}
	case TypeJSONB:
		if !json.Valid([]byte(text)) {
			return "a JSON document; write, for example, \"{}\""
		}
	case TypeBytea:
		if _, err := base64.StdEncoding.DecodeString(text); err != nil {
			return "base64"
		}
	case TypeUUID:
		if _, err := hex.DecodeString(strings.ReplaceAll(text, "-", "")); err != nil || len(strings.ReplaceAll(text, "-", "")) != 32 {
			return "a UUID"
		}
	case TypeText:
		if strings.ContainsRune(text, 0) {
			return "free of zero bytes, which PostgreSQL cannot store in a text"
		}
	}
	return ""
}

func oneOf[T ~string](ps *Problems, path string, value T, allowed ...T) {
	if slices.Contains(allowed, value) {
		return
	}
	texts := make([]string, len(allowed))
	for i, a := range allowed {
		texts[i] = string(a)
	}
	ps.add(path, "%q is not allowed; write one of %s", string(value), strings.Join(texts, ", "))
}

func between[T int | Duration](ps *Problems, path string, value, low, high T) {
	if value < low || value > high {
		ps.add(path, "%v is out of range; write %v to %v", value, low, high)
	}
}
