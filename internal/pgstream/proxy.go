package pgstream

import (
	"context"
	"strconv"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// FitProxies makes a pool fit for a proxy that pools by transaction, such as PgBouncer. There, a prepared statement is in one server connection, and the
// next transaction may be in another. pgx prepares statements unless its connections are made with another default_query_exec_mode, so before the pool's
// first connection a short one finds out whether a proxy stands in between, and then statements are only described (cache_describe). Other modes that a
// connection string asks for are left alone.
func FitProxies(cfg *pgxpool.Config) {
	var mu sync.Mutex
	var known, proxied bool
	before := cfg.BeforeConnect
	cfg.BeforeConnect = func(ctx context.Context, c *pgx.ConnConfig) error {
		if before != nil {
			if err := before(ctx, c); err != nil {
				return err
			}
		}
		if c.DefaultQueryExecMode != pgx.QueryExecModeCacheStatement {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		if !known {
			found, err := isProxied(ctx, c)
			if err != nil {
				return err
			}
			known, proxied = true, found
		}
		if proxied {
			c.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
		}
		return nil
	}
}

func isProxied(ctx context.Context, cfg *pgx.ConnConfig) (bool, error) {
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return false, err
	}
	defer func() { _ = conn.Close(ctx) }()
	direct, err := isDirect(ctx, conn, "")
	return !direct, err
}

// isDirect runs a statement, if any, and says whether the connection leads to the very backend that it was told at its beginning: a proxy gives its clients
// numbers of its own. In the simple protocol, because a proxy may not know prepared statements.
func isDirect(ctx context.Context, conn *pgx.Conn, statement string) (bool, error) {
	results, err := conn.PgConn().Exec(ctx, statement+"select pg_backend_pid()").ReadAll()
	if err != nil {
		return false, err
	}
	pid := results[len(results)-1].Rows[0][0]
	return string(pid) == strconv.FormatUint(uint64(conn.PgConn().PID()), 10), nil
}
