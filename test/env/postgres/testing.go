package postgres

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/url"
	"os"
	"strings"
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
	if shared.dsn == nil {
		tb.Fatal("no shared server: add  func TestMain(m *testing.M) { os.Exit(postgres.Main(m, postgres.Options{})) }  to this package")
	}
	name := databaseName(tb.Name())
	quoted := pgx.Identifier{name}.Sanitize()
	if err := administer("CREATE DATABASE " + quoted + " TEMPLATE template0"); err != nil {
		tb.Fatalf("create the test's database: %v", err)
	}
	tb.Cleanup(func() {
		if err := administer("DROP DATABASE IF EXISTS " + quoted + " WITH (FORCE)"); err != nil {
			tb.Errorf("drop the test's database: %v", err)
		}
	})
	return shared.dsn(name)
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
