package seeds

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

func TestMain(m *testing.M) { os.Exit(postgres.Main(m, postgres.Options{})) }

// limit is how long one test may take, on a machine that has much else to do. Tests wait for what they need and not for time.
const limit = 3 * time.Minute

// The application's role of every test's database: it may use the functions of Millrace, and owns nothing.
const (
	runtimeRole = "seeds_runtime"
	appRole     = "seeds_app"
	appPassword = "seeds"
)

// database is a database of one test's own, with the newest schema.
type database struct {
	t     testing.TB
	ctx   context.Context // ends with the test, or before it takes too long
	owner *pgxpool.Pool   // of whoever makes streams and groups
	app   *pgxpool.Pool   // of an application: no DDL, no table of its own
	// The same for programs.
	ownerDSN, appDSN string
}

func newDatabase(t testing.TB) *database {
	t.Helper()
	d := &database{t: t, ownerDSN: postgres.NewClone(t, runtimeRole+schema.SQL(), migrate)}
	u, err := url.Parse(d.ownerDSN)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(appRole, appPassword)
	d.appDSN = u.String()
	var cancel context.CancelFunc
	d.ctx, cancel = context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	d.owner, d.app = d.pool(d.ownerDSN), d.pool(d.appDSN)
	return d
}

// migrate makes the database that the tests' are copies of. Roles belong to the server, so an earlier run may have left them.
func migrate(ctx context.Context, dsn string) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer conn.Close(context.Background())
	for _, sql := range []string{
		"create role " + runtimeRole + " nologin",
		"create role " + appRole + " login password '" + appPassword + "' in role " + runtimeRole,
	} {
		if _, err := conn.Exec(ctx, sql); err != nil && sqlState(err) != "42710" {
			return err
		}
	}
	_, err = schema.Migrate(ctx, conn, schema.Options{RuntimeRole: runtimeRole})
	return err
}

func (d *database) pool(dsn string) *pgxpool.Pool {
	d.t.Helper()
	config, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		d.t.Fatal(err)
	}
	config.MaxConns = 8 // whatever the machine has: some tests hold several transactions
	pool, err := pgxpool.NewWithConfig(d.ctx, config)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(pool.Close)
	return pool
}

// connect opens a connection beside the pools; it is closed with the test.
func (d *database) connect(dsn string) *pgx.Conn {
	d.t.Helper()
	conn, err := pgx.Connect(d.ctx, dsn)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// querier is a pool, a connection or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// admin runs SQL as the owner; it must succeed.
func (d *database) admin(sql string, args ...any) {
	d.t.Helper()
	if _, err := d.owner.Exec(d.ctx, sql, args...); err != nil {
		d.t.Fatalf("%s: %v", sql, err)
	}
}

// rows runs SQL as the application; each row is its values with bars between, null is "null".
func (d *database) rows(sql string, args ...any) []string {
	d.t.Helper()
	return d.rowsOf(d.app, sql, args...)
}

// rowsOf does the same elsewhere, for example in a transaction.
func (d *database) rowsOf(db querier, sql string, args ...any) []string {
	d.t.Helper()
	rows, err := query(d.ctx, db, sql, args...)
	if err != nil {
		d.t.Fatalf("%s: %v", sql, err)
	}
	return rows
}

// fails runs SQL as the application and wants the SQLSTATE.
func (d *database) fails(state, sql string, args ...any) {
	d.t.Helper()
	d.failsIn(d.app, state, sql, args...)
}

// failsIn does the same elsewhere.
func (d *database) failsIn(db querier, state, sql string, args ...any) {
	d.t.Helper()
	rows, err := query(d.ctx, db, sql, args...)
	if sqlState(err) != state {
		d.t.Errorf("%s: rows %v, error %v; want SQLSTATE %s", sql, rows, err, state)
	}
}

func query(ctx context.Context, db querier, sql string, args ...any) ([]string, error) {
	found, err := db.Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(found, func(row pgx.CollectableRow) (string, error) {
		values, err := row.Values()
		if err != nil {
			return "", err
		}
		texts := make([]string, len(values))
		for i, v := range values {
			switch v := v.(type) {
			case nil:
				texts[i] = "null"
			case []byte:
				texts[i] = string(v)
			default:
				texts[i] = fmt.Sprint(v)
			}
		}
		return strings.Join(texts, "|"), nil
	})
}

// same compares what the application is told with what it should be.
func (d *database) same(what string, want []string, sql string, args ...any) {
	d.t.Helper()
	if got := d.rows(sql, args...); !slices.Equal(got, want) {
		d.t.Errorf("%s: %v, want %v", what, got, want)
	}
}

// value runs a query for one value as the application.
func value[T any](d *database, sql string, args ...any) T {
	d.t.Helper()
	return valueOf[T](d, d.app, sql, args...)
}

// valueOf does the same elsewhere.
func valueOf[T any](d *database, db querier, sql string, args ...any) T {
	d.t.Helper()
	rows, err := db.Query(d.ctx, sql, args...)
	if err != nil {
		d.t.Fatalf("%s: %v", sql, err)
	}
	v, err := pgx.CollectExactlyOneRow(rows, pgx.RowTo[T])
	if err != nil {
		d.t.Fatalf("%s: %v", sql, err)
	}
	return v
}

// eventually waits until a condition holds; what it returns with false is what was seen last.
func (d *database) eventually(what string, holds func() (bool, string)) {
	d.t.Helper()
	for {
		ok, seen := holds()
		if ok {
			return
		}
		select {
		case <-d.ctx.Done():
			d.t.Fatalf("%s: not within the time; last seen: %s", what, seen)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// sqlState is the code of PostgreSQL's error, or empty.
func sqlState(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code
	}
	return ""
}
