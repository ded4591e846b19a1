package engine

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/bench/report"
)

// heldXmin measures what an idle transaction somewhere does to a flow of 2,000 messages per second: PostgreSQL may not remove any
// row version that this transaction could still see. The first and the last part are compared, a sixth of the time in the full form
// (ten seconds of sixty) and a fifth in the short one.
func (b *bed) heldXmin(ctx context.Context) (map[string]float64, error) {
	const producers, rate = 4, 2000
	parts := 6
	if b.short {
		parts = 5
	}
	if err := b.warmUp(ctx, producers, 1, rate/2, consumers, waitBatch); err != nil {
		return nil, err
	}
	holder, err := b.pool.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if err != nil {
		return nil, err
	}
	defer holder.Rollback(context.WithoutCancel(ctx))
	// The snapshot is taken by the first statement and the transaction id by this one; both are held until the end.
	if _, err := holder.Exec(ctx, "select pg_current_xact_id()"); err != nil {
		return nil, err
	}

	part := time.Duration(b.n) * time.Second / rate / time.Duration(parts)
	usage := b.watchCPU(ctx, part, parts)
	f, err := b.flow(ctx, flowPlan{n: b.n, producers: producers, rate: rate})
	if err != nil {
		return nil, err
	}
	size := max(b.n/parts, 1)
	first, last := report.Percentile(f.latencies[:size], 50), report.Percentile(f.latencies[b.n-size:], 50)
	result := map[string]float64{"held-xmin": last / first, "held-xmin-p50-first": first, "held-xmin-p50-last": last}
	cores, err := usage()
	if err != nil {
		return nil, fmt.Errorf("read the server's use of processors: %w", err)
	}
	if cores != nil {
		result["held-xmin-cores-first"], result["held-xmin-cores-last"] = cores[0], cores[len(cores)-1]
	}
	return result, nil
}
