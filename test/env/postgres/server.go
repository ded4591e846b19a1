package postgres

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/test/env/dirs"
	"github.com/millrace-dev/millrace/test/env/process"
)

// Options describes a server. The zero value is a server for tests on the loopback address.
type Options struct {
	// Major is the major version. Zero: the one that PG names, else the newest installed one.
	Major int
	// Settings are server settings, added to or replacing those of this package (see settings).
	Settings map[string]string
	// Dir keeps the server's files in this directory, which must not exist yet or hold an earlier server's; Stop leaves
	// them there. Empty: a temporary directory that Stop removes.
	Dir string
	// Listen is the address to listen on, or several with commas between; the first is the one that DSN names. Default
	// 127.0.0.1.
	Listen string
	// Port zero is a free one.
	Port int

	memory bool // files in memory, if there is room
}

// settings make a server quick to start and quick to write to. fsync is off because no test pulls the plug of the
// machine: what a killed server has written is in the kernel and survives. Options.Settings can turn it on.
var settings = map[string]string{
	"fsync":                   "off",
	"full_page_writes":        "off",
	"max_connections":         "200",
	"unix_socket_directories": "",
	"log_line_prefix":         "%m [%p] %d ",
	"lc_messages":             "C",
	"timezone":                "UTC",
	"max_wal_size":            "4GB",
	"deadlock_timeout":        "200ms",
}

// The times that a start and a stop may take. They are long because test machines can be busy; nothing waits longer
// than it has to.
const (
	startTimeout = 90 * time.Second
	stopTimeout  = 30 * time.Second
)

// Server is a running (or killed, or paused) PostgreSQL server.
type Server struct {
	install  install
	user     *process.User
	run      *dirs.Run // nil when the caller gave the directory
	dir      string
	port     int
	listen   []string
	password string
	settings map[string]string

	mu       sync.Mutex
	postgres *process.Process
	paused   []int
}

// Start brings up a new server and returns when it answers.
func Start(ctx context.Context, o Options) (*Server, error) {
	s, err := start(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	return s, nil
}

func start(ctx context.Context, o Options) (_ *Server, err error) {
	found, err := findInstall(o.Major)
	if err != nil {
		return nil, err
	}
	user, err := process.Unprivileged("postgres", "nobody")
	if err != nil {
		return nil, err
	}
	s := &Server{install: found, user: user, dir: o.Dir, listen: []string{"127.0.0.1"}, settings: maps.Clone(settings)}
	maps.Copy(s.settings, o.Settings)
	if o.Listen != "" {
		s.listen = strings.Split(o.Listen, ",")
	}
	if s.dir == "" {
		newRun := dirs.NewRun
		if o.memory {
			newRun = dirs.NewMemoryRun
		}
		s.run, err = newRun("postgres")
		if err != nil {
			return nil, err
		}
		s.dir = s.run.Path
		defer func() {
			if err != nil {
				_ = s.run.Remove()
			}
		}()
	}
	if s.password, err = fill(ctx, found, user, s.dir); err != nil {
		return nil, err
	}

	// Between choosing a free port and binding it, another process may take it.
	for attempt := 1; ; attempt++ {
		s.port = o.Port
		if s.port == 0 {
			if s.port, err = process.FreePort(s.listen...); err != nil {
				return nil, err
			}
		}
		err = s.launch(ctx)
		if err == nil || o.Port != 0 || attempt == 5 || !strings.Contains(err.Error(), "could not bind") {
			return s, err
		}
	}
}

// launch starts the postmaster and waits until it takes connections. The caller holds mu or has the only reference.
func (s *Server) launch(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()

	args := []string{"-D", filepath.Join(s.dir, "data"), "-p", strconv.Itoa(s.port),
		"-c", "listen_addresses=" + strings.Join(s.listen, ",")}
	for _, name := range slices.Sorted(maps.Keys(s.settings)) {
		args = append(args, "-c", name+"="+s.settings[name])
	}
	p, err := process.Start(process.Command{
		Path: filepath.Join(s.install.bin, "postgres"), Args: args, Env: s.install.env(), Dir: s.dir, Log: s.logFile(), User: s.user,
		// An immediate shutdown: quick, and unlike SIGKILL it gives the shared memory back.
		DeathSignal: syscall.SIGQUIT,
	})
	if err != nil {
		return err
	}
	s.postgres = p
	if err := s.waitReady(ctx, p); err != nil {
		_ = s.killTree(p)
		return err
	}
	return nil
}

func (s *Server) waitReady(ctx context.Context, p *process.Process) error {
	config, err := pgx.ParseConfig(s.DSN("postgres"))
	if err != nil {
		return err
	}
	config.ConnectTimeout = 2 * time.Second
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for {
		conn, err := pgx.ConnectConfig(ctx, config)
		if err == nil {
			return conn.Close(ctx)
		}
		select {
		case <-p.Done():
			return p.Exit()
		case <-ctx.Done():
			return fmt.Errorf("wait until it answers: %w (last answer: %w)\n%s", ctx.Err(), err, p.LogTail())
		case <-poll.C:
		}
	}
}

// DSN is a connection string of the superuser for the named database. It holds the password.
func (s *Server) DSN(database string) string {
	dsn := url.URL{
		Scheme:   "postgres",
		User:     url.UserPassword("postgres", s.password),
		Host:     net.JoinHostPort(s.listen[0], strconv.Itoa(s.port)),
		Path:     "/" + database,
		RawQuery: "sslmode=disable",
	}
	return dsn.String()
}

// Port is the port that the server listens on, for its whole life.
func (s *Server) Port() int { return s.port }

// Major is the major version of the server.
func (s *Server) Major() int { return s.install.major }

// Log returns the end of the server's log.
func (s *Server) Log() string { return process.Tail(s.logFile(), 20000) }

func (s *Server) logFile() string { return filepath.Join(s.dir, "server.log") }

// Stop ends the server with a fast shutdown and removes its files. Repeating it does nothing.
func (s *Server) Stop(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.shutdown(ctx)
	if s.run != nil {
		err = errors.Join(err, s.run.Remove())
	}
	return err
}

// shutdown ends the server and keeps its files.
func (s *Server) shutdown(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	s.resume()
	if !s.postgres.Running() {
		return nil
	}
	children, err := process.Children(s.postgres.Pid())
	// After an orderly end no child is left. When the postmaster had to be killed, its children are: each is in a
	// process group of its own.
	return errors.Join(err, s.postgres.Stop(ctx, syscall.SIGINT), process.KillAll(context.WithoutCancel(ctx), children))
}

// Kill ends every process of the server with SIGKILL, as when the machine fails. Restart brings it back.
func (s *Server) Kill() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = nil
	return s.killTree(s.postgres)
}

func (s *Server) killTree(p *process.Process) error {
	if !p.Running() {
		return nil
	}
	children, err := freeze(p)
	p.Kill()
	// While one of them lives, it holds the shared memory, and the server cannot start again.
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	if err := errors.Join(err, process.KillAll(ctx, children)); err != nil {
		return fmt.Errorf("kill PostgreSQL: %w", err)
	}
	return nil
}

// Restart stops the server in an orderly way if it runs, and starts it on the same port with the same data.
func (s *Server) Restart(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.shutdown(ctx); err != nil {
		return fmt.Errorf("restart PostgreSQL: %w", err)
	}
	if err := s.launch(ctx); err != nil {
		return fmt.Errorf("restart PostgreSQL: %w", err)
	}
	return nil
}

// Pause freezes every process of the server. Its connections stay open and silent, as behind a broken network.
func (s *Server) Pause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.postgres.Running() {
		return errors.New("pause PostgreSQL: it does not run; call Restart first")
	}
	children, err := freeze(s.postgres)
	s.paused = append(children, s.postgres.Pid())
	if err != nil {
		return fmt.Errorf("pause PostgreSQL: %w", err)
	}
	return nil
}

// Resume lets a paused server go on.
func (s *Server) Resume() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.resume()
	return nil
}

func (s *Server) resume() {
	for _, pid := range s.paused {
		_ = syscall.Kill(pid, syscall.SIGCONT)
	}
	s.paused = nil
}

// freeze stops the postmaster and then its children, which it returns.
func freeze(p *process.Process) ([]int, error) {
	if err := p.Signal(syscall.SIGSTOP); err != nil {
		return nil, err
	}
	// The signal may reach the postmaster in the middle of making one more child, and on a busy machine that may take a while.
	for began := time.Now(); !process.Frozen(p.Pid()); time.Sleep(time.Millisecond) {
		if time.Since(began) > stopTimeout {
			return nil, errors.New("the postmaster does not stop")
		}
	}
	children, err := process.Children(p.Pid())
	for _, pid := range children {
		_ = syscall.Kill(pid, syscall.SIGSTOP)
	}
	return children, err
}

// ownedBy gives a file to the user that the server runs as.
func ownedBy(user *process.User, path string) error {
	if user == nil {
		return nil
	}
	return os.Lchown(path, user.UID, user.GID)
}
