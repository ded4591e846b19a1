package pipeline

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// settledWrite writes a batch and settles it in one transaction of conn. When the answer to its commit gets lost, nobody
// here knows what has happened, and writing the batch again could do it twice: the items are fenced, and their source finds
// out. A nil source settles nothing: then a lost answer is an error like any other.
func settledWrite(ctx context.Context, conn *pgx.Conn, source TxSource, b *Batch, write func(pgx.Tx) ([]Outcome, error)) ([]Outcome, error) {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = tx.Rollback(ctx) }() // does nothing after the commit
	os, err := write(tx)
	if err != nil {
		return nil, err
	}
	if source == nil {
		return os, tx.Commit(ctx)
	}
	whole, all := b.complete(os)
	if err := source.SettleTx(ctx, tx, whole, all); err != nil {
		return nil, err
	}
	err = tx.Commit(ctx)
	if err != nil && commitInDoubt(err) {
		for _, it := range whole.Items {
			it.Fenced = true
		}
		return nil, &inDoubtError{err}
	}
	if err != nil {
		return nil, err
	}
	b.Settled = true
	return os, nil
}
