// Package schema holds the engine's SQL and brings a database to it.
//
// migrations/ is history: numbered, run once each, frozen once released. functions/ is replaced whole whenever its text changes, one file per
// concern. An upgrade is one transaction under an advisory lock, and the version is read again after the lock, so any number of processes
// can start at once and each version is applied once. One transaction, and not one per version, because between the tables of one version and the functions
// of another every publisher and consumer would fail.
//
// This is our own hundred lines because the libraries we looked at (goose, tern, golang-migrate) serialise with a session-level
// lock, which a transaction-pooling proxy breaks, and have no notion of functions that are replaced whole.
package schema

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

//go:embed migrations/*.sql
var migrationFiles embed.FS

//go:embed functions/*.sql
var functionFiles embed.FS

// lockTimeout bounds how long a migration waits for a table that applications use. A migration that cannot have its lock fails
// and is tried again later, rather than making every publisher queue behind it.
const (
	lockTimeout = 5 * time.Second
	attempts    = 3
)

// previousRelease is the schema version of the release before this one.
const previousRelease = 1

var (
	// ErrNewer means that the database was migrated by a newer binary than this one.
	ErrNewer = errors.New("the database schema is newer than this binary")
	// ErrOlder means that the database has not been migrated far enough for this binary.
	ErrOlder = errors.New("the database schema is older than this binary can use")
)

// noSchemaError is ErrOlder for a database that has no schema at all.
type noSchemaError struct{}

func (noSchemaError) Error() string {
	return "the database has no Millrace schema: the manager makes it for the first Stream of this database, or you with millrace migrate run"
}

func (noSchemaError) Is(target error) bool { return target == ErrOlder }

// Options of Migrate.
type Options struct {
	// RuntimeRole, when set, is an existing role that gets what publishing and consuming need, and no DDL. Grant it to the login
	// roles of applications. Empty: the role that was named last, if any.
	RuntimeRole string
}

type migration struct {
	version int
	name    string
	sql     string
}

// Version is the schema version that this binary knows.
func Version() int {
	all := migrations()
	return all[len(all)-1].version
}

// Migrate brings the database to this binary's version and returns the versions it applied. Any number of processes may call
// it at once. It returns ErrNewer, and changes nothing, when the database is newer than the binary.
//
// Of two binaries of one version whose functions differ, the last to call it wins. Released binaries cannot meet like that, because every release
// that changes a function has a version of its own.
func Migrate(ctx context.Context, conn *pgx.Conn, opts Options) ([]int, error) {
	for attempt := 1; ; attempt++ {
		applied, err := migrate(ctx, conn, opts)
		var pg *pgconn.PgError
		if attempt == attempts || !errors.As(err, &pg) || (pg.Code != "55P03" && pg.Code != "40P01") {
			return applied, err
		}
		// A table was in use. Let those who queue behind us go first.
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(time.Duration(attempt) * 100 * time.Millisecond):
		}
	}
}

// Check says whether this binary can work with the database as it is: for processes that must not migrate it. The schema of the previous release will
// do, so that an upgrade can begin with either side. ErrNewer or ErrOlder say who has to be upgraded.
func Check(ctx context.Context, db queryer) error {
	current, err := version(ctx, db)
	switch {
	case err != nil:
		return fmt.Errorf("read the schema version: %w", err)
	case current > Version():
		return newer(current)
	case current == 0:
		return noSchemaError{}
	case current < previousRelease:
		return fmt.Errorf("%w: it has version %d, this binary needs %d or more; let the manager of this release migrate it, or run an older Millrace",
			ErrOlder, current, previousRelease)
	}
	return nil
}

// Installed says whether the database has this schema, in whatever version.
func Installed(ctx context.Context, db queryer) (bool, error) {
	current, err := version(ctx, db)
	if err != nil {
		return false, fmt.Errorf("read the schema version: %w", err)
	}
	return current > 0, nil
}

// SQL returns everything that Migrate would run on an empty database, for review or for those who apply it by other means.
func SQL() string { return State{}.SQL() }

const bootstrap = `create schema if not exists millrace_engine;
create table if not exists millrace_engine.schema_version (
    version    integer not null,
    applied_at timestamptz not null default now(),
    functions  text,                        -- hash of the functions that belong to it
    constraint schema_version_pkey primary key (version)
);
`

// migrate does everything in one transaction, so that nobody ever meets the tables of one version with the functions of another.
func migrate(ctx context.Context, conn *pgx.Conn, opts Options) (applied []int, err error) {
	// The common case, nothing to do, takes no lock.
	if same, err := upToDate(ctx, conn, opts); err != nil || same {
		return nil, err
	}
	err = locked(ctx, conn, func(tx pgx.Tx) error {
		if same, err := upToDate(ctx, tx, opts); err != nil || same {
			return err
		}
		current, err := version(ctx, tx)
		if err != nil {
			return err
		}
		if current > 0 && current < Version() {
			if err := lockTables(ctx, tx); err != nil {
				return fmt.Errorf("lock the engine's tables: %w", err)
			}
		}
		applied, err = install(ctx, tx, current, opts)
		return err
	})
	if err != nil {
		return nil, err
	}
	return applied, nil
}

// install runs what a database of some version lacks, and returns the versions that it applied.
func install(ctx context.Context, tx pgx.Tx, current int, opts Options) (applied []int, err error) {
	if current == 0 {
		if _, err := tx.Exec(ctx, bootstrap); err != nil {
			return nil, fmt.Errorf("create the schema: %w", err)
		}
	}
	for _, m := range migrations() {
		if m.version <= current {
			continue
		}
		if _, err := tx.Exec(ctx, m.sql); err != nil {
			return nil, fmt.Errorf("migrate to version %d (%s): %w", m.version, m.name, err)
		}
		if _, err := tx.Exec(ctx, "insert into millrace_engine.schema_version (version) values ($1)", m.version); err != nil {
			return nil, fmt.Errorf("migrate to version %d (%s): %w", m.version, m.name, err)
		}
		applied = append(applied, m.version)
	}
	if err := replaceFunctions(ctx, tx, opts); err != nil {
		return nil, fmt.Errorf("install the engine's functions: %w", err)
	}
	return applied, nil
}

// lockTables keeps everybody out of the engine's tables until the upgrade is done, without a deadlock: applications lock them in different orders, so
// it never waits for one of them while it holds another one that they may come to. Whoever receives, gives back or leaves looks at the groups first,
// and who publishes at the streams; when these have been waited for, only short settlements are left, and the other tables are taken all at once or not at all.
func lockTables(ctx context.Context, tx pgx.Tx) error {
	for _, table := range []string{"millrace_engine.consumer_group", "millrace_engine.stream"} {
		if _, err := tx.Exec(ctx, "lock table "+table+" in access exclusive mode"); err != nil {
			return err
		}
	}
	var rest string
	err := tx.QueryRow(ctx, `select string_agg(c.oid::regclass::text, ', ' order by c.relname) from pg_catalog.pg_class c
		where c.relnamespace = 'millrace_engine'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition`).Scan(&rest)
	if err != nil {
		return err
	}
	for start := time.Now(); ; {
		err := pgx.BeginFunc(ctx, tx, func(savepoint pgx.Tx) error {
			_, err := savepoint.Exec(ctx, "lock table "+rest+" in access exclusive mode nowait")
			return err
		})
		var pg *pgconn.PgError
		if err == nil || !errors.As(err, &pg) || pg.Code != "55P03" || time.Since(start) > lockTimeout {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// listTemplates notes which functions each stream has copies of. Looking for them by the end of their names reads all functions of the database, so a new
// stream would cost the more, the more streams there are.
const listTemplates = `insert into millrace_engine.setting (name, value)
    select 'templates', string_agg(p.proname, ' ' order by p.proname) from pg_proc p
        where p.pronamespace = 'millrace_engine'::regnamespace and p.proname like '%\_template'
    on conflict (name) do update set value = excluded.value`

// installRings makes the functions that are written with one ring of the ledgers and belong to no stream.
const installRings = `select millrace_engine.install_rings()`

// copyTemplates brings the copies that streams and memories have to the functions' new text.
const copyTemplates = `select millrace_engine.install_functions(s.id) from millrace_engine.stream s;
select millrace_engine.install_memory(m.id) from millrace_engine.memory m`

// replaceFunctions installs the functions, the copies that each stream and each memory has, and what the runtime role may do.
func replaceFunctions(ctx context.Context, tx pgx.Tx, opts Options) error {
	for _, name := range files(functionFiles, "functions") {
		if _, err := tx.Exec(ctx, read(functionFiles, "functions/"+name)); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	for _, sql := range []string{listTemplates, installRings} {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return err
		}
	}
	role, err := runtimeRole(ctx, tx, opts)
	if err != nil {
		return err
	}
	if role != "" {
		if err := grant(ctx, tx, role); err != nil {
			return fmt.Errorf("grant to the runtime role: %w", err)
		}
	}
	if _, err := tx.Exec(ctx, copyTemplates); err != nil {
		return err
	}
	_, err = tx.Exec(ctx, "update millrace_engine.schema_version set functions = $1 where version = $2", installed(role), Version())
	return err
}

// runtimeRole is the role asked for, else the one that the database has already: whoever upgrades need not know of it.
func runtimeRole(ctx context.Context, q queryer, opts Options) (string, error) {
	if opts.RuntimeRole != "" {
		return opts.RuntimeRole, nil
	}
	var role string
	err := q.QueryRow(ctx, "select coalesce((select value from millrace_engine.setting where name = 'runtime_role'), '')").Scan(&role)
	return role, err
}

// installed is how schema_version remembers which functions there are, and for whom.
func installed(role string) string { return functionsHash() + "/" + role }

// upToDate says whether there is nothing to do. ErrNewer when there is nothing that this binary may do.
func upToDate(ctx context.Context, q queryer, opts Options) (bool, error) {
	current, err := version(ctx, q)
	if err != nil || current < Version() {
		return false, err
	}
	if current > Version() {
		return false, newer(current)
	}
	role, err := runtimeRole(ctx, q, opts)
	if err != nil {
		return false, err
	}
	var same bool
	err = q.QueryRow(ctx, "select coalesce((select functions = $1 from millrace_engine.schema_version where version = $2), false)",
		installed(role), current).Scan(&same)
	return same, err
}

func newer(current int) error {
	return fmt.Errorf("%w: it has version %d, this binary knows up to %d; run a newer Millrace", ErrNewer, current, Version())
}

// grants are the statements that give role what publishing and consuming need.
func grants(role string) []string {
	to := pgx.Identifier{role}.Sanitize()
	return []string{
		"grant usage on schema millrace, millrace_engine to " + to,
		"grant execute on all functions in schema millrace, millrace_engine to " + to,
		"grant select on all tables in schema millrace, millrace_engine to " + to,
		"grant insert on millrace_engine.claim, millrace_engine.claim_0, millrace_engine.claim_1, millrace_engine.claim_2 to " + to,
		"grant insert on millrace_engine.settlement, millrace_engine.settlement_0, millrace_engine.settlement_1, millrace_engine.settlement_2 to " + to,
		"grant insert, update, delete on millrace_engine.delivery, millrace_engine.dead_letter, millrace_engine.member, millrace_engine.lane, millrace_engine.parked_key to " + to,
		"grant update (parks, recheck_at) on millrace_engine.consumer_group to " + to,
		"grant update, delete on millrace_engine.group_activity to " + to,
		"grant insert, update, delete on millrace_engine.dedupe, millrace_engine.delayed to " + to,
		"grant update on millrace_engine.scout to " + to,
		"grant insert, update on millrace_engine.entity to " + to,
		"grant insert on millrace_engine.live_frame, millrace_engine.live_frame_0, millrace_engine.live_frame_1 to " + to,
		"grant insert, update on millrace_engine.frame_summary, millrace_engine.frame_waiter to " + to,
		// Looking at them is what consuming needs. Those that a stream's publishers move are granted with the stream (stream_repairs.sql).
		"grant select on all sequences in schema millrace_engine to " + to,
		"grant usage on sequence millrace_engine.memory_token to " + to,
		// Version 1 let the role move them, and whoever moves a ring by hand loses what is in it.
		"revoke usage on sequence millrace_engine.ring, millrace_engine.live_frame_ring, millrace_engine.live_frame_kept from " + to,
	}
}

// grant gives role what publishing and consuming need.
func grant(ctx context.Context, tx pgx.Tx, role string) error {
	for _, sql := range grants(role) {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return err
		}
	}
	_, err := tx.Exec(ctx, `insert into millrace_engine.setting (name, value) values ('runtime_role', $1)
		on conflict (name) do update set value = excluded.value`, role)
	return err
}

// locked runs f in a transaction that no other migration of this database runs beside.
func locked(ctx context.Context, conn *pgx.Conn, f func(pgx.Tx) error) error {
	// Under another level, the version that is read again after the lock would be the one from before it.
	return pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, fmt.Sprintf("set local lock_timeout = '%dms'", lockTimeout.Milliseconds())); err != nil {
			return err
		}
		// Waiting for another migration is not waiting for an application's table, so the lock timeout must not end it.
		for {
			var got bool
			if err := tx.QueryRow(ctx, "select pg_try_advisory_xact_lock(1836019570, 0)").Scan(&got); err != nil {
				return err
			}
			if got {
				break
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(50 * time.Millisecond):
			}
		}
		return f(tx)
	})
}

type queryer interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

func version(ctx context.Context, q queryer) (int, error) {
	var exists bool
	// Not by to_regclass, which reads a cache that may be older than the lock that was just taken.
	if err := q.QueryRow(ctx, `select exists (select from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
		where n.nspname = 'millrace_engine' and c.relname = 'schema_version')`).Scan(&exists); err != nil || !exists {
		return 0, err
	}
	var v int
	err := q.QueryRow(ctx, "select coalesce(max(version), 0) from millrace_engine.schema_version").Scan(&v)
	return v, err
}

func migrations() []migration {
	var all []migration
	for _, name := range files(migrationFiles, "migrations") {
		number, _, _ := strings.Cut(name, "_")
		v, err := strconv.Atoi(number)
		if err != nil {
			panic("schema: migration without a number: " + name)
		}
		all = append(all, migration{version: v, name: strings.TrimSuffix(name, ".sql"), sql: read(migrationFiles, "migrations/"+name)})
	}
	return all
}

func functions() []string {
	var all []string
	for _, name := range files(functionFiles, "functions") {
		all = append(all, read(functionFiles, "functions/"+name))
	}
	return all
}

func functionsHash() string {
	sum := sha256.Sum256([]byte(strings.Join(functions(), "\x00")))
	return hex.EncodeToString(sum[:8])
}

// files lists a directory of the embedded SQL in order of name.
func files(from embed.FS, dir string) []string {
	entries, err := fs.ReadDir(from, dir)
	if err != nil {
		panic("schema: " + err.Error())
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	slices.Sort(names)
	return names
}

func read(from embed.FS, path string) string {
	b, err := from.ReadFile(path)
	if err != nil {
		panic("schema: " + err.Error())
	}
	return string(b)
}
