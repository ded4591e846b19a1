package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ProcessorSpec is the desired state of a processor.
//
// +kubebuilder:validation:XValidation:rule="!has(self.source.redis) || !has(self.sink.table) || has(self.sink.table.key)",message="sink.table.key is needed with a redis source, because Redis delivers an entry again after a crash; write the columns that identify a row"
type ProcessorSpec struct {
	// replicas is the number of pods. Unset: one. An autoscaler may write it through the scale subresource, so it has no
	// default that a GitOps tool would see as a difference.
	//
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000
	// +optional
	Replicas *int32 `json:"replicas,omitempty"`

	// source is where messages come from.
	Source Source `json:"source"`

	// codec turns an entry or message into a record.
	//
	// +kubebuilder:default={}
	// +optional
	Codec Codec `json:"codec,omitempty"`

	// mapping turns a record into a row.
	Mapping Mapping `json:"mapping"`

	// state keeps the last record of each key in memory, per pod.
	//
	// +optional
	State *State `json:"state,omitempty"`

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

// RedisSource reads Redis streams.
type RedisSource struct {
	// urlSecretRef names the Secret key that holds the server's address: redis://user:password@host:6379/0, or rediss:// for TLS.
	URLSecretRef SecretKeyReference `json:"urlSecretRef"`

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
}

// CodecType says how an entry or message becomes a record.
//
// +kubebuilder:validation:Enum=JSON;Fields
type CodecType string

// Codecs.
const (
	// CodecJSON reads one JSON document.
	CodecJSON CodecType = "JSON"
	// CodecFields takes the fields of a Redis entry as they are.
	CodecFields CodecType = "Fields"
)

// Codec turns an entry or message into a record.
//
// +kubebuilder:validation:XValidation:rule="!has(self.field) || self.type == 'JSON'",message="codec.field belongs to type: JSON; remove it, type: Fields takes every field"
type Codec struct {
	// type: JSON reads one JSON document, Fields takes the fields of a Redis entry as they are.
	//
	// +kubebuilder:default=JSON
	// +optional
	Type CodecType `json:"type,omitempty"`

	// field of the Redis entry that holds the JSON document. Default: payload.
	//
	// +kubebuilder:validation:MaxLength=512
	// +optional
	Field string `json:"field,omitempty"`
}

// Mapping turns a record into a row.
type Mapping struct {
	// columns of the row.
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=256
	// +listType=map
	// +listMapKey=name
	Columns []Column `json:"columns"`
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
	Path string `json:"path"`

	// type of the column in PostgreSQL, for example text, bigint, double precision, numeric, boolean, timestamptz or jsonb.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Type string `json:"type"`

	// required: a record without the value is rejected.
	//
	// +optional
	Required bool `json:"required,omitempty"`

	// default stands in for a missing value, written as text.
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

// Sink is where rows go.
//
// +kubebuilder:validation:XValidation:rule="has(self.table)",message="write a sink: table"
type Sink struct {
	// table writes rows into a table.
	//
	// +optional
	Table *TableSink `json:"table,omitempty"`
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
	// index on exactly them. They make a redelivery harmless. A redis source needs them.
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
}

// ConflictAction says what happens to a row whose key is there already.
//
// +kubebuilder:validation:Enum=Nothing;Update
type ConflictAction string

// Conflict actions.
const (
	// ConflictNothing keeps the row that is there.
	ConflictNothing ConflictAction = "Nothing"
	// ConflictUpdate overwrites it.
	ConflictUpdate ConflictAction = "Update"
)

// Conflict says what happens when a row of the same key is there already.
type Conflict struct {
	// action: Nothing keeps the row that is there, Update overwrites it.
	//
	// +kubebuilder:default=Nothing
	// +optional
	Action ConflictAction `json:"action,omitempty"`
}

// Batch bounds what is written at once.
type Batch struct {
	// maxRows in one batch.
	//
	// +kubebuilder:default=1000
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100000
	// +optional
	MaxRows int32 `json:"maxRows,omitempty"`

	// maxBytes in one batch, for example 1Mi.
	//
	// +kubebuilder:default="1Mi"
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

	// lag of the source, with a consumerGroup source.
	//
	// +optional
	Lag *int64 `json:"lag,omitempty"`

	// oldestMessageTime is when the oldest message that is not settled was published, with a consumerGroup source; absent
	// when there is none.
	//
	// +optional
	OldestMessageTime *metav1.Time `json:"oldestMessageTime,omitempty"`

	// conditions: Ready, Reconciling, Stalled, Paused, LagKnown.
	//
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// Processor moves messages from a source to a sink, in pods of its own.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:subresource:scale:specpath=.spec.replicas,statuspath=.status.replicas,selectorpath=.status.selector
// +kubebuilder:resource:shortName=prc,categories=millrace
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Replicas",type=integer,JSONPath=`.status.replicas`
// +kubebuilder:printcolumn:name="Available",type=integer,JSONPath=`.status.readyReplicas`
// +kubebuilder:printcolumn:name="Lag",type=integer,JSONPath=`.status.lag`
// +kubebuilder:printcolumn:name="Oldest",type=date,JSONPath=`.status.oldestMessageTime`
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

// Replicas is the number of pods that spec asks for.
func (p *Processor) Replicas() int32 {
	if p.Spec.Replicas == nil {
		return 1
	}
	return *p.Spec.Replicas
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
