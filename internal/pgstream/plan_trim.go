package pgstream

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// TrimPlan is what Trim would remove from a stream, or from one of its priorities.
type TrimPlan struct {
	Stream      string // "<stream>.p1" for a priority
	First, Mark int64  // positions from First up to Mark, without it, would be removed
}

// Messages is how many positions would be removed: an upper bound of the messages.
func (p TrimPlan) Messages() int64 { return max(p.Mark-p.First, 0) }

// PlanTrim says what Trim would remove and changes nothing. With Approximate it says the most that may be removed. ErrNotFound when there is no such stream.
func PlanTrim(ctx context.Context, db DB, stream string, limits TrimLimits) ([]TrimPlan, error) {
	rows, _ := db.Query(ctx, `select s.name, s.first_position, millrace_engine.horizon(s.id) + 1 from millrace_engine.stream s
		left join millrace_engine.stream p on p.id = s.parent_id where coalesce(p.name, s.name) = $1 order by s.priority`, stream)
	plans, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (p TrimPlan, err error) {
		err = row.Scan(&p.Stream, &p.First, &p.Mark)
		return p, err
	})
	if err != nil {
		return nil, fmt.Errorf("plan to trim stream %q: %w", stream, translate(err))
	}
	if len(plans) == 0 {
		return nil, fmt.Errorf("stream %q: %w", stream, ErrNotFound)
	}
	for i := range plans {
		p := &plans[i]
		top, mark := p.Mark, p.First
		if limits.Before != nil && p.Stream == stream {
			mark = max(mark, *limits.Before)
		}
		if limits.MaxMessages != nil {
			kept := top
			if *limits.MaxMessages > 0 {
				err := db.QueryRow(ctx, fmt.Sprintf(`select coalesce((select m."position" from %s m where m."position" < $1 order by m."position" desc offset $2 limit 1), 0)`,
					table(p.Stream)), top, *limits.MaxMessages-1).Scan(&kept)
				if err != nil {
					return nil, fmt.Errorf("plan to trim stream %q: %w", stream, translate(err))
				}
			}
			mark = max(mark, kept)
		}
		if limits.MaxAge != nil {
			var at int64
			err := db.QueryRow(ctx, "select millrace.position_at($1, clock_timestamp() - make_interval(secs => $2))", p.Stream, limits.MaxAge.Seconds()).Scan(&at)
			if err != nil {
				return nil, fmt.Errorf("plan to trim stream %q: %w", stream, translate(err))
			}
			mark = max(mark, at)
		}
		p.Mark = min(mark, top)
	}
	return plans, nil
}
