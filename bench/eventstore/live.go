package eventstore

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/bench/report"
)

// live measures a run that keeps only what is recent, with one client that appends steadily: the time of an append, the row versions that are left dead for vacuum, and the room
// that all tables take in the end.
func (b *bed) live(ctx context.Context) (map[string]float64, error) {
	l, err := b.log()
	if err != nil {
		return nil, err
	}
	for i := range 20 {
		if err := l.AppendLive(ctx, "warm", event(i)); err != nil {
			return nil, fmt.Errorf("warm up: %w", err)
		}
	}
	before, err := tables(ctx, b.Pool)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	took := make([]float64, b.n)
	if err := steadily(ctx, b.n, start, func(i int, began time.Duration) error {
		err := l.AppendLive(ctx, "run", event(i))
		took[i] = float64(time.Since(start)-began) / float64(time.Millisecond)
		return err
	}); err != nil {
		return nil, err
	}
	kept, err := l.Frames(ctx, "run")
	if err != nil {
		return nil, err
	}
	if least := min(b.n, liveSeconds*frameRate/2); kept < least || kept > b.n {
		return nil, fmt.Errorf("%d of %d frames are kept, where %d came in the last second", kept, b.n, frameRate)
	}
	after, err := tables(ctx, b.Pool)
	if err != nil {
		return nil, err
	}
	return map[string]float64{
		"live-append-p50": report.Percentile(took, 50), "live-append-p99": report.Percentile(took, 99),
		"live-append-dead-rows": float64(after.dead-before.dead) / float64(b.n),
		"live-append-size":      float64(after.bytes-before.bytes) / 1024,
		"live-append-kept":      float64(kept),
	}, nil
}

// room is what the tables of a database have cost so far.
type room struct{ dead, bytes int64 }

// tables counts the row versions that have died, whether vacuum has found them or not, and the bytes that all tables and indexes take now.
func tables(ctx context.Context, pool *pgxpool.Pool) (r room, err error) {
	// Servers count what a connection has done when it has been idle for some time, or when they are told to.
	for _, conn := range pool.AcquireAllIdle(ctx) {
		_, err := conn.Exec(ctx, "select pg_stat_force_next_flush()")
		conn.Release()
		if err != nil {
			return r, err
		}
	}
	err = pool.QueryRow(ctx, "select coalesce(sum(n_tup_upd + n_tup_del), 0)::bigint, coalesce(sum(pg_total_relation_size(relid)), 0)::bigint from pg_stat_user_tables").
		Scan(&r.dead, &r.bytes)
	return r, err
}
