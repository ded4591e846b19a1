package pgstream

import (
	"context"
	"errors"
	"time"
)

// PayloadType is the column type of a stream's payload. It never changes after creation.
type PayloadType string

// Payload types.
const (
	PayloadJSON  PayloadType = "JSON"
	PayloadBytes PayloadType = "Bytes"
)

// RetentionPolicy says when a message may be removed, in NATS JetStream's terms.
type RetentionPolicy string

// Retention policies.
const (
	RetentionLimits    RetentionPolicy = "Limits"
	RetentionInterest  RetentionPolicy = "Interest"
	RetentionWorkQueue RetentionPolicy = "WorkQueue"
)

// Retention limits what a stream keeps. A zero limit means no limit.
type Retention struct {
	Policy      RetentionPolicy
	MaxAge      time.Duration
	MaxBytes    int64
	MaxMessages int64
}

// Owner identifies the Kubernetes resource that a stream or group belongs to. The zero Owner means nobody.
type Owner struct {
	Cluster   string `json:"cluster,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
}

// StreamSpec is the desired state of one stream.
type StreamSpec struct {
	Name            string // [a-z][a-z0-9_]{0,47}; also the table millrace.<name>
	Partitions      int    // only grows; default 8
	PayloadType     PayloadType
	Segments        int // 2..16, default 4; only grows
	Retention       Retention
	DedupeWindow    time.Duration
	MaxMessageBytes int // default 1 MiB
	Owner           Owner
}

// StreamInfo is what the database says about one stream.
type StreamInfo struct {
	Spec         StreamSpec
	ID           int32
	LastPosition int64 // last allocated
	Horizon      int64 // last position that is safe to read
	// HorizonHolder is the backend pid whose open transaction holds the horizon back, 0 if none.
	HorizonHolder int32
	FirstPosition int64 // lowest position still readable
	Bytes         int64
}

// Step is one change that a plan would make.
type Step struct {
	Summary string // "raise partitions from 4 to 8"
	SQL     string
}

// Plan is the difference between a spec and the database, as data. An empty plan means nothing to do.
type Plan struct {
	Spec  StreamSpec
	Steps []Step
	// Drift is true when a step repairs something that this engine had made and someone else changed or dropped.
	Drift bool
}

var (
	// ErrNotFound means that the stream or group does not exist.
	ErrNotFound = errors.New("not found")
	// ErrOwned means that another owner holds the stream or group.
	ErrOwned = errors.New("owned by another resource")
	// ErrRefused means that the change is not possible, and the message says what to do instead.
	ErrRefused = errors.New("refused")
	// ErrFenced means that the caller's claim has ended: it expired and was taken over, or was settled already.
	ErrFenced = errors.New("fenced")
	// ErrNotEmpty means that a drop with onlyIfEmpty found messages.
	ErrNotEmpty = errors.New("not empty")
)

// PlanStream compares spec with the database and writes nothing. It returns ErrRefused for what can never be done
// (partitions lowered, payload type changed) and ErrOwned when another owner holds the name.
func PlanStream(ctx context.Context, db DB, spec StreamSpec) (Plan, error) { panic("todo") }

// ApplyStream runs a plan. It is idempotent and safe to run from several processes at once.
func ApplyStream(ctx context.Context, db DB, plan Plan) error { panic("todo") }

// DescribeStream reads one stream. ErrNotFound when there is none.
func DescribeStream(ctx context.Context, db DB, name string) (StreamInfo, error) { panic("todo") }

// DropStream removes the stream, its groups and its messages. owner must match (ErrOwned otherwise); with onlyIfEmpty it
// returns ErrNotEmpty instead of losing messages. A stream that does not exist is success.
func DropStream(ctx context.Context, db DB, name string, owner Owner, onlyIfEmpty bool) error {
	panic("todo")
}

// ReleaseStream gives up ownership and keeps everything else, so that another resource can adopt the stream.
func ReleaseStream(ctx context.Context, db DB, name string, owner Owner) error { panic("todo") }
