package pipeline

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// OpenPool returns a pool for a connection string that came from the named environment variable. It does not connect yet.
// Its errors never hold the connection string.
func OpenPool(ctx context.Context, variable, dsn, processor string, connections int) (*pgxpool.Pool, error) {
	if dsn == "" {
		return nil, NewConfigurationError("%s is not set; write postgres://user:password@host:5432/database", variable)
	}
	cfg, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		// The parser's error can repeat the string, password included.
		return nil, NewConfigurationError("%s cannot be read; write postgres://user:password@host:5432/database", variable)
	}
	cfg.MaxConns = max(cfg.MaxConns, int32(connections))
	params := cfg.ConnConfig.RuntimeParams
	if params["application_name"] == "" {
		params["application_name"] = "millrace/" + processor
	}
	// A timestamptz that lands in a timestamp column is cut to the session's zone, which must not depend on the server.
	params["timezone"] = "UTC"
	pgstream.FitProxies(cfg)
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("open the pool of %s: %w", variable, err)
	}
	return pool, nil
}
