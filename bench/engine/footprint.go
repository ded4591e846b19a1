package engine

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// footprint measures what a message costs besides time, published in batches and consumed by 100: bytes of write-ahead log, row
// versions that are left dead for vacuum, and the server's work, which depends less on a busy disk than time does.
func (b *bed) footprint(ctx context.Context, producers, batch int, suffix string) (map[string]float64, error) {
	if err := b.hire(ctx, consumers, 100); err != nil {
		return nil, err
	}
	conn, err := pgx.Connect(ctx, b.dsn)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	// A checkpoint in the middle would add images of whole pages. And the first reader of a row notes in its page that it is committed; behind a checkpoint
	// that writes an image of the page: a cost of the new stream's rows in the catalogue, and not of messages, of 70 bytes for each of 5,000. Vacuum notes most of it before.
	for _, sql := range []string{"vacuum", "checkpoint"} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return nil, err
		}
	}
	if err := b.flush(ctx); err != nil {
		return nil, err
	}
	before, err := tuples(ctx, conn)
	if err != nil {
		return nil, err
	}
	var from string
	if err := conn.QueryRow(ctx, "select pg_current_wal_insert_lsn()::text").Scan(&from); err != nil {
		return nil, err
	}
	ms := b.messages(0, b.n)
	cpuBefore, err := b.cpu()
	if err != nil {
		return nil, err
	}
	if err := b.produce(ctx, ms, producers, batch); err != nil {
		return nil, err
	}
	if _, err := b.consume(ctx, 0, b.n); err != nil {
		return nil, err
	}
	var wal float64
	if err := conn.QueryRow(ctx, "select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), $1::text::pg_lsn)::float8", from).Scan(&wal); err != nil {
		return nil, err
	}
	cpuAfter, err := b.cpu()
	if err != nil {
		return nil, err
	}
	// Servers count row versions when a connection ends, at the latest.
	if err := b.leave(); err != nil {
		return nil, err
	}
	if err := alone(ctx, conn); err != nil {
		return nil, err
	}
	after, err := tuples(ctx, conn)
	if err != nil {
		return nil, err
	}
	got := map[string]float64{
		"wal-per-message" + suffix:         wal / float64(b.n),
		"dead-tuples-per-message" + suffix: float64(after-before) / float64(b.n),
	}
	if b.postmaster != 0 {
		got["cpu-per-message"+suffix] = (cpuAfter - cpuBefore).Seconds() * 1e6 / float64(b.n)
	}
	return got, nil
}

// tuples is how many row versions of the database's tables have died so far, whether vacuum has found them or not.
func tuples(ctx context.Context, conn *pgx.Conn) (int64, error) {
	var dead int64
	err := conn.QueryRow(ctx, "select coalesce(sum(n_tup_upd + n_tup_del), 0)::bigint from pg_stat_user_tables").Scan(&dead)
	return dead, err
}

// flush makes the server count what idle connections have done; it does so by itself only after some time.
func (b *bed) flush(ctx context.Context) error {
	for _, conn := range b.pool.AcquireAllIdle(ctx) {
		_, err := conn.Exec(ctx, "select pg_stat_force_next_flush()")
		conn.Release()
		if err != nil {
			return err
		}
	}
	return nil
}

// alone waits until no other client is connected to the database.
func alone(ctx context.Context, conn *pgx.Conn) error {
	deadline := time.Now().Add(stalled)
	for {
		var others int
		if err := conn.QueryRow(ctx, `select count(*) from pg_stat_activity
			where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'`).Scan(&others); err != nil {
			return err
		}
		if others == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d connections are still open after %s", others, stalled)
		}
		if err := sleep(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
}
