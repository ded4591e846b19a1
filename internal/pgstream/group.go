package pgstream

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
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
	FailurePark  FailurePolicy = "Park"  // the message and those of its key wait, in order; the others go on
)

// QueuePolicy is how many messages of one key may be in which state, in a Shared group. Messages without a key count as one key.
type QueuePolicy string

// Queue policies.
const (
	QueueStandard  QueuePolicy = "Standard"  // as many as there are
	QueueShort     QueuePolicy = "Short"     // at most one is queued; one that comes while another is queued is passed over
	QueueSingleton QueuePolicy = "Singleton" // at most one is active
	QueueStately   QueuePolicy = "Stately"   // at most one is queued, one waits for another delivery, one is active
)

// Filter lets messages pass that have everything it asks for. The zero Filter lets every message pass.
type Filter struct {
	// Headers that a message has, each with that string, number, boolean or null, or with one of a list of them.
	Headers        map[string]any `json:"headers,omitempty"`
	WithoutHeaders []string       `json:"without_headers,omitempty"` // the message has none of these headers
	Keys           []string       `json:"keys,omitempty"`            // the message's key is one of these, at most 1,000
	KeyPrefix      string         `json:"key_prefix,omitempty"`      // the message's key begins with it
	// Unrouted lets only messages pass that no other group's filter of the stream takes. It cannot be set or unset later.
	Unrouted bool `json:"unrouted,omitempty"`
}

func (f Filter) isZero() bool {
	return len(f.Headers) == 0 && len(f.WithoutHeaders) == 0 && len(f.Keys) == 0 && f.KeyPrefix == "" && !f.Unrouted
}

// GroupSpec is the desired state of one consumer group. Mode and Start never change after creation. In a stream with priorities the group begins in each
// priority where Start says; with StartPosition, which means a position of priority 0, at the earliest message of the others.
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
	QueuePolicy    QueuePolicy // cannot change
	Paused         bool
	// Filter holds for what is handed out from the log after it was set: retries, parked messages and dead letters stay. Messages that a changed filter
	// lets pass, and that the group has gone past already, are not delivered.
	Filter Filter
	// The group lapses, and keeps no message from being removed any more, when for LapseAfter messages have waited and nobody has worked, or when its
	// lag is above LapseLag. Zero: never. ResetGroup ends it.
	LapseAfter time.Duration // in seconds
	LapseLag   int64
	Owner      Owner
}

// spec is GroupSpec as millrace_engine.apply_group reads it.
func (g GroupSpec) spec() map[string]any {
	start := map[string]any{"from": orDefault(g.StartFrom, StartEarliest)}
	switch g.StartFrom {
	case StartPosition:
		start["position"] = g.StartPosition
	case StartTime:
		start["time"] = g.StartTime.UTC().Truncate(time.Microsecond).Format(time.RFC3339Nano)
	}
	initial := orDefault(g.BackoffInitial, time.Second)
	m := map[string]any{
		"stream":              g.Stream,
		"name":                g.Name,
		"mode":                orDefault(g.Mode, ModeShared),
		"start":               start,
		"ack_wait_ms":         orDefault(g.AckWait, 30*time.Second).Milliseconds(),
		"max_attempts":        g.MaxAttempts,
		"backoff_initial_ms":  initial.Milliseconds(),
		"backoff_max_ms":      max(orDefault(g.BackoffMax, 5*time.Minute), initial).Milliseconds(),
		"failure_policy":      orDefault(g.FailurePolicy, FailureBlock),
		"queue_policy":        orDefault(g.QueuePolicy, QueueStandard),
		"paused":              g.Paused,
		"filter":              nil,
		"lapse_after_seconds": wholeSeconds(g.LapseAfter),
		"lapse_lag":           g.LapseLag,
	}
	if !g.Filter.isZero() {
		m["filter"] = g.Filter
	}
	put(m, "owner", g.Owner)
	return m
}

// group is what the database says about one group.
type group struct {
	streamExists, exists bool
	has                  map[string]any // with the keys of apply_group
	owner                Owner
	lapsedAt             time.Time
	lapseReason          string
}

func describeGroup(ctx context.Context, db DB, stream, name string) (group, error) {
	var g group
	var owner *Owner
	var lapsedAt *time.Time
	var reason *string
	if err := db.QueryRow(ctx, describeGroupSQL, stream, name).Scan(&g.streamExists, &g.exists, &g.has, &owner, &lapsedAt, &reason); err != nil {
		return g, fmt.Errorf("describe group %q: %w", name, translate(err))
	}
	if owner != nil {
		g.owner = *owner
	}
	if lapsedAt != nil {
		g.lapsedAt = *lapsedAt
	}
	if reason != nil {
		g.lapseReason = *reason
	}
	return g, nil
}

// GroupInfo is what the database says about one group.
type GroupInfo struct {
	Spec        GroupSpec
	LapsedAt    time.Time // zero while the group has not lapsed
	LapseReason string
}

// DescribeGroup reads one group. ErrNotFound when there is none, or no such stream.
func DescribeGroup(ctx context.Context, db DB, stream, name string) (GroupInfo, error) {
	g, err := describeGroup(ctx, db, stream, name)
	if err != nil {
		return GroupInfo{}, err
	}
	if !g.exists {
		return GroupInfo{}, fmt.Errorf("consumer group %q of stream %q: %w", name, stream, ErrNotFound)
	}
	var has struct {
		Mode  Mode
		Start struct {
			From     StartFrom
			Position int64
			Time     time.Time
		}
		AckWaitMS         int64         `json:"ack_wait_ms"`
		MaxAttempts       int           `json:"max_attempts"`
		BackoffInitialMS  int64         `json:"backoff_initial_ms"`
		BackoffMaxMS      int64         `json:"backoff_max_ms"`
		FailurePolicy     FailurePolicy `json:"failure_policy"`
		QueuePolicy       QueuePolicy   `json:"queue_policy"`
		Paused            bool
		Filter            Filter
		LapseAfterSeconds int64 `json:"lapse_after_seconds"`
		LapseLag          int64 `json:"lapse_lag"`
	}
	b, err := json.Marshal(g.has)
	if err == nil {
		err = json.Unmarshal(b, &has)
	}
	if err != nil {
		return GroupInfo{}, fmt.Errorf("describe group %q: %w", name, err)
	}
	return GroupInfo{LapsedAt: g.lapsedAt, LapseReason: g.lapseReason, Spec: GroupSpec{
		Stream: stream, Name: name, Mode: has.Mode, StartFrom: has.Start.From, StartPosition: has.Start.Position, StartTime: has.Start.Time,
		AckWait: time.Duration(has.AckWaitMS) * time.Millisecond, MaxAttempts: has.MaxAttempts,
		BackoffInitial: time.Duration(has.BackoffInitialMS) * time.Millisecond, BackoffMax: time.Duration(has.BackoffMaxMS) * time.Millisecond,
		FailurePolicy: has.FailurePolicy, QueuePolicy: has.QueuePolicy, Paused: has.Paused, Filter: has.Filter,
		LapseAfter: time.Duration(has.LapseAfterSeconds) * time.Second, LapseLag: has.LapseLag, Owner: g.owner,
	}}, nil
}

//go:embed queries/describe_group.sql
var describeGroupSQL string

// CallApplyGroup is the SQL by which ApplyGroup brings a group to spec, for a person.
func CallApplyGroup(spec GroupSpec) string { return call("apply_group", spec.spec()) }

// PlanGroup compares spec with the database and writes nothing. ErrRefused when mode or start would change, ErrOwned when
// another owner holds the group, ErrNotFound when the stream does not exist.
func PlanGroup(ctx context.Context, db DB, spec GroupSpec) ([]Step, error) {
	g, err := describeGroup(ctx, db, spec.Stream, spec.Name)
	if err != nil {
		return nil, err
	}
	if !g.streamExists {
		return nil, fmt.Errorf("stream %q: %w", spec.Stream, ErrNotFound)
	}
	sql := CallApplyGroup(spec)
	if !g.exists {
		return []Step{{Summary: fmt.Sprintf("create %s consumer group %q of stream %q", orDefault(spec.Mode, ModeShared), spec.Name, spec.Stream),
			SQL: sql}}, nil
	}
	if err := ownedBy(g.owner, spec.Owner, "consumer group "+strconv.Quote(spec.Name)); err != nil {
		return nil, err
	}
	has := g.has
	want, err := asJSON(spec.spec())
	if err != nil {
		return nil, err
	}
	if samePlace(has["start"], want["start"]) {
		want["start"] = has["start"]
	}
	for _, name := range []string{"mode", "start", "queue_policy"} {
		if !reflect.DeepEqual(has[name], want[name]) {
			what := strings.ReplaceAll(name, "_", " ")
			return nil, fmt.Errorf("%w: the %s of consumer group %q is %v and cannot become %v. Create another group with that %s",
				ErrRefused, what, spec.Name, has[name], want[name], what)
		}
	}
	var steps []Step
	if spec.Owner != (Owner{}) && g.owner == (Owner{}) {
		steps = append(steps, Step{Summary: "become the owner", SQL: sql})
	}
	for _, name := range slices.Sorted(maps.Keys(has)) {
		if !reflect.DeepEqual(has[name], want[name]) {
			steps = append(steps, Step{Summary: fmt.Sprintf("change %s from %v to %v", strings.ReplaceAll(name, "_", " "), has[name], want[name]),
				SQL: sql})
		}
	}
	return steps, nil
}

// samePlace says whether two starts are the same time, however it is written.
func samePlace(a, b any) bool {
	var times [2]time.Time
	for i, start := range []any{a, b} {
		m, _ := start.(map[string]any)
		text, _ := m["time"].(string)
		t, err := time.Parse(time.RFC3339Nano, text)
		if err != nil || m["from"] != string(StartTime) {
			return false
		}
		times[i] = t
	}
	return times[0].Equal(times[1])
}

// asJSON gives m the types that it would have after a journey through JSON, so that it compares with what the database says.
func asJSON(m map[string]any) (map[string]any, error) {
	b, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	var out map[string]any
	return out, json.Unmarshal(b, &out)
}

// ApplyGroup creates or updates the group. Idempotent. Errors as PlanGroup.
func ApplyGroup(ctx context.Context, db DB, spec GroupSpec) error {
	var id int32
	err := db.QueryRow(ctx, `select millrace_engine.apply_group($1) where not exists (
		select from millrace_engine.consumer_group g join millrace_engine.stream s on s.id = g.stream_id
		where s.name = $2 and g.name = $3 and g.owner is not null and g.owner <> $4)`,
		spec.spec(), spec.Stream, spec.Name, spec.Owner).Scan(&id)
	if errors.Is(err, pgx.ErrNoRows) {
		return fmt.Errorf("apply group %q: %w", spec.Name, ErrOwned)
	}
	if err != nil {
		return fmt.Errorf("apply group %q: %w", spec.Name, translate(err))
	}
	return nil
}

// DropGroup removes the group with its claims, deliveries and dead letters. owner must match (ErrOwned otherwise). A group that
// does not exist is success.
func DropGroup(ctx context.Context, db DB, stream, name string, owner Owner) error {
	g, err := describeGroup(ctx, db, stream, name)
	if err != nil || !g.exists {
		return err
	}
	if err := ownedBy(g.owner, owner, "consumer group "+strconv.Quote(name)); err != nil {
		return err
	}
	if _, err := db.Exec(ctx, "select millrace_engine.drop_group($1, $2)", stream, name); err != nil {
		return fmt.Errorf("drop group %q: %w", name, translate(err))
	}
	return nil
}

// Place is where a group goes on after a reset.
type Place struct {
	From     StartFrom // default StartEarliest
	Position int64     // with StartPosition: first position to deliver
	Time     time.Time // with StartTime: first created_at to deliver
}

// ResetGroup moves a group to another place of its stream, back to deliver again or forward to pass over, and returns how many single deliveries it
// removed: retries, and parked messages. From then on the group gets what a new group with that start would get. Whoever holds a claim gets
// ErrFenced for whatever it does with it, except what another transaction is settling just then, which is waited for. Dead letters stay. A lapsed
// group lives again. It is an operation and not a setting, so the owner of the group does not matter.
//
// ErrNotFound when there is no such stream or group, ErrRefused when there is no such place, ErrOutOfRange when retention has removed it. An error
// that IsTransient when somebody keeps a claim locked for ten seconds.
func ResetGroup(ctx context.Context, db DB, stream, name string, to Place) (removed int64, err error) {
	var position *int64
	var at *time.Time
	switch to.From {
	case StartPosition:
		position = &to.Position
	case StartTime:
		at = &to.Time
	}
	err = db.QueryRow(ctx, "select millrace.reset_group($1, $2, $3, $4, $5)", stream, name, orDefault(to.From, StartEarliest), position, at).Scan(&removed)
	if err != nil {
		return 0, fmt.Errorf("reset group %q: %w", name, translate(err))
	}
	return removed, nil
}

// ReleaseGroup gives up ownership and keeps everything else.
func ReleaseGroup(ctx context.Context, db DB, stream, group string, owner Owner) error {
	_, err := db.Exec(ctx, `update millrace_engine.consumer_group g set owner = null from millrace_engine.stream s
		where s.id = g.stream_id and s.name = $1 and g.name = $2 and g.owner = $3`, stream, group, owner)
	if err != nil {
		return fmt.Errorf("release group %q: %w", group, translate(err))
	}
	return nil
}
