package pipeline

import (
	"context"
	"fmt"
	"net"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// OpenPool returns a pool for a connection string. It does not connect yet. Every new connection reads the string again, so a password in a file can be
// rotated. Before a pooler such as PgBouncer, statements are not prepared by name (see pgstream.FitProxies).
//
// Its errors, and those of its connections, never hold the connection string.
func OpenPool(ctx context.Context, dsn config.Setting, processor string, connections int) (*pgxpool.Pool, error) {
	cfg, err := parseDSN(dsn, processor)
	if err != nil {
		return nil, err
	}
	cfg.MaxConns = max(cfg.MaxConns, int32(connections))
	cfg.BeforeConnect = func(_ context.Context, c *pgx.ConnConfig) error {
		fresh, err := parseDSN(dsn, processor)
		if err == nil {
			*c = *fresh.ConnConfig
		}
		return err
	}
	pgstream.FitProxies(cfg)
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("open the pool of %s: %w", dsn.Variable(), err)
	}
	return pool, nil
}

func parseDSN(dsn config.Setting, processor string) (*pgxpool.Config, error) {
	text, err := readDSN(dsn)
	if err != nil {
		return nil, err
	}
	cfg, err := pgxpool.ParseConfig(text)
	if err != nil {
		return nil, unreadableDSN(dsn)
	}
	params := cfg.ConnConfig.RuntimeParams
	if params["application_name"] == "" {
		params["application_name"] = config.ApplicationName(processor)
	}
	// A timestamptz that lands in a timestamp column is cut to the session's zone, which must not depend on the server.
	params["timezone"] = "UTC"
	rotate(cfg.ConnConfig, dsn)
	return cfg, nil
}

// ListenConfig returns the configuration of a connection for notifications. User and password are read again when it is made anew; another host takes a
// restart, and until then messages are found by polling.
func ListenConfig(dsn config.Setting, processor string) (*pgx.ConnConfig, error) {
	cfg, err := parseDSN(dsn, processor)
	if err != nil {
		return nil, err
	}
	return cfg.ConnConfig, nil
}

// rotate lets connections that are made of a copy of this configuration log in as the connection string says by then. The hook gets the copy that the
// connection is made of, before it is used for the login.
func rotate(cfg *pgx.ConnConfig, dsn config.Setting) {
	cfg.AfterNetConnect = func(_ context.Context, c *pgconn.Config, conn net.Conn) (net.Conn, error) {
		text, err := readDSN(dsn)
		if err != nil {
			return conn, err
		}
		fresh, err := pgconn.ParseConfig(text)
		if err != nil {
			return conn, unreadableDSN(dsn)
		}
		c.User, c.Password = fresh.User, fresh.Password
		return conn, nil
	}
}

func readDSN(dsn config.Setting) (string, error) {
	text, err := dsn.Read()
	if err == nil && text == "" {
		err = NewConfigurationError("%s is not set; write postgres://user:password@host:5432/database, or set %[1]s_FILE to a file that holds it", dsn.Variable())
	}
	return text, err
}

// unreadableDSN replaces the parser's error, which can repeat the string, password included.
func unreadableDSN(dsn config.Setting) error {
	return NewConfigurationError("%s cannot be read; write postgres://user:password@host:5432/database", dsn.Variable())
}
