package pgstream

import (
	"context"
	_ "embed"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// What a person asks of a stream, a group or a message that is not where it should be. Nothing here is for a program to call often.

//go:embed queries/segments.sql
var segmentsSQL string

//go:embed queries/stallers.sql
var stallersSQL string

//go:embed queries/receivers.sql
var receiversSQL string

//go:embed queries/delays.sql
var delaysSQL string

//go:embed queries/deliveries.sql
var deliveriesSQL string

//go:embed queries/locate.sql
var locateSQL string

// StreamNames lists the streams of a database.
func StreamNames(ctx context.Context, db DB) ([]string, error) {
	return names(ctx, db, "select s.name from millrace_engine.stream s where s.parent_id is null order by s.name")
}

// GroupNames lists the consumer groups of a stream; none when there is no such stream.
func GroupNames(ctx context.Context, db DB, stream string) ([]string, error) {
	return names(ctx, db, `select g.name from millrace_engine.consumer_group g join millrace_engine.stream s on s.id = g.stream_id
		where s.name = $1 order by g.name`, stream)
}

func names(ctx context.Context, db DB, sql string, args ...any) ([]string, error) {
	rows, _ := db.Query(ctx, sql, args...)
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, fmt.Errorf("list names: %w", translate(err))
	}
	return all, nil
}

// Segment is one physical table of a stream.
type Segment struct {
	Priority    int
	Number      int
	First, Last int64 // positions of its messages; 0 when it is empty
	Bytes       int64 // with indexes
	Current     bool  // new messages go there
}

// Segments lists the segments of a stream, the highest priority first. None when there is no such stream.
func Segments(ctx context.Context, db DB, stream string) ([]Segment, error) {
	return inspect(ctx, db, "segments of stream "+stream, segmentsSQL, func(row pgx.CollectableRow) (s Segment, err error) {
		var first, last *int64
		err = row.Scan(&s.Priority, &s.Number, &first, &last, &s.Bytes, &s.Current)
		s.First, s.Last = orZero(first), orZero(last)
		return s, err
	}, stream)
}

// OpenTransaction is a transaction that others wait for.
type OpenTransaction struct {
	Priority    int
	Holder      string    // "pid 123", "prepared transaction <gid>" or, where no gid is known, "a prepared transaction"
	Since       time.Time // when it began; zero where the caller may not see it
	User        string
	Application string
	Client      string // address; empty for a local one
	State       string // as in pg_stat_activity
}

// scan reads the transaction's columns, and then others.
func (t *OpenTransaction) scan(row pgx.CollectableRow, more ...any) error {
	var since *time.Time
	err := row.Scan(append([]any{&t.Priority, &t.Holder, &since, &t.User, &t.Application, &t.Client, &t.State}, more...)...)
	t.Since = orZero(since)
	return err
}

// Stallers lists the open transactions that have published to a stream, so that readers wait at what each has published first. There is one for each
// priority: the one that holds readers back furthest.
func Stallers(ctx context.Context, db DB, stream string) ([]OpenTransaction, error) {
	return inspect(ctx, db, "open transactions of stream "+stream, stallersSQL, func(row pgx.CollectableRow) (t OpenTransaction, err error) {
		err = t.scan(row)
		return t, err
	}, stream)
}

// Receiver is an open transaction that has received from a group, so that nobody else of the group can before it ends.
type Receiver struct {
	OpenTransaction
	Waiting int // how many sessions wait for it
}

// Receivers lists the transactions that have received from a group and stay open. None when every member receives in a transaction of its own.
func Receivers(ctx context.Context, db DB, stream, group string) ([]Receiver, error) {
	return inspect(ctx, db, "open receives of group "+group, receiversSQL, func(row pgx.CollectableRow) (r Receiver, err error) {
		err = r.scan(row, &r.Waiting)
		return r, err
	}, stream, group)
}

// Delays says when the first delayed message of a stream is due, zero if there is none, and whether a scout runs that will deliver it.
func Delays(ctx context.Context, db DB, stream string) (first time.Time, scouted bool, err error) {
	var due *time.Time
	if err := db.QueryRow(ctx, delaysSQL, stream).Scan(&due, &scouted); err != nil {
		return time.Time{}, false, fmt.Errorf("look at the delayed messages of stream %s: %w", stream, translate(err))
	}
	return orZero(due), scouted, nil
}

// Retry is a message that waits for another delivery, or is having it.
type Retry struct {
	Priority int
	Position int64
	Key      *string
	Attempt  int       // deliveries so far
	Held     bool      // a member has it, until Due
	Member   string    // who, when it is held
	Parked   bool      // it waits with others of its key
	Due      time.Time // zero: after the message of its key that is before it
	Error    string    // the newest
}

// Retries lists up to limit messages of a group that wait for another delivery or are having one, those that are due first.
func Retries(ctx context.Context, db DB, stream, group string, limit int) ([]Retry, error) {
	return inspect(ctx, db, "retries of group "+group, deliveriesSQL, func(row pgx.CollectableRow) (r Retry, err error) {
		var due *time.Time
		err = row.Scan(&r.Priority, &r.Position, &r.Key, &r.Attempt, &r.Member, &r.Held, &r.Parked, &due, &r.Error)
		if due != nil {
			r.Due = *due
		}
		return r, err
	}, stream, group, limit)
}

// Whereabouts of a message in a group.
const (
	WhereWaiting    = "waiting"     // it has not been handed out yet, or was given back
	WhereHeld       = "held"        // a member has it
	WhereQueued     = "queued"      // it waits for its first delivery in a queue of the group
	WhereRetry      = "retry"       // it waits for another delivery
	WhereParked     = "parked"      // it waits with others of its key, after one that failed
	WhereDeadLetter = "dead letter" // the group gave up on it
	WhereFiltered   = "filtered"    // the group's filter does not let it pass
	WhereSettled    = "settled"     // the group has done with it, or began behind it
	WhereRemoved    = "removed"     // it was removed before it was handed out
	WhereUnknown    = "unknown"     // it was removed, and an Ordered group keeps its progress by key
)

// Whereabouts is what a consumer group has done with a message.
type Whereabouts struct {
	Group    string
	State    string    // one of the above
	Attempts int       // deliveries so far, where somebody counts them
	Member   string    // who holds it
	Until    time.Time // until when it is held, or when it is due
	DeadAt   time.Time
	Error    string // the newest
}

// Locate says where each consumer group of a stream is with a message, which may have been removed from the log. Priorities are streams of their own here,
// "<stream>.p1". ErrNotFound when there is no such stream.
func Locate(ctx context.Context, db DB, stream string, position int64) (*Message, []Whereabouts, error) {
	message, err := messageAt(ctx, db, stream, position)
	if err != nil {
		return nil, nil, err
	}
	var key *string
	var headers []byte
	if message != nil {
		key, headers = message.Key, message.Headers
	}
	all, err := inspect(ctx, db, "groups of stream "+stream, locateSQL, func(row pgx.CollectableRow) (w Whereabouts, err error) {
		var deadAt, due, expires *time.Time
		var delivery, parked, taken, held, waiting, known, wanted bool
		err = row.Scan(&w.Group, &deadAt, &w.Attempts, &w.Error, &delivery, &parked, &taken, &due, &held, &w.Member, &expires, &waiting, &known, &wanted)
		switch {
		case deadAt != nil:
			w.State, w.DeadAt = WhereDeadLetter, *deadAt
		case delivery && taken:
			w.State = WhereHeld
		case delivery && parked:
			w.State = WhereParked
		case delivery && w.Attempts == 0:
			w.State = WhereQueued
		case delivery:
			w.State = WhereRetry
		case held:
			w.State, due = WhereHeld, expires
		case !known:
			w.State = WhereUnknown
		case message == nil && waiting:
			w.State = WhereRemoved
		case !wanted:
			w.State = WhereFiltered
		case waiting:
			w.State = WhereWaiting
		default:
			w.State = WhereSettled
		}
		if w.State != WhereHeld {
			w.Member = ""
		}
		if due != nil {
			w.Until = *due
		}
		return w, err
	}, stream, position, key, headers, message != nil)
	return message, all, err
}

// messageAt reads one message, whether or not readers may have it already; nil when there is none.
func messageAt(ctx context.Context, db DB, stream string, position int64) (*Message, error) {
	if _, err := StreamSettings(ctx, db, stream); err != nil {
		return nil, err
	}
	rows, _ := db.Query(ctx, fmt.Sprintf(`select m."position", m.key, m.headers, m.payload, m.created_at from %s m join millrace_engine.stream s on s.name = $1
		where m."position" = $2 and m."position" >= s.first_position`, table(stream)), stream, position)
	all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (m Message, err error) {
		err = row.Scan(&m.Position, &m.Key, &m.Headers, &m.Payload, &m.CreatedAt)
		return m, err
	})
	if err != nil {
		return nil, fmt.Errorf("read position %d of stream %q: %w", position, stream, translate(err))
	}
	if len(all) == 0 {
		return nil, nil
	}
	return &all[0], nil
}

// inspect runs a query of this file.
func inspect[T any](ctx context.Context, db DB, what, sql string, scan pgx.RowToFunc[T], args ...any) ([]T, error) {
	rows, _ := db.Query(ctx, sql, args...)
	all, err := pgx.CollectRows(rows, scan)
	if err != nil {
		return nil, fmt.Errorf("read the %s: %w", what, translate(err))
	}
	return all, nil
}
