package system

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
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
	name    string
	mode    pgstream.Mode
	payload pgstream.PayloadType // nothing: JSON
	sql     bool                 // publishes by the SQL function instead
	cannot  map[string]string
}

var (
	millrace        = goClient{name: "millrace", mode: pgstream.ModeShared}
	millraceOrdered = goClient{name: "millrace-ordered", mode: pgstream.ModeOrdered, cannot: map[string]string{
		"publish-single": "publishes as millrace does", "publish-batch-1000": "publishes as millrace does", "streams-1000": "streams do not differ",
		"maintenance": "maintained as millrace is"}}
	millraceBytes = goClient{name: "millrace-bytes", mode: pgstream.ModeShared, payload: pgstream.PayloadBytes,
		cannot: exceptFor("only there to see what it costs to store JSON and not text", "publish-single", "publish-batch-1000")}
	millraceSQLToGo = goClient{name: "millrace-sql-to-go", mode: pgstream.ModeShared, sql: true,
		cannot: exceptFor("only there to see how fast a Go consumer notices SQL producers", "latency-500")}
)

// exceptFor are all works but these, with the reason not to do them.
func exceptFor(why string, works ...string) map[string]string {
	cannot := map[string]string{}
	for _, w := range engine.Works() {
		if !slices.Contains(works, w.Name) {
			cannot[w.Name] = why
		}
	}
	return cannot
}

func (g goClient) Name() string { return g.name }

func (g goClient) Cannot(work string) string { return g.cannot[work] }

func (g goClient) Open(ctx context.Context, pool *pgxpool.Pool, shape engine.Shape) (engine.Queue, error) {
	if err := install(ctx, pool, g.mode, g.payload, shape); err != nil {
		return nil, err
	}
	q := &goQueue{pool: pool, sql: g.sql, lane: lane{stream: stream, group: group}, shared: &shared{
		listener: pgstream.NewListener(pool.Config().ConnConfig), prefetch: shape.Prefetch}}
	runs := []func(context.Context) error{q.listener.Run}
	if !shape.Upkeep {
		runs = append(runs, func(ctx context.Context) error { return maintain(ctx, pool) })
	}
	q.background.start(ctx, runs...)
	return q, nil
}

// name is the name of one of several streams or groups.
func name(prefix string, i int) string {
	if i == 0 {
		return prefix
	}
	return fmt.Sprintf("%s_%d", prefix, i)
}

// install brings the schema, streams and groups into an empty database.
func install(ctx context.Context, pool *pgxpool.Pool, mode pgstream.Mode, payload pgstream.PayloadType, shape engine.Shape) error {
	conn, err := pool.Acquire(ctx)
	if err != nil {
		return err
	}
	_, err = schema.Migrate(ctx, conn.Conn(), schema.Options{})
	conn.Release()
	if err != nil {
		return err
	}
	for s := range max(shape.Streams, 1) {
		spec := pgstream.StreamSpec{Name: name(stream, s), PayloadType: payload}
		if shape.Upkeep {
			// Rotates every 64 MiB and removes what the group has settled.
			spec.Retention.Policy = pgstream.RetentionWorkQueue
		}
		plan, err := pgstream.PlanStream(ctx, pool, spec)
		if err != nil {
			return err
		}
		if err := pgstream.ApplyStream(ctx, pool, plan); err != nil {
			return err
		}
		for g := range max(shape.Groups, 1) {
			if err := pgstream.ApplyGroup(ctx, pool, pgstream.GroupSpec{Stream: spec.Name, Name: name(group, g), Mode: mode}); err != nil {
				return err
			}
		}
	}
	return nil
}

// maintain has a connection of its own, as the manager has, which is another process.
func maintain(ctx context.Context, pool *pgxpool.Pool) error {
	config := pool.Config()
	config.MaxConns = 1
	own, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return err
	}
	defer own.Close()
	var failed error
	pgstream.RunMaintenance(ctx, own, maintenance, func(err error) { failed = fmt.Errorf("maintenance: %w", err) })
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

// shared is what all lanes of a queue have in common.
type shared struct {
	listener *pgstream.Listener
	prefetch bool
	background
	hired int
}

type lane struct{ stream, group string }

type goQueue struct {
	pool *pgxpool.Pool
	sql  bool
	lane
	*shared
}

// Lane is the queue of another stream and group.
func (q *goQueue) Lane(s, g int) engine.Queue {
	return &goQueue{pool: q.pool, sql: q.sql, lane: lane{stream: name(stream, s), group: name(group, g)}, shared: q.shared}
}

func (q *goQueue) Publish(ctx context.Context, m engine.Message) error {
	var err error
	if q.sql {
		_, err = q.pool.Exec(ctx, "select millrace.publish($1, $2, $3)", q.stream, m.Payload, m.Key)
	} else {
		_, err = pgstream.Publish(ctx, q.pool, q.stream, pgstream.NewMessage{Key: &m.Key, Payload: m.Payload})
	}
	return err
}

func (q *goQueue) PublishBatch(ctx context.Context, ms []engine.Message) error {
	batch := make([]pgstream.NewMessage, len(ms))
	for i := range ms {
		batch[i] = pgstream.NewMessage{Key: &ms[i].Key, Payload: ms[i].Payload}
	}
	return pgstream.PublishCopy(ctx, q.pool, q.stream, batch)
}

// Consumer is called by one goroutine, before any consumer works.
func (q *goQueue) Consumer(ctx context.Context, batch int) (engine.Consumer, error) {
	q.hired++
	if q.prefetch {
		batch = prefetchAhead
	}
	c, err := pgstream.NewConsumer(ctx, q.pool, pgstream.ConsumerConfig{Stream: q.stream, Group: q.group,
		Member: fmt.Sprintf("member-%d", q.hired), MaxMessages: batch, Listener: q.listener})
	if err != nil {
		return nil, err
	}
	if q.prefetch {
		return &prefetchConsumer{consumer: c}, nil
	}
	return &goConsumer{consumer: c}, nil
}

// Upkeep rotates and truncates every ten milliseconds, a hundred times as often as usual.
func (q *goQueue) Upkeep(ctx context.Context) (int, error) {
	removals := 0
	for {
		did, err := pgstream.Maintain(ctx, q.pool)
		if ctx.Err() != nil {
			return removals, nil
		}
		if err != nil {
			return removals, fmt.Errorf("maintenance: %w", err)
		}
		for _, what := range did {
			if strings.Contains(what, "truncated") {
				removals++
			}
		}
		if pause(ctx, 10*time.Millisecond) != nil {
			return removals, nil
		}
	}
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

const (
	// prefetchAhead is how many messages a prefetching consumer fetches at a time; the default.
	prefetchAhead = 1000
	// patience is how long it waits for a message when it should not wait: long enough for one that is on its way.
	patience = 10 * time.Millisecond
)

// prefetchConsumer handles one message at a time.
type prefetchConsumer struct {
	consumer *pgstream.Consumer
	messages *pgstream.Messages // nil until it works
	held     *pgstream.Delivery
	patient  context.Context // ends soon; made anew when it has ended, because a timer for each message would be measured
	cancel   context.CancelFunc
}

func (c *prefetchConsumer) Next(ctx context.Context, wait bool) ([][]byte, error) {
	c.ack()
	if c.messages == nil {
		c.messages = c.consumer.Prefetch(pgstream.PrefetchConfig{})
	}
	within := ctx
	if !wait {
		if c.patient == nil || c.patient.Err() != nil {
			c.impatient()
			c.patient, c.cancel = context.WithTimeout(ctx, patience)
		}
		within = c.patient
	}
	d, err := c.messages.Next(within)
	if err != nil {
		if !wait && ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
			return nil, nil
		}
		return nil, err
	}
	c.held = d
	return [][]byte{d.Payload}, nil
}

func (c *prefetchConsumer) ack() {
	if c.held != nil {
		c.held.Ack()
		c.held = nil
	}
}

func (c *prefetchConsumer) impatient() {
	if c.cancel != nil {
		c.cancel()
		c.patient, c.cancel = nil, nil
	}
}

// Settle stops prefetching, which settles all that was handled and gives the rest back.
func (c *prefetchConsumer) Settle(ctx context.Context) error {
	c.ack()
	c.impatient()
	if c.messages == nil {
		return nil
	}
	err := c.messages.Stop(ctx)
	c.messages = nil
	return err
}
