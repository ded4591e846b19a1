package config

import "time"

// Defaults of what a configuration leaves out. The comments on the fields repeat them.
const (
	DefaultCodecField       = "payload"
	DefaultReclaimAfter     = Duration(30 * time.Second)
	DefaultSchema           = "public"
	DefaultStateKeys        = 100_000
	DefaultBatchRows        = 1000
	DefaultBatchBytes       = 1 << 20
	DefaultLinger           = Duration(10 * time.Millisecond)
	DefaultWriters          = 2
	DefaultMaxInFlightBytes = 16 << 20
	DefaultMaxDeliveries    = 5
	DefaultDrainTimeout     = Duration(15 * time.Second)
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
		if c.Codec.Type == CodecJSON {
			set(&c.Codec.Field, DefaultCodecField)
		}
	}
	if g := c.Source.ConsumerGroup; g != nil {
		set(&g.Mode, ModeShared)
	}
	for i := range c.Mapping.Columns {
		col := &c.Mapping.Columns[i]
		if t, ok := columnTypeAliases[col.Type]; ok {
			col.Type = t
		}
		if col.Type == TypeTimestamptz {
			set(&col.TimeFormat, TimeRFC3339)
		}
	}
	if c.State != nil {
		set(&c.State.MaxKeys, DefaultStateKeys)
	}
	if t := c.Sink.Table; t != nil {
		set(&t.Schema, DefaultSchema)
		set(&t.Conflict.Action, ConflictNothing)
		set(&t.Create, CreateNever)
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

// set gives field its default when it has the zero value.
func set[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}
