package system

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/bench/engine"
)

// poll is how often a waiting consumer without notifications looks for messages: hard, because the question is what the system
// can do, not how lazy its client is.
const poll = time.Millisecond

// SQL is a queue whose verbs are one SQL statement each.
type SQL struct {
	name  string
	setup string // everything that the queue needs in an empty database
	// publish takes the key $1 and the payload $2, publishBatch the same as arrays.
	publish, publishBatch string
	// receive takes the number of messages $1 and returns id bigint, key, headers, payload and created_at of each.
	receive string
	// ack takes the ids $1.
	ack string
	// transaction says that receive and ack belong into one transaction. The consumer then keeps its connection.
	transaction bool
	// asynchronous says that this transaction is committed without waiting for the disk.
	asynchronous bool
	cannot       map[string]string // works that it cannot do, and why
}

// Name is the system's name in reports.
func (s SQL) Name() string { return s.name }

// Cannot says why the system cannot do a work.
func (s SQL) Cannot(work string) string { return because(work, s.cannot, queueOnly) }

// queueOnly is why a plain queue cannot do some works.
var queueOnly = map[string]string{
	"groups-100":         "a queue has one group of consumers: whoever takes a message deletes it",
	"streams-1000":       "a table for each queue; not compared",
	"maintenance":        "its maintenance is vacuum, which runs in all works",
	"consume-prefetch-1": "holds a transaction open while a message is handled; see consume-batch-1",
}

// because returns the first of these reasons for not doing a work.
func because(work string, reasons ...map[string]string) string {
	for _, r := range reasons {
		if why := r[work]; why != "" {
			return why
		}
	}
	return ""
}

// Open runs the setup.
func (s SQL) Open(ctx context.Context, pool *pgxpool.Pool, _ engine.Shape) (engine.Queue, error) {
	if _, err := pool.Exec(ctx, s.setup); err != nil {
		return nil, err
	}
	return &sqlQueue{SQL: s, pool: pool}, nil
}

type sqlQueue struct {
	SQL
	pool *pgxpool.Pool
	held []*pgxpool.Conn // by consumers
}

func (q *sqlQueue) Publish(ctx context.Context, m engine.Message) error {
	_, err := q.pool.Exec(ctx, q.publish, m.Key, m.Payload)
	return err
}

func (q *sqlQueue) PublishBatch(ctx context.Context, ms []engine.Message) error {
	return publishArrays(ctx, q.pool, q.publishBatch, ms)
}

// publishArrays runs a statement that takes keys and payloads as arrays.
func publishArrays(ctx context.Context, pool *pgxpool.Pool, sql string, ms []engine.Message) error {
	keys, payloads := make([]string, len(ms)), make([][]byte, len(ms))
	for i, m := range ms {
		keys[i], payloads[i] = m.Key, m.Payload
	}
	_, err := pool.Exec(ctx, sql, keys, payloads)
	return err
}

// Consumer is called by one goroutine, before any consumer works.
func (q *sqlQueue) Consumer(ctx context.Context, batch int) (engine.Consumer, error) {
	conn, err := q.pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	q.held = append(q.held, conn)
	return &sqlConsumer{SQL: q.SQL, conn: conn, batch: batch}, nil
}

func (q *sqlQueue) Close() error {
	for _, conn := range q.held {
		conn.Release()
	}
	q.held = nil
	return nil
}

type sqlConsumer struct {
	SQL
	conn  *pgxpool.Conn
	batch int
	ids   []int64 // received and not settled
}

// record is what every system reads of a message.
type record struct {
	id        int64
	key       *string
	headers   []byte
	payload   []byte
	createdAt time.Time
}

func (c *sqlConsumer) Next(ctx context.Context, wait bool) ([][]byte, error) {
	for {
		if err := c.Settle(ctx); err != nil {
			return nil, err
		}
		payloads, err := c.take(ctx)
		if err != nil || len(payloads) > 0 || !wait {
			return payloads, err
		}
		if err := pause(ctx, poll); err != nil {
			return nil, err
		}
	}
}

func (c *sqlConsumer) take(ctx context.Context) ([][]byte, error) {
	var payloads [][]byte
	batch := &pgx.Batch{}
	if c.transaction {
		batch.Queue("begin")
	}
	if c.asynchronous {
		batch.Queue("set local synchronous_commit = off")
	}
	batch.Queue(c.receive, c.batch).Query(func(rows pgx.Rows) error {
		var err error
		payloads, err = readRecords(rows, func(r record) { c.ids = append(c.ids, r.id) })
		return err
	})
	if err := c.conn.SendBatch(ctx, batch).Close(); err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	if len(payloads) == 0 && c.transaction {
		if _, err := c.conn.Exec(ctx, "commit"); err != nil {
			return nil, err
		}
	}
	return payloads, nil
}

// readRecords reads messages in full, as a consumer would, and hands each to note.
func readRecords(rows pgx.Rows, note func(record)) ([][]byte, error) {
	var payloads [][]byte
	for rows.Next() {
		var r record
		if err := rows.Scan(&r.id, &r.key, &r.headers, &r.payload, &r.createdAt); err != nil {
			return nil, err
		}
		note(r)
		payloads = append(payloads, r.payload)
	}
	return payloads, rows.Err()
}

func (c *sqlConsumer) Settle(ctx context.Context) error {
	if len(c.ids) == 0 {
		return nil
	}
	batch := &pgx.Batch{}
	batch.Queue(c.ack, c.ids)
	if c.transaction {
		batch.Queue("commit")
	}
	if err := c.conn.SendBatch(ctx, batch).Close(); err != nil {
		return fmt.Errorf("ack: %w", err)
	}
	c.ids = c.ids[:0]
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
