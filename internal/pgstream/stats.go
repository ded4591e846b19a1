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
	Lag           int64         // messages not yet claimed (an upper bound: rolled-back positions count)
	InFlight      int64         // claimed and unsettled
	Retrying      int64         // in the delivery table
	DeadLetters   int64         // in the dead-letter table
	OldestAge     time.Duration // age of the oldest unsettled message; 0 when there is none
	AckFloor      int64         // every position up to it is settled
	Members       []GroupMember
}

// Stats returns the statistics of every group in the database, in one call. Its cost does not depend on the backlog.
func Stats(ctx context.Context, db DB) ([]GroupStats, error) {
	rows, err := db.Query(ctx, `select stream, "group", mode, lag, in_flight, retrying, dead_letters,
		coalesce(extract(epoch from oldest_age), 0)::float8, ack_floor, members from millrace.stats()`)
	if err != nil {
		return nil, fmt.Errorf("read statistics: %w", translate(err))
	}
	all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (GroupStats, error) {
		var s GroupStats
		var age float64
		err := row.Scan(&s.Stream, &s.Group, &s.Mode, &s.Lag, &s.InFlight, &s.Retrying, &s.DeadLetters, &age, &s.AckFloor, &s.Members)
		s.OldestAge = time.Duration(age * float64(time.Second))
		return s, err
	})
	if err != nil {
		return nil, fmt.Errorf("read statistics: %w", translate(err))
	}
	return all, nil
}
