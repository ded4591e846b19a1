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

// spec is GroupSpec as millrace_engine.apply_group reads it.
func (g GroupSpec) spec() map[string]any {
	start := map[string]any{"from": orDefault(g.StartFrom, StartEarliest)}
	switch g.StartFrom {
	case StartPosition:
		start["position"] = g.StartPosition
	case StartTime:
		start["time"] = g.StartTime.UTC().Format(time.RFC3339Nano)
	}
	initial := orDefault(g.BackoffInitial, time.Second)
	m := map[string]any{
		"stream":             g.Stream,
		"name":               g.Name,
		"mode":               orDefault(g.Mode, ModeShared),
		"start":              start,
		"ack_wait_ms":        orDefault(g.AckWait, 30*time.Second).Milliseconds(),
		"max_attempts":       g.MaxAttempts,
		"backoff_initial_ms": initial.Milliseconds(),
		"backoff_max_ms":     max(orDefault(g.BackoffMax, 5*time.Minute), initial).Milliseconds(),
		"failure_policy":     orDefault(g.FailurePolicy, FailureBlock),
		"paused":             g.Paused,
	}
	if g.Owner != (Owner{}) {
		m["owner"] = g.Owner
	}
	return m
}

//go:embed queries/describe_group.sql
var describeGroupSQL string

// PlanGroup compares spec with the database and writes nothing. ErrRefused when mode or start would change, ErrOwned when
// another owner holds the group, ErrNotFound when the stream does not exist.
func PlanGroup(ctx context.Context, db DB, spec GroupSpec) ([]Step, error) {
	var streamExists, exists bool
	var has map[string]any
	var owner *Owner
	if err := db.QueryRow(ctx, describeGroupSQL, spec.Stream, spec.Name).Scan(&streamExists, &exists, &has, &owner); err != nil {
		return nil, fmt.Errorf("describe group %q: %w", spec.Name, translate(err))
	}
	if !streamExists {
		return nil, fmt.Errorf("stream %q: %w", spec.Stream, ErrNotFound)
	}
	if !exists {
		return []Step{{Summary: fmt.Sprintf("create %s consumer group %q of stream %q", orDefault(spec.Mode, ModeShared), spec.Name, spec.Stream),
			SQL: "select millrace_engine.apply_group(…)"}}, nil
	}
	if owner != nil {
		if err := ownedBy(*owner, spec.Owner, "consumer group "+strconv.Quote(spec.Name)); err != nil {
			return nil, err
		}
	}
	want, err := asJSON(spec.spec())
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"mode", "start"} {
		if !reflect.DeepEqual(has[name], want[name]) {
			return nil, fmt.Errorf("%w: the %s of consumer group %q is %v and cannot become %v. Create another group with that %s",
				ErrRefused, name, spec.Name, has[name], want[name], name)
		}
	}
	var steps []Step
	if spec.Owner != (Owner{}) && owner == nil {
		steps = append(steps, Step{Summary: "become the owner", SQL: "select millrace_engine.apply_group(…)"})
	}
	for _, name := range slices.Sorted(maps.Keys(has)) {
		if !reflect.DeepEqual(has[name], want[name]) {
			steps = append(steps, Step{Summary: fmt.Sprintf("change %s from %v to %v", strings.ReplaceAll(name, "_", " "), has[name], want[name]),
				SQL: "select millrace_engine.apply_group(…)"})
		}
	}
	return steps, nil
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
func DropGroup(ctx context.Context, db DB, stream, group string, owner Owner) error {
	var streamExists, exists bool
	var has map[string]any
	var holder *Owner
	if err := db.QueryRow(ctx, describeGroupSQL, stream, group).Scan(&streamExists, &exists, &has, &holder); err != nil {
		return fmt.Errorf("drop group %q: %w", group, translate(err))
	}
	if !exists {
		return nil
	}
	if holder != nil {
		if err := ownedBy(*holder, owner, "consumer group "+strconv.Quote(group)); err != nil {
			return err
		}
	}
	if _, err := db.Exec(ctx, "select millrace_engine.drop_group($1, $2)", stream, group); err != nil {
		return fmt.Errorf("drop group %q: %w", group, translate(err))
	}
	return nil
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
