package client

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

const (
	defaultConnectTimeout = 5 * time.Second
	defaultMaxConns       = 10
)

// PoolOptions are the settings of the pool that Open opens. What is given here goes before the same setting in the connection string.
type PoolOptions struct {
	// MaxConns is the size of the pool; default: pool_max_conns of the connection string, or 10. Each handler that uses Delivery.Tx holds one connection; two
	// are always left for everything else, so handlers with transactions wait for each other when there are more of them.
	MaxConns int
	// MinConns are kept open, so that a burst need not wait for connections to be made; default 0.
	MinConns int
	// MaxConnIdleTime is after how long an idle connection is closed; default 30m.
	MaxConnIdleTime time.Duration
	// MaxConnLifetime is after how long a connection is replaced by a new one, which may find another server behind the name; default 1h.
	MaxConnLifetime time.Duration
	// ConnectTimeout is how long connecting may take; default: connect_timeout of the connection string, or 5s.
	ConnectTimeout time.Duration
	// StatementTimeout is after how long the server ends a statement; default: the role's or database's own. Options.CallTimeout bounds the client's calls
	// without it; this one holds for the program's own SQL on the pool, too. Poolers by transaction refuse it: set it for the role there.
	StatementTimeout time.Duration
	// IdleInTransactionTimeout is after how long the server ends a session whose transaction does nothing; as StatementTimeout otherwise.
	IdleInTransactionTimeout time.Duration
	// ApplicationName is what pg_stat_activity shows; default: application_name of the connection string, or millrace-client.
	ApplicationName string
	// Configure, when set, may change everything else, such as TLS, or BeforeConnect for passwords that rotate.
	Configure func(*pgxpool.Config)
}

// openPool returns a pool that has not connected yet. Errors never hold the connection string.
func openPool(ctx context.Context, url string, o PoolOptions) (*pgxpool.Pool, error) {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		// The parser's error can repeat the string, password included.
		return nil, errors.New("the connection string cannot be read; write postgres://user:password@host:5432/database")
	}
	switch {
	case o.MaxConns > 0:
		cfg.MaxConns = int32(o.MaxConns)
	case !strings.Contains(url, "pool_max_conns"):
		cfg.MaxConns = defaultMaxConns
	}
	if o.MinConns > 0 {
		cfg.MinConns = int32(o.MinConns)
	}
	set(&cfg.MaxConnIdleTime, o.MaxConnIdleTime)
	set(&cfg.MaxConnLifetime, o.MaxConnLifetime)
	set(&cfg.ConnConfig.ConnectTimeout, o.ConnectTimeout)
	if cfg.ConnConfig.ConnectTimeout <= 0 {
		cfg.ConnConfig.ConnectTimeout = defaultConnectTimeout
	}
	params := cfg.ConnConfig.RuntimeParams
	for name, limit := range map[string]time.Duration{
		"statement_timeout": o.StatementTimeout, "idle_in_transaction_session_timeout": o.IdleInTransactionTimeout,
	} {
		if limit > 0 {
			params[name] = strconv.FormatInt(max(limit.Milliseconds(), 1), 10)
		}
	}
	if o.ApplicationName != "" {
		params["application_name"] = o.ApplicationName
	}
	if params["application_name"] == "" {
		params["application_name"] = "millrace-client"
	}
	if o.Configure != nil {
		o.Configure(cfg)
	}
	pgstream.FitProxies(cfg)
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("open the pool: %w", err)
	}
	return pool, nil
}

func set(d *time.Duration, v time.Duration) {
	if v > 0 {
		*d = v
	}
}
