package pipeline

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// createMemory creates the memory of the configuration, or brings it to its settings. A role that may not is told so only when there is something to do.
func createMemory(ctx context.Context, pool *pgxpool.Pool, m *config.Memory) error {
	var there bool
	err := pool.QueryRow(ctx, `select exists (select from millrace.memories() m where m.name = $1 and m.problem is null
		and (m.keep_completed_seconds = $2 or $2 = 0) and ($3 = '' or to_regclass(m."table") = to_regclass($3)))`,
		m.Name, int64(time.Duration(m.KeepCompleted).Round(time.Second).Seconds()), m.Table).Scan(&there)
	if err != nil || there {
		return err
	}
	_, err = pgstream.CreateMemory(ctx, pool, pgstream.MemorySpec{Name: m.Name, Table: m.Table, KeepCompleted: time.Duration(m.KeepCompleted)})
	return memoryError(err)
}

// openMemory returns the memory of the configuration, nil when it has none. Its errors are of class ClassConfiguration when a person has to act.
func openMemory(ctx context.Context, pool *pgxpool.Pool, c *config.Config) (*pgstream.Memory, error) {
	if c.Memory == nil {
		return nil, nil
	}
	memory, err := pgstream.OpenMemory(ctx, pool, c.Memory.Name)
	return memory, memoryError(err)
}

// memoryError tells of what is the matter with the memory itself, and not with a row.
func memoryError(err error) error {
	if errors.Is(err, pgstream.ErrRefused) || errors.Is(err, pgstream.ErrNotFound) {
		return NewConfigurationError("memory: %v", err)
	}
	return err
}
