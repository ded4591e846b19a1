package pipeline

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// Source hands out batches and later learns what became of their items.
type Source interface {
	// Readers are the independent places that the source reads from. The pipeline runs each in one goroutine.
	Readers() []Reader
	// Run does what the source needs beside reading, such as keeping what it holds, until ctx ends. What only readers need, such as waking them, ends
	// with reading, which ends first.
	Run(ctx, reading context.Context) error
	// Settle takes one outcome per item, in order. It runs only after the sink's commit, and is repeated until it
	// returns nil, so it must be harmless to repeat. The batch need not be one that a reader returned.
	Settle(ctx context.Context, b *Batch, outcomes []Outcome) error
	// Release gives back everything that is not settled, so that other members can have it at once, and leaves the
	// group. It runs last.
	Release(ctx context.Context) error
}

// Reader reads from one place.
type Reader interface {
	// Name of the place, for logs.
	Name() string
	// Next waits until it has at least one item, or for a short while; then it may return an empty batch. It returns
	// about max items at most. When ctx ends it returns soon; what it returns then is still written.
	Next(ctx context.Context, max int) (*Batch, error)
}

// TxSource is a source that can settle inside a transaction of its own database. A sink in the same database calls
// SettleTx before it commits, and effect and ack become one.
type TxSource interface {
	Source
	// SettleTx acknowledges the items whose result says so. When items are fenced it marks them and returns an error
	// of class ClassFenced: the sink rolls back, and the pipeline writes the others again.
	SettleTx(ctx context.Context, tx pgx.Tx, b *Batch, outcomes []Outcome) error
}

// LeasedSource is a source whose right to items can end while they are here, without a transaction that would prove it.
type LeasedSource interface {
	Source
	// Fence marks as Fenced the items of a batch that another member has by now. It returns false when it cannot tell of
	// some of them yet: they must not be written before it can.
	Fence(b *Batch) (known bool)
}
