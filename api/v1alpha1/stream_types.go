package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// PayloadType is the column type of a stream's payload.
//
// +kubebuilder:validation:Enum=JSON;Bytes
type PayloadType string

// Payload types.
const (
	// PayloadJSON stores payloads as jsonb.
	PayloadJSON PayloadType = "JSON"
	// PayloadBytes stores payloads as bytea.
	PayloadBytes PayloadType = "Bytes"
)

// RetentionPolicy says when a message may be removed.
//
// +kubebuilder:validation:Enum=Limits;Interest;WorkQueue
type RetentionPolicy string

// Retention policies.
const (
	// RetentionLimits keeps messages until a limit is passed, read or not.
	RetentionLimits RetentionPolicy = "Limits"
	// RetentionInterest keeps messages until every consumer group has acked them.
	RetentionInterest RetentionPolicy = "Interest"
	// RetentionWorkQueue is Interest with one consumer group.
	RetentionWorkQueue RetentionPolicy = "WorkQueue"
)

// DeletionPolicy says what deleting a resource does to the database.
//
// +kubebuilder:validation:Enum=Retain;Delete;DeleteIfEmpty
type DeletionPolicy string

// Deletion policies.
const (
	// DeletionRetain leaves the database as it is.
	DeletionRetain DeletionPolicy = "Retain"
	// DeletionDelete drops the object with everything in it.
	DeletionDelete DeletionPolicy = "Delete"
	// DeletionDeleteIfEmpty drops the object when it holds no message, and otherwise leaves it.
	DeletionDeleteIfEmpty DeletionPolicy = "DeleteIfEmpty"
)

// AdoptionPolicy says what happens when the object is in the database already.
//
// +kubebuilder:validation:Enum=IfUnowned;Never
type AdoptionPolicy string

// Adoption policies.
const (
	// AdoptionIfUnowned takes over an object that no living resource owns.
	AdoptionIfUnowned AdoptionPolicy = "IfUnowned"
	// AdoptionNever takes over nothing.
	AdoptionNever AdoptionPolicy = "Never"
)

// StreamSpec is the desired state of a stream.
//
// +kubebuilder:validation:XValidation:rule="self.payloadType == oldSelf.payloadType",messageExpression="'payloadType cannot change from ' + oldSelf.payloadType + ' to ' + self.payloadType + ': the column keeps its type; create another Stream and publish there'"
// +kubebuilder:validation:XValidation:rule="self.partitions >= oldSelf.partitions",message="partitions only grow, because the order of keys in flight would be lost: write the present number or more; for fewer, create another Stream and move its consumers"
// +kubebuilder:validation:XValidation:rule="self.retention.segments >= oldSelf.retention.segments",message="retention.segments only grows: write the present number or more"
// +kubebuilder:validation:XValidation:rule="self.priorities >= oldSelf.priorities",message="priorities only grow, because messages may wait in each of them: write the present number or more"
// +kubebuilder:validation:XValidation:rule="self.versions || !oldSelf.versions",message="versions cannot be taken back: keep versions: true, or create another Stream"
// +kubebuilder:validation:XValidation:rule="!self.versions || self.payloadType == 'JSON' && self.priorities == 1",message="versions need payloadType: JSON and one priority, because the versions of a key are its order and projections read its payloads"
// +kubebuilder:validation:XValidation:rule="has(self.frames) || !has(oldSelf.frames)",message="frames cannot be taken back: keep frames: {}, or create another Stream"
// +kubebuilder:validation:XValidation:rule="!has(self.frames) || !self.versions && self.priorities == 1",message="frames need a Stream without versions and with one priority, because the ids of the frames of a key are its order"
// +kubebuilder:validation:XValidation:rule="!has(self.tenants) || self.versions && self.retention.policy == 'Limits' && !has(self.retention.maxAge) && !has(self.retention.maxBytes) && !has(self.retention.maxMessages)",message="tenants need versions: true and no limits of retention, because there is no common end to remove messages from; millrace.drop_tenant removes what belongs to one"
// +kubebuilder:validation:XValidation:rule="!has(self.projections) || self.versions || self.projections.all(p, has(p.group))",message="a projection without a group runs inside the append, which needs versions: true; write that, or the group that runs it"
type StreamSpec struct {
	// databaseSecretRef names the Secret key that holds the connection string of the stream's database, for example
	// postgres://user:password@host:5432/app?sslmode=verify-full. Without it the stream lives in the default database of
	// the installation.
	//
	// +optional
	DatabaseSecretRef *SecretKeyReference `json:"databaseSecretRef,omitempty"`

	// name of the stream in the database: its table is millrace.<name>. Default: metadata.name with each - replaced by _.
	// It cannot change.
	//
	// +kubebuilder:validation:MaxLength=48
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z][a-z0-9_]*$')",message="write a name of lower-case letters, digits and _ that starts with a letter, for example orders_eu"
	// +optional
	Name string `json:"name,omitempty"`

	// partitions is the number of lanes. All messages of a key go through one lane, and a lane of an Ordered group has one
	// reader at a time. It can be raised, never lowered.
	//
	// +kubebuilder:default=8
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1024
	// +optional
	Partitions int32 `json:"partitions,omitempty"`

	// payloadType is JSON (jsonb) or Bytes (bytea). It cannot change.
	//
	// +kubebuilder:default=JSON
	// +optional
	PayloadType PayloadType `json:"payloadType,omitempty"`

	// retention says how long messages stay.
	//
	// +kubebuilder:default={}
	// +optional
	Retention Retention `json:"retention,omitempty"`

	// maxMessageBytes is the largest payload that the publish functions take, for example 64Ki or 1Mi. Plain INSERT and COPY are
	// not checked.
	//
	// +kubebuilder:default="1Mi"
	// +kubebuilder:validation:XValidation:rule="quantity(string(self)).compareTo(quantity('1')) >= 0 && quantity(string(self)).compareTo(quantity('64Mi')) <= 0",message="write a size from 1 to 64Mi, for example 1Mi"
	// +optional
	MaxMessageBytes *resource.Quantity `json:"maxMessageBytes,omitempty"`

	// dedupeWindow is how long a dedupe key is remembered: a message published with the same one within it is not stored again,
	// and the publisher gets the position of the first. 0s remembers none, and then publishing with a dedupe key is refused. Fractions of a
	// second are rounded up.
	//
	// +kubebuilder:default="2m"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') && duration(self) <= duration('8760h')",message="write a duration such as 30s, 2m or 24h, at most 8760h; 0s switches it off"
	// +optional
	DedupeWindow *metav1.Duration `json:"dedupeWindow,omitempty"`

	// priorities is how many there are: a message is published with one from 0, the default, to priorities - 1, and those of a
	// higher one are delivered first. Order per key and the limits of retention hold within each. It can be raised, never lowered.
	//
	// +kubebuilder:default=1
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=8
	// +optional
	Priorities int32 `json:"priorities,omitempty"`

	// versions numbers the messages of each key, so that millrace.append can name the version that it was decided upon: the stream is an
	// event store. Give it no limits of retention. It can be switched on, for what is appended from then on, and never off.
	//
	// +kubebuilder:default=false
	// +optional
	Versions bool `json:"versions,omitempty"`

	// frames makes the stream take frames: what an agent or a job says while it works, in small pieces under a key, with ids of their own, a
	// rolling summary per key, and live frames that are not stored (millrace.append_frame). frames: {} takes the defaults. It can be switched on and
	// never off.
	//
	// +optional
	Frames *Frames `json:"frames,omitempty"`

	// tenants of an event store, each with a table of its own for the messages of its entities, those with keys that begin with the tenant and a /, as acme/cart-1. It needs versions and no limits
	// of retention. A tenant that is left out later stays: millrace.drop_tenant removes one with all its messages.
	//
	// +kubebuilder:validation:MaxItems=100
	// +kubebuilder:validation:items:MaxLength=40
	// +kubebuilder:validation:items:Pattern=`^[a-z0-9]([a-z0-9_.-]{0,38}[a-z0-9])?$`
	// +listType=set
	// +optional
	Tenants []string `json:"tenants,omitempty"`

	// projections make documents of the messages: in the transaction of the append, or by a consumer group.
	//
	// +kubebuilder:validation:MaxItems=32
	// +listType=map
	// +listMapKey=name
	// +optional
	Projections []Projection `json:"projections,omitempty"`

	// changePolicy: Apply, the default, changes the database as soon as spec differs from it. Plan writes into status.plan what
	// would be done and destroyed there, creation and repairs included, and does nothing until the annotation
	// millrace.dev/approve-plan holds status.plan.hash. Deleting this resource needs no approval: deletionPolicy says what it does.
	//
	// +kubebuilder:default=Apply
	// +optional
	ChangePolicy ChangePolicy `json:"changePolicy,omitempty"`

	// deletionPolicy says what deleting this resource does to the stream. Retain, the default, leaves it with its messages and
	// adds no finalizer. Delete drops it with its groups and messages. DeleteIfEmpty drops it when it holds no message and
	// otherwise leaves it.
	//
	// +kubebuilder:default=Retain
	// +optional
	DeletionPolicy DeletionPolicy `json:"deletionPolicy,omitempty"`

	// adoptionPolicy says what happens when the stream exists in the database already. IfUnowned takes it over unless a living
	// resource owns it. Never refuses.
	//
	// +kubebuilder:default=IfUnowned
	// +optional
	AdoptionPolicy AdoptionPolicy `json:"adoptionPolicy,omitempty"`

	// suspend stops the controller from looking at or changing the stream. Publishing and consuming go on.
	//
	// +optional
	Suspend bool `json:"suspend,omitempty"`
}

// Frames says how the frames of a stream are kept. Durable ones are messages, and retention says how long they stay.
type Frames struct {
	// bestEffort says how many live frames of a key are kept for who comes late.
	//
	// +kubebuilder:default={}
	// +optional
	BestEffort BestEffortFrames `json:"bestEffort,omitempty"`

	// summaryTTL is how long the summary of a key is kept after its last patch. 0s keeps it for ever.
	//
	// +kubebuilder:default="168h"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') && duration(self) <= duration('876000h')",message="write a duration such as 24h or 168h, at most 876000h; 0s keeps summaries for ever"
	// +optional
	SummaryTTL *metav1.Duration `json:"summaryTTL,omitempty"`
}

// BestEffortFrames bounds the live frames of a key: the newest 2 × ⌈rate × ttl⌉ are kept, between minLength and maxLength, where the rate is an
// exponential moving average of the frames a second.
//
// +kubebuilder:validation:XValidation:rule="!has(self.minLength) || !has(self.maxLength) || self.minLength <= self.maxLength",message="minLength cannot be above maxLength"
type BestEffortFrames struct {
	// ttl is for how long a live frame should be seen.
	//
	// +kubebuilder:default="10s"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') && duration(self) >= duration('1ms') && duration(self) <= duration('24h')",message="write a duration from 1ms to 24h, such as 10s"
	// +optional
	TTL *metav1.Duration `json:"ttl,omitempty"`

	// minLength is how many live frames of a key are kept at least.
	//
	// +kubebuilder:default=64
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000000
	// +optional
	MinLength int32 `json:"minLength,omitempty"`

	// maxLength is how many live frames of a key are kept at most.
	//
	// +kubebuilder:default=16384
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000000
	// +optional
	MaxLength int32 `json:"maxLength,omitempty"`

	// alpha is the weight of the newest sample in the average rate, a number above 0 and up to 1 in quotes.
	//
	// +kubebuilder:default="0.2"
	// +kubebuilder:validation:MaxLength=8
	// +kubebuilder:validation:XValidation:rule="self.matches('^(0[.][0-9]+|1([.]0+)?)$') && double(self) >= 0.001",message="write a number from 0.001 to 1 in quotes, such as \"0.2\""
	// +optional
	Alpha string `json:"alpha,omitempty"`
}

// Projection turns messages into documents, or into whatever its function writes. A new or changed one with documents is built from the beginning of the stream beside what is live,
// and goes live in one transaction when it has caught up.
//
// +kubebuilder:validation:XValidation:rule="!has(self.documentId) || has(self.documents)",message="documentId names a document; write the table of documents too"
type Projection struct {
	// name of the projection. Inline projections run in the order of their names.
	//
	// +kubebuilder:validation:Pattern=`^[a-z][a-z0-9_-]{0,62}$`
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name"`

	// function of the database, without arguments, such as shop.apply_cart_event. With documents it is function(document jsonb, payload jsonb, headers jsonb) returns
	// jsonb; without, it writes what it likes: function(stream text, key text, version bigint, position bigint, payload jsonb, headers jsonb). While it does not exist the
	// projection waits.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=200
	Function string `json:"function"`

	// documents is the table that holds them: key, document, version. It is made when it is missing, and stays when the projection goes.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=200
	// +optional
	Documents string `json:"documents,omitempty"`

	// documentId is the path in the payload whose text names the document, so that messages of many keys make one. Default: the message's key.
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MaxLength=200
	// +listType=atomic
	// +optional
	DocumentID []string `json:"documentId,omitempty"`

	// group is the consumer group that runs the projection, by its name in the database: an Ordered one of this stream, of its own. Give it a Processor with sink.projection. Default: the
	// projection is inline, in the transaction of the append.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	// +optional
	Group string `json:"group,omitempty"`

	// revision makes the documents anew when it changes, for a function that has changed under the same name.
	//
	// +kubebuilder:validation:MaxLength=63
	// +optional
	Revision string `json:"revision,omitempty"`
}

// Retention limits what a stream keeps. Space is freed by whole segments, so a stream may hold up to one segment more
// than a limit says.
type Retention struct {
	// policy: Limits keeps messages until a limit below is passed; Interest until every group has acked them; WorkQueue is
	// Interest with one group.
	//
	// +kubebuilder:default=Limits
	// +optional
	Policy RetentionPolicy `json:"policy,omitempty"`

	// maxAge of a message. Unset: no limit.
	//
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') && duration(self) >= duration('0s')",message="write a duration such as 30s, 5m or 168h; days are written in hours"
	// +optional
	MaxAge *metav1.Duration `json:"maxAge,omitempty"`

	// maxBytes of the stream on disk, of each priority, for example 20Gi. Unset: no limit.
	//
	// +kubebuilder:validation:XValidation:rule="quantity(string(self)).isGreaterThan(quantity('0'))",message="write a size above zero, for example 20Gi, or leave maxBytes out for no limit"
	// +optional
	MaxBytes *resource.Quantity `json:"maxBytes,omitempty"`

	// maxMessages in the stream, in each priority. Unset: no limit.
	//
	// +kubebuilder:validation:Minimum=1
	// +optional
	MaxMessages *int64 `json:"maxMessages,omitempty"`

	// segments is the number of tables that the stream is made of. More of them free space in finer steps. It can be raised,
	// never lowered.
	//
	// +kubebuilder:default=4
	// +kubebuilder:validation:Minimum=2
	// +kubebuilder:validation:Maximum=16
	// +optional
	Segments int32 `json:"segments,omitempty"`
}

// StreamStatus is what the controller last saw. What moves with the traffic is brought up to date when the stream is compared with its
// database, every few minutes, so that a busy stream causes hardly any writes to the API server; lag is on the ConsumerGroups, and fresher
// figures are in the metrics.
type StreamStatus struct {
	// observedGeneration is the generation of spec that the conditions speak of; -1 before the first.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// name of the stream in the database.
	//
	// +optional
	Name string `json:"name,omitempty"`

	// partitions in the database.
	//
	// +optional
	Partitions *int32 `json:"partitions,omitempty"`

	// segments in the database.
	//
	// +optional
	Segments *int32 `json:"segments,omitempty"`

	// priorities in the database.
	//
	// +optional
	Priorities *int32 `json:"priorities,omitempty"`

	// messages that the stream held at the last comparison with the database. It may count positions that were rolled back. The
	// manager's metrics have a fresher figure.
	//
	// +optional
	Messages *int64 `json:"messages,omitempty"`

	// bytes that the stream took on disk at the last comparison with the database, with its indexes.
	//
	// +optional
	Bytes *int64 `json:"bytes,omitempty"`

	// plan is what waits for approval, with changePolicy: Plan; absent when nothing does.
	//
	// +optional
	Plan *PlannedChange `json:"plan,omitempty"`

	// approvedPlan is the hash of the last plan that was approved and carried out. An approval holds once.
	//
	// +optional
	ApprovedPlan string `json:"approvedPlan,omitempty"`

	// conditions: Ready, Reconciling, Stalled, SchemaApplied, Drifted, Paused, HorizonHeld.
	//
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// Stream is a durable, ordered log of messages in PostgreSQL, the table millrace.<name>.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=stm,categories=millrace
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Partitions",type=integer,JSONPath=`.status.partitions`
// +kubebuilder:printcolumn:name="Retention",type=string,JSONPath=`.spec.retention.policy`
// +kubebuilder:printcolumn:name="Priorities",type=integer,priority=1,JSONPath=`.status.priorities`
// +kubebuilder:printcolumn:name="Messages",type=integer,priority=1,JSONPath=`.status.messages`
// +kubebuilder:printcolumn:name="Bytes",type=integer,priority=1,JSONPath=`.status.bytes`
// +kubebuilder:printcolumn:name="Plan",type=string,priority=1,JSONPath=`.status.plan.hash`
// +kubebuilder:printcolumn:name="Table",type=string,priority=1,JSONPath=`.status.name`
// +kubebuilder:printcolumn:name="Message",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="has(self.spec.name) || self.metadata.name.matches('^[a-z][a-z0-9-]{0,47}$')",message="this metadata.name cannot be a table name; set spec.name to lower-case letters, digits and _, at most 48, starting with a letter"
// +kubebuilder:validation:XValidation:rule="(has(self.spec.name) ? self.spec.name : self.metadata.name.replace('-', '_')) == (has(oldSelf.spec.name) ? oldSelf.spec.name : oldSelf.metadata.name.replace('-', '_'))",message="spec.name cannot change: the table keeps its name; create another Stream with the new name"
type Stream struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +required
	Spec StreamSpec `json:"spec"`

	// +default={"observedGeneration": -1}
	// +optional
	Status StreamStatus `json:"status,omitempty"`
}

// DatabaseName is the stream's name in the database.
func (s *Stream) DatabaseName() string {
	if s.Spec.Name != "" {
		return s.Spec.Name
	}
	return databaseName(s.Name)
}

// InDatabase says whether the stream can be worked with: it is as spec says, or it exists and a change of it waits for approval.
func (s *Stream) InDatabase() bool { return inDatabase(s.Status.Conditions, s.Status.Name) }

// StreamList is a list of Streams.
//
// +kubebuilder:object:root=true
type StreamList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Stream `json:"items"`
}

// GetConditions returns the conditions in status.
func (x *Stream) GetConditions() []metav1.Condition { return x.Status.Conditions }

// SetConditions replaces the conditions in status.
func (x *Stream) SetConditions(conditions []metav1.Condition) { x.Status.Conditions = conditions }
