package system

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/bench/engine"
	"github.com/millrace-dev/millrace/test/env/dirs"
)

// pgqSystem is PgQ. Consumers get all events between two ticks at once, and a ticker makes ticks. It is installed as an extension where the server
// has it, and otherwise from the file without C code of Debian's package, which runs on every version; peers.sh fetches it. Publishing single
// events is slower without the C code.
//
// Tuning: its daemon's ticker runs every second and waits for 500 events or three seconds by default. Here it runs every five milliseconds, and
// waits for as many events as a consumer is to get at once, or five milliseconds. For works that empty a backlog, ticks are made while the
// backlog is filled, so that batches have the size asked for. Batches are published by COPY into the queue's table, as its own
// library does. One consumer works for a group at a time. Tables rotate every two hours, as by default.
type pgqSystem struct{}

const (
	pgqQueueName = "bench"
	pgqTick      = 5 * time.Millisecond
)

var pgqCannot = map[string]string{
	"consume-prefetch-1": "settles all events of a tick at once",
	"groups-100":         "not compared",
	"streams-1000":       "not compared",
	"backlog-10m":        "a tick for each hundred of ten million events would take minutes",
	"maintenance":        "rotates every two hours",
}

func (pgqSystem) Name() string { return "pgq" }

func (pgqSystem) Cannot(work string) string { return pgqCannot[work] }

// pgqSQL is PgQ without C code, as peers.sh leaves it.
func pgqSQL() (string, error) {
	path, err := dirs.Cache("pgq/pgq_pl_only.sql")
	if err != nil {
		return "", err
	}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", engine.Unavailable("neither the server nor this machine has PgQ; on Debian and Ubuntu bench/peers.sh fetches it")
	}
	return string(text), err
}

func (pgqSystem) Open(ctx context.Context, pool *pgxpool.Pool, _ engine.Shape) (engine.Queue, error) {
	var there bool
	if err := pool.QueryRow(ctx, "select exists (select from pg_available_extensions where name = 'pgq')").Scan(&there); err != nil {
		return nil, err
	}
	install := "create extension pgq"
	if !there {
		var err error
		if install, err = pgqSQL(); err != nil {
			return nil, err
		}
	}
	if err := pgqInstall(ctx, pool, install); err != nil {
		return nil, fmt.Errorf("install PgQ: %w", err)
	}
	if _, err := pool.Exec(ctx, fmt.Sprintf(`select pgq.create_queue('%[1]s'), pgq.register_consumer('%[1]s', 'bench');
		select pgq.set_queue_config('%[1]s', 'ticker_max_lag', '%[2]d milliseconds')`, pgqQueueName, pgqTick.Milliseconds())); err != nil {
		return nil, err
	}
	q := &pgqQueue{pool: pool}
	q.background.start(ctx, q.ticker)
	return q, nil
}

// pgqInstall runs the file on a connection that is then thrown away, because it changes settings of the session.
func pgqInstall(ctx context.Context, pool *pgxpool.Pool, sql string) error {
	pooled, err := pool.Acquire(ctx)
	if err != nil {
		return err
	}
	conn := pooled.Hijack()
	defer conn.Close(context.WithoutCancel(ctx))
	_, err = conn.Exec(ctx, sql)
	return err
}

type pgqQueue struct {
	pool *pgxpool.Pool
	background
	hired    bool
	stocking sync.Mutex
}

// ticker does what PgQ's daemon does.
func (q *pgqQueue) ticker(ctx context.Context) error {
	for pause(ctx, pgqTick) == nil {
		if _, err := q.pool.Exec(ctx, "select pgq.ticker()"); err != nil && ctx.Err() == nil {
			return fmt.Errorf("make a tick: %w", err)
		}
	}
	return nil
}

func (q *pgqQueue) Publish(ctx context.Context, m engine.Message) error {
	_, err := q.pool.Exec(ctx, "select pgq.insert_event($1, 'message', $2, $3, null, null, null)", pgqQueueName, string(m.Payload), m.Key)
	return err
}

func (q *pgqQueue) PublishBatch(ctx context.Context, ms []engine.Message) error {
	var table string
	if err := q.pool.QueryRow(ctx, "select pgq.current_event_table($1)", pgqQueueName).Scan(&table); err != nil {
		return err
	}
	now := time.Now()
	_, err := q.pool.CopyFrom(ctx, strings.Split(table, "."), []string{"ev_time", "ev_type", "ev_data", "ev_extra1"},
		pgx.CopyFromSlice(len(ms), func(i int) ([]any, error) { return []any{now, "message", string(ms[i].Payload), ms[i].Key}, nil }))
	return err
}

// Stock makes a tick after each batch.
func (q *pgqQueue) Stock(ctx context.Context, ms []engine.Message, batch int) error {
	if batch >= len(ms) {
		return q.PublishBatch(ctx, ms)
	}
	// One at a time, so that no other batch is visible to the tick.
	q.stocking.Lock()
	defer q.stocking.Unlock()
	for part := range slices.Chunk(ms, batch) {
		if err := q.PublishBatch(ctx, part); err != nil {
			return err
		}
		if _, err := q.pool.Exec(ctx, "select pgq.ticker($1)", pgqQueueName); err != nil {
			return err
		}
	}
	return nil
}

func (q *pgqQueue) Consumer(ctx context.Context, batch int) (engine.Consumer, error) {
	if q.hired {
		return idleConsumer{}, nil
	}
	q.hired = true
	_, err := q.pool.Exec(ctx, "select pgq.set_queue_config($1, 'ticker_max_count', $2)", pgqQueueName, fmt.Sprint(batch))
	return &pgqConsumer{pool: q.pool}, err
}

func (q *pgqQueue) Close() error { return q.stop() }

type pgqConsumer struct {
	pool  *pgxpool.Pool
	batch *int64
}

func (c *pgqConsumer) Next(ctx context.Context, wait bool) ([][]byte, error) {
	for {
		payloads, err := c.take(ctx)
		if err != nil || len(payloads) > 0 || !wait {
			return payloads, err
		}
		if c.batch != nil {
			continue // a batch without events; there may be another
		}
		if err := pause(ctx, poll); err != nil {
			return nil, err
		}
	}
}

// take finishes the batch that it has, opens the next and reads it, in one transaction and one round trip.
func (c *pgqConsumer) take(ctx context.Context) ([][]byte, error) {
	batch := &pgx.Batch{}
	if c.batch != nil {
		batch.Queue("select pgq.finish_batch($1)", *c.batch)
	}
	// Functions of PL/pgSQL see what those before them in the statement did.
	batch.Queue(`select b.id, e.ev_id, e.ev_extra1, e.ev_data, e.ev_time
		from (select pgq.next_batch($1, 'bench') as id offset 0) b left join lateral pgq.get_batch_events(b.id) e on true where b.id is not null`, pgqQueueName)
	results := c.pool.SendBatch(ctx, batch)
	defer func() { _ = results.Close() }() // errors are those of its parts
	if c.batch != nil {
		if _, err := results.Exec(); err != nil {
			return nil, fmt.Errorf("finish a batch: %w", err)
		}
		c.batch = nil
	}
	rows, err := results.Query()
	if err != nil {
		return nil, fmt.Errorf("open a batch: %w", err)
	}
	defer rows.Close()
	var payloads [][]byte
	for rows.Next() {
		var r record
		var id *int64
		var at *time.Time
		if err := rows.Scan(&c.batch, &id, &r.key, &r.payload, &at); err != nil {
			return nil, err
		}
		if id != nil {
			payloads = append(payloads, r.payload)
		}
	}
	return payloads, rows.Err()
}

func (c *pgqConsumer) Settle(ctx context.Context) error {
	if c.batch == nil {
		return nil
	}
	id := *c.batch
	c.batch = nil
	_, err := c.pool.Exec(ctx, "select pgq.finish_batch($1)", id)
	return err
}
