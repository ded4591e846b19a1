// Package schema holds the engine's SQL and brings a database to it.
//
// migrations/ is history: numbered, run once each, frozen once released. functions/ is replaced whole whenever its text changes, one file per
// concern. Everything a version needs happens in one transaction under an advisory lock, and the version is read again after the
// lock, so any number of processes can start at once and each version is applied once.
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
)

//go:embed migrations/*.sql
var migrationFiles embed.FS

//go:embed functions/*.sql
var functionFiles embed.FS

// lockTimeout bounds how long a migration waits for a table that applications use. A migration that cannot have its lock fails
// and is tried again later, rather than making every publisher queue behind it.
const lockTimeout = 5 * time.Second

// ErrNewer means that the database was migrated by a newer binary than this one.
var ErrNewer = errors.New("the database schema is newer than this binary")

// Options of Migrate.
type Options struct {
	// RuntimeRole, when set, is an existing role that gets what publishing and consuming need, and no DDL. Grant it to the login
	// roles of applications.
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
func Migrate(ctx context.Context, conn *pgx.Conn, opts Options) ([]int, error) {
	var applied []int
	all := migrations()
	for _, m := range all {
		done, err := step(ctx, conn, m, all[len(all)-1].version)
		if err != nil {
			return applied, fmt.Errorf("migrate to version %d (%s): %w", m.version, m.name, err)
		}
		if done {
			applied = append(applied, m.version)
		}
	}
	if err := replaceFunctions(ctx, conn, opts); err != nil {
		return applied, fmt.Errorf("install the engine's functions: %w", err)
	}
	return applied, nil
}

// SQL returns everything that Migrate would run on an empty database, for review or for those who apply it by other means.
func SQL() string {
	var b strings.Builder
	b.WriteString(bootstrap)
	for _, m := range migrations() {
		fmt.Fprintf(&b, "\n%s\ninsert into millrace_engine.schema_version (version) values (%d);\n", m.sql, m.version)
	}
	for _, f := range functions() {
		b.WriteString("\n" + f)
	}
	fmt.Fprintf(&b, "\nupdate millrace_engine.schema_version set functions = '%s' where version = %d;\n", functionsHash(), Version())
	return b.String()
}

const bootstrap = `create schema if not exists millrace_engine;
create table if not exists millrace_engine.schema_version (
    version    integer not null,
    applied_at timestamptz not null default now(),
    functions  text,                        -- hash of the functions that belong to it
    constraint schema_version_pkey primary key (version)
);
`

func step(ctx context.Context, conn *pgx.Conn, m migration, newest int) (bool, error) {
	// The common case, nothing to do, takes no lock.
	if current, err := version(ctx, conn); err != nil {
		return false, err
	} else if current > newest {
		return false, fmt.Errorf("%w: it has version %d, this binary knows up to %d; run a newer Millrace", ErrNewer, current, newest)
	} else if current >= m.version {
		return false, nil
	}
	done := false
	err := locked(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, bootstrap); err != nil {
			return err
		}
		current, err := version(ctx, tx)
		if err != nil || current >= m.version {
			return err
		}
		if _, err := tx.Exec(ctx, m.sql); err != nil {
			return err
		}
		done = true
		_, err = tx.Exec(ctx, "insert into millrace_engine.schema_version (version) values ($1)", m.version)
		return err
	})
	return done && err == nil, err
}

// replaceFunctions installs the functions when their text differs from what the database has, and the copies that each stream has.
func replaceFunctions(ctx context.Context, conn *pgx.Conn, opts Options) error {
	hash := functionsHash() + "/" + opts.RuntimeRole
	if same, err := functionsAre(ctx, conn, hash); err != nil || same {
		return err
	}
	return locked(ctx, conn, func(tx pgx.Tx) error {
		if same, err := functionsAre(ctx, tx, hash); err != nil || same {
			return err
		}
		for _, f := range functions() {
			if _, err := tx.Exec(ctx, f); err != nil {
				return err
			}
		}
		if opts.RuntimeRole != "" {
			if err := grant(ctx, tx, opts.RuntimeRole); err != nil {
				return fmt.Errorf("grant to the runtime role: %w", err)
			}
		}
		if _, err := tx.Exec(ctx, "select millrace_engine.install_functions(s.id) from millrace_engine.stream s"); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "update millrace_engine.schema_version set functions = $1 where version = $2", hash, Version())
		return err
	})
}

// grant gives role what publishing and consuming need.
func grant(ctx context.Context, tx pgx.Tx, role string) error {
	to := pgx.Identifier{role}.Sanitize()
	for _, sql := range []string{
		"grant usage on schema millrace, millrace_engine to " + to,
		"grant execute on all functions in schema millrace, millrace_engine to " + to,
		"grant select on all tables in schema millrace, millrace_engine to " + to,
		"grant insert on millrace_engine.claim, millrace_engine.settlement to " + to,
		"grant insert, update, delete on millrace_engine.delivery, millrace_engine.dead_letter, millrace_engine.member, millrace_engine.lane to " + to,
		"grant usage, select on all sequences in schema millrace_engine to " + to,
	} {
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
	if err := q.QueryRow(ctx, "select to_regclass('millrace_engine.schema_version') is not null").Scan(&exists); err != nil || !exists {
		return 0, err
	}
	var v int
	err := q.QueryRow(ctx, "select coalesce(max(version), 0) from millrace_engine.schema_version").Scan(&v)
	return v, err
}

func functionsAre(ctx context.Context, q queryer, hash string) (bool, error) {
	var same bool
	err := q.QueryRow(ctx, "select coalesce((select functions = $1 from millrace_engine.schema_version where version = $2), false)",
		hash, Version()).Scan(&same)
	return same, err
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
