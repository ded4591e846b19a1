package database

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"k8s.io/utils/clock"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

// Options of a Registry. Zero values mean the defaults named here.
type Options struct {
	// MaxConns per database. Default 4.
	MaxConns int32
	// ConnectTimeout of one attempt to connect. Default 5s.
	ConnectTimeout time.Duration
	// StatementTimeout in the server. Default 20s.
	StatementTimeout time.Duration
	// LockTimeout in the server. Default 5s: a lock that does not come is tried again later, and nobody queues behind us.
	LockTimeout time.Duration
	// CallTimeout bounds one call of Do, answer or not. Default 30s.
	CallTimeout time.Duration
	// MigrateTimeout bounds the migration before the first call. Default 2m.
	MigrateTimeout time.Duration
	// IdleAfter is how long a database that no resource asks for keeps its pool. Default 30m. It has to be longer than the
	// interval of verification.
	IdleAfter time.Duration
	// Migration says what may be done to databases whose schema is not this manager's. Default schema.CreateOrUpdate.
	Migration schema.Policy
	// Migrated is told which versions were applied to a database. Optional.
	Migrated func(d *Database, versions []int)
	// Changed is told when a database is lost, or found again. Optional.
	Changed func(d *Database)
	// Clock for tests. Default: the real one.
	Clock clock.PassiveClock
}

// Registry holds one Database per connection string.
type Registry struct {
	opts Options

	mu        sync.Mutex
	databases map[ID]*Database
	closed    bool
}

// ID identifies a database by a hash of its connection string.
type ID string

// NewRegistry returns an empty registry. Run it to let go of idle pools.
func NewRegistry(o Options) *Registry {
	setDefault(&o.MaxConns, 4)
	setDefault(&o.ConnectTimeout, 5*time.Second)
	setDefault(&o.StatementTimeout, 20*time.Second)
	setDefault(&o.LockTimeout, 5*time.Second)
	setDefault(&o.CallTimeout, 30*time.Second)
	setDefault(&o.MigrateTimeout, 2*time.Minute)
	setDefault(&o.IdleAfter, 30*time.Minute)
	setDefault(&o.Migration, schema.CreateOrUpdate)
	if o.Clock == nil {
		o.Clock = clock.RealClock{}
	}
	return &Registry{opts: o, databases: map[ID]*Database{}}
}

func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// errNotAConnectionString says nothing of the value, which may hold a password.
var errNotAConnectionString = errors.New("the value is not a PostgreSQL connection string; " +
	"write postgres://user:password@host:5432/database, with special characters in the password percent-encoded")

// Get returns the database of a connection string. It connects to nothing.
func (r *Registry) Get(dsn string) (*Database, error) {
	cfg, err := pgxpool.ParseConfig(dsn)
	if err != nil || cfg.ConnConfig.Host == "" || cfg.ConnConfig.Database == "" {
		return nil, errNotAConnectionString
	}
	sum := sha256.Sum256([]byte(dsn))
	id := ID(hex.EncodeToString(sum[:16]))

	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, errors.New("the manager is stopping")
	}
	d, ok := r.databases[id]
	if !ok {
		d = r.open(id, cfg)
		r.databases[id] = d
	}
	d.used = r.opts.Clock.Now()
	return d, nil
}

// holds says whether the registry still has a database, and then keeps its pool for longer.
func (r *Registry) holds(d *Database) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.databases[d.id] != d {
		return false
	}
	d.used = r.opts.Clock.Now()
	return true
}

func (r *Registry) open(id ID, cfg *pgxpool.Config) *Database {
	c := cfg.ConnConfig
	cfg.MaxConns = r.opts.MaxConns
	cfg.MinConns = 0
	// Idle databases keep no connection: a thousand of them must not cost a thousand backends.
	cfg.MaxConnIdleTime = time.Minute
	cfg.HealthCheckPeriod = 30 * time.Second
	c.ConnectTimeout = r.opts.ConnectTimeout
	c.RuntimeParams["application_name"] = "millrace-manager"
	c.RuntimeParams["statement_timeout"] = strconv.FormatInt(r.opts.StatementTimeout.Milliseconds(), 10)
	c.RuntimeParams["lock_timeout"] = strconv.FormatInt(r.opts.LockTimeout.Milliseconds(), 10)
	// A manager that vanishes in the middle of a change must not hold its locks for long.
	c.RuntimeParams["idle_in_transaction_session_timeout"] = "60000"
	pgstream.FitProxies(cfg)
	return &Database{
		registry: r, id: id, config: cfg,
		host: net.JoinHostPort(c.Host, strconv.Itoa(int(c.Port))), name: c.Database, user: c.User,
		breaker: &breaker{clock: r.opts.Clock},
		turns:   make(chan struct{}, r.opts.MaxConns), altering: make(chan struct{}, 1),
	}
}

// Active returns the databases that resources have asked for lately.
func (r *Registry) Active() []*Database {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]*Database, 0, len(r.databases))
	for _, d := range r.databases {
		all = append(all, d)
	}
	return all
}

// Run closes pools that nobody uses, until ctx ends; then it closes all.
func (r *Registry) Run(ctx context.Context) error {
	tick := time.NewTicker(r.opts.IdleAfter / 4)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			r.evict()
		case <-ctx.Done():
			r.mu.Lock()
			r.closed = true
			all := r.databases
			r.databases = map[ID]*Database{}
			r.mu.Unlock()
			for _, d := range all {
				d.close()
			}
			return nil
		}
	}
}

// errShut is for who follows a database by a connection string that is no more, such as one with an old password.
var errShut = phase.Waitf(v1alpha1.ReasonDatabaseUnreachable, time.Second, "the connection string in the Secret has changed, and the new one is not in use yet")

// forget closes a database that no connection string leads to any more: with an old password, its server would see failed logins.
func (r *Registry) forget(d *Database) {
	r.mu.Lock()
	if r.databases[d.id] == d {
		delete(r.databases, d.id)
	}
	r.mu.Unlock()
	if pool := d.detach(); pool != nil {
		go pool.Close() // which waits for the calls that are under way
	}
}

// evict closes what was not asked for within IdleAfter.
func (r *Registry) evict() {
	var idle []*Database
	r.mu.Lock()
	for id, d := range r.databases {
		if r.opts.Clock.Since(d.used) > r.opts.IdleAfter {
			idle = append(idle, d)
			delete(r.databases, id)
		}
	}
	r.mu.Unlock()
	for _, d := range idle {
		d.close()
	}
}

// Database is one PostgreSQL database with its pool and breaker.
type Database struct {
	registry         *Registry
	id               ID
	config           *pgxpool.Config
	host, name, user string
	breaker          *breaker
	turns            chan struct{} // as many as connections, so that waiting for one is waiting here, where it is bounded
	altering         chan struct{} // the turn of Alter
	used             time.Time     // guarded by registry.mu

	mu         sync.Mutex
	pool       *pgxpool.Pool
	migrated   bool
	shut       bool
	maintained time.Time // when upkeep last ran to its end
}

// ID identifies the database.
func (d *Database) ID() ID { return d.id }

// String names the database for a person: name and address, no secret.
func (d *Database) String() string { return fmt.Sprintf("database %q at %s", d.name, d.host) }

// SameAs says whether two connection strings lead to the same database, perhaps as different users.
func (d *Database) SameAs(o *Database) bool { return d.host == o.host && d.name == o.name }

// Reachable says whether the last call got an answer.
func (d *Database) Reachable() bool { return d.breaker.closed() }

// turnWait bounds the wait for one of the database's connections. It is short, because the caller is a worker that other
// databases need.
const turnWait = 500 * time.Millisecond

// Touch says that somebody still follows this database, so that its pool is kept.
func (d *Database) Touch() {
	d.registry.mu.Lock()
	defer d.registry.mu.Unlock()
	d.used = d.registry.opts.Clock.Now()
}

// ErrNoSchema means that the engine was never installed in a database.
var ErrNoSchema = errors.New("the database has no Millrace schema")

// Look is Do for whoever must not be the first to make something in the database: one without the engine's schema stays without it, f is
// not called, and the error is ErrNoSchema, which asks to come again. A schema of an earlier version is brought up as Do does it, because
// f could not read it.
func (d *Database) Look(ctx context.Context, f func(ctx context.Context, db pgstream.DB) error) error {
	return d.do(ctx, d.registry.opts.CallTimeout, false, f)
}

// Do calls f with a connection to the migrated database. Its errors carry their handling (package phase): unreachable and
// read-only databases wait, refused users and missing privileges stall, and a database whose connections are all busy asks
// to come again. What f returns is passed on, classified in the same way.
func (d *Database) Do(ctx context.Context, f func(ctx context.Context, db pgstream.DB) error) error {
	return d.do(ctx, d.registry.opts.CallTimeout, true, f)
}

// do is Do with a time limit, and Look unless it may install the schema. Only a call within CallTimeout says by its lateness that the database is lost: upkeep may be
// long because there is much of it.
func (d *Database) do(ctx context.Context, limit time.Duration, install bool, f func(ctx context.Context, db pgstream.DB) error) error {
	ok, after, cause := d.breaker.admit()
	if !ok {
		return d.refused(after, cause)
	}
	return d.admitted(ctx, limit, install, f)
}

// probe asks a database that was lost whether it is back. Nobody but the caller waits for the answer.
func (d *Database) probe(ctx context.Context) {
	if d.breaker.probe() {
		_ = d.admitted(ctx, d.registry.opts.CallTimeout, false, func(ctx context.Context, db pgstream.DB) error {
			_, err := db.Exec(ctx, "select 1")
			return err
		})
	}
}

// admitted is do for a caller that the breaker let through.
func (d *Database) admitted(ctx context.Context, limit time.Duration, install bool, f func(ctx context.Context, db pgstream.DB) error) error {
	select {
	case d.turns <- struct{}{}:
	default:
		timer := time.NewTimer(turnWait)
		defer timer.Stop()
		select {
		case d.turns <- struct{}{}:
		case <-timer.C:
			d.breaker.abandon()
			return busy(d)
		case <-ctx.Done():
			d.breaker.abandon()
			return ctx.Err()
		}
	}
	defer func() { <-d.turns }()

	err := d.call(ctx, limit, install, f)
	if ctx.Err() != nil || limit > d.registry.opts.CallTimeout && errors.Is(err, context.DeadlineExceeded) {
		d.breaker.abandon()
		return err
	}
	var lost error
	if unreachable(err) {
		lost = err
	}
	if d.breaker.report(lost) && d.registry.opts.Changed != nil {
		d.registry.opts.Changed(d)
	}
	return d.classify(err)
}

func (d *Database) call(ctx context.Context, limit time.Duration, install bool, f func(ctx context.Context, db pgstream.DB) error) error {
	pool, migrated, err := d.open(ctx)
	if err != nil {
		return err
	}
	if !migrated {
		if err := d.migrate(ctx, pool, install); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return pool.AcquireFunc(ctx, func(conn *pgxpool.Conn) error { return f(ctx, conn) })
}

func (d *Database) open(ctx context.Context) (*pgxpool.Pool, bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.shut {
		return nil, false, errShut
	}
	if d.pool == nil {
		// The pool outlives the reconcile that opens it; it connects on demand.
		pool, err := pgxpool.NewWithConfig(context.WithoutCancel(ctx), d.config)
		if err != nil {
			return nil, false, err
		}
		d.pool = pool
	}
	return d.pool, d.migrated, nil
}

// migrate brings the engine's schema to this binary's version. Callers at the same time are harmless: Migrate takes an
// advisory lock, and until a first call was answered there is only one. Unless install is set it leaves a database alone that has none.
func (d *Database) migrate(ctx context.Context, pool *pgxpool.Pool, install bool) error {
	ctx, cancel := context.WithTimeout(ctx, d.registry.opts.MigrateTimeout)
	defer cancel()
	var versions []int
	err := pool.AcquireFunc(ctx, func(conn *pgxpool.Conn) error {
		if !install {
			if installed, err := schema.Installed(ctx, conn); err != nil {
				return err
			} else if !installed {
				return phase.Again(breakerFirst, fmt.Errorf("%s: %w", d, ErrNoSchema))
			}
		}
		policy := d.registry.opts.Migration
		var err error
		if _, versions, err = schema.Apply(ctx, conn.Conn(), policy, "", schema.Options{}); err != nil || policy == schema.CreateOrUpdate {
			return err
		}
		if err := schema.Check(ctx, conn); err != nil {
			return fmt.Errorf("the migration policy %s lets this manager not do it: %w", policy, err)
		}
		return nil
	})
	if phase.IsAgain(err) {
		return err
	}
	if err != nil {
		return &migrationError{err}
	}
	d.mu.Lock()
	d.migrated = true
	d.mu.Unlock()
	if len(versions) > 0 && d.registry.opts.Migrated != nil {
		d.registry.opts.Migrated(d, versions)
	}
	return nil
}

// forgetSchema makes the next call migrate again: the schema was found missing.
func (d *Database) forgetSchema() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.migrated = false
}

func (d *Database) maintainedAt() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.maintained
}

func (d *Database) noteMaintained(at time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.maintained = at
}

func (d *Database) close() {
	if pool := d.detach(); pool != nil {
		pool.Close()
	}
}

// detach lets no further call in, and returns the pool that is left to close, if there is one.
func (d *Database) detach() *pgxpool.Pool {
	d.mu.Lock()
	defer d.mu.Unlock()
	pool := d.pool
	d.pool, d.shut = nil, true
	return pool
}

var _ pgstream.DB = (*pgx.Conn)(nil)

// Check says what is wrong with a connection string, and nothing of what it is.
func Check(dsn string) error {
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil || cfg.Host == "" || cfg.Database == "" {
		return errNotAConnectionString
	}
	return nil
}
