package pgstream

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

//go:embed queries/describe_stream.sql
var describeStreamSQL string

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
	MaxAge      time.Duration // in seconds
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

// NoDedupe as StreamSpec.DedupeWindow: publishing with a dedupe key is refused.
const NoDedupe time.Duration = -1

// StreamSpec is the desired state of one stream. What only grows or never changes, when zero, stays as it is or takes its default.
type StreamSpec struct {
	Name            string      // [a-z][a-z0-9_]{0,47}; also the table millrace.<name>
	Partitions      int         // only grows; default 8
	PayloadType     PayloadType // never changes; default PayloadJSON
	Segments        int         // 2..16, default 4; only grows
	Retention       Retention
	MaxMessageBytes int           // default 1 MiB
	DedupeWindow    time.Duration // how long a dedupe key is remembered, in seconds; default 2 minutes; NoDedupe: not at all
	Priorities      int           // 1..8, default 1; only grows. Limits of Retention hold for each priority
	Versions        bool          // numbers the messages of each key, for Append; never taken back
	Frames          Frames        // for AppendFrame; zero: no frames; never taken back
	// Tenants that have a table of their own. More can be added by millrace.add_tenant, and none is ever dropped for not being here.
	Tenants []string
	// Projections that the stream's resource declares; those that it does not declare any more are dropped.
	Projections []ProjectionSpec
	Owner       Owner
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
	Bytes         int64 // of every priority, with indexes
}

// Step is one change that a plan would make. Steps with the same SQL are made by one call.
type Step struct {
	Summary string // "change partitions from 4 to 8"
	SQL     string
}

// call is the SQL that calls a function of the engine with a spec, as a person would write it.
func call(function string, spec map[string]any) string {
	b, err := json.Marshal(spec) // with sorted keys, so that equal specs have equal calls
	if err != nil {
		return "select millrace_engine." + function + "(…)" // a filter of the caller's that is no JSON; applying it says so
	}
	return "select millrace_engine." + function + "('" + strings.ReplaceAll(string(b), "'", "''") + "')"
}

// Plan is the difference between a spec and the database, as data. An empty plan means nothing to do.
type Plan struct {
	Spec  StreamSpec
	Steps []Step
	// Drift is true when a step repairs something that this engine had made and someone else changed or dropped.
	Drift bool
	// Projections is how many of the steps, the last ones, are changes of projections.
	Projections int
}

// spec is StreamSpec as millrace_engine.apply_stream reads it, which keeps what is missing.
func (s StreamSpec) spec() map[string]any {
	m := map[string]any{
		"name":                  s.Name,
		"retention_policy":      orDefault(s.Retention.Policy, RetentionLimits),
		"max_age_seconds":       wholeSeconds(s.Retention.MaxAge),
		"max_bytes":             s.Retention.MaxBytes,
		"max_messages":          s.Retention.MaxMessages,
		"max_message_bytes":     orDefault(s.MaxMessageBytes, 1<<20),
		"dedupe_window_seconds": wholeSeconds(max(orDefault(s.DedupeWindow, 2*time.Minute), 0)),
	}
	put(m, "partitions", s.Partitions)
	put(m, "payload_type", s.PayloadType)
	put(m, "segments", s.Segments)
	put(m, "priorities", s.Priorities)
	put(m, "versions", s.Versions)
	put(m, "frames", s.Frames.settings())
	put(m, "owner", s.Owner)
	return m
}

// wholeSeconds rounds up, because zero would mean without a limit, or never.
func wholeSeconds(d time.Duration) int64 { return int64(math.Ceil(d.Seconds())) }

// put sets m[name] unless v is zero.
func put[T comparable](m map[string]any, name string, v T) {
	var zero T
	if v != zero {
		m[name] = v
	}
}

func orDefault[T comparable](v, d T) T {
	var zero T
	if v == zero {
		return d
	}
	return v
}

// PlanStream compares spec with the database and writes nothing. It returns ErrRefused for what can never be done (partitions or priorities
// lowered, payload type changed) and ErrOwned when another owner holds the name. The repairs of a stream include those of its priorities. Projections that cannot be made yet have
// no step: PlanProjections says why.
func PlanStream(ctx context.Context, db DB, spec StreamSpec) (Plan, error) {
	plan := Plan{Spec: spec}
	info, err := StreamSettings(ctx, db, spec.Name)
	if errors.Is(err, ErrNotFound) {
		return NewStreamPlan(spec), nil
	}
	if err != nil {
		return plan, err
	}
	if err := ownedBy(info.Spec.Owner, spec.Owner, "stream "+strconv.Quote(spec.Name)); err != nil {
		return plan, err
	}
	if err := refuse(info.Spec, spec); err != nil {
		return plan, err
	}
	plan.Steps = changes(info.Spec, spec)

	rows, err := db.Query(ctx, "select summary, statement from millrace_engine.stream_repairs($1)", info.ID)
	if err != nil {
		return plan, fmt.Errorf("inspect stream %q: %w", spec.Name, translate(err))
	}
	repairs, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (Step, error) {
		var s Step
		err := row.Scan(&s.Summary, &s.SQL)
		return s, err
	})
	if err != nil {
		return plan, fmt.Errorf("inspect stream %q: %w", spec.Name, translate(err))
	}
	plan.Drift = len(repairs) > 0
	plan.Steps = append(plan.Steps, repairs...)
	for _, tenant := range spec.Tenants {
		var there bool
		if err := db.QueryRow(ctx, "select exists (select from millrace_engine.tenant t where t.stream_id = $1 and t.name = $2)", info.ID, tenant).Scan(&there); err != nil {
			return plan, fmt.Errorf("inspect the tenants of stream %q: %w", spec.Name, translate(err))
		}
		if !there {
			plan.Steps = append(plan.Steps, Step{Summary: "add tenant " + tenant, SQL: fmt.Sprintf("select millrace.add_tenant('%s', '%s')", spec.Name, tenant)})
		}
	}
	projections, _, err := PlanProjections(ctx, db, spec.Name, spec.Projections)
	if err != nil {
		return plan, err
	}
	plan.Projections = len(projections)
	plan.Steps = append(plan.Steps, projections...)
	return plan, nil
}

// NewStreamPlan is the plan for a stream that does not exist.
func NewStreamPlan(spec StreamSpec) Plan {
	return Plan{Spec: spec, Steps: []Step{{
		Summary: fmt.Sprintf("create stream %q with %d partitions and %d segments", spec.Name, orDefault(spec.Partitions, 8), orDefault(spec.Segments, 4)),
		SQL:     CallApplyStream(spec),
	}}}
}

// CallApplyStream is the SQL by which ApplyStream brings a stream to spec, for a person.
func CallApplyStream(spec StreamSpec) string { return call("apply_stream", spec.spec()) }

// refuse names what can never be done to an existing stream.
func refuse(has, want StreamSpec) error {
	switch {
	case want.Partitions != 0 && want.Partitions < has.Partitions:
		return fmt.Errorf("%w: stream %q has %d partitions and cannot go down to %d. Keep %d or more; for fewer, create another stream and move its consumers",
			ErrRefused, has.Name, has.Partitions, want.Partitions, has.Partitions)
	case want.PayloadType != "" && want.PayloadType != has.PayloadType:
		return fmt.Errorf("%w: the payload type of stream %q is %s and cannot become %s. Create another stream with that payload type",
			ErrRefused, has.Name, has.PayloadType, want.PayloadType)
	case want.Segments != 0 && want.Segments < has.Segments:
		return fmt.Errorf("%w: stream %q has %d segments and cannot go down to %d. Keep %d or more",
			ErrRefused, has.Name, has.Segments, want.Segments, has.Segments)
	case want.Priorities != 0 && want.Priorities < has.Priorities:
		return fmt.Errorf("%w: stream %q has %d priorities and cannot go down to %d. Keep %d or more: messages may wait in each of them",
			ErrRefused, has.Name, has.Priorities, want.Priorities, has.Priorities)
	case want.Frames != (Frames{}) && (has.Versions || has.Priorities > 1):
		return fmt.Errorf("%w: stream %q has versions or %d priorities, and frames need none and one. Create another stream for frames",
			ErrRefused, has.Name, has.Priorities)
	case want.Versions && has.Frames != (Frames{}):
		return fmt.Errorf("%w: stream %q has frames, and cannot have versions. Create another stream with versions", ErrRefused, has.Name)
	case want.Versions && (has.PayloadType != PayloadJSON || has.Priorities > 1):
		return fmt.Errorf("%w: stream %q has payload type %s and %d priorities, and versions need JSON and one. Create another stream with versions",
			ErrRefused, has.Name, has.PayloadType, has.Priorities)
	}
	return nil
}

// changes lists the settings that differ.
func changes(has, want StreamSpec) []Step {
	old, wanted := has.spec(), want.spec()
	sql := CallApplyStream(want)
	var steps []Step
	for _, name := range slices.Sorted(maps.Keys(wanted)) {
		if name == "owner" {
			if has.Owner != want.Owner {
				steps = append(steps, Step{Summary: "become the owner", SQL: sql})
			}
			continue
		}
		if old[name] != wanted[name] {
			steps = append(steps, Step{
				Summary: fmt.Sprintf("change %s from %v to %v", strings.ReplaceAll(name, "_", " "), old[name], wanted[name]),
				SQL:     sql,
			})
		}
	}
	return steps
}

// ownedBy checks that what is owned by has may be changed by want. Nobody's things may be changed by anybody.
func ownedBy(has, want Owner, what string) error {
	if has == (Owner{}) || has == want {
		return nil
	}
	return fmt.Errorf("%w: %s belongs to %s/%s of cluster %s", ErrOwned, what, has.Namespace, has.Name, has.Cluster)
}

// ApplyStream runs a plan. It is idempotent and safe to run from several processes at once.
func ApplyStream(ctx context.Context, db DB, plan Plan) error {
	// The owner is checked again by PlanStream inside the statement's own transaction only if the caller passes one; two managers that plan
	// at once are told apart here.
	var id int32
	err := db.QueryRow(ctx, `select millrace_engine.apply_stream($1) where not exists (
		select from millrace_engine.stream s where s.name = $2 and s.owner is not null and s.owner <> $3)`,
		plan.Spec.spec(), plan.Spec.Name, plan.Spec.Owner).Scan(&id)
	if errors.Is(err, pgx.ErrNoRows) {
		return fmt.Errorf("apply stream %q: %w", plan.Spec.Name, ErrOwned)
	}
	if err != nil {
		return fmt.Errorf("apply stream %q: %w", plan.Spec.Name, translate(err))
	}
	for _, tenant := range plan.Spec.Tenants {
		if _, err := db.Exec(ctx, "select millrace.add_tenant($1, $2)", plan.Spec.Name, tenant); err != nil {
			return fmt.Errorf("add tenant %q to stream %q: %w", tenant, plan.Spec.Name, translate(err))
		}
	}
	return ApplyProjections(ctx, db, plan.Spec.Name, plan.Steps[len(plan.Steps)-plan.Projections:])
}

// DescribeStream reads one stream; ErrNotFound when there is none. Positions and the horizon are those of priority 0, Bytes is the sum of all
// priorities.
func DescribeStream(ctx context.Context, db DB, name string) (StreamInfo, error) {
	return describeStream(ctx, db, name, true)
}

// StreamSettings is DescribeStream without what moves: positions, the horizon and sizes are zero. It costs a fraction.
func StreamSettings(ctx context.Context, db DB, name string) (StreamInfo, error) {
	return describeStream(ctx, db, name, false)
}

func describeStream(ctx context.Context, db DB, name string, figures bool) (StreamInfo, error) {
	info := StreamInfo{Spec: StreamSpec{Name: name}}
	var owner *Owner
	var frames frameSettings
	var age, window int64
	err := db.QueryRow(ctx, describeStreamSQL, name, figures).Scan(&info.ID, &info.Spec.Partitions, &info.Spec.PayloadType, &info.Spec.Segments,
		&info.Spec.Retention.Policy, &age, &info.Spec.Retention.MaxBytes, &info.Spec.Retention.MaxMessages,
		&info.Spec.MaxMessageBytes, &window, &info.Spec.Priorities, &info.Spec.Versions, &frames, &owner, &info.FirstPosition, &info.LastPosition, &info.Horizon, &info.HorizonHolder, &info.Bytes)
	if errors.Is(err, pgx.ErrNoRows) {
		return info, fmt.Errorf("stream %q: %w", name, ErrNotFound)
	}
	if err != nil {
		return info, fmt.Errorf("describe stream %q: %w", name, translate(err))
	}
	if owner != nil {
		info.Spec.Owner = *owner
	}
	info.Spec.Frames = frames.frames()
	info.Spec.Retention.MaxAge = time.Duration(age) * time.Second
	if info.Spec.DedupeWindow = time.Duration(window) * time.Second; window == 0 {
		info.Spec.DedupeWindow = NoDedupe
	}
	return info, nil
}

// DropStream removes the stream, its groups and its messages. owner must match (ErrOwned otherwise); with onlyIfEmpty it returns ErrNotEmpty
// instead of losing messages. A stream that does not exist is success.
func DropStream(ctx context.Context, db DB, name string, owner Owner, onlyIfEmpty bool) error {
	info, err := DescribeStream(ctx, db, name)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := ownedBy(info.Spec.Owner, owner, "stream "+strconv.Quote(name)); err != nil {
		return err
	}
	if _, err := db.Exec(ctx, "select millrace_engine.drop_stream($1, $2)", name, onlyIfEmpty); err != nil {
		var pg *pgconn.PgError
		if errors.As(err, &pg) && pg.Code == codeNotEmpty {
			return fmt.Errorf("drop stream %q: %w: %s", name, ErrNotEmpty, pg.Message)
		}
		return fmt.Errorf("drop stream %q: %w", name, translate(err))
	}
	return nil
}

// ReleaseStream gives up ownership and keeps everything else, so that another resource can adopt the stream.
func ReleaseStream(ctx context.Context, db DB, name string, owner Owner) error {
	_, err := db.Exec(ctx, "update millrace_engine.stream set owner = null where name = $1 and owner = $2", name, owner)
	if err != nil {
		return fmt.Errorf("release stream %q: %w", name, translate(err))
	}
	return nil
}
