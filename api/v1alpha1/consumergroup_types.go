package v1alpha1

import (
	"bytes"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// GroupMode is how a group shares a stream among its members.
//
// +kubebuilder:validation:Enum=Ordered;Shared
type GroupMode string

// Group modes.
const (
	// ModeOrdered keeps the order of each key: a partition has one member at a time.
	ModeOrdered GroupMode = "Ordered"
	// ModeShared gives each message to any one member.
	ModeShared GroupMode = "Shared"
)

// StartFrom is where a new group begins.
//
// +kubebuilder:validation:Enum=Earliest;Latest;Position;Time
type StartFrom string

// Start places.
const (
	StartEarliest StartFrom = "Earliest"
	StartLatest   StartFrom = "Latest"
	StartPosition StartFrom = "Position"
	StartTime     StartFrom = "Time"
)

// FailurePolicy is what an Ordered group does with a message that keeps failing.
//
// +kubebuilder:validation:Enum=Block;Skip;Park
type FailurePolicy string

// Failure policies.
const (
	// FailureBlock retries in place; later messages of the partition wait.
	FailureBlock FailurePolicy = "Block"
	// FailureSkip makes it a dead letter after maxAttempts and goes on.
	FailureSkip FailurePolicy = "Skip"
	// FailurePark sets it aside with the later messages of its key, which wait for it in order; other keys go on.
	FailurePark FailurePolicy = "Park"
)

// QueuePolicy is how many messages of one key may be in which state, in a Shared group.
//
// +kubebuilder:validation:Enum=Standard;Short;Singleton;Stately
type QueuePolicy string

// Queue policies.
const (
	// QueueStandard: as many as there are.
	QueueStandard QueuePolicy = "Standard"
	// QueueShort: at most one waits for its first delivery.
	QueueShort QueuePolicy = "Short"
	// QueueSingleton: at most one is with a member.
	QueueSingleton QueuePolicy = "Singleton"
	// QueueStately: at most one waits for its first delivery, one for another one, and one is with a member.
	QueueStately QueuePolicy = "Stately"
)

// ConsumerGroupSpec is the desired state of a consumer group.
//
// +kubebuilder:validation:XValidation:rule="self.streamRef.name == oldSelf.streamRef.name",messageExpression="'streamRef cannot change from ' + oldSelf.streamRef.name + ': a group keeps its place in one stream; create another ConsumerGroup for ' + self.streamRef.name"
// +kubebuilder:validation:XValidation:rule="self.mode == oldSelf.mode",messageExpression="'mode cannot change from ' + oldSelf.mode + ' to ' + self.mode + ': the two keep progress differently; create another ConsumerGroup, and give it start.from: Position where this one stands'"
// +kubebuilder:validation:XValidation:rule="self.start == oldSelf.start",message="start cannot change: it is used once, when the group is created; create another ConsumerGroup to read from elsewhere"
// +kubebuilder:validation:XValidation:rule="!has(self.failurePolicy) || self.mode == 'Ordered'",message="failurePolicy belongs to mode: Ordered; remove it, a Shared group sets a failing message aside after maxAttempts by itself"
// +kubebuilder:validation:XValidation:rule="!has(self.failurePolicy) || self.failurePolicy != 'Skip' || self.maxAttempts > 0",message="failurePolicy: Skip needs maxAttempts of 1 or more; with 0 a message is retried for ever"
// +kubebuilder:validation:XValidation:rule="(has(self.queuePolicy) ? self.queuePolicy : 'Standard') == (has(oldSelf.queuePolicy) ? oldSelf.queuePolicy : 'Standard')",message="queuePolicy cannot change: it says how the group keeps what waits; create another ConsumerGroup, and give it start.from: Position where this one stands"
// +kubebuilder:validation:XValidation:rule="!has(self.queuePolicy) || self.queuePolicy == 'Standard' || self.mode == 'Shared'",message="queuePolicy belongs to mode: Shared; remove it, an Ordered group gives the messages of a key to one member at a time"
// +kubebuilder:validation:XValidation:rule="(has(self.filter) && has(self.filter.unrouted) && self.filter.unrouted) == (has(oldSelf.filter) && has(oldSelf.filter.unrouted) && oldSelf.filter.unrouted)",message="filter.unrouted cannot change: it says how the group keeps what waits; create another ConsumerGroup"
// +kubebuilder:validation:XValidation:rule="!has(self.filter) || !has(self.filter.unrouted) || !self.filter.unrouted || self.mode == 'Shared'",message="filter.unrouted belongs to mode: Shared; messages that nobody handles have no order to keep"
type ConsumerGroupSpec struct {
	// streamRef names the Stream, in the same namespace, that the group reads. It cannot change.
	StreamRef LocalReference `json:"streamRef"`

	// name of the group in the database. Default: metadata.name with each - replaced by _. It cannot change.
	//
	// +kubebuilder:validation:MaxLength=48
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z][a-z0-9_]*$')",message="write a name of lower-case letters, digits and _ that starts with a letter, for example billing"
	// +optional
	Name string `json:"name,omitempty"`

	// mode: Shared gives each message to any one member, as many members as wanted. Ordered keeps the order of each key: a
	// partition has one member at a time. It cannot change.
	//
	// +kubebuilder:default=Shared
	// +optional
	Mode GroupMode `json:"mode,omitempty"`

	// start is where the group begins when it is created. It cannot change.
	//
	// +kubebuilder:default={from: "Earliest"}
	// +optional
	Start Start `json:"start,omitempty"`

	// ackWait is how long a member may hold a message before another gets it.
	//
	// +kubebuilder:default="30s"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') && duration(self) >= duration('0s')",message="write a duration such as 30s or 5m"
	// +optional
	AckWait *metav1.Duration `json:"ackWait,omitempty"`

	// maxAttempts is how often a message is delivered before it becomes a dead letter. 0: without end.
	//
	// +kubebuilder:default=10
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000
	// +optional
	MaxAttempts *int32 `json:"maxAttempts,omitempty"`

	// backoff is the wait before a message is delivered again.
	//
	// +kubebuilder:default={initial: "1s", max: "5m"}
	// +optional
	Backoff Backoff `json:"backoff,omitempty"`

	// failurePolicy of an Ordered group: Block, its default, retries a failing message in place while the rest of its
	// partition waits; Park lets the later messages of its key wait for it, in order, while other keys go on; Skip makes it a
	// dead letter after maxAttempts and goes on. With Park it becomes a dead letter after maxAttempts too, and its key goes on.
	//
	// +optional
	FailurePolicy FailurePolicy `json:"failurePolicy,omitempty"`

	// queuePolicy of a Shared group counts the messages of each key, and those without a key together. Short: at most one waits for its first delivery; one that
	// comes meanwhile is passed over. Singleton: at most one is with a member, the others wait. Stately: at most one waits for its first delivery, one for another
	// one, and one is with a member; one that fails while another waits for its retry is a dead letter. Standard, the default: as many as there are. Other than
	// Standard costs a row for each message, and cannot be combined with priorities of the Stream. It cannot change.
	//
	// +optional
	QueuePolicy QueuePolicy `json:"queuePolicy,omitempty"`

	// filter lets the group pass over messages that lack something. A message has to have all that is written here. A change
	// holds for what is handed out from then on. Unset: the group gets every message.
	//
	// +optional
	Filter *Filter `json:"filter,omitempty"`

	// lapse says when the group is given up, so that a reader that is gone for good does not keep messages on disk for ever.
	// A lapsed group receives nothing, and keeps nothing from being removed, until millrace.reset_group moves it to another
	// place. Unset: never.
	//
	// +optional
	Lapse *Lapse `json:"lapse,omitempty"`

	// warningSize is a number of messages that wait for a delivery: from there on the condition BacklogHigh is true, until fewer than four fifths of it wait.
	// The group is Ready all the same. In a group for unrouted messages, 1 tells of any. Unset: no such condition.
	//
	// +kubebuilder:validation:Minimum=1
	// +optional
	WarningSize *int64 `json:"warningSize,omitempty"`

	// paused keeps the group and its place, and hands out no message.
	//
	// +optional
	Paused bool `json:"paused,omitempty"`

	// changePolicy: Apply, the default, changes the database as soon as spec differs from it. Plan writes into status.plan what
	// would be done and destroyed there, creation and repairs included, and does nothing until the annotation
	// millrace.dev/approve-plan holds status.plan.hash. Deleting this resource needs no approval: deletionPolicy says what it does.
	//
	// +kubebuilder:default=Apply
	// +optional
	ChangePolicy ChangePolicy `json:"changePolicy,omitempty"`

	// deletionPolicy says what deleting this resource does to the group. Retain, the default, leaves it and its place, and
	// adds no finalizer. Delete drops it with its place and dead letters. DeleteIfEmpty drops it when nothing is waiting for
	// it, in flight or dead, and otherwise leaves it.
	//
	// +kubebuilder:default=Retain
	// +optional
	DeletionPolicy DeletionPolicy `json:"deletionPolicy,omitempty"`

	// adoptionPolicy says what happens when the group exists in the database already. IfUnowned takes it over unless a living
	// resource owns it. Never refuses.
	//
	// +kubebuilder:default=IfUnowned
	// +optional
	AdoptionPolicy AdoptionPolicy `json:"adoptionPolicy,omitempty"`

	// suspend stops the controller from looking at or changing the group. Consuming goes on; paused stops that.
	//
	// +optional
	Suspend bool `json:"suspend,omitempty"`
}

// Start is the place where a new group begins.
//
// +kubebuilder:validation:XValidation:rule="(self.from == 'Position') == has(self.position)",message="position and from: Position belong together: write both, or neither"
// +kubebuilder:validation:XValidation:rule="(self.from == 'Time') == has(self.time)",message="time and from: Time belong together: write both, or neither"
type Start struct {
	// from: Earliest is the oldest message kept, Latest only what is published from now on, Position and Time what they say.
	//
	// +kubebuilder:default=Earliest
	// +optional
	From StartFrom `json:"from,omitempty"`

	// position of the first message to deliver, with from: Position.
	//
	// +kubebuilder:validation:Minimum=1
	// +optional
	Position *int64 `json:"position,omitempty"`

	// time of the first message to deliver, with from: Time.
	//
	// +optional
	Time *metav1.Time `json:"time,omitempty"`
}

// Filter lets messages pass that have everything it asks for.
//
// +kubebuilder:validation:MinProperties=1
type Filter struct {
	// headers that a message must have, each with this value, which is a string, a number or a boolean: "2" is not 2; or with one of a list of up to 100 values.
	// It may have others besides.
	//
	// +kubebuilder:validation:MinProperties=1
	// +kubebuilder:validation:MaxProperties=32
	// +optional
	Headers map[string]HeaderValue `json:"headers,omitempty"`

	// withoutHeaders: the message must have none of these headers.
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:items:MaxLength=1024
	// +listType=set
	// +optional
	WithoutHeaders []string `json:"withoutHeaders,omitempty"`

	// keys: the message's key must be one of these.
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=1000
	// +kubebuilder:validation:items:MaxLength=1024
	// +listType=set
	// +optional
	Keys []string `json:"keys,omitempty"`

	// keyPrefix: the message's key must begin with this.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	// +optional
	KeyPrefix string `json:"keyPrefix,omitempty"`

	// unrouted: no other group of the Stream has a filter that takes the message. Groups without a filter do not count. Each message is judged once, half a
	// minute after it was published at the latest, and then kept for this group until somebody settles it. What a group that is deleted, or whose filter
	// changes, has not settled comes here as well, unless another filter takes it. It cannot change.
	//
	// +optional
	Unrouted bool `json:"unrouted,omitempty"`
}

// HeaderValue is a string, a number or a boolean, or a list of them. Publishers write headers as JSON, where 2 and "2" differ, so a filter of strings alone
// could not name every header. A CRD has no type for any of the three, so the schema lets everything through, and the engine refuses
// objects.
//
// +kubebuilder:validation:Type=""
// +kubebuilder:pruning:PreserveUnknownFields
type HeaderValue struct {
	// Raw is the value in JSON.
	Raw []byte `json:"-"`
}

// MarshalJSON is json.Marshaler's.
func (v HeaderValue) MarshalJSON() ([]byte, error) {
	if len(v.Raw) == 0 {
		return []byte("null"), nil
	}
	return v.Raw, nil
}

// UnmarshalJSON is json.Unmarshaler's.
func (v *HeaderValue) UnmarshalJSON(b []byte) error {
	v.Raw = bytes.Clone(b)
	return nil
}

// Lapse is when a group is given up: whichever comes first. In a stream with priorities their messages count together.
//
// +kubebuilder:validation:XValidation:rule="has(self.after) || has(self.lag)",message="write lapse.after, lapse.lag or both; for a group that never lapses leave lapse out"
type Lapse struct {
	// after: messages have waited for so long, and no member has worked. A paused group does not lapse by time. Fractions of a
	// second are rounded up.
	//
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') && duration(self) >= duration('1s')",message="write a duration of 1s or more, such as 30m or 168h; days are written in hours"
	// +optional
	After *metav1.Duration `json:"after,omitempty"`

	// lag: more than so many messages wait.
	//
	// +kubebuilder:validation:Minimum=1
	// +optional
	Lag *int64 `json:"lag,omitempty"`
}

// Backoff grows from initial to max, doubling.
//
// +kubebuilder:validation:XValidation:rule="duration(self.initial) <= duration(self.max)",message="backoff.initial must not exceed backoff.max; raise max or lower initial"
type Backoff struct {
	// initial wait.
	//
	// +kubebuilder:default="1s"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$')",message="write a duration such as 500ms or 1s"
	// +optional
	Initial *metav1.Duration `json:"initial,omitempty"`

	// max wait.
	//
	// +kubebuilder:default="5m"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$')",message="write a duration such as 30s or 5m"
	// +optional
	Max *metav1.Duration `json:"max,omitempty"`
}

// ConsumerGroupStatus is what the controller last saw.
type ConsumerGroupStatus struct {
	// observedGeneration is the generation of spec that the conditions speak of; -1 before the first.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// name of the group in the database.
	//
	// +optional
	Name string `json:"name,omitempty"`

	// stream is the name of the group's stream in the database.
	//
	// +optional
	Stream string `json:"stream,omitempty"`

	// lag is the number of messages that no member has been given yet, or that were given back. It may count positions that were rolled back.
	//
	// +optional
	Lag *int64 `json:"lag,omitempty"`

	// queued is the number of messages that wait for a delivery, the first or another. Of a group with a filter it counts those that the filter takes: exactly for
	// the next 2,000 positions of the stream, and estimated beyond them.
	//
	// +optional
	Queued *int64 `json:"queued,omitempty"`

	// inFlight is the number of messages that members hold.
	//
	// +optional
	InFlight *int64 `json:"inFlight,omitempty"`

	// retrying is the number of messages that wait for another delivery.
	//
	// +optional
	Retrying *int64 `json:"retrying,omitempty"`

	// deadLetters is the number of messages set aside.
	//
	// +optional
	DeadLetters *int64 `json:"deadLetters,omitempty"`

	// oldestMessageTime is when the oldest message that is not settled was published; absent when there is none.
	//
	// +optional
	OldestMessageTime *metav1.Time `json:"oldestMessageTime,omitempty"`

	// deliveries is how often the unsettled message that was handed out most often has been: far above 1, members fail at it again and again.
	// Absent when no message is held or waits for another delivery.
	//
	// +optional
	Deliveries *int32 `json:"deliveries,omitempty"`

	// publishedPerMinute is how many messages came into the stream, at the rate of the last minute, rounded to two digits. A change of
	// less than a fifth is not shown.
	//
	// +optional
	PublishedPerMinute *int64 `json:"publishedPerMinute,omitempty"`

	// settledPerMinute is how many messages the group was done with, in the same way: settled, set aside, or removed by retention.
	//
	// +optional
	SettledPerMinute *int64 `json:"settledPerMinute,omitempty"`

	// members is the number of processes in an Ordered group. A Shared group keeps no list of its members.
	//
	// +optional
	Members *int32 `json:"members,omitempty"`

	// holders are the members that hold something, those with the most messages first: at most ten.
	//
	// +kubebuilder:validation:MaxItems=10
	// +listType=atomic
	// +optional
	Holders []Holder `json:"holders,omitempty"`

	// lastError is the newest error of a message that waits for another delivery or was set aside; absent when there is none.
	//
	// +optional
	LastError *MessageError `json:"lastError,omitempty"`

	// plan is what waits for approval, with changePolicy: Plan; absent when nothing does.
	//
	// +optional
	Plan *PlannedChange `json:"plan,omitempty"`

	// approvedPlan is the hash of the last plan that was approved and carried out. An approval holds once.
	//
	// +optional
	ApprovedPlan string `json:"approvedPlan,omitempty"`

	// conditions: Ready, Reconciling, Stalled, SchemaApplied, Drifted, Paused, Lapsed, Consuming, BacklogHigh, LagKnown.
	//
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// Holder is a member of a group, and what it holds.
type Holder struct {
	// member is the name that the process gave.
	Member string `json:"member"`

	// partitions that are the member's alone, in an Ordered group, such as 0-3,7.
	//
	// +optional
	Partitions string `json:"partitions,omitempty"`

	// messages that it was given and has not settled.
	Messages int64 `json:"messages"`
}

// MessageError is what a consumer said of a message.
type MessageError struct {
	// time when it was said.
	Time metav1.Time `json:"time"`

	// message in the consumer's words, cut after 300 bytes. It may quote a part of the message.
	Message string `json:"message"`
}

// ConsumerGroup is a named set of readers of a Stream with its own progress.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=cg,categories=millrace
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Stream",type=string,JSONPath=`.spec.streamRef.name`
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name="Lag",type=integer,JSONPath=`.status.lag`
// +kubebuilder:printcolumn:name="In-Flight",type=integer,JSONPath=`.status.inFlight`
// +kubebuilder:printcolumn:name="Dead",type=integer,JSONPath=`.status.deadLetters`
// +kubebuilder:printcolumn:name="Oldest",type=date,JSONPath=`.status.oldestMessageTime`
// +kubebuilder:printcolumn:name="Queued",type=integer,priority=1,JSONPath=`.status.queued`
// +kubebuilder:printcolumn:name="Retrying",type=integer,priority=1,JSONPath=`.status.retrying`
// +kubebuilder:printcolumn:name="In/Min",type=integer,priority=1,JSONPath=`.status.publishedPerMinute`
// +kubebuilder:printcolumn:name="Out/Min",type=integer,priority=1,JSONPath=`.status.settledPerMinute`
// +kubebuilder:printcolumn:name="Members",type=integer,priority=1,JSONPath=`.status.members`
// +kubebuilder:printcolumn:name="Plan",type=string,priority=1,JSONPath=`.status.plan.hash`
// +kubebuilder:printcolumn:name="Message",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="has(self.spec.name) || self.metadata.name.matches('^[a-z][a-z0-9-]{0,47}$')",message="this metadata.name cannot be a group's name; set spec.name to lower-case letters, digits and _, at most 48, starting with a letter"
// +kubebuilder:validation:XValidation:rule="(has(self.spec.name) ? self.spec.name : self.metadata.name.replace('-', '_')) == (has(oldSelf.spec.name) ? oldSelf.spec.name : oldSelf.metadata.name.replace('-', '_'))",message="spec.name cannot change: the group keeps its name in the database; create another ConsumerGroup with the new name"
type ConsumerGroup struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +required
	Spec ConsumerGroupSpec `json:"spec"`

	// +default={"observedGeneration": -1}
	// +optional
	Status ConsumerGroupStatus `json:"status,omitempty"`
}

// DatabaseName is the group's name in the database.
func (g *ConsumerGroup) DatabaseName() string {
	if g.Spec.Name != "" {
		return g.Spec.Name
	}
	return databaseName(g.Name)
}

// InDatabase says whether the group can be worked with: it is as spec says, or it exists and a change of it waits for approval.
func (g *ConsumerGroup) InDatabase() bool { return inDatabase(g.Status.Conditions, g.Status.Name) }

// ConsumerGroupList is a list of ConsumerGroups.
//
// +kubebuilder:object:root=true
type ConsumerGroupList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ConsumerGroup `json:"items"`
}

// GetConditions returns the conditions in status.
func (x *ConsumerGroup) GetConditions() []metav1.Condition { return x.Status.Conditions }

// SetConditions replaces the conditions in status.
func (x *ConsumerGroup) SetConditions(conditions []metav1.Condition) {
	x.Status.Conditions = conditions
}
