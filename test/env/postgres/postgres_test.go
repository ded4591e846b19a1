package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/test/env/postgres"
)

func TestMain(m *testing.M) { os.Exit(postgres.Main(m, postgres.Options{})) }

func TestEveryTestHasADatabaseOfItsOwn(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"first", "second"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := connect(t, postgres.NewDatabase(t))
			// The same table in both: it would exist already if the database were shared.
			exec(t, conn, "create table mine (id int primary key)")
		})
	}
}

func TestClonesAreAlikeAndApart(t *testing.T) {
	t.Parallel()
	prepared := 0
	clone := func(t *testing.T) *pgx.Conn {
		t.Helper()
		return connect(t, postgres.NewClone(t, "clones are alike", func(ctx context.Context, dsn string) error {
			prepared++
			conn, err := pgx.Connect(ctx, dsn)
			if err != nil {
				return err
			}
			_, err = conn.Exec(ctx, "create table prepared (id int primary key)")
			return errors.Join(err, conn.Close(ctx))
		}))
	}
	t.Run("several at once", func(t *testing.T) {
		for _, name := range []string{"first", "second", "third"} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				exec(t, clone(t), "insert into prepared values (1)") // a duplicate if they shared it
			})
		}
	})
	if prepared != 1 {
		t.Errorf("prepared %d times, want once", prepared)
	}
}

func TestADatabaseGoesWithItsTest(t *testing.T) {
	t.Parallel()
	var dsn string
	t.Run("a test with a connection that it forgets to close", func(t *testing.T) {
		dsn = postgres.NewDatabase(t)
		if _, err := pgx.Connect(t.Context(), dsn); err != nil {
			t.Fatal(err)
		}
	})
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	name := strings.TrimPrefix(u.Path, "/")
	u.Path = "/postgres"
	var left int
	row := connect(t, u.String()).QueryRow(t.Context(), "select count(*) from pg_database where datname = $1", name)
	if err := row.Scan(&left); err != nil || left != 0 {
		t.Fatalf("%d databases named %s, error %v; want none", left, name, err)
	}
}

func TestServerIsTheMajorThatWasAskedFor(t *testing.T) {
	t.Parallel()
	s := postgres.NewServer(t, postgres.Options{})
	var version string
	if err := connect(t, s.DSN("postgres")).QueryRow(t.Context(), "show server_version_num").Scan(&version); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(version, strconv.Itoa(s.Major())) {
		t.Fatalf("server_version_num is %s, Major() %d", version, s.Major())
	}
	if asked := os.Getenv("PG"); asked != "" && strconv.Itoa(s.Major()) != asked {
		t.Fatalf("Major() is %d, PG asked for %s", s.Major(), asked)
	}
}

func TestAWrongPasswordIsRefused(t *testing.T) {
	t.Parallel()
	s := postgres.NewServer(t, postgres.Options{})
	u, err := url.Parse(s.DSN("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword("postgres", "wrong")
	if _, err := pgx.Connect(t.Context(), u.String()); err == nil || !strings.Contains(err.Error(), "28P01") {
		t.Fatalf("connect with a wrong password: %v; want SQLSTATE 28P01", err)
	}
}

func TestSettingsReachTheServer(t *testing.T) {
	t.Parallel()
	s := postgres.NewServer(t, postgres.Options{Settings: map[string]string{"fsync": "on", "work_mem": "7MB"}})
	for name, want := range map[string]string{"fsync": "on", "work_mem": "7MB"} {
		var got string
		if err := connect(t, s.DSN("postgres")).QueryRow(t.Context(), "select current_setting($1)", name).Scan(&got); err != nil || got != want {
			t.Errorf("%s is %q (error %v), want %q", name, got, err, want)
		}
	}
}

func TestAKilledServerComesBackWithWhatItAcknowledged(t *testing.T) {
	t.Parallel()
	s := postgres.NewServer(t, postgres.Options{})
	port := s.Port()
	conn := connect(t, s.DSN("postgres"))
	exec(t, conn, "create table kept (id int)")
	for round := 1; round <= 3; round++ {
		conn := connect(t, s.DSN("postgres"))
		exec(t, conn, fmt.Sprintf("insert into kept values (%d)", round))
		if err := s.Kill(); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Exec(t.Context(), "select 1"); err == nil {
			t.Fatal("a connection survived Kill")
		}
		if _, err := pgx.Connect(t.Context(), s.DSN("postgres")); err == nil {
			t.Fatal("a killed server took a connection")
		}
		if err := s.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		var rows int
		if err := connect(t, s.DSN("postgres")).QueryRow(t.Context(), "select count(*) from kept").Scan(&rows); err != nil || rows != round {
			t.Fatalf("%d rows after round %d, error %v", rows, round, err)
		}
	}
	if s.Port() != port {
		t.Fatalf("the port moved from %d to %d", port, s.Port())
	}
}

func TestRestartOfARunningServerKeepsItsData(t *testing.T) {
	t.Parallel()
	s := postgres.NewServer(t, postgres.Options{})
	exec(t, connect(t, s.DSN("postgres")), "create table kept (id int)")
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	exec(t, connect(t, s.DSN("postgres")), "insert into kept values (1)")
}

func TestAPausedServerIsSilentUntilItResumes(t *testing.T) {
	t.Parallel()
	s := postgres.NewServer(t, postgres.Options{})
	conn := connect(t, s.DSN("postgres"))
	if err := s.Pause(); err != nil {
		t.Fatal(err)
	}
	answered := make(chan error, 1)
	go func() {
		_, err := conn.Exec(context.Background(), "select 1")
		answered <- err
	}()
	select {
	case err := <-answered:
		t.Fatalf("a paused server answered: %v", err)
	case <-time.After(300 * time.Millisecond): // long for a server on loopback that runs
	}
	if err := s.Resume(); err != nil {
		t.Fatal(err)
	}
	if err := <-answered; err != nil {
		t.Fatalf("the query that waited through the pause: %v", err)
	}
}

func TestAPausedServerCanBeStopped(t *testing.T) {
	t.Parallel()
	s := postgres.NewServer(t, postgres.Options{})
	if err := s.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestStopLeavesNothing(t *testing.T) {
	t.Parallel()
	s, err := postgres.Start(t.Context(), postgres.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var data string
	if err := connect(t, s.DSN("postgres")).QueryRow(t.Context(), "show data_directory").Scan(&data); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Dir(data)); !os.IsNotExist(err) {
		t.Errorf("the server's directory is still there: %v", err)
	}
	if c, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(s.Port()))); err == nil {
		_ = c.Close()
		t.Error("the server's port still answers")
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Errorf("a second Stop: %v", err)
	}
}

func TestAGivenDirectoryKeepsTheData(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "millrace-kept-*") //nolint:usetesting // the user that the server runs as cannot enter t.TempDir
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	first := postgres.NewServer(t, postgres.Options{Dir: filepath.Join(dir, "server")})
	exec(t, connect(t, first.DSN("postgres")), "create table kept (id int)")
	if err := first.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	second := postgres.NewServer(t, postgres.Options{Dir: filepath.Join(dir, "server")})
	exec(t, connect(t, second.DSN("postgres")), "insert into kept values (1)")
}

func connect(t *testing.T, dsn string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func exec(t *testing.T, conn *pgx.Conn, sql string) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatal(err)
	}
}

// TestAPromotedStandbyHasEveryCommit: the server is killed right after it has said that a row is committed.
func TestAPromotedStandbyHasEveryCommit(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	primary := postgres.NewServer(t, postgres.Options{})
	exec(t, connect(t, primary.DSN("postgres")), "create table kept (id int primary key)")
	standby, err := primary.Standby(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := standby.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	both := postgres.PrimaryDSN("postgres", primary, standby)
	conn := connect(t, both)
	for id := range 100 {
		exec(t, conn, fmt.Sprintf("insert into kept values (%d)", id))
	}
	if err := primary.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := standby.Promote(ctx); err != nil {
		t.Fatal(err)
	}
	conn = connect(t, both)
	exec(t, conn, "insert into kept values (100)") // also: it waits for no other standby
	var rows, port int
	if err := conn.QueryRow(ctx, "select count(*), inet_server_port() from kept").Scan(&rows, &port); err != nil {
		t.Fatal(err)
	}
	if rows != 101 || port != standby.Port() {
		t.Errorf("%d rows at port %d, want 101 at %d", rows, port, standby.Port())
	}
}
