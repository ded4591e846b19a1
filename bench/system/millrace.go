package system

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"github.com/millrace-dev/millrace/bench/engine"
	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

const (
	stream = "bench"
	group  = "bench"
	// maintenance runs as often as this while Millrace is measured, because it also does in real life.
	maintenance = time.Second
)

// goClient is Millrace through its Go client, with its listener and its maintenance running.
type goClient struct {
	name   string
	mode   pgstream.Mode
	cannot map[string]string
}

var (
	millrace        = goClient{name: "millrace", mode: pgstream.ModeShared}
	millraceOrdered = goClient{name: "millrace-ordered", mode: pgstream.ModeOrdered, cannot: map[string]string{
		"publish-single": "publishes as millrace does", "publish-batch-1000": "publishes as millrace does"}}
)

func (g goClient) Name() string { return g.name }

func (g goClient) Cannot(work string) string { return g.cannot[work] }

func (g goClient) Open(ctx context.Context, pool *pgxpool.Pool) (engine.Queue, error) {
	if err := install(ctx, pool, g.mode); err != nil {
		return nil, err
	}
	q := &goQueue{pool: pool, listener: pgstream.NewListener(pool.Config().ConnConfig)}
	q.background.start(ctx, q.listener.Run, func(ctx context.Context) error { return maintain(ctx, pool) })
	return q, nil
}

// install brings the schema, one stream and one group into an empty database.
func install(ctx context.Context, pool *pgxpool.Pool, mode pgstream.Mode) error {
	conn, err := pool.Acquire(ctx)
	if err != nil {
		return err
	}
	_, err = schema.Migrate(ctx, conn.Conn(), schema.Options{})
	conn.Release()
	if err != nil {
		return err
	}
	plan, err := pgstream.PlanStream(ctx, pool, pgstream.StreamSpec{Name: stream})
	if err != nil {
		return err
	}
	if err := pgstream.ApplyStream(ctx, pool, plan); err != nil {
		return err
	}
	return pgstream.ApplyGroup(ctx, pool, pgstream.GroupSpec{Stream: stream, Name: group, Mode: mode})
}

func maintain(ctx context.Context, pool *pgxpool.Pool) error {
	var failed error
	pgstream.RunMaintenance(ctx, pool, maintenance, func(err error) { failed = fmt.Errorf("maintenance: %w", err) })
	return failed
}

// background is what runs beside a measurement.
type background struct {
	cancel context.CancelFunc
	group  errgroup.Group
}

func (b *background) start(ctx context.Context, runs ...func(context.Context) error) {
	ctx, b.cancel = context.WithCancel(ctx)
	for _, run := range runs {
		b.group.Go(func() error { return run(ctx) })
	}
}

func (b *background) stop() error {
	b.cancel()
	return b.group.Wait()
}

type goQueue struct {
	pool     *pgxpool.Pool
	listener *pgstream.Listener
	background
	hired int
}

func (q *goQueue) Publish(ctx context.Context, m engine.Message) error {
	_, err := pgstream.Publish(ctx, q.pool, stream, pgstream.NewMessage{Key: &m.Key, Payload: m.Payload})
	return err
}

func (q *goQueue) PublishBatch(ctx context.Context, ms []engine.Message) error {
	batch := make([]pgstream.NewMessage, len(ms))
	for i := range ms {
		batch[i] = pgstream.NewMessage{Key: &ms[i].Key, Payload: ms[i].Payload}
	}
	return pgstream.PublishCopy(ctx, q.pool, stream, batch)
}

// Consumer is called by one goroutine, before any consumer works.
func (q *goQueue) Consumer(ctx context.Context, batch int) (engine.Consumer, error) {
	q.hired++
	c, err := pgstream.NewConsumer(ctx, q.pool, pgstream.ConsumerConfig{Stream: stream, Group: group,
		Member: fmt.Sprintf("member-%d", q.hired), MaxMessages: batch, Listener: q.listener})
	if err != nil {
		return nil, err
	}
	return &goConsumer{consumer: c}, nil
}

func (q *goQueue) Close() error { return q.stop() }

type goConsumer struct {
	consumer *pgstream.Consumer
	token    string
}

func (c *goConsumer) Next(ctx context.Context, wait bool) ([][]byte, error) {
	receive := c.consumer.AckAndTryReceive
	if wait {
		receive = c.consumer.AckAndReceive
	}
	claim, err := receive(ctx, c.token)
	if err != nil {
		return nil, err
	}
	c.token = ""
	if claim == nil {
		return nil, nil
	}
	c.token = claim.Token
	payloads := make([][]byte, len(claim.Messages))
	for i, m := range claim.Messages {
		payloads[i] = m.Payload
	}
	return payloads, nil
}

func (c *goConsumer) Settle(ctx context.Context) error {
	if c.token == "" {
		return nil
	}
	token := c.token
	c.token = ""
	return c.consumer.Ack(ctx, token)
}
