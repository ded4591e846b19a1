package pgstream

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// NewMessage is a message to publish. The zero value of every option is a message that is published at once, with priority 0.
type NewMessage struct {
	Key     *string // messages with one key are delivered in order to Ordered groups; nil: no order
	Headers []byte  // JSON object or nil
	Payload []byte  // JSON text or raw bytes, by the stream's payload type

	// Delay and DeliverAt keep the message out of the stream until then, by the database's clock; one of them at most. It has no position
	// before it is due, so publishing it returns 0. A time in the past is now.
	Delay     time.Duration
	DeliverAt time.Time
	// Priority is 1 or higher for a message that goes before those with a lower one, in a stream that has priorities.
	Priority int
	// DedupeKey, when not empty, makes publishing repeatable: a second message with the key within the stream's dedupe window is not appended, and
	// publishing it returns the position of the first (0 when that was delayed). It waits for a transaction that has published the key and is still
	// open.
	DedupeKey string
	// Serialize makes the message wait for open transactions that have published its key with Serialize, so that the positions of the key
	// are in the order of commits.
	Serialize bool
	// Throttle appends at most one message of DedupeKey in each slot of that many seconds, instead of the stream's window: publishing another one returns the
	// position of the first. Slots are counted from the epoch, so all publishers have the same. Whole seconds.
	Throttle time.Duration
	// NextSlot delivers a message whose slot is taken at the beginning of the next one, unless one waits for that already. Publishing it returns 0 either way.
	NextSlot bool
}

func (m NewMessage) options() options {
	return options{m.Delay, m.DeliverAt, m.Priority, m.Serialize, m.Throttle, m.NextSlot}
}

// options are those that all messages of one call share.
type options struct {
	delay     time.Duration
	deliverAt time.Time
	priority  int
	serialize bool
	throttle  time.Duration
	nextSlot  bool
}

// slot returns the value of p_throttle_seconds.
func (o options) slot() *int64 {
	if o.throttle == 0 {
		return nil
	}
	seconds := int64(o.throttle / time.Second)
	return &seconds
}

// due returns the values of p_delay_seconds and p_deliver_at.
func (o options) due() (*float64, *time.Time) {
	var seconds *float64
	var at *time.Time
	if o.delay != 0 {
		s := o.delay.Seconds()
		seconds = &s
	}
	if !o.deliverAt.IsZero() {
		at = &o.deliverAt
	}
	return seconds, at
}

// Publish appends one message and returns its position. With a pgx.Tx it takes part in that transaction: if that rolls back, the
// message was never there. ErrNotFound when the stream does not exist; ErrRefused when an option is not possible. Whoever publishes often, with
// options or in batches, uses a Publisher.
func Publish(ctx context.Context, db DB, stream string, m NewMessage) (int64, error) {
	if m.options() == (options{}) && m.DedupeKey == "" {
		return insert(ctx, db, stream, m)
	}
	p, err := NewPublisher(ctx, db, stream)
	if err != nil {
		return 0, err
	}
	return p.Publish(ctx, db, m)
}

// insert appends a message without options. A plain INSERT, because pgx keeps its plan; the stream's trigger does what millrace.publish would.
func insert(ctx context.Context, db DB, stream string, m NewMessage) (int64, error) {
	var position int64
	err := db.QueryRow(ctx, "insert into "+table(stream)+` (key, headers, payload) values ($1, $2, $3) returning "position"`,
		m.Key, m.Headers, m.Payload).Scan(&position)
	if err != nil {
		return 0, publishError(stream, err)
	}
	return position, nil
}

// PublishBatch appends messages in order and returns their positions in that order, in one statement: all of them or none. Their options
// other than DedupeKey must be the same.
func PublishBatch(ctx context.Context, db DB, stream string, ms []NewMessage) ([]int64, error) {
	if len(ms) == 0 {
		return nil, nil
	}
	p, err := NewPublisher(ctx, db, stream)
	if err != nil {
		return nil, err
	}
	return p.PublishBatch(ctx, db, ms)
}

// Copier is what COPY needs: a pool, a connection or a transaction.
type Copier interface {
	CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, rows pgx.CopyFromSource) (int64, error)
}

// PublishCopy appends messages in order by COPY, the fastest way. All of them or none; their positions are not returned. COPY knows no options:
// those of the messages are refused. Sizes and headers are not checked; Publisher.Copy does that.
func PublishCopy(ctx context.Context, db Copier, stream string, ms []NewMessage) error {
	for _, m := range ms {
		if m.options() != (options{}) || m.DedupeKey != "" {
			return publishError(stream, fmt.Errorf("%w: COPY knows no options. Use PublishBatch", ErrRefused))
		}
	}
	_, err := db.CopyFrom(ctx, pgx.Identifier{"millrace", stream}, []string{"key", "headers", "payload"},
		pgx.CopyFromSlice(len(ms), func(i int) ([]any, error) {
			return []any{ms[i].Key, ms[i].Headers, ms[i].Payload}, nil
		}))
	if err != nil {
		return publishError(stream, err)
	}
	return nil
}

func table(stream string) string { return pgx.Identifier{"millrace", stream}.Sanitize() }

func publishError(stream string, err error) error {
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "42P01" {
		err = ErrNotFound
	}
	return fmt.Errorf("publish to stream %q: %w", stream, translate(err))
}
