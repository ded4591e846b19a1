package pgstream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
)

// DeadLetterFilter says which dead letters are meant. All its parts must hold; the zero value means all of them.
type DeadLetterFilter struct {
	Keys                 []string       // the key is one of them
	Headers              map[string]any // each of them is in the message's headers with this value
	Reason               string         // contained in the reason
	From, To             int64          // lowest and highest position; 0: no limit
	DeadAfter, DeadUntil time.Time      // when it became a dead letter; the first is included
}

// json returns the filter as the SQL functions read it; nil when it means everything.
func (f DeadLetterFilter) json() ([]byte, error) {
	parts := map[string]any{}
	if len(f.Keys) > 0 {
		parts["keys"] = f.Keys
	}
	if len(f.Headers) > 0 {
		parts["headers"] = f.Headers
	}
	if f.Reason != "" {
		parts["reason"] = f.Reason
	}
	if f.From != 0 || f.To != 0 {
		between := []any{nil, nil}
		if f.From != 0 {
			between[0] = f.From
		}
		if f.To != 0 {
			between[1] = f.To
		}
		parts["positions"] = between
	}
	if !f.DeadAfter.IsZero() {
		parts["dead_after"] = f.DeadAfter.UTC().Format(time.RFC3339Nano)
	}
	if !f.DeadUntil.IsZero() {
		parts["dead_before"] = f.DeadUntil.UTC().Format(time.RFC3339Nano)
	}
	if len(parts) == 0 {
		return nil, nil
	}
	return json.Marshal(parts)
}

// DeadLetter is a message that a group gave up on.
type DeadLetter struct {
	Message                // Attempt: how often it was delivered
	Priority int           // of the lane it was published to; positions are counted for each lane
	Reason   string        // of the last failure
	Errors   []FailedEntry // the last ten, the newest last
	DeadAt   time.Time
}

// FailedEntry is one failure in the history of a message.
type FailedEntry struct {
	Attempt int       `json:"attempt"`
	At      time.Time `json:"at"`
	Error   string    `json:"error"`
}

// DeadLetters returns up to limit dead letters of a group, the oldest positions first; limit 0 means all. ErrNotFound when there is no such group.
func DeadLetters(ctx context.Context, db DB, stream, group string, filter DeadLetterFilter, limit int) ([]DeadLetter, error) {
	choice, err := filter.json()
	if err != nil {
		return nil, deadLetterError("read dead letters", group, err)
	}
	rows, err := db.Query(ctx, `select "position", key, headers, coalesce(convert_to(payload::text, 'UTF8'), payload_bytes), created_at, attempts,
		reason, errors, dead_at, priority from millrace.dead_letters($1, $2, $3, nullif($4::bigint, 0))`, stream, group, choice, limit)
	if err != nil {
		return nil, deadLetterError("read dead letters", group, err)
	}
	all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (DeadLetter, error) {
		var d DeadLetter
		err := row.Scan(&d.Position, &d.Key, &d.Headers, &d.Payload, &d.CreatedAt, &d.Attempt, &d.Reason, &d.Errors, &d.DeadAt, &d.Priority)
		return d, err
	})
	if err != nil {
		return nil, deadLetterError("read dead letters", group, err)
	}
	return all, nil
}

// CountDeadLetters returns how many dead letters of a group pass a filter. ErrNotFound when there is no such group.
func CountDeadLetters(ctx context.Context, db DB, stream, group string, filter DeadLetterFilter) (int64, error) {
	choice, err := filter.json()
	if err != nil {
		return 0, deadLetterError("count dead letters", group, err)
	}
	var n int64
	err = db.QueryRow(ctx, "select count(*) from millrace.dead_letters($1, $2, $3, null)", stream, group, choice).Scan(&n)
	return n, deadLetterError("count dead letters", group, err)
}

// RedriveOptions say what Redrive moves, and where to. The zero value moves everything back to the group, at once.
type RedriveOptions struct {
	Filter DeadLetterFilter
	Max    int64   // at most so many in this call; 0: all
	Rate   float64 // so many become due in a second; 0: all at once
	To     string  // another stream with the same payload type: they are published there; "": back to their group
}

// Redrive moves dead letters back and returns how many. In its own group a message is delivered again with attempts from zero and its history kept, in an
// Ordered group in order with the others of its key. A call does all it says or nothing; what Max leaves is for the next one.
// ErrNotFound when there is no such group or stream, ErrRefused when the other stream has another payload type or allows only smaller messages.
func Redrive(ctx context.Context, db DB, stream, group string, o RedriveOptions) (int64, error) {
	choice, err := o.Filter.json()
	if err != nil {
		return 0, deadLetterError("redrive", group, err)
	}
	var n int64
	err = db.QueryRow(ctx, "select millrace.redrive($1, $2, $3, nullif($4::bigint, 0), nullif($5::float8, 0), nullif($6, ''))",
		stream, group, choice, o.Max, o.Rate, o.To).Scan(&n)
	return n, deadLetterError("redrive", group, err)
}

// PurgeDeadLetters removes dead letters for good and returns how many. ErrNotFound when there is no such group.
func PurgeDeadLetters(ctx context.Context, db DB, stream, group string, filter DeadLetterFilter) (int64, error) {
	return purge(ctx, db, "select millrace.purge_dead_letters($1, $2, $3)", stream, group, filter)
}

// PurgeDeliveries removes messages that wait for another delivery and that nobody holds, for good, and returns how many. The filter's Reason is looked for in
// the last error; times are refused (ErrRefused). ErrNotFound when there is no such group.
func PurgeDeliveries(ctx context.Context, db DB, stream, group string, filter DeadLetterFilter) (int64, error) {
	return purge(ctx, db, "select millrace.purge_deliveries($1, $2, $3)", stream, group, filter)
}

func purge(ctx context.Context, db DB, sql, stream, group string, filter DeadLetterFilter) (int64, error) {
	choice, err := filter.json()
	if err != nil {
		return 0, deadLetterError("purge", group, err)
	}
	var n int64
	err = db.QueryRow(ctx, sql, stream, group, choice).Scan(&n)
	return n, deadLetterError("purge", group, err)
}

func deadLetterError(verb, group string, err error) error {
	if err == nil {
		return nil
	}
	var unsupported *json.UnsupportedTypeError
	if errors.As(err, &unsupported) {
		err = fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return fmt.Errorf("%s of group %s: %w", verb, strconv.Quote(group), translate(err))
}
