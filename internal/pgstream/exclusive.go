package pgstream

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Exclusively runs f in a transaction beside which nobody changes the settings of a stream or of its groups, or the structure of any stream, so that f can
// look at them and do what follows from that. Changes that go past the engine's functions, such as dropping an index by hand, are not held off.
// db is a pool or a connection. It waits for the locks as long as lock_timeout lets it.
func Exclusively(ctx context.Context, db DB, stream string, f func(tx DB) error) error {
	b, ok := db.(interface {
		BeginTx(ctx context.Context, o pgx.TxOptions) (pgx.Tx, error)
	})
	if !ok {
		return fmt.Errorf("change stream %q: a %T cannot begin a transaction", stream, db)
	}
	// The engine's functions look again after they have their locks, which needs this level.
	return pgx.BeginTxFunc(ctx, b, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error {
		// In the order in which apply_stream takes them.
		if _, err := tx.Exec(ctx, "select pg_advisory_xact_lock(1836019570, 1)"); err != nil {
			return fmt.Errorf("change stream %q: %w", stream, translate(err))
		}
		if _, err := tx.Exec(ctx, "select from millrace_engine.stream s where s.name = $1 for no key update", stream); err != nil {
			return fmt.Errorf("change stream %q: %w", stream, translate(err))
		}
		return f(tx)
	})
}
