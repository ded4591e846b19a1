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
	// Open sets the system up in an empty database. The pool is shared by everything that the system does there. Unavailable, when
	// this server lacks something that the system needs.
	Open(ctx context.Context, pool *pgxpool.Pool, shape Shape) (Queue, error)
}

// Shape is what Open makes. The zero Shape is one stream with one group. Systems that cannot make another one say so in Cannot, for the
// works that ask for it.
type Shape struct {
	// Streams and Groups are how many streams there are, and groups on each; zero means one. With more the queue is a Lanes.
	Streams, Groups int
	// Upkeep says that the queue is an Upkeeper, which removes at once what was consumed, but only when told to.
	Upkeep bool
	// Prefetch says that consumers handle single messages and that the client may fetch as many in advance as it likes.
	Prefetch bool
}

// Unavailable is the error of a system that this server or machine lacks; it says what is missing. Such a system is reported, not measured.
type Unavailable string

func (u Unavailable) Error() string { return string(u) }

// Lanes is a queue of several streams with several groups each.
type Lanes interface {
	// Lane publishes to one stream and consumes as one group. Closing it does nothing.
	Lane(stream, group int) Queue
}

// Upkeeper is a queue whose upkeep runs only while it is asked to.
type Upkeeper interface {
	// Upkeep removes what was consumed, over and over, until ctx ends, and returns how often it removed something.
	Upkeep(ctx context.Context) (int, error)
}

// Stocker is a queue whose batches are made when messages are published, not when they are consumed.
type Stocker interface {
	// Stock publishes messages so that consumers get batch of them at a time.
	Stock(ctx context.Context, ms []Message, batch int) error
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
