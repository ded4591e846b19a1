package system

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/bench/engine"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// millraceSQL is Millrace by its bare SQL functions, as a program in any language would call them: one statement for each verb, committed
// by itself, and polling instead of notifications.
type millraceSQL struct{}

func (millraceSQL) Name() string { return "millrace-sql" }

func (millraceSQL) Cannot(work string) string { return asMillrace[work] }

// asMillrace are works where the SQL functions differ from the Go client in nothing that is measured.
var asMillrace = map[string]string{
	"consume-prefetch-1": "prefetching is the Go client's",
	"groups-100":         "the same in the database as millrace",
	"streams-1000":       "the same in the database as millrace",
	"backlog-10m":        "the same in the database as millrace",
	"foreign-locks-10k":  "the same in the database as millrace",
	"maintenance":        "the same in the database as millrace",
}

func (millraceSQL) Open(ctx context.Context, pool *pgxpool.Pool, shape engine.Shape) (engine.Queue, error) {
	if err := install(ctx, pool, pgstream.ModeShared, pgstream.PayloadJSON, shape); err != nil {
		return nil, err
	}
	q := &functionQueue{pool: pool}
	q.background.start(ctx, func(ctx context.Context) error { return maintain(ctx, pool) })
	return q, nil
}

type functionQueue struct {
	pool *pgxpool.Pool
	background
	hired int
}

func (q *functionQueue) Publish(ctx context.Context, m engine.Message) error {
	_, err := q.pool.Exec(ctx, "select millrace.publish($1, $2, $3)", stream, m.Payload, m.Key)
	return err
}

func (q *functionQueue) PublishBatch(ctx context.Context, ms []engine.Message) error {
	return publishArrays(ctx, q.pool, "select count(*) from millrace.publish_batch('"+stream+"', $2::jsonb[], $1::text[])", ms)
}

// Consumer is called by one goroutine, before any consumer works.
func (q *functionQueue) Consumer(_ context.Context, batch int) (engine.Consumer, error) {
	q.hired++
	return &functionConsumer{pool: q.pool, member: fmt.Sprintf("member-%d", q.hired), batch: batch}, nil
}

func (q *functionQueue) Close() error { return q.stop() }

type functionConsumer struct {
	pool   *pgxpool.Pool
	member string
	batch  int
	claim  *string
}

func (c *functionConsumer) Next(ctx context.Context, wait bool) ([][]byte, error) {
	for {
		payloads, err := c.take(ctx)
		if err != nil || len(payloads) > 0 || !wait {
			return payloads, err
		}
		if err := pause(ctx, poll); err != nil {
			return nil, err
		}
	}
}

// take settles the claim that it has and receives the next in the same call.
func (c *functionConsumer) take(ctx context.Context) ([][]byte, error) {
	rows, err := c.pool.Query(ctx, `select claim, "position", key, headers, payload, created_at
		from millrace.receive($1, $2, $3, $4, null, $5)`, stream, group, c.member, c.batch, c.claim)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	c.claim = nil
	var payloads [][]byte
	for rows.Next() {
		var r record
		if err := rows.Scan(&c.claim, &r.id, &r.key, &r.headers, &r.payload, &r.createdAt); err != nil {
			return nil, err
		}
		payloads = append(payloads, r.payload)
	}
	return payloads, rows.Err()
}

func (c *functionConsumer) Settle(ctx context.Context) error {
	if c.claim == nil {
		return nil
	}
	claim := c.claim
	c.claim = nil
	_, err := c.pool.Exec(ctx, "select millrace.ack($1)", claim)
	return err
}
