package pgbouncer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/test/env/dirs"
	"github.com/millrace-dev/millrace/test/env/process"
)

// Options describes a PgBouncer. The zero value pools by transaction.
type Options struct {
	// Settings of the section [pgbouncer], added to or replacing those of this package (see settings).
	Settings map[string]string
}

// settings make clients share server connections as much as they can.
var settings = map[string]string{
	"pool_mode":           "transaction",
	"default_pool_size":   "3",
	"server_idle_timeout": "1",
	"max_client_conn":     "500",
	"auth_type":           "scram-sha-256",
	"unix_socket_dir":     "",
	// What client libraries send, and PgBouncer would refuse (1.18 and others): it makes no difference to tests.
	"ignore_startup_parameters": "extra_float_digits",
}

// The times that a start and a stop may take. They are long because test machines can be busy.
const (
	startTimeout = 90 * time.Second
	stopTimeout  = 30 * time.Second
)

// Server is a running PgBouncer.
type Server struct {
	dsn       url.URL
	run       *dirs.Run
	pgbouncer *process.Process
}

// New starts a PgBouncer before the database of a DSN. It is stopped when the test ends; a failed test shows its log.
func New(tb testing.TB, dsn string, o Options) *Server {
	tb.Helper()
	s, err := Start(context.Background(), dsn, o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if tb.Failed() {
			tb.Logf("PgBouncer's log ends with:\n%s", s.Log())
		}
		if err := s.Stop(context.Background()); err != nil {
			tb.Error(err)
		}
	})
	return s
}

// Start brings up a PgBouncer before the database of a DSN and returns when it answers.
func Start(ctx context.Context, dsn string, o Options) (*Server, error) {
	s, err := start(ctx, dsn, o)
	if err != nil {
		return nil, fmt.Errorf("start PgBouncer: %w", err)
	}
	return s, nil
}

func start(ctx context.Context, dsn string, o Options) (_ *Server, err error) {
	program, err := exec.LookPath("pgbouncer")
	if err != nil {
		if program, err = exec.LookPath("/usr/sbin/pgbouncer"); err != nil {
			return nil, errors.New("no pgbouncer found; run: make deps  (on Debian and Ubuntu it installs the package pgbouncer)")
		}
	}
	target, err := url.Parse(dsn)
	if err != nil {
		return nil, errors.New("the DSN is not a URL; write postgres://user:password@host:port/database") // the parser's error has the password
	}
	user, err := process.Unprivileged("postgres", "nobody")
	if err != nil {
		return nil, err
	}
	run, err := dirs.NewRun("pgbouncer")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, run.Remove())
		}
	}()
	s := &Server{dsn: *target, run: run}

	// Between choosing a free port and binding it, another process may take it.
	for attempt := 1; ; attempt++ {
		port, err := process.FreePort("127.0.0.1")
		if err != nil {
			return nil, err
		}
		s.dsn.Host = "127.0.0.1:" + strconv.Itoa(port)
		if err := s.configure(target, port, o, user); err != nil {
			return nil, err
		}
		err = s.launch(ctx, program, user)
		if err == nil || attempt == 5 || !strings.Contains(err.Error(), "Address already in use") {
			return s, err
		}
	}
}

// configure writes pgbouncer.ini and the list of users, whose password PgBouncer also shows to PostgreSQL.
func (s *Server) configure(target *url.URL, port int, o Options, user *process.User) error {
	all := maps.Clone(settings)
	maps.Copy(all, o.Settings)
	all["listen_addr"], all["listen_port"] = "127.0.0.1", strconv.Itoa(port)
	all["auth_file"] = filepath.Join(s.run.Path, "users")
	database := strings.TrimPrefix(target.Path, "/")
	lines := []string{"[databases]", fmt.Sprintf("%s = host=%s port=%s dbname=%s", database, target.Hostname(), target.Port(), database), "[pgbouncer]"}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		lines = append(lines, name+" = "+all[name])
	}
	password, _ := target.User.Password()
	quote := func(s string) string { return `"` + strings.ReplaceAll(s, `"`, `""`) + `"` }
	for path, text := range map[string]string{
		filepath.Join(s.run.Path, "pgbouncer.ini"): strings.Join(lines, "\n") + "\n",
		all["auth_file"]: quote(target.User.Username()) + " " + quote(password) + "\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return err
		}
		if user != nil {
			if err := os.Lchown(path, user.UID, user.GID); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Server) launch(ctx context.Context, program string, user *process.User) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	p, err := process.Start(process.Command{Path: program, Args: []string{filepath.Join(s.run.Path, "pgbouncer.ini")}, Dir: s.run.Path, Log: s.logFile(), User: user})
	if err != nil {
		return err
	}
	s.pgbouncer = p
	config, err := pgx.ParseConfig(s.DSN())
	if err != nil {
		return err
	}
	config.ConnectTimeout = 2 * time.Second
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for {
		conn, err := pgx.ConnectConfig(ctx, config)
		if err == nil {
			_, err = conn.Exec(ctx, "select 1") // only now does it connect to PostgreSQL
			if err = errors.Join(err, conn.Close(ctx)); err == nil {
				return nil
			}
		}
		select {
		case <-p.Done():
			return p.Exit()
		case <-ctx.Done():
			p.Kill()
			return fmt.Errorf("wait until it answers: %w (last answer: %w)\n%s", ctx.Err(), err, p.LogTail())
		case <-poll.C:
		}
	}
}

// DSN is the DSN that was given, through the pool. It holds the password.
func (s *Server) DSN() string { return s.dsn.String() }

// Log returns the end of PgBouncer's log.
func (s *Server) Log() string { return process.Tail(s.logFile(), 20000) }

func (s *Server) logFile() string { return filepath.Join(s.run.Path, "pgbouncer.log") }

// Stop ends it and removes its files. Repeating it does nothing.
func (s *Server) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	var err error
	if s.pgbouncer.Running() {
		err = s.pgbouncer.Stop(ctx, syscall.SIGTERM) // at once; SIGINT would wait for open transactions
	}
	return errors.Join(err, s.run.Remove())
}
