package postgres

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// shared is the server of the running test package, set by Main before any test runs.
var shared struct {
	dsn func(database string) string
}

// Main runs the tests of a package with one shared server, or with the one that MILLRACE_TEST_POSTGRES names, and
// returns the exit code.
func Main(m *testing.M, o Options) int {
	if dsn := os.Getenv("MILLRACE_TEST_POSTGRES"); dsn != "" {
		u, err := url.Parse(dsn)
		if err != nil {
			// The parser's message would repeat the DSN with its password.
			fmt.Fprintln(os.Stderr, "MILLRACE_TEST_POSTGRES is not a URL; write postgres://user:password@host:port/database")
			return 1
		}
		shared.dsn = func(database string) string {
			other := *u
			other.Path = "/" + database
			return other.String()
		}
		return m.Run()
	}
	o.memory = true
	s, err := Start(context.Background(), o)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() {
		if err := s.Stop(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}()
	shared.dsn = s.DSN
	return m.Run()
}

// NewDatabase makes an empty database on the package's server and returns its DSN. It is dropped when the test ends.
func NewDatabase(tb testing.TB) string {
	tb.Helper()
	return newDatabase(tb, "TEMPLATE template0")
}

// NewClone makes a database that is a copy of one that prepare has filled, and returns its DSN. It is dropped when the test ends. prepare
// runs once per server for everything that calls itself recipe, also when several packages share the server; it must leave no connection
// open. A change in what prepare makes needs another recipe, for instance a hash of its SQL.
func NewClone(tb testing.TB, recipe string, prepare func(ctx context.Context, dsn string) error) string {
	tb.Helper()
	template, err := ensureClonable(recipe, prepare)
	if err != nil {
		tb.Fatalf("make the template of the test's database: %v", err)
	}
	// Copying files takes a little less time than writing every page to the log, and leaves no log behind.
	return newDatabase(tb, "TEMPLATE "+pgx.Identifier{template}.Sanitize()+" STRATEGY FILE_COPY")
}

// ExampleDatabase makes a database for the examples of a package, which have no testing.TB, and returns its DSN. It goes with the server, or when it is made again.
func ExampleDatabase(name string) (string, error) {
	if shared.dsn == nil {
		return "", errors.New("no shared server")
	}
	quoted := pgx.Identifier{name}.Sanitize()
	for _, sql := range []string{"DROP DATABASE IF EXISTS " + quoted + " WITH (FORCE)", "CREATE DATABASE " + quoted + " TEMPLATE template0"} {
		if err := administer(sql); err != nil {
			return "", fmt.Errorf("make the examples' database: %w", err)
		}
	}
	return shared.dsn(name), nil
}

func newDatabase(tb testing.TB, options string) string {
	tb.Helper()
	if shared.dsn == nil {
		tb.Fatal("no shared server: add  func TestMain(m *testing.M) { os.Exit(postgres.Main(m, postgres.Options{})) }  to this package")
	}
	name := databaseName(tb.Name())
	quoted := pgx.Identifier{name}.Sanitize()
	if err := administer("CREATE DATABASE " + quoted + " " + options); err != nil {
		tb.Fatalf("create the test's database: %v", err)
	}
	tb.Cleanup(func() {
		if err := administer("DROP DATABASE IF EXISTS " + quoted + " WITH (FORCE)"); err != nil {
			tb.Errorf("drop the test's database: %v", err)
		}
	})
	return shared.dsn(name)
}

// clonable remembers which templates this process has made or found.
var clonable struct {
	mu    sync.Mutex
	names map[string]string // by recipe
}

// ensureClonable returns the name of the database that recipe stands for. Whoever wants it at the same time waits for the one that makes it.
func ensureClonable(recipe string, prepare func(ctx context.Context, dsn string) error) (string, error) {
	clonable.mu.Lock()
	defer clonable.mu.Unlock()
	if name, ok := clonable.names[recipe]; ok {
		return name, nil
	}
	if shared.dsn == nil {
		return "", errors.New("no shared server")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, shared.dsn("postgres"))
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx)
	hash := sha256.Sum256([]byte(recipe))
	name := fmt.Sprintf("template_%x", hash[:8])
	if _, err := conn.Exec(ctx, "SELECT pg_advisory_lock($1)", int64(binary.BigEndian.Uint64(hash[:8]))); err != nil { //nolint:gosec // any number will do
		return "", err
	}
	var exists bool
	if err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", name).Scan(&exists); err != nil {
		return "", err
	}
	if !exists {
		// The rename makes it visible whole or not at all.
		building := name + "_new"
		for _, sql := range []string{"DROP DATABASE IF EXISTS " + building + " WITH (FORCE)", "CREATE DATABASE " + building + " TEMPLATE template0"} {
			if _, err := conn.Exec(ctx, sql); err != nil {
				return "", err
			}
		}
		if err := prepare(ctx, shared.dsn(building)); err != nil {
			return "", err
		}
		if _, err := conn.Exec(ctx, "ALTER DATABASE "+building+" RENAME TO "+name); err != nil {
			return "", err
		}
	}
	if clonable.names == nil {
		clonable.names = map[string]string{}
	}
	clonable.names[recipe] = name
	return name, nil
}

// NewServer starts a server of the test's own. It is stopped when the test ends; a failed test shows its log.
func NewServer(tb testing.TB, o Options) *Server {
	tb.Helper()
	s, err := Start(context.Background(), o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if tb.Failed() {
			tb.Logf("PostgreSQL's log ends with:\n%s", s.Log())
		}
		if err := s.Stop(context.Background()); err != nil {
			tb.Error(err)
		}
	})
	return s
}

// administer runs one statement on the shared server. It has its own deadline, because it also runs in cleanups, after
// the test's context has ended.
func administer(sql string) error {
	// go test shows a kept result while what the tests have read is the same. It notes that once they have begun, and Main read these before.
	_, _ = os.LookupEnv("PG")
	_, _ = os.LookupEnv("MILLRACE_TEST_POSTGRES")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, shared.dsn("postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	_, err = conn.Exec(ctx, sql)
	return err
}

// databaseName makes a readable name that no other test has; PostgreSQL cuts names at 63 bytes.
func databaseName(test string) string {
	readable := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			return r
		case r >= 'A' && r <= 'Z':
			return r - 'A' + 'a'
		default:
			return '_'
		}
	}, strings.TrimPrefix(test, "Test"))
	return fmt.Sprintf("t_%.40s_%s", readable, strings.ToLower(rand.Text()[:10]))
}
