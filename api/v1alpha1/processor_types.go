package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ProcessorSpec is the desired state of a processor.
//
// +kubebuilder:validation:XValidation:rule="!has(self.source.redis) || !has(self.sink.table) || has(self.sink.table.key) || self.sink.table.idempotency == 'Ledger'",message="sink.table.key is needed with a redis source, because Redis delivers an entry again after a crash; write the columns that identify a row, or idempotency: Ledger"
// +kubebuilder:validation:XValidation:rule="!has(self.source.redis) || !has(self.sink.fanOut) || self.sink.fanOut.all(b, !has(b.table) || has(b.table.key) || b.table.idempotency == 'Ledger')",message="each table of a fanOut needs a key with a redis source, because Redis delivers an entry again after a crash; write the columns that identify a row, or idempotency: Ledger"
// +kubebuilder:validation:XValidation:rule="has(self.mapping.columns) || !has(self.sink.table) && !has(self.sink.sql)",message="mapping.columns is needed with a table or sql sink; write the columns that it fills"
// +kubebuilder:validation:XValidation:rule="has(self.mapping.columns) || !has(self.sink.fanOut) || self.sink.fanOut.all(b, has(b.mapping) && has(b.mapping.columns) || !has(b.table) && !has(b.sql))",message="a table or sql branch of a fanOut needs mapping.columns, its own or those of spec; write the columns that it fills"
// +kubebuilder:validation:XValidation:rule="!has(self.source.consumerGroup) || !has(self.sink.table) || self.sink.table.idempotency != 'Ledger'",message="idempotency: Ledger belongs to a redis source; a consumerGroup keeps a ledger of its own, so leave it out"
// +kubebuilder:validation:XValidation:rule="!has(self.sink.projection) || has(self.source.consumerGroup) && !has(self.mapping.columns) && !has(self.mapping.filter)",message="sink.projection takes the messages of a consumerGroup as they are: write source.consumerGroup and no mapping; a filter belongs to the ConsumerGroup"
//
// +kubebuilder:validation:XValidation:rule="!has(self.memory) || has(self.source.consumerGroup)",message="memory needs a consumerGroup source, whose ack is in the transaction that writes a state"
// +kubebuilder:validation:XValidation:rule="!has(self.memory) || has(self.sink.sql) || has(self.sink.http)",message="memory belongs to a sql or http sink; leave it out, or write one of these"
// +kubebuilder:validation:XValidation:rule="!has(self.memory) || !has(self.sink.http) || !has(self.sink.http.mode) || self.sink.http.mode == 'Single'",message="with memory each event has a request of its own; write sink.http.mode: Single"
// +kubebuilder:validation:XValidation:rule="!has(self.memory) || !has(self.memory.subject) || !has(self.sink.sql)",message="memory.subject belongs to an http sink; a statement names its subjects itself, by mapped columns"
// +kubebuilder:validation:XValidation:rule="!has(self.memory) || (!has(self.sink.sql) || !has(self.sink.sql.databaseSecretRef)) && (!has(self.sink.http) || !has(self.sink.http.databaseSecretRef))",message="memory is in the database of the source, with the acks; leave databaseSecretRef of the sink out"
//
// +kubebuilder:validation:XValidation:rule="!has(self.replicas) || !has(self.autoscaling)",message="write replicas or autoscaling, not both; an HPA or KEDA that scales this Processor writes replicas, so leave autoscaling out for them"
// +kubebuilder:validation:XValidation:rule="!has(self.source.redis) || !has(self.autoscaling)",message="autoscaling needs a consumerGroup source, because the manager does not connect to Redis and knows no lag there; let KEDA's redis-streams trigger, or an HPA by the metric millrace_processor_lag_entries, write replicas"
type ProcessorSpec struct {
	// replicas is the number of pods. An HPA or KEDA may write it through the scale subresource, so it has no default that a GitOps
	// tool would see as a difference. Without replicas and autoscaling there is one pod, until somebody scales the Deployment.
	//
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000
	// +optional
	Replicas *int32 `json:"replicas,omitempty"`

	// autoscaling lets the number of pods follow the backlog of a consumerGroup source. It writes the Deployment, never this spec.
	//
	// +optional
	Autoscaling *Autoscaling `json:"autoscaling,omitempty"`

	// source is where messages come from.
	Source Source `json:"source"`

	// codec turns an entry or message into a record.
	//
	// +kubebuilder:default={}
	// +optional
	Codec Codec `json:"codec,omitempty"`

	// mapping turns a record into a row. A stream or http sink can do without, and sends the document as it came.
	//
	// +kubebuilder:default={}
	// +optional
	Mapping Mapping `json:"mapping,omitempty"`

	// state keeps the last record of each key in memory, per pod.
	//
	// +optional
	State *State `json:"state,omitempty"`

	// memory keeps the state of workflows between their messages, in the database of a consumerGroup source: for a sql sink, whose statement uses its functions, and for
	// an http sink, whose requests carry a workflow's state and whose answers the next one.
	//
	// +optional
	Memory *Memory `json:"memory,omitempty"`

	// sink is where rows go.
	Sink Sink `json:"sink"`

	// batch bounds what is written at once.
	//
	// +kubebuilder:default={}
	// +optional
	Batch Batch `json:"batch,omitempty"`

	// errors says what becomes of records that cannot be decoded or written.
	//
	// +kubebuilder:default={}
	// +optional
	Errors Errors `json:"errors,omitempty"`

	// drain bounds the orderly end of a pod.
	//
	// +kubebuilder:default={}
	// +optional
	Drain Drain `json:"drain,omitempty"`

	// image overrides the processor image of the installation.
	//
	// +kubebuilder:validation:MinLength=1
	// +optional
	Image string `json:"image,omitempty"`

	// pod holds the fields of the pods that may be chosen. The rest meets the restricted Pod Security Standard and is fixed.
	//
	// +optional
	Pod *PodTemplate `json:"pod,omitempty"`

	// suspend stops the controller from looking at or changing the processor's objects. Its pods go on; replicas: 0 stops them.
	//
	// +optional
	Suspend bool `json:"suspend,omitempty"`
}

// Source is where messages come from.
//
// +kubebuilder:validation:XValidation:rule="has(self.redis) != has(self.consumerGroup)",message="write exactly one source: redis, or consumerGroup"
type Source struct {
	// redis reads Redis streams through a Redis consumer group.
	//
	// +optional
	Redis *RedisSource `json:"redis,omitempty"`

	// consumerGroup reads a Stream through a ConsumerGroup.
	//
	// +optional
	ConsumerGroup *ConsumerGroupSource `json:"consumerGroup,omitempty"`
}

// RedisStart is where a new Redis consumer group begins.
//
// +kubebuilder:validation:Enum=Earliest;Latest
type RedisStart string

// Places where a new Redis group begins.
const (
	RedisStartEarliest RedisStart = "Earliest"
	RedisStartLatest   RedisStart = "Latest"
)

// AfterAck says what becomes of a Redis entry once it is acknowledged.
//
// +kubebuilder:validation:Enum=Keep;Delete;Trim
type AfterAck string

// Choices of what becomes of an acknowledged entry.
const (
	// AfterAckKeep leaves it until somebody trims the stream.
	AfterAckKeep AfterAck = "Keep"
	// AfterAckDelete deletes it, whatever other groups have read.
	AfterAckDelete AfterAck = "Delete"
	// AfterAckTrim trims the stream up to what every group has acknowledged.
	AfterAckTrim AfterAck = "Trim"
)

// Ownership says how pods share the streams of a Redis source.
//
// +kubebuilder:validation:Enum=Shared;Exclusive
type Ownership string

// Ways to share streams.
const (
	// OwnershipShared lets every pod read every stream.
	OwnershipShared Ownership = "Shared"
	// OwnershipExclusive gives a stream to one pod at a time.
	OwnershipExclusive Ownership = "Exclusive"
)

// RedisSource reads Redis streams.
type RedisSource struct {
	// urlSecretRef names the Secret key that holds the address: redis://user:password@host:6379/0,
	// redis+sentinel://user:password@host1:26379,host2:26379/master/0, or redis+cluster://user:password@host1:6379,host2:6379;
	// with rediss in place of redis for TLS. A user or password that changes in the Secret needs no restart.
	URLSecretRef SecretKeyReference `json:"urlSecretRef"`

	// tlsSecretRef names a Secret with ca.crt, which signs the server's certificate, and, for a client certificate, tls.crt with
	// tls.key. It needs an address with rediss://. Default: the certificate authorities of the image, and no client certificate.
	//
	// +optional
	TLSSecretRef *LocalReference `json:"tlsSecretRef,omitempty"`

	// streams to read.
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=512
	// +listType=set
	Streams []string `json:"streams"`

	// group is the Redis consumer group. It is created when it does not exist. Default: the name of the Processor.
	//
	// +kubebuilder:validation:MaxLength=512
	// +optional
	Group string `json:"group,omitempty"`

	// start is where the group begins when it is created: Earliest or Latest.
	//
	// +kubebuilder:default=Earliest
	// +optional
	Start RedisStart `json:"start,omitempty"`

	// reclaimAfter is how long an entry may be held by a pod that does not move before another takes it. It has to be longer
	// than the slowest write.
	//
	// +kubebuilder:default="30s"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') && duration(self) >= duration('0s')",message="write a duration such as 30s or 5m"
	// +optional
	ReclaimAfter *metav1.Duration `json:"reclaimAfter,omitempty"`

	// afterAck says what becomes of an entry once it is acknowledged: Keep leaves it until somebody trims the stream, Delete
	// deletes it, whatever other groups have read, Trim trims the stream up to what every group has acknowledged.
	//
	// +kubebuilder:default=Keep
	// +optional
	AfterAck AfterAck `json:"afterAck,omitempty"`

	// ownership says how pods share the streams: Shared lets every pod read every stream, Exclusive gives a stream to one pod at
	// a time, which keeps the order of its entries.
	//
	// +kubebuilder:default=Shared
	// +optional
	Ownership Ownership `json:"ownership,omitempty"`
}

// ConsumerGroupSource reads a Stream through a ConsumerGroup of the same namespace.
type ConsumerGroupSource struct {
	// name of the ConsumerGroup.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`

	// databaseSecretRef names the Secret key that holds the connection string with which the pods read. Default: that of the
	// Stream. It is needed when the Stream names none, because pods cannot use the default database of the installation.
	//
	// +optional
	DatabaseSecretRef *SecretKeyReference `json:"databaseSecretRef,omitempty"`

	// listenSecretRef names the Secret key that holds a connection string for LISTEN, when databaseSecretRef leads to a pooler such as
	// PgBouncer, through which no notification comes. Without it pods poll.
	//
	// +optional
	ListenSecretRef *SecretKeyReference `json:"listenSecretRef,omitempty"`
}

// CodecType says how an entry or message becomes a record.
//
// +kubebuilder:validation:Enum=JSON;Fields;CloudEvents;Protobuf
type CodecType string

// Codecs.
const (
	// CodecJSON reads one JSON document.
	CodecJSON CodecType = "JSON"
	// CodecFields takes the fields of a Redis entry as they are.
	CodecFields CodecType = "Fields"
	// CodecCloudEvents reads a CloudEvent, structured or binary.
	CodecCloudEvents CodecType = "CloudEvents"
	// CodecProtobuf reads one protobuf message.
	CodecProtobuf CodecType = "Protobuf"
)

// Codec turns an entry or message into a record.
//
// +kubebuilder:validation:XValidation:rule="!has(self.field) || !has(self.type) || self.type != 'Fields'",message="codec.field does not belong to type: Fields, which takes every field; remove it"
// +kubebuilder:validation:XValidation:rule="has(self.protobuf) == (has(self.type) && self.type == 'Protobuf')",message="codec.protobuf and type: Protobuf belong together; write both or neither"
type Codec struct {
	// type: JSON reads one JSON document, Fields takes the fields of a Redis entry as they are, CloudEvents reads a CloudEvent, whose
	// attributes and data become paths, Protobuf reads one protobuf message.
	//
	// +kubebuilder:default=JSON
	// +optional
	Type CodecType `json:"type,omitempty"`

	// field of the Redis entry that holds the document. Default: payload.
	//
	// +kubebuilder:validation:MaxLength=512
	// +optional
	Field string `json:"field,omitempty"`

	// protobuf describes the message, with type Protobuf.
	//
	// +optional
	Protobuf *ProtobufCodec `json:"protobuf,omitempty"`
}

// ProtobufCodec describes a protobuf message.
//
// +kubebuilder:validation:XValidation:rule="has(self.descriptorSet) != has(self.descriptorSetRef)",message="write exactly one of descriptorSet, in base64, and descriptorSetRef, a ConfigMap key"
type ProtobufCodec struct {
	// message is its full name, such as telemetry.v1.Position.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=512
	Message string `json:"message"`

	// descriptorSet is the file that protoc --include_imports --descriptor_set_out writes, in base64.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=262144
	// +optional
	DescriptorSet string `json:"descriptorSet,omitempty"`

	// descriptorSetRef names a ConfigMap key that holds the file: kubectl create configmap schemas --from-file=position.pb.
	//
	// +optional
	DescriptorSetRef *ConfigMapKeyReference `json:"descriptorSetRef,omitempty"`
}

// Mapping turns a record into a row.
type Mapping struct {
	// filter is a CEL expression. Records for which it is false are acknowledged and not written: doc.speed > 0 && has(doc.device).
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=8192
	// +optional
	Filter string `json:"filter,omitempty"`

	// columns of the row.
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=256
	// +listType=map
	// +listMapKey=name
	// +optional
	Columns []Column `json:"columns,omitempty"`
}

// TimeFormat says how a time is written in the record.
//
// +kubebuilder:validation:Enum=RFC3339;UnixSeconds;UnixMillis;UnixMicros
type TimeFormat string

// Time formats.
const (
	TimeRFC3339     TimeFormat = "RFC3339"
	TimeUnixSeconds TimeFormat = "UnixSeconds"
	TimeUnixMillis  TimeFormat = "UnixMillis"
	TimeUnixMicros  TimeFormat = "UnixMicros"
)

// Column is one column of the row.
//
// +kubebuilder:validation:XValidation:rule="has(self.path) != has(self.expression)",message="write exactly one of path and expression"
type Column struct {
	// name of the column in the table.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name"`

	// path of the value in the record, for example position.latitude; or @id, @stream, @received_at, @key or @position for
	// what is known about the entry or message itself. In a stream with priorities @id tells all messages apart, and @position those of one priority.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	// +optional
	Path string `json:"path,omitempty"`

	// expression in CEL computes the value instead: double(doc.speed) * 3.6. It sees doc, id, stream, key, headers, position, received_at,
	// created_at, deliveries and state.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=8192
	// +optional
	Expression string `json:"expression,omitempty"`

	// type of the column in PostgreSQL, for example text, bigint, double precision, numeric, boolean, timestamptz or jsonb, or an array such as text[].
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Type string `json:"type"`

	// required: a record without the value is rejected.
	//
	// +optional
	Required bool `json:"required,omitempty"`

	// default stands in for a missing value, written as text; that of an array as JSON, such as [].
	//
	// +kubebuilder:validation:MaxLength=65536
	// +optional
	Default *string `json:"default,omitempty"`

	// timeFormat of a timestamptz column. Default: RFC3339.
	//
	// +optional
	TimeFormat TimeFormat `json:"timeFormat,omitempty"`
}

// State keeps the last record of each key in the memory of a pod.
type State struct {
	// key is the mapped column that identifies, for example, a device.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Key string `json:"key"`

	// time is the mapped timestamptz column that says when; the last time seen is its maximum.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Time string `json:"time"`

	// maxKeys is how many keys are kept; the least recently used goes first.
	//
	// +kubebuilder:default=100000
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=10000000
	// +optional
	MaxKeys int32 `json:"maxKeys,omitempty"`
}

// Memory is a workflow memory.
//
// +kubebuilder:validation:XValidation:rule="self.create == 'IfMissing' || !has(self.table) && !has(self.keepCompleted)",message="memory.table and memory.keepCompleted belong to create: IfMissing; write it, or leave them out"
type Memory struct {
	// name of the memory in the database.
	//
	// +kubebuilder:validation:MaxLength=48
	// +kubebuilder:validation:Pattern=`^[a-z][a-z0-9_]*$`
	Name string `json:"name"`

	// subject is a CEL expression whose text is the workflow of a message, with an http sink. Default: the key of the message.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=8192
	// +optional
	Subject string `json:"subject,omitempty"`

	// create: Never expects the memory to be there, IfMissing creates it, which needs a role that owns the schema.
	//
	// +kubebuilder:default=Never
	// +optional
	Create CreatePolicy `json:"create,omitempty"`

	// table of the memory, such as public.order_state, with create: IfMissing. Default: millrace."<name>.memory". It never changes.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=130
	// +optional
	Table string `json:"table,omitempty"`

	// keepCompleted is how long maintenance leaves completed workflows, such as 720h, with create: IfMissing. Default: as it is; for ever in a new memory.
	//
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') && duration(self) >= duration('1s') && duration(self) <= duration('876000h')",message="write a duration from 1s, for example 720h"
	// +optional
	KeepCompleted *metav1.Duration `json:"keepCompleted,omitempty"`
}

// Sink is where rows go.
//
// +kubebuilder:validation:XValidation:rule="[has(self.table), has(self.stream), has(self.sql), has(self.projection), has(self.http), has(self.fanOut)].filter(x, x).size() == 1",message="write exactly one sink: table, stream, sql, projection, http or fanOut"
// +kubebuilder:validation:XValidation:rule="!has(self.fanOut) || self.fanOut.filter(b, has(b.http)).size() < 2 || !self.fanOut.exists(b, has(b.http) && (has(b.http.urlSecretRef) || has(b.http.authorizationSecretRef) || has(b.http.signingKeySecretRef) || has(b.http.sidecar)))",message="an http branch with Secrets or a sidecar has to be the only http branch of its fanOut; write a Processor for each of the others"
type Sink struct {
	// table writes rows into a table.
	//
	// +optional
	Table *TableSink `json:"table,omitempty"`

	// stream publishes messages to Streams.
	//
	// +optional
	Stream *StreamSink `json:"stream,omitempty"`

	// sql runs one statement per batch.
	//
	// +optional
	SQL *SQLSink `json:"sql,omitempty"`

	// projection runs the projection that the Stream declares for this group (Stream.spec.projections), in the Stream's database. Documents and acks are one transaction.
	//
	// +optional
	Projection *ProjectionSink `json:"projection,omitempty"`

	// http posts CloudEvents to a URL.
	//
	// +optional
	HTTP *HTTPSink `json:"http,omitempty"`

	// fanOut gives every record to each of several sinks. It is acknowledged when all have taken it. Those that write into PostgreSQL
	// write into one database.
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +listType=map
	// +listMapKey=name
	// +optional
	FanOut []Branch `json:"fanOut,omitempty"`
}

// Branch is one sink of a fan-out.
//
// +kubebuilder:validation:XValidation:rule="[has(self.table), has(self.stream), has(self.sql), has(self.http)].filter(x, x).size() == 1",message="write exactly one sink in a branch: table, stream, sql or http"
type Branch struct {
	// name of the branch in logs, metrics and dead letters.
	//
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([a-z0-9_-]*[a-z0-9])?$`
	Name string `json:"name"`

	// mapping of this branch. Default: that of spec.
	//
	// +optional
	Mapping *Mapping `json:"mapping,omitempty"`

	// table writes rows into a table.
	//
	// +optional
	Table *TableSink `json:"table,omitempty"`

	// stream publishes messages to Streams.
	//
	// +optional
	Stream *StreamSink `json:"stream,omitempty"`

	// sql runs one statement per batch.
	//
	// +optional
	SQL *SQLSink `json:"sql,omitempty"`

	// http posts CloudEvents to a URL.
	//
	// +optional
	HTTP *HTTPSink `json:"http,omitempty"`
}

// StreamSink publishes messages to Streams of one database. Its CEL expressions see what those of the mapping see, and row, the
// mapped columns.
//
// +kubebuilder:validation:XValidation:rule="has(self.stream) != has(self.route)",message="write exactly one of stream, a name, and route, an expression whose text is a name"
type StreamSink struct {
	// databaseSecretRef names the Secret key that holds the connection string. Default, with a consumerGroup source: the
	// database of the source, and then messages are published exactly once, because the ack is in the same transaction.
	//
	// +optional
	DatabaseSecretRef *SecretKeyReference `json:"databaseSecretRef,omitempty"`

	// stream to publish to, by its name in the database: that of the Stream with _ for -. It has to exist.
	//
	// +kubebuilder:validation:MaxLength=48
	// +kubebuilder:validation:Pattern=`^[a-z][a-z0-9_]*$`
	// +optional
	Stream string `json:"stream,omitempty"`

	// route is an expression whose text is the name of the stream: 'orders_' + doc.region.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=8192
	// +optional
	Route string `json:"route,omitempty"`

	// key is an expression whose text is the key of the message. Default: the key of the source's message.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=8192
	// +optional
	Key string `json:"key,omitempty"`

	// headers of the message: expressions by name.
	//
	// +kubebuilder:validation:MaxProperties=64
	// +optional
	Headers map[string]string `json:"headers,omitempty"`

	// payload is an expression. Default: the mapped columns as a JSON object, or without columns the document as it came.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=8192
	// +optional
	Payload string `json:"payload,omitempty"`
}

// SQLSink runs one statement per batch.
type SQLSink struct {
	// databaseSecretRef names the Secret key that holds the connection string. Default, with a consumerGroup source: the
	// database of the source, and then each batch has its effect exactly once, because the ack is in the same transaction.
	//
	// +optional
	DatabaseSecretRef *SecretKeyReference `json:"databaseSecretRef,omitempty"`

	// statement that reads the mapped columns of the batch from a table named batch:
	// insert into totals select device, sum(amount) from batch group by device on conflict …
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=65536
	// +kubebuilder:validation:XValidation:rule="self.matches('(?i)(^|[^a-z0-9_])batch($|[^a-z0-9_])')",message="the statement reads nothing of the batch; write select … from batch in it"
	Statement string `json:"statement"`
}

// ProjectionSink runs the projection of the group. There is nothing to set: the Stream declares it.
type ProjectionSink struct{}

// HTTPMode says how many events a request has.
//
// +kubebuilder:validation:Enum=Single;Batch
type HTTPMode string

// Modes of the HTTP sink.
const (
	// HTTPSingle sends one event per request.
	HTTPSingle HTTPMode = "Single"
	// HTTPBatch sends application/cloudevents-batch+json.
	HTTPBatch HTTPMode = "Batch"
)

// HTTPSink posts records as CloudEvents. 2xx acknowledges; 408, 429, 5xx and timeouts are tried again; other answers count as a
// failed delivery of the record.
//
// +kubebuilder:validation:XValidation:rule="[has(self.url), has(self.urlSecretRef), has(self.sidecar)].filter(x, x).size() == 1",message="write exactly one of url, urlSecretRef and sidecar"
type HTTPSink struct {
	// databaseSecretRef names the Secret key that holds the connection string of the database for dead letters, with a redis source
	// and errors.policy: DeadLetter. With a consumerGroup source dead letters stay with the group.
	//
	// +optional
	DatabaseSecretRef *SecretKeyReference `json:"databaseSecretRef,omitempty"`

	// url to post to.
	//
	// +kubebuilder:validation:MaxLength=2048
	// +kubebuilder:validation:XValidation:rule="isURL(self) && url(self).getScheme() in ['http', 'https'] && url(self).getHost() != ''",message="write the address of a web server, such as https://example.org/events"
	// +kubebuilder:validation:XValidation:rule="!self.contains('@') || self.matches('^https?://[^/?#@]*[/?#]')",message="credentials do not belong into spec; put them into a Secret, and name it in authorizationSecretRef or urlSecretRef"
	// +optional
	URL string `json:"url,omitempty"`

	// urlSecretRef names the Secret key that holds the URL, when a part of it is secret.
	//
	// +optional
	URLSecretRef *SecretKeyReference `json:"urlSecretRef,omitempty"`

	// sidecar is a container beside the processor that takes the requests.
	//
	// +optional
	Sidecar *Sidecar `json:"sidecar,omitempty"`

	// authorizationSecretRef names the Secret key that holds the Authorization header, such as Bearer ….
	//
	// +optional
	AuthorizationSecretRef *SecretKeyReference `json:"authorizationSecretRef,omitempty"`

	// signingKeySecretRef names the Secret key that holds the key with which requests are signed.
	//
	// +optional
	SigningKeySecretRef *SecretKeyReference `json:"signingKeySecretRef,omitempty"`

	// mode: Single sends one event per request, Batch sends a request for many, as application/cloudevents-batch+json.
	//
	// +kubebuilder:default=Single
	// +optional
	Mode HTTPMode `json:"mode,omitempty"`

	// type of the events. Default: dev.millrace.message.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=256
	// +optional
	Type string `json:"type,omitempty"`

	// data is a CEL expression. Default: the mapped columns as a JSON object, or without columns the document as it came.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=8192
	// +optional
	Data string `json:"data,omitempty"`

	// headers sent with every request. What is secret belongs into authorizationSecretRef.
	//
	// +kubebuilder:validation:MaxProperties=64
	// +optional
	Headers map[string]string `json:"headers,omitempty"`

	// timeout of a request.
	//
	// +kubebuilder:default="10s"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') && duration(self) >= duration('100ms') && duration(self) <= duration('5m')",message="write a duration from 100ms to 5m, for example 10s"
	// +optional
	Timeout *metav1.Duration `json:"timeout,omitempty"`

	// maxConcurrent requests of a pod.
	//
	// +kubebuilder:default=8
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=256
	// +optional
	MaxConcurrent int32 `json:"maxConcurrent,omitempty"`
}

// Sidecar is a container of the processor's pods that takes the requests of an HTTP sink at 127.0.0.1. It starts before the processor
// and ends after it. It meets the restricted Pod Security Standard, has a read-only file system, and sees no Secret of the processor.
type Sidecar struct {
	// image of the container. It runs as user 65532.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	Image string `json:"image"`

	// port at which it listens.
	//
	// +kubebuilder:validation:Minimum=1024
	// +kubebuilder:validation:Maximum=65535
	// +kubebuilder:validation:XValidation:rule="self != 8080",message="8080 is the processor's own port; choose another"
	Port int32 `json:"port"`

	// path to post to.
	//
	// +kubebuilder:default="/"
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:Pattern=`^/[^?#\s]*$`
	// +optional
	Path string `json:"path,omitempty"`

	// args of the image's entry point.
	//
	// +kubebuilder:validation:MaxItems=64
	// +listType=atomic
	// +optional
	Args []string `json:"args,omitempty"`

	// env holds environment variables with plain values.
	//
	// +kubebuilder:validation:MaxItems=64
	// +listType=map
	// +listMapKey=name
	// +optional
	Env []EnvVar `json:"env,omitempty"`

	// resources of the container. Default: requests of 50m CPU and 64Mi, a memory limit of 512Mi.
	//
	// +optional
	Resources *corev1.ResourceRequirements `json:"resources,omitempty"`
}

// CreatePolicy says who makes the table.
//
// +kubebuilder:validation:Enum=Never;IfMissing
type CreatePolicy string

// Create policies.
const (
	// CreateNever expects the table to be there.
	CreateNever CreatePolicy = "Never"
	// CreateIfMissing creates it from the mapping.
	CreateIfMissing CreatePolicy = "IfMissing"
)

// TableSink writes rows into a table.
type TableSink struct {
	// databaseSecretRef names the Secret key that holds the connection string. Default, with a consumerGroup source: the
	// database of the source, and then rows are written exactly once, because the ack is in the same transaction.
	//
	// +optional
	DatabaseSecretRef *SecretKeyReference `json:"databaseSecretRef,omitempty"`

	// schema of the table.
	//
	// +kubebuilder:default=public
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	// +optional
	Schema string `json:"schema,omitempty"`

	// name of the table.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name"`

	// key names the columns that identify a row: they have to be in the mapping, and the table needs a primary key or unique
	// index on exactly them. They make a redelivery harmless. A redis source needs them, or idempotency: Ledger.
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MaxLength=63
	// +listType=atomic
	// +optional
	Key []string `json:"key,omitempty"`

	// conflict says what happens when a row of the same key is there already.
	//
	// +kubebuilder:default={}
	// +optional
	Conflict Conflict `json:"conflict,omitempty"`

	// create: Never expects the table to be there, IfMissing creates it from the mapping.
	//
	// +kubebuilder:default=Never
	// +optional
	Create CreatePolicy `json:"create,omitempty"`

	// idempotency says what makes the redelivery of a Redis entry harmless: Key, the row's natural key, or Ledger, the ids of written
	// entries, kept in a table in the same transaction.
	//
	// +kubebuilder:default=Key
	// +optional
	Idempotency Idempotency `json:"idempotency,omitempty"`
}

// Idempotency says what makes a redelivery harmless.
//
// +kubebuilder:validation:Enum=Key;Ledger
type Idempotency string

// Means of idempotency.
const (
	// IdempotencyKey is the row's natural key.
	IdempotencyKey Idempotency = "Key"
	// IdempotencyLedger keeps the ids of written entries.
	IdempotencyLedger Idempotency = "Ledger"
)

// ConflictAction says what happens to a row whose key is there already.
//
// +kubebuilder:validation:Enum=Nothing;Update;UpdateIfNewer
type ConflictAction string

// Conflict actions.
const (
	// ConflictNothing keeps the row that is there.
	ConflictNothing ConflictAction = "Nothing"
	// ConflictUpdate overwrites it.
	ConflictUpdate ConflictAction = "Update"
	// ConflictUpdateIfNewer overwrites it with what is newer.
	ConflictUpdateIfNewer ConflictAction = "UpdateIfNewer"
)

// Conflict says what happens when a row of the same key is there already.
//
// +kubebuilder:validation:XValidation:rule="has(self.newer) == (has(self.action) && self.action == 'UpdateIfNewer')",message="conflict.newer and action: UpdateIfNewer belong together; newer is the column that tells which row is newer"
// +kubebuilder:validation:XValidation:rule="!has(self.detectMismatch) || !self.detectMismatch || !has(self.action) || self.action == 'Nothing'",message="detectMismatch belongs to action: Nothing; the other actions write what differs"
type Conflict struct {
	// action: Nothing keeps the row that is there, Update overwrites it, UpdateIfNewer overwrites it when the new row's column newer is greater.
	//
	// +kubebuilder:default=Nothing
	// +optional
	Action ConflictAction `json:"action,omitempty"`

	// newer is the mapped column that is compared, with action UpdateIfNewer: a time or a number.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	// +optional
	Newer string `json:"newer,omitempty"`

	// detectMismatch counts duplicates whose other columns differ from the row that is there, with action Nothing.
	//
	// +optional
	DetectMismatch bool `json:"detectMismatch,omitempty"`
}

// Batch bounds what is written at once.
type Batch struct {
	// maxRows in one batch, at most: a batch begins with 1,000 and grows while it is written quickly.
	//
	// +kubebuilder:default=10000
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100000
	// +optional
	MaxRows int32 `json:"maxRows,omitempty"`

	// maxBytes in one batch, for example 1Mi.
	//
	// +kubebuilder:default="8Mi"
	// +kubebuilder:validation:XValidation:rule="quantity(string(self)).compareTo(quantity('1Ki')) >= 0 && quantity(string(self)).compareTo(quantity('64Mi')) <= 0",message="write a size from 1Ki to 64Mi, for example 1Mi"
	// +optional
	MaxBytes *resource.Quantity `json:"maxBytes,omitempty"`

	// linger is how long a batch that is not full waits for more.
	//
	// +kubebuilder:default="10ms"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') && duration(self) >= duration('0s')",message="write a duration such as 10ms or 1s"
	// +optional
	Linger *metav1.Duration `json:"linger,omitempty"`

	// writers is the number of batches that a pod writes at the same time. Each needs a database connection.
	//
	// +kubebuilder:default=2
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=64
	// +optional
	Writers int32 `json:"writers,omitempty"`
}

// ErrorPolicy says what becomes of a record that cannot be decoded or written.
//
// +kubebuilder:validation:Enum=Pending;DeadLetter
type ErrorPolicy string

// Error policies.
const (
	// ErrorPending leaves it unacknowledged.
	ErrorPending ErrorPolicy = "Pending"
	// ErrorDeadLetter sets it aside after maxDeliveries, and then acknowledges it.
	ErrorDeadLetter ErrorPolicy = "DeadLetter"
)

// Errors says what becomes of records that cannot be decoded or written.
type Errors struct {
	// maxDeliveries of a record before the policy applies.
	//
	// +kubebuilder:default=5
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000
	// +optional
	MaxDeliveries int32 `json:"maxDeliveries,omitempty"`

	// policy: DeadLetter sets the record aside and then acknowledges it, Pending leaves it unacknowledged.
	//
	// +kubebuilder:default=DeadLetter
	// +optional
	Policy ErrorPolicy `json:"policy,omitempty"`
}

// Drain bounds the orderly end of a pod.
type Drain struct {
	// timeout for finishing and settling what a pod holds. The pod's grace period is longer by a margin.
	//
	// +kubebuilder:default="15s"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') && duration(self) >= duration('1s') && duration(self) <= duration('10m')",message="write a duration from 1s to 10m, for example 15s"
	// +optional
	Timeout *metav1.Duration `json:"timeout,omitempty"`
}

// PodTemplate holds the fields of a Processor's pods that may be chosen. It is a selection and not a PodSpec, which would
// make the CRD larger than the API server likes to serve.
type PodTemplate struct {
	// labels added to the pods.
	//
	// +optional
	Labels map[string]string `json:"labels,omitempty"`

	// annotations added to the pods.
	//
	// +optional
	Annotations map[string]string `json:"annotations,omitempty"`

	// resources of the processor container. Default: requests of 50m CPU and 64Mi, a memory limit of 512Mi.
	//
	// +optional
	Resources *corev1.ResourceRequirements `json:"resources,omitempty"`

	// env adds environment variables. Names that start with MILLRACE_ are reserved.
	//
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:XValidation:rule="self.all(e, !e.name.startsWith('MILLRACE_'))",message="names that start with MILLRACE_ are reserved; choose another"
	// +listType=map
	// +listMapKey=name
	// +optional
	Env []EnvVar `json:"env,omitempty"`

	// nodeSelector of the pods.
	//
	// +optional
	NodeSelector map[string]string `json:"nodeSelector,omitempty"`

	// tolerations of the pods.
	//
	// +kubebuilder:validation:MaxItems=64
	// +listType=atomic
	// +optional
	Tolerations []corev1.Toleration `json:"tolerations,omitempty"`

	// affinity of the pods.
	//
	// +optional
	Affinity *corev1.Affinity `json:"affinity,omitempty"`

	// topologySpreadConstraints of the pods.
	//
	// +kubebuilder:validation:MaxItems=16
	// +listType=atomic
	// +optional
	TopologySpreadConstraints []corev1.TopologySpreadConstraint `json:"topologySpreadConstraints,omitempty"`

	// imagePullSecrets of the pods.
	//
	// +kubebuilder:validation:MaxItems=16
	// +listType=map
	// +listMapKey=name
	// +optional
	ImagePullSecrets []LocalReference `json:"imagePullSecrets,omitempty"`

	// priorityClassName of the pods.
	//
	// +optional
	PriorityClassName string `json:"priorityClassName,omitempty"`

	// serviceAccountName of the pods. Default: one made for the Processor, without any permission.
	//
	// +optional
	ServiceAccountName string `json:"serviceAccountName,omitempty"`
}

// EnvVar is one environment variable with a plain value. Secrets have their own fields in source and sink.
type EnvVar struct {
	// name of the variable.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=256
	Name string `json:"name"`

	// value of the variable.
	//
	// +kubebuilder:validation:MaxLength=32768
	// +optional
	Value string `json:"value,omitempty"`
}

// ProcessorStatus is what the controller last saw.
type ProcessorStatus struct {
	// observedGeneration is the generation of spec that the conditions speak of; -1 before the first.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// desiredReplicas is the number of pods that are wanted: by spec.replicas, by spec.autoscaling, or by whoever scales the Deployment.
	//
	// +optional
	DesiredReplicas int32 `json:"desiredReplicas"`

	// autoscaling is what the autoscaler did last, with spec.autoscaling.
	//
	// +optional
	Autoscaling *AutoscalingStatus `json:"autoscaling,omitempty"`

	// replicas is the number of pods that exist.
	//
	// +optional
	Replicas int32 `json:"replicas"`

	// readyReplicas is the number of pods that are ready.
	//
	// +optional
	ReadyReplicas int32 `json:"readyReplicas"`

	// updatedReplicas is the number of pods with the newest configuration.
	//
	// +optional
	UpdatedReplicas int32 `json:"updatedReplicas"`

	// selector matches the pods, for the scale subresource.
	//
	// +optional
	Selector string `json:"selector,omitempty"`

	// lastError is the last that kept a pod from working, and stays when pods have recovered.
	//
	// +optional
	LastError *PodError `json:"lastError,omitempty"`

	// lag of the source, with a consumerGroup source.
	//
	// +optional
	Lag *int64 `json:"lag,omitempty"`

	// oldestMessageTime is when the oldest message that is not settled was published, with a consumerGroup source; absent
	// when there is none.
	//
	// +optional
	OldestMessageTime *metav1.Time `json:"oldestMessageTime,omitempty"`

	// conditions: Ready, Reconciling, Stalled, Paused, LagKnown, AutoscalingActive, ScalingLimited.
	//
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// PodError is what kept a pod from working.
type PodError struct {
	// time when the container stopped, or when it was first seen to say so.
	Time metav1.Time `json:"time"`

	// pod that it was.
	Pod string `json:"pod"`

	// message: the pod's own words, or those of Kubernetes.
	Message string `json:"message"`
}

// Processor moves messages from a source to a sink, in pods of its own.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:subresource:scale:specpath=.spec.replicas,statuspath=.status.replicas,selectorpath=.status.selector
// +kubebuilder:resource:shortName=prc,categories=millrace
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Desired",type=integer,JSONPath=`.status.desiredReplicas`
// +kubebuilder:printcolumn:name="Replicas",type=integer,JSONPath=`.status.replicas`
// +kubebuilder:printcolumn:name="Available",type=integer,JSONPath=`.status.readyReplicas`
// +kubebuilder:printcolumn:name="Lag",type=integer,JSONPath=`.status.lag`
// +kubebuilder:printcolumn:name="Oldest",type=date,JSONPath=`.status.oldestMessageTime`
// +kubebuilder:printcolumn:name="Scaling",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="AutoscalingActive")].reason`
// +kubebuilder:printcolumn:name="Limited",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="ScalingLimited")].reason`
// +kubebuilder:printcolumn:name="Table",type=string,priority=1,JSONPath=`.spec.sink.table.name`
// +kubebuilder:printcolumn:name="Message",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.matches('^[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?$')",message="metadata.name becomes a label and part of pod names: write at most 52 lower-case letters, digits and -"
type Processor struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +required
	Spec ProcessorSpec `json:"spec"`

	// +default={"observedGeneration": -1}
	// +optional
	Status ProcessorStatus `json:"status,omitempty"`
}

// ProcessorList is a list of Processors.
//
// +kubebuilder:object:root=true
type ProcessorList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Processor `json:"items"`
}

// GetConditions returns the conditions in status.
func (x *Processor) GetConditions() []metav1.Condition { return x.Status.Conditions }

// SetConditions replaces the conditions in status.
func (x *Processor) SetConditions(conditions []metav1.Condition) { x.Status.Conditions = conditions }
