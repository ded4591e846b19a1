package system

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/bench/engine"
)

// limit is no queue: a plain table with an index on a sequence, the least that anything durable in PostgreSQL costs. It is read by ranges
// of positions; nothing is claimed or settled, and transactions that commit out of order would be missed.
type limit struct {
	name   string
	copies bool // publishes batches by COPY
	lanes  bool // can be many tables
	cannot map[string]string
}

const (
	readsNothing   = "only publishes"
	publishNothing = "only reads"
)

var (
	limitInsert = limit{name: "limit-insert", cannot: map[string]string{
		"consume-batch-1": readsNothing, "consume-batch-10": readsNothing, "consume-batch-100": readsNothing, "consume-batch-1000": readsNothing,
		"latency-500": readsNothing, "held-xmin": readsNothing}}
	limitCopy = limit{name: "limit-copy", copies: true, cannot: map[string]string{
		"publish-single": "COPY of one row is no limit of anything", "footprint": "COPY of one row is no limit of anything",
		"consume-batch-1": readsNothing, "consume-batch-10": readsNothing, "consume-batch-100": readsNothing, "consume-batch-1000": readsNothing,
		"latency-500": readsNothing, "held-xmin": readsNothing}}
	limitRead = limit{name: "limit-read", copies: true, lanes: true, cannot: map[string]string{
		"publish-single": publishNothing, "publish-batch-1000": publishNothing, "footprint": publishNothing, "footprint-batch": publishNothing,
		"held-xmin": "would miss messages: several producers commit out of order"}}
)

func (l limit) Name() string { return l.name }

func (l limit) Cannot(work string) string {
	if l.lanes && work == "streams-1000" {
		return ""
	}
	return because(work, l.cannot, noLimit)
}

// noLimit are works that compare a system with itself.
var noLimit = map[string]string{
	"consume-prefetch-1": "no limit of this; see consume-batch-1000",
	"idle":               "no limit of this",
	"groups-100":         "no limit of this", "streams-1000": "see limit-read", "backlog-10m": "no limit of this",
	"foreign-locks-10k": "no limit of this", "maintenance": "no limit of this",
}

func (l limit) Open(ctx context.Context, pool *pgxpool.Pool, shape engine.Shape) (engine.Queue, error) {
	q := &limitQueue{limit: l, pool: pool}
	for i := range max(shape.Streams, 1) {
		t := newLimitTable(name("log", i))
		// The columns of a stream that hold something.
		if _, err := pool.Exec(ctx, fmt.Sprintf(`create table %[1]s (
				position   bigint generated always as identity,
				created_at timestamptz not null default now(),
				key        text,
				headers    jsonb,
				payload    jsonb not null
			) with (autovacuum_vacuum_insert_threshold = -1, autovacuum_analyze_threshold = 2147483647);
			create index on %[1]s (position)`, t.table)); err != nil {
			return nil, err
		}
		q.tables = append(q.tables, t)
	}
	q.limitTable = q.tables[0]
	return q, nil
}

// limitTable is one log. Its statements are made once, because a client has them ready too.
type limitTable struct {
	table, insert, insertArrays, read string

	cursor atomic.Int64 // read by somebody so far
}

func newLimitTable(table string) *limitTable {
	return &limitTable{table: table,
		insert:       fmt.Sprintf("insert into %s (key, payload) values ($1, $2)", table),
		insertArrays: fmt.Sprintf("insert into %s (key, payload) select * from unnest($1::text[], $2::jsonb[])", table),
		read: fmt.Sprintf(`select position, key, headers, payload, created_at from %s
			where position > $1 and position <= $2 order by position`, table)}
}

type limitQueue struct {
	limit
	*limitTable
	pool   *pgxpool.Pool
	tables []*limitTable
}

// Lane is another table; there are no groups.
func (q *limitQueue) Lane(stream, _ int) engine.Queue {
	return &limitQueue{limit: q.limit, limitTable: q.tables[stream], pool: q.pool}
}

func (q *limitQueue) Publish(ctx context.Context, m engine.Message) error {
	_, err := q.pool.Exec(ctx, q.insert, m.Key, m.Payload)
	return err
}

func (q *limitQueue) PublishBatch(ctx context.Context, ms []engine.Message) error {
	if !q.copies {
		return publishArrays(ctx, q.pool, q.insertArrays, ms)
	}
	_, err := q.pool.CopyFrom(ctx, pgx.Identifier{q.table}, []string{"key", "payload"},
		pgx.CopyFromSlice(len(ms), func(i int) ([]any, error) { return []any{ms[i].Key, ms[i].Payload}, nil }))
	return err
}

func (q *limitQueue) Consumer(_ context.Context, batch int) (engine.Consumer, error) {
	return &limitConsumer{table: q.limitTable, pool: q.pool, batch: batch}, nil
}

func (q *limitQueue) Close() error { return nil }

// limitConsumer reads the next range that no other consumer has. A range is read again until it is full, so that nothing is missed at
// the end of the log, where messages still come.
type limitConsumer struct {
	table    *limitTable
	pool     *pgxpool.Pool
	batch    int
	position int64 // read up to here
	end      int64 // of the present range
}

func (c *limitConsumer) Next(ctx context.Context, wait bool) ([][]byte, error) {
	for {
		if c.position == c.end {
			c.end = c.table.cursor.Add(int64(c.batch))
			c.position = c.end - int64(c.batch)
		}
		rows, err := c.pool.Query(ctx, c.table.read, c.position, c.end)
		if err != nil {
			return nil, err
		}
		payloads, err := readRecords(rows, func(r record) { c.position = r.id })
		if err != nil || len(payloads) > 0 || !wait {
			return payloads, err
		}
		if err := pause(ctx, poll); err != nil {
			return nil, err
		}
	}
}

func (c *limitConsumer) Settle(context.Context) error { return nil }
