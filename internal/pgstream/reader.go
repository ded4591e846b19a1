package pgstream

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Where a Reader begins that is not told a position.
const (
	ReadFirst int64 = 0  // at the first message that is left
	ReadNext  int64 = -1 // at the next message that is published
)

// readerPoll is how long a Reader waits without a notification before it looks again.
const readerPoll = time.Second

// Reader reads a stream by position, without a consumer group: whoever keeps its own progress, or wants to look. Nothing is claimed,
// written or acked. Of a stream with priorities it reads the lowest; the others are streams of their own, "<name>.p1" and so on. Its methods are for
// one goroutine at a time.
type Reader struct {
	// CallTimeout bounds every round trip of reading, so that a server that does not answer is an error. 0: as long as ctx lets it. Set it before reading.
	CallTimeout time.Duration

	pool   *pgxpool.Pool
	name   string
	waits  int32 // the stream that publishers notify: the parent of a priority
	waiter waiter
	sql    string

	next int64 // where the next read begins: behind the last message seen, and never at the horizon
	safe int64 // a horizon that a read was told; what it covers is read without computing another
	// On which connection it was told. While that lives, the server has not crashed: one that did may hand out positions again that it had not made durable. The pool may replace
	// connections that a crash has ended without anybody hearing of it.
	told *pgx.Conn
}

// NewReader returns a reader whose first message is the first at or above position from, or as ReadFirst and ReadNext say. listener may be nil:
// then it polls. ErrNotFound when there is no such stream. Whether from is still there is told by Next.
func NewReader(ctx context.Context, pool *pgxpool.Pool, stream string, from int64, listener *Listener) (*Reader, error) {
	r := &Reader{pool: pool, name: stream, waiter: waiter{pool: pool, listener: listener, poll: readerPoll}, next: from}
	var payloadType PayloadType
	var id int32
	var first, horizon int64
	err := pool.QueryRow(ctx, `select s.id, coalesce(s.parent_id, s.id), s.payload_type, s.first_position, case when $2 then millrace_engine.horizon(s.id) else 0 end
		from millrace_engine.stream s where s.name = $1`, stream, from < 0).Scan(&id, &r.waits, &payloadType, &first, &horizon)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, fmt.Errorf("stream %q: %w", stream, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("stream %q: %w", stream, translate(err))
	}
	switch {
	case from < 0:
		r.next = max(horizon+1, first)
	case from == ReadFirst:
		r.next = first
	}
	payload := "payload"
	if payloadType == PayloadBytes {
		payload = "payload_bytes"
	}
	r.sql = fmt.Sprintf(`select r."position", r.key, r.headers, r.%s, r.created_at, r.horizon from millrace_engine.read_%d($1, $2, null, null, $3) r`,
		payload, id)
	return r, nil
}

// Position is where the next read begins. Whoever stores it with the effect of what it has read goes on there after a restart.
func (r *Reader) Position() int64 { return r.next }

// MoveTo makes the next read begin at the first message at or above position, which must be positive.
func (r *Reader) MoveTo(position int64) { r.next = position }

// Next returns up to max messages in order of position, from Position on, and moves there. It waits until there is at least one, or ctx ends; no
// connection is held while it waits. ErrOutOfRange when messages from Position on were removed, also while they were read: the error names the first that is
// left, and Position stays.
func (r *Reader) Next(ctx context.Context, maximum int) ([]Message, error) {
	var messages []Message
	r.waiter.limit = r.CallTimeout
	err := r.waiter.until(ctx, func() topic { return messagesOf(r.waits) }, func() (bool, error) {
		var err error
		messages, err = r.TryNext(ctx, maximum)
		return len(messages) > 0, err
	})
	return messages, err
}

// TryNext is Next without waiting: no message when there is none now.
func (r *Reader) TryNext(ctx context.Context, maximum int) ([]Message, error) {
	ctx, cancel := limited(ctx, r.CallTimeout)
	defer cancel()
	conn, err := r.pool.Acquire(ctx)
	if err != nil {
		return nil, r.wrap(err)
	}
	defer conn.Release()
	var safe *int64
	if r.safe >= r.next && r.told == conn.Conn() {
		safe = &r.safe
	}
	var messages []Message
	var horizon int64
	// READ COMMITTED is asked for, because it may not be the role's or the database's default.
	batch := &pgx.Batch{}
	batch.Queue("begin isolation level read committed read only")
	batch.Queue(r.sql, r.next, maximum, safe).Query(func(rows pgx.Rows) (err error) {
		messages, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (m Message, err error) {
			err = row.Scan(&m.Position, &m.Key, &m.Headers, &m.Payload, &m.CreatedAt, &horizon)
			return m, err
		})
		return err
	})
	batch.Queue("commit")
	if err := conn.SendBatch(ctx, batch).Close(); err != nil {
		if conn.Conn().PgConn().TxStatus() == 'E' {
			// The batch stopped before its commit. A pool closes connections that come back like that, and being out of range is normal.
			_, _ = conn.Exec(ctx, "rollback")
		}
		return nil, r.wrap(err)
	}
	if len(messages) > 0 {
		r.next = messages[len(messages)-1].Position + 1
		r.safe, r.told = horizon, conn.Conn()
	}
	return messages, nil
}

func (r *Reader) wrap(err error) error {
	r.told = nil
	var pg *pgconn.PgError
	if errors.As(err, &pg) && (pg.Code == "42883" || pg.Code == "42P01") {
		return fmt.Errorf("read stream %q: it was dropped: %w", r.name, ErrNotFound)
	}
	return fmt.Errorf("read stream %q: %w", r.name, translate(err))
}
