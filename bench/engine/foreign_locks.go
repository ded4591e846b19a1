package engine

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/bench/report"
)

// foreignLocks measures what so many advisory locks of somebody else do to the consumption of a backlog and to latency: nothing, for whoever does
// not look at locks.
func (b *bed) foreignLocks(ctx context.Context, row string, locks int) (map[string]float64, error) {
	const (
		batch = 100
		rate  = 500
	)
	others, err := pgx.Connect(ctx, b.dsn)
	if err != nil {
		return nil, err
	}
	defer others.Close(context.WithoutCancel(ctx))
	// Keys as many programs have them: a number of their own in the upper half and a counter in the lower.
	if _, err := others.Exec(ctx, "select count(pg_advisory_lock_shared(7777777::bigint << 40 | i)) from generate_series(1, $1::integer) i", locks); err != nil {
		return nil, fmt.Errorf("take %d locks: %w", locks, err)
	}
	if err := b.warmUp(ctx, batchProducers, publishBatch, max(b.n/10, 10*batch), consumers, batch); err != nil {
		return nil, err
	}
	if err := b.stock(ctx, 0, b.n, batch); err != nil {
		return nil, err
	}
	took, err := b.consume(ctx, 0, b.n)
	if err != nil {
		return nil, err
	}
	f, err := b.flow(ctx, flowPlan{n: max(b.n/50, 1), producers: 1, rate: rate})
	if err != nil {
		return nil, err
	}
	return map[string]float64{row: micros(took, b.n), row + "-p50": report.Percentile(f.latencies, 50)}, nil
}
