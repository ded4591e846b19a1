package system

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	river "github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"

	"github.com/millrace-dev/millrace/bench/engine"
)

// riverQueue is River, a job queue. Its consumers are clients that fetch as many jobs as they have free workers, run one worker for each job and
// complete jobs in batches of their own making, so it is measured with single-message handlers (consume-prefetch-1) and, because that is what peers
// are usually compared by, as consume-batch-100.
//
// Tuning: FetchCooldown, which bounds both throughput and latency and is 100 ms by default, is 2 ms, for the inserting client too, because that
// announces new jobs no more often than that; FetchPollInterval, which matters only where no announcement came, is 20 ms. Jobs have no
// timeout, which would cost a timer each. Batches are inserted by COPY (InsertManyFast). Autovacuum looks at its table as early as at
// skip-locked's.
type riverSystem struct{}

const (
	riverCooldown = 2 * time.Millisecond
	riverPoll     = 20 * time.Millisecond
	// riverWorkers of each of the two clients: with fewer, fetching becomes the limit; with more, nothing is gained on two cores.
	riverWorkers = 1000
)

var riverCannot = map[string]string{
	"consume-batch-1":    "fetches and completes in batches of its own; see consume-batch-100 and consume-prefetch-1",
	"consume-batch-10":   "fetches and completes in batches of its own; see consume-batch-100 and consume-prefetch-1",
	"consume-batch-1000": "fetches and completes in batches of its own; see consume-batch-100 and consume-prefetch-1",
	"groups-100":         "a job is worked once; there are no groups",
	"streams-1000":       "a queue is a column's value; not compared",
	"backlog-10m":        "filling and emptying ten million would take minutes each",
	"maintenance":        "its cleaner removes jobs a day after they were completed",
}

func (riverSystem) Name() string { return "river" }

func (riverSystem) Cannot(work string) string { return riverCannot[work] }

// riverJob carries a message.
type riverJob struct {
	Key     string          `json:"key"`
	Payload json.RawMessage `json:"payload"`
}

func (riverJob) Kind() string { return "message" }

type riverWorker struct {
	river.WorkerDefaults[riverJob]
	out  chan []byte
	done chan struct{} // closed when nobody reads out any more
}

func (w *riverWorker) Work(ctx context.Context, job *river.Job[riverJob]) error {
	select {
	case w.out <- job.Args.Payload:
		return nil
	case <-w.done:
		return errClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (riverSystem) Open(ctx context.Context, pool *pgxpool.Pool, _ engine.Shape) (engine.Queue, error) {
	migrator, err := rivermigrate.New(riverpgxv5.New(pool), &rivermigrate.Config{Logger: quiet})
	if err != nil {
		return nil, err
	}
	if _, err := migrator.Migrate(ctx, rivermigrate.DirectionUp, nil); err != nil {
		return nil, err
	}
	if _, err := pool.Exec(ctx, `alter table river_job set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
		autovacuum_vacuum_cost_delay = 0, autovacuum_vacuum_insert_threshold = -1, autovacuum_analyze_scale_factor = 0.5)`); err != nil {
		return nil, err
	}
	workers := river.NewWorkers()
	river.AddWorker(workers, &riverWorker{})
	client, err := river.NewClient(riverpgxv5.New(pool), &river.Config{Workers: workers, Logger: quiet, FetchCooldown: riverCooldown, FetchPollInterval: riverPoll})
	if err != nil {
		return nil, err
	}
	return &riverQueue{pool: pool, insert: client, done: make(chan struct{})}, nil
}

// quiet hears nothing: River tells of workers that are cut off when a measurement ends.
var quiet = slog.New(slog.DiscardHandler)

type riverQueue struct {
	pool    *pgxpool.Pool
	insert  *river.Client[pgx.Tx]
	clients []*river.Client[pgx.Tx]
	done    chan struct{}
}

func (q *riverQueue) Publish(ctx context.Context, m engine.Message) error {
	_, err := q.insert.Insert(ctx, riverJob{Key: m.Key, Payload: m.Payload}, nil)
	return err
}

func (q *riverQueue) PublishBatch(ctx context.Context, ms []engine.Message) error {
	jobs := make([]river.InsertManyParams, len(ms))
	for i, m := range ms {
		jobs[i].Args = riverJob{Key: m.Key, Payload: m.Payload}
	}
	_, err := q.insert.InsertManyFast(ctx, jobs)
	return err
}

// Consumer starts one more client, as another process would.
func (q *riverQueue) Consumer(ctx context.Context, _ int) (engine.Consumer, error) {
	worker := &riverWorker{out: make(chan []byte), done: q.done}
	workers := river.NewWorkers()
	river.AddWorker(workers, worker)
	client, err := river.NewClient(riverpgxv5.New(q.pool), &river.Config{
		ID:      fmt.Sprintf("consumer-%d", len(q.clients)+1),
		Queues:  map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: riverWorkers}},
		Workers: workers, Logger: quiet, FetchCooldown: riverCooldown, FetchPollInterval: riverPoll, JobTimeout: -1,
	})
	if err != nil {
		return nil, err
	}
	if err := client.Start(context.WithoutCancel(ctx)); err != nil {
		return nil, err
	}
	q.clients = append(q.clients, client)
	return &riverConsumer{pool: q.pool, out: worker.out}, nil
}

func (q *riverQueue) Close() error {
	close(q.done)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, c := range q.clients {
		if err := c.StopAndCancel(ctx); err != nil {
			return fmt.Errorf("stop a client: %w", err)
		}
	}
	return nil
}

type riverConsumer struct {
	pool *pgxpool.Pool
	out  <-chan []byte
}

// Next returns what workers were given; River completes their jobs by itself.
func (c *riverConsumer) Next(ctx context.Context, wait bool) ([][]byte, error) {
	return handed(ctx, c.out, riverWorkers, wait)
}

// Settle waits until what was worked is completed in the database.
func (c *riverConsumer) Settle(ctx context.Context) error {
	for {
		var running bool
		if err := c.pool.QueryRow(ctx, "select exists (select from river_job where state = 'running')").Scan(&running); err != nil || !running {
			return err
		}
		if err := pause(ctx, time.Millisecond); err != nil {
			return err
		}
	}
}
