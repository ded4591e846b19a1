package pgstream

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// GroupMember is one process in a group.
type GroupMember struct {
	Name       string    `json:"name"`
	Partitions []int32   `json:"partitions"` // Ordered only
	ExpiresAt  time.Time `json:"expires_at"`
}

// GroupStats describes a group's progress. Its cost does not depend on the backlog.
type GroupStats struct {
	Stream, Group string
	Mode          Mode
	Lag           int64         // messages that wait to be claimed, or to be claimed again (an upper bound: rolled-back positions count)
	InFlight      int64         // claimed and unsettled; a claim that was given back is Lag
	Retrying      int64         // in the delivery table
	DeadLetters   int64         // in the dead-letter table
	OldestAge     time.Duration // age of the oldest unsettled message; 0 when there is none
	AckFloor      int64         // every position up to it is settled
	Members       []GroupMember
	Paused        bool
	Lapsed        string // why the group does not receive any more; empty while it does
	// Queued is how many messages wait, for their first delivery or another one, and Active how many members hold. Of a group with a filter Queued counts those that
	// the filter takes: it is counted for the next 2,000 positions, and estimated beyond them.
	Queued, Active int64
}

// StreamStats describes what a stream holds and how it fares. The priorities of a stream are counted together; positions are those of the
// lowest.
type StreamStats struct {
	Stream        string
	Messages      int64 // an upper bound: rolled-back positions and open transactions count
	FirstPosition int64 // lowest position still readable
	LastPosition  int64 // last allocated
	Horizon       int64 // last position that is safe to read; 0 on a standby, where it is not known
	Bytes         int64
	// StalledBy is the open transaction that holds the horizon back, "pid 123" or "prepared transaction <gid>", and StalledFor for how long at
	// most. Empty when there is none.
	StalledBy          string
	StalledFor         time.Duration
	PublishedPerSecond float64 // over the last minute
	Delayed            int64   // messages that wait for their time
	Segments           int
	SegmentsUsed       int // as many as Segments: retention keeps the ring full, and nothing can be rotated
}

// Stats returns the statistics of every group in the database, in one call. Its cost does not depend on the backlog.
func Stats(ctx context.Context, db DB) ([]GroupStats, error) {
	rows, err := db.Query(ctx, `select stream, "group", mode, lag, in_flight, retrying, dead_letters,
		coalesce(extract(epoch from oldest_age), 0)::float8, ack_floor, members, paused, coalesce(lapsed, ''),
		queued, active from millrace.stats()`)
	if err != nil {
		return nil, fmt.Errorf("read statistics: %w", translate(err))
	}
	all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (GroupStats, error) {
		var s GroupStats
		var age float64
		err := row.Scan(&s.Stream, &s.Group, &s.Mode, &s.Lag, &s.InFlight, &s.Retrying, &s.DeadLetters, &age, &s.AckFloor, &s.Members, &s.Paused, &s.Lapsed,
			&s.Queued, &s.Active)
		s.OldestAge = time.Duration(age * float64(time.Second))
		return s, err
	})
	if err != nil {
		return nil, fmt.Errorf("read statistics: %w", translate(err))
	}
	return all, nil
}

// AllStreamStats returns the statistics of every stream in the database, in one call. Its cost does not depend on what they hold.
func AllStreamStats(ctx context.Context, db DB) ([]StreamStats, error) {
	rows, err := db.Query(ctx, `select stream, messages, first_position, last_position, coalesce(horizon, 0), bytes, coalesce(stalled_by, ''),
		coalesce(extract(epoch from stalled_for), 0)::float8, coalesce(published_per_second, 0), delayed, segments, segments_used
		from millrace.stream_stats()`)
	if err != nil {
		return nil, fmt.Errorf("read statistics of streams: %w", translate(err))
	}
	all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (StreamStats, error) {
		var s StreamStats
		var stalled float64
		err := row.Scan(&s.Stream, &s.Messages, &s.FirstPosition, &s.LastPosition, &s.Horizon, &s.Bytes, &s.StalledBy, &stalled,
			&s.PublishedPerSecond, &s.Delayed, &s.Segments, &s.SegmentsUsed)
		s.StalledFor = time.Duration(stalled * float64(time.Second))
		return s, err
	})
	if err != nil {
		return nil, fmt.Errorf("read statistics of streams: %w", translate(err))
	}
	return all, nil
}

// Holder is a member with messages that it has not settled.
type Holder struct {
	Name     string `json:"name"`
	Messages int64  `json:"messages"`
}

// GroupReport is GroupStats with what a person on call asks next. Of a group at rest it costs no more than GroupStats.
type GroupReport struct {
	GroupStats
	// LastPosition is the sum of the last positions of the stream and its priorities: its growth is what was published. Positions that rolled
	// back count.
	LastPosition int64
	// Holders are the members that hold the most messages, at most ten, the greediest first.
	Holders []Holder
	// Deliveries is how often the message that was handed out most often has been, of those that are held or wait for another delivery; 0
	// when there is none.
	Deliveries int
	// Error is the newest error of a message that waits for another delivery or was set aside, ErrorAt when it came. Empty and zero when there is none.
	Error   string
	ErrorAt time.Time
}

// Settled is the number of positions that the group has done with: its growth is what was settled, set aside or removed.
func (r GroupReport) Settled() int64 { return r.LastPosition - r.Lag - r.InFlight - r.Retrying }

// GroupReports returns a report of every group in the database, in one call.
func GroupReports(ctx context.Context, db DB) ([]GroupReport, error) {
	rows, err := db.Query(ctx, `select stream, "group", mode, lag, in_flight, retrying, dead_letters,
		coalesce(extract(epoch from oldest_age), 0)::float8, ack_floor, members, paused, coalesce(lapsed, ''),
		last_position, holders, coalesce(deliveries, 0), coalesce(error, ''), error_at, queued, active
		from millrace_engine.group_report()`)
	if err != nil {
		return nil, fmt.Errorf("read the reports of groups: %w", translate(err))
	}
	all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (GroupReport, error) {
		var r GroupReport
		var age float64
		var at *time.Time
		err := row.Scan(&r.Stream, &r.Group, &r.Mode, &r.Lag, &r.InFlight, &r.Retrying, &r.DeadLetters, &age, &r.AckFloor, &r.Members, &r.Paused, &r.Lapsed,
			&r.LastPosition, &r.Holders, &r.Deliveries, &r.Error, &at, &r.Queued, &r.Active)
		r.OldestAge = time.Duration(age * float64(time.Second))
		if at != nil {
			r.ErrorAt = *at
		}
		return r, err
	})
	if err != nil {
		return nil, fmt.Errorf("read the reports of groups: %w", translate(err))
	}
	return all, nil
}

// UnusedStream says whether nothing was ever published to a stream, so that the report of a group without members is all zeros, and how many bytes its tables
// take. It costs a fraction of GroupReports and AllStreamStats. A stream whose sequence was lost and made again counts as used; so does one that does not exist.
func UnusedStream(ctx context.Context, db DB, stream string) (unused bool, bytes int64, err error) {
	if err := db.QueryRow(ctx, `select coalesce(bool_and(coalesce(q.seqstart = 1 and pg_sequence_last_value(q.seqrelid) is null, false)), false),
			coalesce(sum(z.bytes), 0)::bigint
		from millrace_engine.stream s
		join millrace_engine.stream l on l.id = s.id or l.parent_id = s.id
		left join pg_sequence q on q.seqrelid = to_regclass('millrace_engine.position_' || l.id)
		cross join lateral (select sum(pg_total_relation_size(to_regclass(format('millrace_engine.segment_%s_%s', l.id, k)))) as bytes
			from generate_series(0, l.segments - 1) k) z
		where s.name = $1`, stream).Scan(&unused, &bytes); err != nil {
		return false, 0, fmt.Errorf("look whether stream %q was used: %w", stream, translate(err))
	}
	return unused, bytes, nil
}

// PositionAt returns the first position whose CreatedAt is at or after t; when there is none, the next one to be read. CreatedAt is when the
// publishing statement began: see position_at.sql for what that means while long statements run. ErrNotFound when there is no such stream.
func PositionAt(ctx context.Context, db DB, stream string, t time.Time) (int64, error) {
	var position int64
	if err := db.QueryRow(ctx, "select millrace.position_at($1, $2)", stream, t).Scan(&position); err != nil {
		return 0, fmt.Errorf("position at %s in stream %q: %w", t.Format(time.RFC3339), stream, translate(err))
	}
	return position, nil
}

// TrimLimits say what Trim removes: whatever any of them says. A nil field says nothing.
type TrimLimits struct {
	Before      *int64         // positions below it
	MaxMessages *int64         // all but the newest
	MaxAge      *time.Duration // what is older
	// Approximate removes only what can be freed by whole segments: more may be left than was asked for, never less.
	Approximate bool
}

// Trim removes the oldest messages of a stream, whatever its retention policy and its groups, and returns the first position that is left.
// Claims that were handed out, retries and dead letters stay. ErrNotFound when there is no such stream, ErrRefused when the limits are not valid.
func Trim(ctx context.Context, db DB, stream string, limits TrimLimits) (int64, error) {
	var age *float64
	if limits.MaxAge != nil {
		s := limits.MaxAge.Seconds()
		age = &s
	}
	var first int64
	if err := db.QueryRow(ctx, "select millrace.trim($1, $2, $3, $4, $5)", stream, limits.Before, limits.MaxMessages, age,
		!limits.Approximate).Scan(&first); err != nil {
		return 0, fmt.Errorf("trim stream %q: %w", stream, translate(err))
	}
	return first, nil
}
