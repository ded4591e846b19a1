package eventstore

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5/pgxpool"
)

// System is an event store, a log of frames, or both.
type System interface {
	Name() string
	// Cannot says why the system cannot do the work; nothing when it can.
	Cannot(work string) string
	// Open sets the system up in an empty database. engine.Unavailable, when this machine lacks something that the system needs.
	Open(ctx context.Context, place Place) (Store, error)
}

// Place is an empty database and how to reach it.
type Place struct {
	DSN string
	// Pool is for systems of this program. It has Connections, as the pools of other programs should.
	Pool        *pgxpool.Pool
	Connections int
}

// Store is a system that is set up. Those that do frames are FrameLogs too.
type Store interface {
	// Perform makes the calls of a task with the system's own client and says how long they took.
	Perform(ctx context.Context, task Task) (Outcome, error)
	// History is a statement that returns entity, version and number of every event, ordered by entity and version.
	History() string
	// Close ends what Open has started, and tells what went wrong in the background.
	Close() error
}

// Task is one kind of call, made many times by several clients. It can be written as JSON, for systems that are programs of their own.
type Task struct {
	Verb     Verb   `json:"verb"`
	Prefix   string `json:"prefix"` // the entities are <prefix>-0, <prefix>-1 …
	Entities int    `json:"entities"`
	Rounds   int    `json:"rounds"`  // calls for each entity; Contend: appends of each client
	Events   int    `json:"events"`  // in an append
	Clients  int    `json:"clients"` // which divide the entities among themselves; Contend: which share them
	First    int    `json:"first"`   // number of the first event
}

// Verb is what the calls of a task do.
type Verb string

// Verbs.
const (
	// Append appends to every entity, round after round, expecting the version that the round before has left.
	Append Verb = "append"
	// Contend appends to entities that all clients share. Who is refused reads what is new and tries again.
	Contend Verb = "contend"
	// Read reads the whole history of an entity.
	Read Verb = "read"
	// Aggregate adds up the amounts in the history of an entity.
	Aggregate Verb = "aggregate"
)

// Outcome is what became of a task.
type Outcome struct {
	Seconds float64 `json:"seconds"`
	Calls   int     `json:"calls"`
	Events  int     `json:"events"` // that reads returned
	Sum     int64   `json:"sum"`    // of all aggregates
	// Of Contend: calls that were refused, those of them after which nothing new was found, and the appends that were not.
	Refused   int        `json:"refused"`
	Unfounded int        `json:"unfounded"`
	Accepted  []accepted `json:"accepted"`
}

// accepted is an append of one event by Contend: entity, the version that it got, and its number.
type accepted [3]int64

// errConflict is a refused append: the entity has another version than expected.
var errConflict = errors.New("another version than expected")

// FrameLog is a system that appends frames to runs and lets readers follow them. Its methods are called by many goroutines at once.
type FrameLog interface {
	// AppendFrame makes a frame durable, in a transaction of its own.
	AppendFrame(ctx context.Context, run string, payload []byte) error
	// AppendLive is AppendFrame for a log that keeps about two seconds, at least liveFloor frames.
	AppendLive(ctx context.Context, run string, payload []byte) error
	// Merge appends a merge patch and returns the version of the summary that it has led to.
	Merge(ctx context.Context, run string, patch []byte) (version int64, err error)
	// Summary reads the rolling document.
	Summary(ctx context.Context, run string) (document []byte, version int64, err error)
	// Follow begins after the frames that the run has.
	Follow(ctx context.Context, run string) (Follower, error)
	// Frames counts the frames of a run that a reader gets.
	Frames(ctx context.Context, run string) (int, error)
}

// Follower waits for the frames of one run. It is used by one goroutine.
type Follower interface {
	// Next returns the payloads of the next frames, or waits until there are some or ctx ends.
	Next(ctx context.Context) ([][]byte, error)
	Close() error
}

// What a live log keeps: the frames of liveSeconds at the present rate, at least liveFloor, at most liveCeiling.
const (
	liveSeconds = 2
	liveFloor   = 64
	liveCeiling = 16_384
)
