package v1alpha1

// Condition types. Ready, Reconciling and Stalled are read by kstatus (Flux, helm --wait, Argo CD): Reconciling and
// Stalled are present only while they are true.
const (
	// ConditionReady is true when the resource is as its spec says.
	ConditionReady = "Ready"
	// ConditionReconciling is true while the controller still works on it or waits for another object.
	ConditionReconciling = "Reconciling"
	// ConditionStalled is true when a person has to act.
	ConditionStalled = "Stalled"
	// ConditionSchemaApplied is true when the database holds what spec asks for.
	ConditionSchemaApplied = "SchemaApplied"
	// ConditionDrifted is true while something that Millrace had made in the database differs from spec and is not repaired yet.
	ConditionDrifted = "Drifted"
	// ConditionPaused is true while spec asks for no work.
	ConditionPaused = "Paused"
	// ConditionLapsed is true while a group receives nothing because it was given up: spec.lapse, or its place in the stream, was left
	// behind. millrace.reset_group ends it.
	ConditionLapsed = "Lapsed"
	// ConditionConsuming is false while messages wait in a group and nothing becomes of them: nobody receives, or a message fails again and again.
	ConditionConsuming = "Consuming"
	// ConditionBacklogHigh is true while at least spec.warningSize messages wait in a group, and until fewer than four fifths of that do. Absent without
	// spec.warningSize.
	ConditionBacklogHigh = "BacklogHigh"
	// ConditionHorizonHeld is true while one open transaction that published to a stream keeps everything that was published after it from
	// being read.
	ConditionHorizonHeld = "HorizonHeld"
	// ConditionLagKnown is true while the lag in status is a measurement, not a memory.
	ConditionLagKnown = "LagKnown"
	// ConditionAutoscalingActive is true while the autoscaler decides how many pods there are; its reason says by what. Absent without
	// spec.autoscaling.
	ConditionAutoscalingActive = "AutoscalingActive"
	// ConditionScalingLimited is true while more pods are asked for than a limit allows. Absent without spec.autoscaling.
	ConditionScalingLimited = "ScalingLimited"
)

// Reasons of Ready, and of Reconciling and Stalled, which repeat the reason of Ready. Event reasons are the same words.
const (
	// ReasonReady: as spec says.
	ReasonReady = "Ready"
	// ReasonProgressing: work is going on and nothing is wrong.
	ReasonProgressing = "Progressing"
	// ReasonSuspended: spec.suspend is true, and the controller leaves everything as it is.
	ReasonSuspended = "Suspended"
	// ReasonFailed: an error without a better name; the message holds it, and the controller tries again.
	ReasonFailed = "Failed"

	// ReasonSecretMissing: a Secret that spec names does not exist.
	ReasonSecretMissing = "SecretMissing"
	// ReasonSecretKeyMissing: the Secret exists and lacks the key.
	ReasonSecretKeyMissing = "SecretKeyMissing"
	// ReasonSecretInvalid: the value in the Secret is not a connection string.
	ReasonSecretInvalid = "SecretInvalid"
	// ReasonConfigMapMissing: a ConfigMap that spec names does not exist, or lacks the key.
	ReasonConfigMapMissing = "ConfigMapMissing"
	// ReasonDefaultDatabaseMissing: spec names no database and the installation has no default.
	ReasonDefaultDatabaseMissing = "DefaultDatabaseMissing"

	// ReasonDatabaseUnreachable: the server does not answer.
	ReasonDatabaseUnreachable = "DatabaseUnreachable"
	// ReasonDatabaseReadOnly: the server answers and is a standby or read-only.
	ReasonDatabaseReadOnly = "DatabaseReadOnly"
	// ReasonAuthenticationFailed: the server refuses the user or password.
	ReasonAuthenticationFailed = "AuthenticationFailed"
	// ReasonDatabaseNotFound: the server has no such database.
	ReasonDatabaseNotFound = "DatabaseNotFound"
	// ReasonPermissionDenied: the database user lacks a privilege.
	ReasonPermissionDenied = "PermissionDenied"
	// ReasonSchemaNewer: the database was migrated by a newer Millrace.
	ReasonSchemaNewer = "SchemaNewer"

	// ReasonConflict: another resource owns the object in the database.
	ReasonConflict = "Conflict"
	// ReasonAdoptionRefused: the object exists in the database without an owner, and adoptionPolicy is Never.
	ReasonAdoptionRefused = "AdoptionRefused"
	// ReasonPartitionsLowered: the database has more partitions than spec.
	ReasonPartitionsLowered = "PartitionsLowered"
	// ReasonChangeRefused: the database object cannot be changed to spec.
	ReasonChangeRefused = "ChangeRefused"
	// ReasonApprovalPending: changePolicy is Plan, and the plan in status waits for its approval.
	ReasonApprovalPending = "ApprovalPending"
	// ReasonApprovalOutdated: the same, and the annotation approves another plan than the one in status.
	ReasonApprovalOutdated = "ApprovalOutdated"
	// ReasonStreamMissing: the Stream that spec names does not exist.
	ReasonStreamMissing = "StreamMissing"
	// ReasonStreamNotReady: the Stream exists and is not in its database yet.
	ReasonStreamNotReady = "StreamNotReady"
	// ReasonConsumerGroupMissing: the ConsumerGroup that spec names does not exist.
	ReasonConsumerGroupMissing = "ConsumerGroupMissing"
	// ReasonConsumerGroupNotReady: the ConsumerGroup exists and is not in its database yet.
	ReasonConsumerGroupNotReady = "ConsumerGroupNotReady"
	// ReasonLapsed: the group has lapsed and receives nothing; the message says why and what to do. Also the reason of Lapsed.
	ReasonLapsed = "Lapsed"
	// ReasonProjectionFailed: a projection of a Stream cannot be as spec says: its function does not exist, or fails. The stream itself works.
	ReasonProjectionFailed = "ProjectionFailed"
	// ReasonRebuilding: documents of a projection are made from the beginning of the stream; the message says how far. What was there stays until then.
	ReasonRebuilding = "Rebuilding"
	// ReasonDeletionBlocked: the resource is being deleted and its database cannot be reached.
	ReasonDeletionBlocked = "DeletionBlocked"

	// ReasonInvalidConfiguration: source, codec, mapping or sink do not make a working processor.
	ReasonInvalidConfiguration = "InvalidConfiguration"
	// ReasonDatabaseSecretRefRequired: pods need a Secret in their own namespace, and spec names none.
	ReasonDatabaseSecretRefRequired = "DatabaseSecretRefRequired"
	// ReasonNameTaken: an object of the name that the controller needs exists and belongs to someone else.
	ReasonNameTaken = "NameTaken"
	// ReasonRollingOut: pods of the newest configuration are starting.
	ReasonRollingOut = "RollingOut"
	// ReasonPodsFailing: pods do not become ready; the message says what the last of them said.
	ReasonPodsFailing = "PodsFailing"
	// ReasonScaledToZero: no pod is wanted: spec.replicas is 0, or nothing waits for an autoscaled Processor.
	ReasonScaledToZero = "ScaledToZero"
)

// Reasons of the other conditions.
const (
	// ReasonApplied: SchemaApplied is true.
	ReasonApplied = "Applied"
	// ReasonInSync: Drifted is false, nothing differed at the last look.
	ReasonInSync = "InSync"
	// ReasonRepaired: Drifted is false, the last difference was repaired; the message says what it was.
	ReasonRepaired = "Repaired"
	// ReasonDriftFound: Drifted is true.
	ReasonDriftFound = "DriftFound"
	// ReasonActive: Paused, or Lapsed, is false.
	ReasonActive = "Active"
	// ReasonDeliveryPaused: the group exists and hands out nothing, because spec.paused is true.
	ReasonDeliveryPaused = "DeliveryPaused"
	// ReasonNobodyReceives: Consuming is false: messages wait, and for a minute nobody has received or settled one.
	ReasonNobodyReceives = "NobodyReceives"
	// ReasonMessageFails: Consuming is false: a message has been handed out again and again, and is not settled.
	ReasonMessageFails = "MessageFails"
	// ReasonAboveWarningSize: BacklogHigh is true.
	ReasonAboveWarningSize = "AboveWarningSize"
	// ReasonBelowWarningSize: BacklogHigh is false.
	ReasonBelowWarningSize = "BelowWarningSize"
	// ReasonOpenTransaction: HorizonHeld is true; the message names the transaction.
	ReasonOpenTransaction = "OpenTransaction"
	// ReasonMoving: HorizonHeld is false: what is committed can be read. Consuming is true: nothing waits, or what waits is worked on.
	ReasonMoving = "Moving"
	// ReasonMeasured: LagKnown is true.
	ReasonMeasured = "Measured"
	// ReasonNotMeasured: LagKnown is false, and no lag has been read yet.
	ReasonNotMeasured = "NotMeasured"
	// ReasonRedisSource: LagKnown is false, because the manager does not connect to Redis. The pods' metrics have the lag.
	ReasonRedisSource = "RedisSource"
)

// Reasons of AutoscalingActive. Suspended is one as well.
const (
	// ReasonBacklog: the number of messages that wait or are in flight decides.
	ReasonBacklog = "Backlog"
	// ReasonAge: the age of the oldest message decides.
	ReasonAge = "Age"
	// ReasonRate: the rate of publishing decides.
	ReasonRate = "Rate"
	// ReasonIdle: nothing asks for more than minReplicas, or the one pod that stays until the cooldown ends.
	ReasonIdle = "Idle"
	// ReasonStabilizing: fewer pods are enough, and not for the whole stabilizationWindow yet.
	ReasonStabilizing = "Stabilizing"
	// ReasonHeldByRollout: nothing is decided before the pods of the last change are there.
	ReasonHeldByRollout = "HeldByRollout"
	// ReasonGroupPaused: the group hands out nothing, so more pods would not help and fewer not matter.
	ReasonGroupPaused = "GroupPaused"
	// ReasonLagUnknown: AutoscalingActive is false: without figures the number of pods stays.
	ReasonLagUnknown = "LagUnknown"
	// ReasonNotReady: AutoscalingActive is false: the Processor cannot be brought to its spec, and Ready says why.
	ReasonNotReady = "NotReady"
)

// Reasons of ScalingLimited.
const (
	// ReasonNotLimited: there are as many pods as asked for, or will be.
	ReasonNotLimited = "NotLimited"
	// ReasonMaxReplicas: maxReplicas is the limit.
	ReasonMaxReplicas = "MaxReplicas"
	// ReasonPartitions: each partition of an Ordered group has one pod at a time, so more pods than partitions would have nothing to do.
	ReasonPartitions = "Partitions"
	// ReasonConnections: more pods might find no connection to the database.
	ReasonConnections = "Connections"
)

// Event reasons that are not reasons of a condition.
const (
	// EventAdopted: an object that was in the database already is now owned by this resource.
	EventAdopted = "Adopted"
	// EventDropped: the deletion policy removed the object from the database.
	EventDropped = "Dropped"
	// EventRetained: the resource is gone and its object stays in the database.
	EventRetained = "Retained"
	// EventAbandoned: the resource was let go by annotation and its object stays in the database, whatever its policy.
	EventAbandoned = "Abandoned"
	// EventDeadLetters: a group that had no dead letters has some.
	EventDeadLetters = "DeadLetters"
	// EventPlanApplied: a plan that was approved has been carried out.
	EventPlanApplied = "PlanApplied"
	// EventDriftRepaired: something was changed or dropped behind Millrace's back and is as spec says again.
	EventDriftRepaired = "DriftRepaired"
	// EventScaled: the autoscaler changed the number of pods; the note says from what to what, and why.
	EventScaled = "Scaled"
)
