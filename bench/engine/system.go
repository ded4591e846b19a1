package engine

import (
	"context"

	"github.com/jackc/pgx/v5/pgxpool"
)

// System is one way to publish and consume, in package system.
type System interface {
	Name() string
	// Cannot says why the system cannot do the work; nothing when it can.
	Cannot(work string) string
	// Open sets the system up in an empty database. The pool is shared by everything that the system does there.
	Open(ctx context.Context, pool *pgxpool.Pool) (Queue, error)
}

// Queue is a system that is set up in a database. Its methods are called by many goroutines at once.
type Queue interface {
	// Publish makes one message durable, in a transaction of its own.
	Publish(ctx context.Context, m Message) error
	// PublishBatch makes many messages durable, in one transaction.
	PublishBatch(ctx context.Context, ms []Message) error
	// Consumer returns one more consumer, who gets at most batch messages at a time and shares all messages with the
	// others. It is used by one goroutine.
	Consumer(ctx context.Context, batch int) (Consumer, error)
	// Close ends what Open and the consumers have started, and tells what went wrong in the background.
	Close() error
}

// Consumer takes messages and settles them.
type Consumer interface {
	// Next settles what it returned last and returns the payloads of the next messages. When there is nothing now, it
	// returns nothing, or waits until there is or ctx ends.
	Next(ctx context.Context, wait bool) ([][]byte, error)
	// Settle settles what Next returned last, and takes nothing more.
	Settle(ctx context.Context) error
}
