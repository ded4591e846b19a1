package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel/trace"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

// Options of a Client. Zero values mean the defaults named here.
type Options struct {
	// Logger gets every line. Default: slog.Default(). Payloads are never logged; the texts of handlers' errors are.
	Logger *slog.Logger
	// TracerProvider makes OpenTelemetry spans of publishing and handling; otel.GetTracerProvider() is the program's own. nil: no spans, at no cost. The trace
	// context that a caller's ctx or a message's headers have is handed on in either case.
	TracerProvider trace.TracerProvider
	// CallTimeout is how long one call may take, the wait for a connection of the pool included, whatever the caller's ctx allows; default 30s. It holds within the
	// caller's transactions, too. Waiting for messages is no call. Negative: no limit.
	CallTimeout time.Duration
	// Listen is how the connection for notifications is made: it has to reach PostgreSQL directly and not through a pooler by transaction. Default: as the
	// pool's. Where notifications do not arrive, that is logged, and consumers look for messages every PollInterval.
	Listen *pgx.ConnConfig
	// PollInterval is how often a waiting consumer looks by itself; default 1s. Notifications only make waiting shorter.
	PollInterval time.Duration
	// Scout lets this process take turns in waking consumers for what no publisher announces, and in delivering delayed messages, while it consumes or tails.
	// Millrace's manager and processors do that; it is for databases with neither.
	Scout bool
	// Pool is for Open only.
	Pool PoolOptions
}

// Client is a program's access to the streams of one database. Its methods, those of Session included, may be used by many goroutines.
type Client struct {
	// Session has the verbs; on a Client each is a transaction of its own.
	Session

	pool     *pgxpool.Pool
	owned    bool // the pool was opened by Open
	o        Options
	log      *slog.Logger
	tracing  *tracing
	transact chan struct{} // a place for each handler's transaction

	mu         sync.Mutex
	publishers map[string]*pgstream.Publisher
	closed     bool
	listening  listening
}

// Session are the verbs that publish, append and read. See Client.In.
type Session struct {
	c  *Client
	db pgstream.DB
}

// New returns a client on a pool of the caller's, which it does not close. If the pool's connections go through a pooler by transaction such as PgBouncer,
// give Open the address instead, or set default_query_exec_mode=cache_describe. New does not connect.
func New(pool *pgxpool.Pool, o Options) *Client {
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.CallTimeout == 0 {
		o.CallTimeout = 30 * time.Second
	}
	if o.PollInterval <= 0 {
		o.PollInterval = time.Second
	}
	c := &Client{pool: pool, o: o, log: o.Logger, tracing: newTracing(o.TracerProvider), publishers: map[string]*pgstream.Publisher{}}
	// Two connections are left for everything else: a handler that publishes beside its transaction, and claims that have to be extended.
	c.transact = make(chan struct{}, max(int(pool.Config().MaxConns)-2, 1))
	c.Session = Session{c, pool}
	return c
}

// Open opens a pool for a connection string, such as postgres://user:password@host:5432/database, and returns a client on it. It connects, and fails when that is
// not possible within Options.Pool.ConnectTimeout, or when the database has no Millrace schema of a version that this client knows. Close it at the end.
func Open(ctx context.Context, url string, o Options) (*Client, error) {
	pool, err := openPool(ctx, url, o.Pool)
	if err != nil {
		return nil, err
	}
	c := New(pool, o)
	c.owned = true
	call, cancel := context.WithTimeout(ctx, c.connectTimeout())
	defer cancel()
	if err := schema.Check(call, pool); err != nil {
		pool.Close()
		return nil, fmt.Errorf("open the database: %w", err)
	}
	return c, nil
}

// Close ends what the client does in the background, and closes the pool that Open has opened. End Consume and Tail before.
func (c *Client) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	if c.owned {
		c.pool.Close()
	}
}

// Pool returns the client's pool, for the program's own SQL and transactions.
func (c *Client) Pool() *pgxpool.Pool { return c.pool }

// In returns the verbs within the caller's transaction: what they publish and append is there when it commits, and never was when it rolls back. Like every error
// within a transaction of PostgreSQL, one of these leaves nothing to do but to roll back.
func (c *Client) In(tx pgx.Tx) Session { return Session{c, tx} }

// Transaction runs f in a transaction at READ COMMITTED, which is committed when f returns nil and rolled back otherwise, also when it panics.
func (c *Client) Transaction(ctx context.Context, f func(tx pgx.Tx) error) error {
	return pgx.BeginTxFunc(ctx, c.pool, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, f)
}

// limit is ctx for one call.
func (c *Client) limit(ctx context.Context) (context.Context, context.CancelFunc) {
	if c.o.CallTimeout < 0 {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, c.o.CallTimeout)
}

// callTimeout is the limit as the engine takes it. There is always one, because without it a receive that has been sent is cut short by its ctx.
func (c *Client) callTimeout() time.Duration {
	if c.o.CallTimeout < 0 {
		return 24 * time.Hour
	}
	return c.o.CallTimeout
}

func (c *Client) connectTimeout() time.Duration {
	if t := c.pool.Config().ConnConfig.ConnectTimeout; t > 0 {
		return t
	}
	return defaultConnectTimeout
}

// publisher returns what is known of a stream, and asks db when that is nothing yet.
func (c *Client) publisher(ctx context.Context, db pgstream.DB, stream string) (*pgstream.Publisher, error) {
	c.mu.Lock()
	p := c.publishers[stream]
	c.mu.Unlock()
	if p != nil {
		return p, nil
	}
	p, err := pgstream.NewPublisher(ctx, db, stream)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.publishers[stream] = p
	return p, nil
}

// forget makes the next publish ask again: the stream may have been dropped, or made anew with another type of payload.
func (c *Client) forget(stream string, err error) {
	if err == nil || IsTransient(err) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.publishers, stream)
}

var errClosed = errors.New("the client is closed")
