package pgstream

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Message is one message of a stream.
type Message struct {
	Position  int64
	Key       *string
	Headers   []byte // JSON object, nil when there are none
	Payload   []byte // JSON text or raw bytes, by the stream's payload type
	CreatedAt time.Time
	Attempt   int // 1 on the first delivery
}

// Claim is a set of messages that a member holds until ExpiresAt. Its token fences every later verb.
type Claim struct {
	Token     string
	Messages  []Message
	ExpiresAt time.Time
}

// ConsumerConfig configures a Consumer. Zero values mean the defaults named here.
type ConsumerConfig struct {
	Stream, Group string
	Member        string        // unique per process; default: host name plus random suffix
	MaxMessages   int           // per claim; default 1,000
	Lease         time.Duration // default: the group's ack wait
	PollInterval  time.Duration // fallback when no notification comes; default 1s
	Listener      *Listener     // nil: polling only
}

// Consumer receives, settles and leaves on behalf of one member. Its methods are safe for concurrent use.
type Consumer struct{ cfg ConsumerConfig }

// NewConsumer checks that stream and group exist (ErrNotFound).
func NewConsumer(ctx context.Context, pool *pgxpool.Pool, cfg ConsumerConfig) (*Consumer, error) {
	panic("todo")
}

// Receive waits until there is at least one message or ctx ends. No connection is held while it waits.
func (c *Consumer) Receive(ctx context.Context) (*Claim, error) { panic("todo") }

// TryReceive returns at once; nil when there is nothing to deliver.
func (c *Consumer) TryReceive(ctx context.Context) (*Claim, error) { panic("todo") }

// Ack settles the whole claim. ErrFenced when it has ended.
func (c *Consumer) Ack(ctx context.Context, token string) error { panic("todo") }

// AckTx settles the whole claim inside the caller's transaction: effect and ack commit together (exactly once).
func (c *Consumer) AckTx(ctx context.Context, tx pgx.Tx, token string) error { panic("todo") }

// AckMessagesTx settles some messages of a claim inside the caller's transaction.
func (c *Consumer) AckMessagesTx(ctx context.Context, tx pgx.Tx, token string, positions []int64) error {
	panic("todo")
}

// AckMessages settles some messages of a claim.
func (c *Consumer) AckMessages(ctx context.Context, token string, positions []int64) error {
	panic("todo")
}

// Nack gives messages back to be delivered again after delay (negative: the group's backoff), with the reason kept. A message
// at the group's MaxAttempts becomes a dead letter. The rest of the claim stays held.
func (c *Consumer) Nack(ctx context.Context, token string, positions []int64, delay time.Duration, reason string) error {
	panic("todo")
}

// DeadLetter moves messages of a claim to the dead-letter table at once, whatever their attempt.
func (c *Consumer) DeadLetter(ctx context.Context, token string, positions []int64, reason string) error {
	panic("todo")
}

// Release gives the whole claim back at once without counting an attempt: used on drain.
func (c *Consumer) Release(ctx context.Context, token string) error { panic("todo") }

// Extend prolongs the claim to now plus d and returns its new end.
func (c *Consumer) Extend(ctx context.Context, token string, d time.Duration) (time.Time, error) {
	panic("todo")
}

// Leave gives up membership so that other members take over at once. Call it after the last settle.
func (c *Consumer) Leave(ctx context.Context) error { panic("todo") }
