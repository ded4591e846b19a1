package system

import (
	"context"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	watermillsql "github.com/ThreeDotsLabs/watermill-sql/v4/pkg/sql"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/bench/engine"
)

// watermillSystem is watermill-sql with the schema and offsets that its documentation has for PostgreSQL: a log with an offset for each
// group. A subscriber reads a batch in a transaction, hands over one message after the other, each when the one before was acked, and commits the
// offset.
//
// Tuning: SubscribeBatchSize, 100 by default, is the work's batch, and 100 where messages are handled one by one; PollInterval, a second by
// default, is as short as that of every polling system here. The subscribers of a group exclude each other by a lock on its offset and
// fail when they lose, so there is only one.
type watermillSystem struct{}

const watermillTopic = "bench"

var watermillCannot = map[string]string{
	"held-xmin":    "reads nothing that is newer than the oldest open transaction of the server",
	"groups-100":   "a polling subscriber for each group; not compared",
	"streams-1000": "a polling subscriber for each topic; not compared",
	"backlog-10m":  "emptying ten million, one message after the other, would take minutes",
	"maintenance":  "removes nothing by itself",
}

func (watermillSystem) Name() string { return "watermill-sql" }

func (watermillSystem) Cannot(work string) string { return watermillCannot[work] }

func (watermillSystem) Open(_ context.Context, pool *pgxpool.Pool, shape engine.Shape) (engine.Queue, error) {
	db := watermillsql.BeginnerFromPgx(pool)
	schema := watermillsql.DefaultPostgreSQLSchema{GeneratePayloadType: func(string) string { return "JSONB" }}
	publisher, err := watermillsql.NewPublisher(db, watermillsql.PublisherConfig{SchemaAdapter: schema, AutoInitializeSchema: true}, watermill.NopLogger{})
	if err != nil {
		return nil, err
	}
	return &watermillQueue{db: db, publisher: publisher, schema: schema, single: shape.Prefetch}, nil
}

type watermillQueue struct {
	db         watermillsql.Beginner
	publisher  *watermillsql.Publisher
	schema     watermillsql.DefaultPostgreSQLSchema
	single     bool
	subscriber *watermillsql.Subscriber
}

func (q *watermillQueue) Publish(ctx context.Context, m engine.Message) error {
	return q.PublishBatch(ctx, []engine.Message{m})
}

func (q *watermillQueue) PublishBatch(ctx context.Context, ms []engine.Message) error {
	messages := make([]*message.Message, len(ms))
	for i, m := range ms {
		messages[i] = message.NewMessageWithContext(ctx, watermill.NewUUID(), m.Payload)
		messages[i].Metadata.Set("key", m.Key)
	}
	return q.publisher.Publish(watermillTopic, messages...)
}

// Consumer starts the group's subscriber; all further consumers find nothing.
func (q *watermillQueue) Consumer(ctx context.Context, batch int) (engine.Consumer, error) {
	if q.subscriber != nil {
		return idleConsumer{}, nil
	}
	if q.single {
		batch = 100
	}
	schema := q.schema
	schema.SubscribeBatchSize = batch
	subscriber, err := watermillsql.NewSubscriber(q.db, watermillsql.SubscriberConfig{
		ConsumerGroup:    "bench",
		SchemaAdapter:    schema,
		OffsetsAdapter:   watermillsql.DefaultPostgreSQLOffsetsAdapter{},
		BackoffManager:   watermillsql.NewDefaultBackoffManager(poll, poll),
		PollInterval:     poll,
		ResendInterval:   time.Second,
		InitializeSchema: true,
	}, watermill.NopLogger{})
	if err != nil {
		return nil, err
	}
	out, err := subscriber.Subscribe(context.WithoutCancel(ctx), watermillTopic)
	if err != nil {
		return nil, err
	}
	q.subscriber = subscriber
	return &watermillConsumer{out: out}, nil
}

func (q *watermillQueue) Close() error {
	if q.subscriber == nil {
		return nil
	}
	return q.subscriber.Close()
}

type watermillConsumer struct {
	out  <-chan *message.Message
	held *message.Message
}

// Next returns one message: the next comes only when it was acked.
func (c *watermillConsumer) Next(ctx context.Context, wait bool) ([][]byte, error) {
	if err := c.Settle(ctx); err != nil {
		return nil, err
	}
	got, err := handed(ctx, c.out, 1, wait)
	if err != nil || len(got) == 0 {
		return nil, err
	}
	c.held = got[0]
	return [][]byte{got[0].Payload}, nil
}

func (c *watermillConsumer) Settle(context.Context) error {
	if c.held != nil {
		c.held.Ack()
		c.held = nil
	}
	return nil
}

// idleConsumer is a consumer that gets nothing, because another one of its group does.
type idleConsumer struct{}

func (idleConsumer) Next(ctx context.Context, wait bool) ([][]byte, error) {
	if wait {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return nil, nil
}

func (idleConsumer) Settle(context.Context) error { return nil }
