package pgstream

import (
	"context"
	"time"
)

// Mode is how a group shares a stream among its members.
type Mode string

// Modes.
const (
	ModeOrdered Mode = "Ordered" // strict order per key; a partition has one owner at a time
	ModeShared  Mode = "Shared"  // any number of members, each message to one of them
)

// StartFrom is where a new group begins.
type StartFrom string

// Start places.
const (
	StartEarliest StartFrom = "Earliest"
	StartLatest   StartFrom = "Latest"
	StartPosition StartFrom = "Position"
	StartTime     StartFrom = "Time"
)

// FailurePolicy is what an Ordered group does with a message that is nacked.
type FailurePolicy string

// Failure policies.
const (
	FailureBlock FailurePolicy = "Block" // retry in place; later messages of the partition wait
	FailureSkip  FailurePolicy = "Skip"  // after MaxAttempts: dead letter, and go on
)

// GroupSpec is the desired state of one consumer group. Mode and Start never change after creation.
type GroupSpec struct {
	Stream         string
	Name           string // [a-z][a-z0-9_]{0,47}
	Mode           Mode
	StartFrom      StartFrom
	StartPosition  int64     // with StartPosition: first position to deliver
	StartTime      time.Time // with StartTime: first created_at to deliver
	AckWait        time.Duration
	MaxAttempts    int // deliveries before dead letter; 0: no limit
	BackoffInitial time.Duration
	BackoffMax     time.Duration
	FailurePolicy  FailurePolicy
	Paused         bool
	Owner          Owner
}

// GroupMember is one process in a group.
type GroupMember struct {
	Name       string
	Partitions []int32 // Ordered only
	ExpiresAt  time.Time
}

// GroupStats describes a group's progress. Its cost does not depend on the backlog.
type GroupStats struct {
	Stream, Group string
	Mode          Mode
	Lag           int64         // messages not yet claimed (an upper bound: rolled-back positions count)
	InFlight      int64         // claimed and unsettled
	Retrying      int64         // in the delivery table
	DeadLetters   int64         // in the dead-letter table
	OldestAge     time.Duration // age of the oldest unsettled message; 0 when there is none
	AckFloor      int64         // every position up to it is settled
	Members       []GroupMember
}

// PlanGroup compares spec with the database and writes nothing; ErrRefused when mode or start would change, ErrNotFound
// when the stream does not exist.
func PlanGroup(ctx context.Context, db DB, spec GroupSpec) ([]Step, error) { panic("todo") }

// ApplyGroup creates or updates the group. Idempotent.
func ApplyGroup(ctx context.Context, db DB, spec GroupSpec) error { panic("todo") }

// DropGroup removes the group with its claims, deliveries and dead letters. A group that does not exist is success.
func DropGroup(ctx context.Context, db DB, stream, group string, owner Owner) error { panic("todo") }

// ReleaseGroup gives up ownership and keeps everything else.
func ReleaseGroup(ctx context.Context, db DB, stream, group string, owner Owner) error { panic("todo") }

// Stats returns the statistics of every group in the database, in one query.
func Stats(ctx context.Context, db DB) ([]GroupStats, error) { panic("todo") }
