package config

import "time"

// Defaults of what a configuration leaves out. The comments on the fields repeat them.
const (
	DefaultCodecField       = "payload"
	DefaultReclaimAfter     = Duration(30 * time.Second)
	DefaultSchema           = "public"
	DefaultStateKeys        = 100_000
	DefaultBatchRows        = 10_000
	DefaultBatchBytes       = 8 << 20
	DefaultLinger           = Duration(10 * time.Millisecond)
	DefaultWriters          = 2
	DefaultMaxInFlightBytes = 16 << 20
	DefaultMaxDeliveries    = 5
	DefaultDrainTimeout     = Duration(15 * time.Second)
	DefaultHTTPType         = "dev.millrace.message"
	DefaultHTTPTimeout      = Duration(10 * time.Second)
	DefaultHTTPConcurrency  = 8
)

// columnTypeAliases are the other names under which people know PostgreSQL's types.
var columnTypeAliases = map[ColumnType]ColumnType{
	"varchar": TypeText, "string": TypeText,
	"bool": TypeBoolean,
	"int2": TypeSmallint, "int4": TypeInteger, "int": TypeInteger, "int8": TypeBigint,
	"decimal": TypeNumeric,
	"float4":  TypeReal, "float8": TypeDouble, "double": TypeDouble,
	"timestamp with time zone": TypeTimestamptz,
}

// Defaults fills in what was left out. It changes nothing that was set, and doing it twice changes nothing.
func (c *Config) Defaults() {
	set(&c.Codec.Type, CodecJSON)
	if r := c.Source.Redis; r != nil {
		set(&r.Start, StartEarliest)
		set(&r.ReclaimAfter, DefaultReclaimAfter)
		set(&r.AfterAck, AfterAckKeep)
		set(&r.Ownership, OwnershipShared)
		if c.Codec.Type != CodecFields {
			set(&c.Codec.Field, DefaultCodecField)
		}
	}
	if g := c.Source.ConsumerGroup; g != nil {
		set(&g.Mode, ModeShared)
	}
	c.Mapping.defaults()
	if c.State != nil {
		set(&c.State.MaxKeys, DefaultStateKeys)
	}
	if c.Memory != nil {
		set(&c.Memory.Create, CreateNever)
	}
	defaultsOf(c.Sink.Table, c.Sink.Stream, c.Sink.HTTP)
	empty(&c.Sink.FanOut)
	for i := range c.Sink.FanOut {
		b := &c.Sink.FanOut[i]
		if b.Mapping != nil {
			b.Mapping.defaults()
		}
		defaultsOf(b.Table, b.Stream, b.HTTP)
	}
	set(&c.Batch.MaxRows, DefaultBatchRows)
	set(&c.Batch.MaxBytes, DefaultBatchBytes)
	set(&c.Batch.Linger, DefaultLinger)
	set(&c.Batch.Writers, DefaultWriters)
	// Bounded so that a mistaken MaxRows, which Validate reports, cannot overflow here.
	if c.Batch.MaxRows <= maxBatchRows && c.Batch.Writers <= maxWriters {
		set(&c.Batch.MaxInFlight, 4*c.Batch.MaxRows*c.Batch.Writers)
	}
	set(&c.Batch.MaxInFlightBytes, max(DefaultMaxInFlightBytes, 2*min(c.Batch.MaxBytes, maxBatchBytes)))
	set(&c.Errors.MaxDeliveries, DefaultMaxDeliveries)
	set(&c.Errors.Policy, PolicyDeadLetter)
	set(&c.Drain.Timeout, DefaultDrainTimeout)
}

func (m *Mapping) defaults() {
	empty(&m.Columns)
	for i := range m.Columns {
		col := &m.Columns[i]
		element, array := col.Type.Element()
		if !array {
			element = col.Type
		}
		if t, ok := columnTypeAliases[element]; ok {
			element = t
		}
		if col.Type = element; array {
			col.Type += arraySuffix
		}
		if element == TypeTimestamptz {
			set(&col.TimeFormat, TimeRFC3339)
		}
	}
}

// defaultsOf fills in a sink or a branch of a fan-out, of which at most one is not nil when the configuration is right.
func defaultsOf(t *TableSink, s *StreamSink, h *HTTPSink) {
	if t != nil {
		set(&t.Schema, DefaultSchema)
		set(&t.Conflict.Action, ConflictNothing)
		set(&t.Create, CreateNever)
		set(&t.Idempotency, IdempotencyKey)
		empty(&t.Key)
	}
	if s != nil && len(s.Headers) == 0 {
		s.Headers = nil
	}
	if h != nil {
		set(&h.Mode, HTTPSingle)
		set(&h.Type, DefaultHTTPType)
		set(&h.Timeout, DefaultHTTPTimeout)
		set(&h.MaxConcurrent, DefaultHTTPConcurrency)
		if len(h.Headers) == 0 {
			h.Headers = nil
		}
	}
}

// empty gives the one form to a list without items, so that equal configurations are equal (C3).
func empty[T any](list *[]T) {
	if len(*list) == 0 {
		*list = nil
	}
}

// set gives field its default when it has the zero value.
func set[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}
