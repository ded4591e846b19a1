package config

import (
	"bytes"
	"fmt"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Names of the environment variables that carry the connection strings. The manager sets them from Secrets. Each may have _FILE appended, and then
// names a file, which is read again for every new connection: so a rotated password needs no restart.
const (
	EnvRedisURL          = "MILLRACE_REDIS_URL"           // redis://user:password@host:6379/0, redis+sentinel://… or redis+cluster://…; with TLS rediss…
	EnvSourceDatabaseURL = "MILLRACE_SOURCE_DATABASE_URL" // the database of a consumer group's stream
	EnvSinkDatabaseURL   = "MILLRACE_SINK_DATABASE_URL"   // the database of the sink's table; default: the source's
	EnvSourceListenURL   = "MILLRACE_SOURCE_LISTEN_URL"   // a direct connection for LISTEN when the other is a pooler
	EnvRedisTLSDir       = "MILLRACE_REDIS_TLS_DIR"       // ca.crt, and tls.crt with tls.key for a client certificate; each may be absent
	EnvHTTPURL           = "MILLRACE_HTTP_URL"            // sink.http.url, when it holds a secret
	EnvHTTPAuthorization = "MILLRACE_HTTP_AUTHORIZATION"  // the Authorization header of the HTTP sink
	EnvHTTPSigningKey    = "MILLRACE_HTTP_SIGNING_KEY"    // what the HTTP sink signs its requests with
)

// Config is one processor's pipeline.
type Config struct {
	// Name of the Processor. It names the pipeline in logs, metrics and the dead-letter table.
	Name string `json:"name" yaml:"name"`
	// Source says where batches come from.
	Source Source `json:"source" yaml:"source"`
	// Codec says how an entry's bytes become values.
	Codec Codec `json:"codec,omitzero" yaml:"codec,omitempty"`
	// Mapping says which values become which columns.
	Mapping Mapping `json:"mapping" yaml:"mapping"`
	// State keeps the last record per key in memory. Nil: no state.
	State *State `json:"state,omitempty" yaml:"state,omitempty"`
	// Memory keeps the state of workflows between their messages. Nil: none.
	Memory *Memory `json:"memory,omitempty" yaml:"memory,omitempty"`
	// Sink says where rows land.
	Sink Sink `json:"sink" yaml:"sink"`
	// Batch bounds what is written at once and what is in flight.
	Batch Batch `json:"batch,omitzero" yaml:"batch,omitempty"`
	// Errors says what becomes of entries that cannot be decoded or written.
	Errors Errors `json:"errors,omitzero" yaml:"errors,omitempty"`
	// Drain bounds a clean stop.
	Drain Drain `json:"drain,omitzero" yaml:"drain,omitempty"`
}

// Source is exactly one of its fields.
type Source struct {
	Redis         *RedisSource         `json:"redis,omitempty" yaml:"redis,omitempty"`
	ConsumerGroup *ConsumerGroupSource `json:"consumerGroup,omitempty" yaml:"consumerGroup,omitempty"`
}

// RedisSource reads Redis streams as one consumer of a Redis consumer group.
type RedisSource struct {
	// Streams are the keys to read.
	Streams []string `json:"streams" yaml:"streams"`
	// Group is the Redis consumer group. It is created when it does not exist.
	Group string `json:"group" yaml:"group"`
	// Start is where a new group begins. Default: Earliest.
	Start StartFrom `json:"start,omitempty" yaml:"start,omitempty"`
	// ReclaimAfter is how long an entry of another consumer must have been idle before it is taken over. Living consumers
	// refresh what they hold three times in this time. Default: 30s.
	ReclaimAfter Duration `json:"reclaimAfter,omitempty" yaml:"reclaimAfter,omitempty"`
	// AfterAck says what becomes of an entry once it is acknowledged. Default: Keep.
	AfterAck AfterAck `json:"afterAck,omitempty" yaml:"afterAck,omitempty"`
	// Ownership says how the members of the group share the streams. Default: Shared.
	Ownership Ownership `json:"ownership,omitempty" yaml:"ownership,omitempty"`
}

// ConsumerGroupSource reads a Millrace stream as a member of a consumer group.
type ConsumerGroupSource struct {
	Stream string `json:"stream" yaml:"stream"` // name in the database
	Group  string `json:"group" yaml:"group"`   // name in the database
	// Mode is the group's mode. Default: Shared.
	Mode GroupMode `json:"mode,omitempty" yaml:"mode,omitempty"`
}

// Codec turns bytes into values.
type Codec struct {
	// Type of the codec. Default: JSON.
	Type CodecType `json:"type,omitempty" yaml:"type,omitempty"`
	// Field of a Redis entry that holds the document, with every type but Fields. Default: payload. A message of a consumer group is the document.
	Field string `json:"field,omitempty" yaml:"field,omitempty"`
	// Protobuf describes the message, with type Protobuf.
	Protobuf *ProtobufCodec `json:"protobuf,omitempty" yaml:"protobuf,omitempty"`
}

// ProtobufCodec describes a protobuf message by a descriptor set (protoc --include_imports --descriptor_set_out).
type ProtobufCodec struct {
	// DescriptorSet is the file, in base64.
	DescriptorSet string `json:"descriptorSet,omitempty" yaml:"descriptorSet,omitempty"`
	// DescriptorSetFile is its path instead.
	DescriptorSetFile string `json:"descriptorSetFile,omitempty" yaml:"descriptorSetFile,omitempty"`
	// Message is the full name, such as telemetry.v1.Position.
	Message string `json:"message" yaml:"message"`
}

// Mapping turns values into columns.
type Mapping struct {
	// Filter is a CEL expression. Records for which it is false are acknowledged and not written. Empty: every record is written.
	Filter  string   `json:"filter,omitempty" yaml:"filter,omitempty"`
	Columns []Column `json:"columns" yaml:"columns"`
}

// Column fills one column of the sink.
type Column struct {
	// Name of the column in the sink.
	Name string `json:"name" yaml:"name"`
	// Path of the value: names and array indexes joined by dots, a dot inside a name written as \. , or one of the
	// entry's own properties: @id @stream @received_at @key @position.
	Path string `json:"path,omitempty" yaml:"path,omitempty"`
	// Expression in CEL computes the value instead of Path. Exactly one of the two is written.
	Expression string `json:"expression,omitempty" yaml:"expression,omitempty"`
	// Type of the value.
	Type ColumnType `json:"type" yaml:"type"`
	// Required makes an entry without this value undecodable.
	Required bool `json:"required,omitempty" yaml:"required,omitempty"`
	// Default is used, in its text form, when the value is missing or null.
	Default *string `json:"default,omitempty" yaml:"default,omitempty"`
	// TimeFormat of a timestamptz. Default: RFC3339.
	TimeFormat TimeFormat `json:"timeFormat,omitempty" yaml:"timeFormat,omitempty"`
}

// State is the last record per key, bounded by MaxKeys.
type State struct {
	Key     string `json:"key" yaml:"key"`                             // column that identifies, for example, a device
	Time    string `json:"time" yaml:"time"`                           // timestamptz column; last seen is its maximum
	MaxKeys int    `json:"maxKeys,omitempty" yaml:"maxKeys,omitempty"` // default 100,000
}

// Memory is a workflow memory of the source's database.
type Memory struct {
	// Name of the memory.
	Name string `json:"name" yaml:"name"`
	// Subject is an expression whose text is the workflow of a message. Default: the message's key. Only with an http sink: a statement names its subjects itself.
	Subject string `json:"subject,omitempty" yaml:"subject,omitempty"`
	// Create says whether the processor creates the memory, with the settings below. Default: Never.
	Create Create `json:"create,omitempty" yaml:"create,omitempty"`
	// Table of the memory. Default: millrace."<name>.memory".
	Table string `json:"table,omitempty" yaml:"table,omitempty"`
	// KeepCompleted is how long maintenance leaves completed workflows. Default: as it is; for ever in a new memory.
	KeepCompleted Duration `json:"keepCompleted,omitempty" yaml:"keepCompleted,omitempty"`
}

// Sink is exactly one of its fields.
type Sink struct {
	Table  *TableSink  `json:"table,omitempty" yaml:"table,omitempty"`
	Stream *StreamSink `json:"stream,omitempty" yaml:"stream,omitempty"`
	SQL    *SQLSink    `json:"sql,omitempty" yaml:"sql,omitempty"`
	HTTP   *HTTPSink   `json:"http,omitempty" yaml:"http,omitempty"`
	// FanOut gives every record to each of several sinks. It is acknowledged when all have taken it.
	FanOut []Branch `json:"fanOut,omitempty" yaml:"fanOut,omitempty"`
}

// Branch is one sink of a fan-out: a name, and exactly one of table, stream, sql and http.
type Branch struct {
	// Name of the branch in logs, metrics and dead letters.
	Name string `json:"name" yaml:"name"`
	// Mapping of this branch. Default: the pipeline's.
	Mapping *Mapping    `json:"mapping,omitempty" yaml:"mapping,omitempty"`
	Table   *TableSink  `json:"table,omitempty" yaml:"table,omitempty"`
	Stream  *StreamSink `json:"stream,omitempty" yaml:"stream,omitempty"`
	SQL     *SQLSink    `json:"sql,omitempty" yaml:"sql,omitempty"`
	HTTP    *HTTPSink   `json:"http,omitempty" yaml:"http,omitempty"`
}

// StreamSink publishes to Millrace streams of one database. The CEL expressions see what those of the mapping see, and row, the mapped columns.
type StreamSink struct {
	// Stream to publish to, by its name in the database. Exactly one of Stream and Route is written.
	Stream string `json:"stream,omitempty" yaml:"stream,omitempty"`
	// Route is an expression whose text is the stream's name.
	Route string `json:"route,omitempty" yaml:"route,omitempty"`
	// Key is an expression whose text is the message's key. Default: the key of the source's message.
	Key string `json:"key,omitempty" yaml:"key,omitempty"`
	// Headers are expressions by header name.
	Headers map[string]string `json:"headers,omitempty" yaml:"headers,omitempty"`
	// Payload is an expression. Default: the mapped columns as a JSON object, or without columns the document as it came.
	Payload string `json:"payload,omitempty" yaml:"payload,omitempty"`
}

// SQLSink runs one statement per batch. The statement reads the mapped columns of the batch from a table named batch.
type SQLSink struct {
	// Statement such as: insert into totals select device, sum(amount) from batch group by device on conflict …
	Statement string `json:"statement" yaml:"statement"`
}

// HTTPSink sends records as CloudEvents over HTTP.
type HTTPSink struct {
	// URL to post to. Default: the environment variable of EnvHTTPURL.
	URL string `json:"url,omitempty" yaml:"url,omitempty"`
	// Mode: Single (default) sends one event per request, Batch sends application/cloudevents-batch+json.
	Mode HTTPMode `json:"mode,omitempty" yaml:"mode,omitempty"`
	// Type of the events. Default: dev.millrace.message.
	Type string `json:"type,omitempty" yaml:"type,omitempty"`
	// Data is an expression. Default: the mapped columns as a JSON object, or without columns the document as it came.
	Data string `json:"data,omitempty" yaml:"data,omitempty"`
	// Headers sent with every request. Secrets belong into the environment (EnvHTTPAuthorization).
	Headers map[string]string `json:"headers,omitempty" yaml:"headers,omitempty"`
	// Timeout of a request. Default: 10s.
	Timeout Duration `json:"timeout,omitempty" yaml:"timeout,omitempty"`
	// MaxConcurrent requests of a processor. Default: 8.
	MaxConcurrent int `json:"maxConcurrent,omitempty" yaml:"maxConcurrent,omitempty"`
}

// TableSink writes rows into one table.
type TableSink struct {
	Schema string `json:"schema,omitempty" yaml:"schema,omitempty"` // default public
	Name   string `json:"name" yaml:"name"`
	// Key are the columns that identify a row: a unique constraint of the table. They make redelivery harmless.
	Key []string `json:"key,omitempty" yaml:"key,omitempty"`
	// Conflict says what happens to a row whose key is already there.
	Conflict Conflict `json:"conflict,omitzero" yaml:"conflict,omitempty"`
	// Create says whether a missing table is created from the mapping. Default: Never.
	Create Create `json:"create,omitempty" yaml:"create,omitempty"`
	// Idempotency says what makes the redelivery of a Redis entry harmless. Default: Key.
	Idempotency Idempotency `json:"idempotency,omitempty" yaml:"idempotency,omitempty"`
}

// Conflict is the treatment of rows whose key exists.
type Conflict struct {
	// Action. Default: Nothing.
	Action ConflictAction `json:"action,omitempty" yaml:"action,omitempty"`
	// Newer is the column that is compared, with UpdateIfNewer.
	Newer string `json:"newer,omitempty" yaml:"newer,omitempty"`
	// DetectMismatch counts duplicates whose other columns differ from the row that is there, with action Nothing.
	DetectMismatch bool `json:"detectMismatch,omitempty" yaml:"detectMismatch,omitempty"`
}

// Batch bounds one write and everything in flight.
type Batch struct {
	MaxRows  int      `json:"maxRows,omitempty" yaml:"maxRows,omitempty"`   // rows per write, at most; default 10,000
	MaxBytes int      `json:"maxBytes,omitempty" yaml:"maxBytes,omitempty"` // bytes of entries per write; default 8 MiB
	Linger   Duration `json:"linger,omitempty" yaml:"linger,omitempty"`     // longest wait for a fuller batch; default 10ms
	Writers  int      `json:"writers,omitempty" yaml:"writers,omitempty"`   // concurrent writes; default 2
	// MaxInFlight entries read and not yet settled; reading stops above. Default: 4 × MaxRows × Writers.
	MaxInFlight int `json:"maxInFlight,omitempty" yaml:"maxInFlight,omitempty"`
	// MaxInFlightBytes of entries read and not yet settled. Default: 16 MiB.
	MaxInFlightBytes int `json:"maxInFlightBytes,omitempty" yaml:"maxInFlightBytes,omitempty"`
}

// Errors is the treatment of entries that cannot be decoded or written.
type Errors struct {
	// MaxDeliveries of an entry before the policy applies. Default: 5.
	MaxDeliveries int `json:"maxDeliveries,omitempty" yaml:"maxDeliveries,omitempty"`
	// Policy. Default: DeadLetter.
	Policy ErrorPolicy `json:"policy,omitempty" yaml:"policy,omitempty"`
}

// Drain bounds a clean stop.
type Drain struct {
	// Timeout after which unfinished entries are given back. Keep it below the pod's grace period. Default: 15s.
	Timeout Duration `json:"timeout,omitempty" yaml:"timeout,omitempty"`
}

// StartFrom is where a new Redis group begins.
type StartFrom string

// Start places.
const (
	StartEarliest StartFrom = "Earliest"
	StartLatest   StartFrom = "Latest"
)

// GroupMode is a consumer group's mode.
type GroupMode string

// Modes of a consumer group.
const (
	ModeShared  GroupMode = "Shared"
	ModeOrdered GroupMode = "Ordered"
)

// CodecType names a codec.
type CodecType string

// Codecs.
const (
	CodecJSON   CodecType = "JSON"   // one JSON document
	CodecFields CodecType = "Fields" // each field of a Redis entry is a value
	// CodecCloudEvents reads a CloudEvent, structured or binary (ce_ fields or headers): paths are its attributes and data.
	CodecCloudEvents CodecType = "CloudEvents"
	CodecProtobuf    CodecType = "Protobuf" // one protobuf message; paths are field names
)

// AfterAck is what becomes of an acknowledged Redis entry.
type AfterAck string

// Choices of what becomes of an acknowledged entry.
const (
	AfterAckKeep   AfterAck = "Keep"   // it stays until somebody trims the stream
	AfterAckDelete AfterAck = "Delete" // it is deleted, whatever other groups have read
	AfterAckTrim   AfterAck = "Trim"   // the stream is trimmed up to what every group has acknowledged
)

// Ownership is how members of a Redis group share its streams.
type Ownership string

// Ways to share streams.
const (
	OwnershipShared    Ownership = "Shared"    // every member reads every stream
	OwnershipExclusive Ownership = "Exclusive" // a stream is read by one member at a time, so the order in it is kept
)

// Idempotency is what makes a redelivery harmless.
type Idempotency string

// Means of idempotency.
const (
	IdempotencyKey    Idempotency = "Key"    // the row's natural key
	IdempotencyLedger Idempotency = "Ledger" // the ids of written entries, kept in a table in the same transaction
)

// HTTPMode is how many events a request has.
type HTTPMode string

// Modes of the HTTP sink.
const (
	HTTPSingle HTTPMode = "Single"
	HTTPBatch  HTTPMode = "Batch"
)

// ColumnType is a type of PostgreSQL, under the name PostgreSQL prints.
type ColumnType string

// Column types. Each but jsonb and bytea also has an array: text[]. Parse also takes int, int2, int4, int8, bool, decimal, float4, float8, double and varchar and replaces them.
const (
	TypeText        ColumnType = "text"
	TypeBoolean     ColumnType = "boolean"
	TypeSmallint    ColumnType = "smallint"
	TypeInteger     ColumnType = "integer"
	TypeBigint      ColumnType = "bigint"
	TypeNumeric     ColumnType = "numeric"
	TypeReal        ColumnType = "real"
	TypeDouble      ColumnType = "double precision"
	TypeTimestamptz ColumnType = "timestamptz"
	TypeJSONB       ColumnType = "jsonb"
	TypeBytea       ColumnType = "bytea"
	TypeUUID        ColumnType = "uuid"
)

// arraySuffix makes an array type of an element type: text[], bigint[]. jsonb and bytea have none: a jsonb holds arrays itself.
const arraySuffix = "[]"

// Element is the type of an array's elements; ok is false when the type is no array.
func (t ColumnType) Element() (element ColumnType, ok bool) {
	name, ok := strings.CutSuffix(string(t), arraySuffix)
	if !ok {
		return "", false
	}
	return ColumnType(name), true
}

// TimeFormat is how a time is written in the source.
type TimeFormat string

// Time formats. Numbers may have a fraction; what is smaller than a microsecond is cut off.
const (
	TimeRFC3339     TimeFormat = "RFC3339"
	TimeUnixSeconds TimeFormat = "UnixSeconds"
	TimeUnixMillis  TimeFormat = "UnixMillis"
	TimeUnixMicros  TimeFormat = "UnixMicros"
)

// ConflictAction is what happens to a row whose key exists.
type ConflictAction string

// Conflict actions.
const (
	ConflictNothing ConflictAction = "Nothing" // the row that is there stays; the new one counts as a duplicate
	ConflictUpdate  ConflictAction = "Update"  // the new row replaces every column outside the key
	// ConflictUpdateIfNewer replaces them when the new row's Newer column is greater.
	ConflictUpdateIfNewer ConflictAction = "UpdateIfNewer"
)

// Create says whether a missing table is created.
type Create string

// Create choices.
const (
	CreateNever     Create = "Never"
	CreateIfMissing Create = "IfMissing"
)

// ErrorPolicy is what becomes of an entry that failed MaxDeliveries times.
type ErrorPolicy string

// Error policies.
const (
	PolicyPending    ErrorPolicy = "Pending"    // it stays pending in its source
	PolicyDeadLetter ErrorPolicy = "DeadLetter" // it moves to the dead letters, and only then is acknowledged
)

// Duration is a time.Duration that is written as 10ms, 30s or 1h30m.
type Duration time.Duration

// MarshalText writes the duration as time.Duration does.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText reads what time.ParseDuration reads.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%q is not a duration: write a number with a unit, such as 500ms, 30s or 5m", text)
	}
	*d = Duration(v)
	return nil
}

// String writes the duration as time.Duration does.
func (d Duration) String() string { return time.Duration(d).String() }

// Marshal writes the configuration as YAML, the same bytes for equal configurations.
func (c *Config) Marshal() ([]byte, error) {
	var buf bytes.Buffer
	enc := yaml.NewEncoder(&buf)
	enc.SetIndent(2)
	if err := enc.Encode(c); err != nil {
		return nil, fmt.Errorf("write the configuration of %q: %w", c.Name, err)
	}
	return buf.Bytes(), nil
}
