package redis

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/millrace-dev/millrace/test/env/dirs"
	"github.com/millrace-dev/millrace/test/env/process"
)

// Options describes a server. The zero value is one for tests: loopback, no password, nothing kept.
type Options struct {
	// Password is what clients must give; empty: none.
	Password string
	// Port zero is a free one.
	Port int
	// Persist keeps the data over Kill and Restart.
	Persist bool
	// Listen is the address to listen on, or several with commas between; the first is the one that Addr names. Default
	// 127.0.0.1.
	Listen string
	// Settings are directives of redis.conf, added to those of this package.
	Settings map[string]string
	// TLS adds a port that speaks TLS; TLSAddr names it.
	TLS *TLS

	sentinel bool // be a Sentinel
}

// TLS are a server's certificates, in PEM.
type TLS struct {
	CA        []byte // who signed the clients' certificates
	Cert, Key []byte // the server's own
	// Clients says that every client needs a certificate.
	Clients bool
}

// The times that a start and a stop may take. They are long because test machines can be busy.
const (
	startTimeout = 90 * time.Second
	stopTimeout  = 30 * time.Second
)

// Server is a running (or killed, or paused) Redis server.
type Server struct {
	program  string
	user     *process.User
	run      *dirs.Run
	port     int
	tlsPort  int // 0: none
	listen   []string
	password string
	sentinel bool
	config   string // path of redis.conf

	mu    sync.Mutex
	redis *process.Process
}

// Start brings up a new server and returns when it answers.
func Start(ctx context.Context, o Options) (*Server, error) {
	s, err := start(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("start Redis: %w", err)
	}
	return s, nil
}

func start(ctx context.Context, o Options) (_ *Server, err error) {
	program, err := findProgram()
	if err != nil {
		return nil, err
	}
	user, err := process.Unprivileged("redis", "nobody")
	if err != nil {
		return nil, err
	}
	run, err := dirs.NewRun("redis")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, run.Remove())
		}
	}()
	s := &Server{program: program, user: user, run: run, password: o.Password, sentinel: o.sentinel, listen: []string{"127.0.0.1"}}
	s.config = filepath.Join(s.data(), "redis.conf") // beside the data, because a Sentinel rewrites it
	if o.Listen != "" {
		s.listen = strings.Split(o.Listen, ",")
	}
	if err := os.Mkdir(s.data(), 0o700); err != nil {
		return nil, err
	}
	if err := s.ownedByUser(s.data()); err != nil {
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
		if err := s.configure(o); err != nil {
			return nil, err
		}
		err = s.launch(ctx)
		if err == nil || o.Port != 0 || attempt == 5 || !strings.Contains(err.Error(), "Could not create server TCP listening socket") {
			return s, err
		}
	}
}

// configure writes redis.conf. The password stands there and not on the command line, which every user can read.
func (s *Server) configure(o Options) error {
	lines := []string{
		"port " + strconv.Itoa(s.port),
		"bind " + strings.Join(s.listen, " "),
		"dir " + s.data(),
		"daemonize no",
		`save ""`,
		// Listening beyond loopback without a password is refused otherwise; it is bound to addresses of tests anyway.
		"protected-mode no",
	}
	if o.Persist {
		lines = append(lines, "appendonly yes", "appendfsync no") // what is written is in the kernel, which outlives Kill
	}
	if o.Password != "" {
		lines = append(lines, fmt.Sprintf("requirepass %q", o.Password))
	}
	for name, value := range o.Settings {
		lines = append(lines, name+" "+value)
	}
	if o.TLS != nil {
		more, err := s.configureTLS(o.TLS)
		if err != nil {
			return err
		}
		lines = append(lines, more...)
	}
	if err := os.WriteFile(s.config, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		return err
	}
	return s.ownedByUser(s.config)
}

// configureTLS writes the certificates where the server may read them.
func (s *Server) configureTLS(t *TLS) ([]string, error) {
	var err error
	if s.tlsPort, err = process.FreePort(s.listen...); err != nil {
		return nil, err
	}
	clients := "no"
	if t.Clients {
		clients = "yes"
	}
	lines := []string{"tls-port " + strconv.Itoa(s.tlsPort), "tls-auth-clients " + clients}
	for directive, data := range map[string][]byte{"tls-ca-cert-file": t.CA, "tls-cert-file": t.Cert, "tls-key-file": t.Key} {
		file := filepath.Join(s.data(), directive+".pem")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			return nil, err
		}
		if err := s.ownedByUser(file); err != nil {
			return nil, err
		}
		lines = append(lines, directive+" "+file)
	}
	return lines, nil
}

// launch starts the server and waits until it answers. The caller holds mu or has the only reference.
func (s *Server) launch(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	args := []string{s.config}
	if s.sentinel {
		args = append(args, "--sentinel")
	}
	p, err := process.Start(process.Command{Path: s.program, Args: args, Dir: s.run.Path, Log: s.logFile(), User: s.user})
	if err != nil {
		return err
	}
	s.redis = p
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for {
		err := s.ping(ctx)
		if err == nil {
			return nil
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

// ping asks the server whether it serves; it does not while it loads its append-only file.
func (s *Server) ping(ctx context.Context) error {
	dialer := net.Dialer{Timeout: time.Second}
	conn, err := dialer.DialContext(ctx, "tcp", s.Addr())
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	request, answers := "PING\r\n", 1
	if s.password != "" {
		request, answers = fmt.Sprintf("*2\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\n", len(s.password), s.password)+request, 2
	}
	if _, err := conn.Write([]byte(request)); err != nil {
		return err
	}
	for lines := bufio.NewReader(conn); answers > 0; answers-- {
		line, err := lines.ReadString('\n')
		if err != nil {
			return err
		}
		if !strings.HasPrefix(line, "+") {
			return fmt.Errorf("it answers %q", strings.TrimSpace(line))
		}
	}
	return nil
}

// Addr is host:port of the server, the same for its whole life.
func (s *Server) Addr() string { return net.JoinHostPort(s.listen[0], strconv.Itoa(s.port)) }

// TLSAddr is host:port of the port that speaks TLS.
func (s *Server) TLSAddr() string { return net.JoinHostPort(s.listen[0], strconv.Itoa(s.tlsPort)) }

// URL is a connection string for database 0. It holds the password.
func (s *Server) URL() string {
	u := url.URL{Scheme: "redis", Host: s.Addr(), Path: "/0"}
	if s.password != "" {
		u.User = url.UserPassword("", s.password)
	}
	return u.String()
}

// userinfo is the part of a URL before the host.
func (s *Server) userinfo() string {
	if s.password == "" {
		return ""
	}
	return url.UserPassword("", s.password).String() + "@"
}

// Port is the port that the server listens on.
func (s *Server) Port() int { return s.port }

// Log returns the end of the server's log.
func (s *Server) Log() string { return process.Tail(s.logFile(), 20000) }

func (s *Server) logFile() string { return filepath.Join(s.run.Path, "server.log") }

func (s *Server) data() string { return filepath.Join(s.run.Path, "data") }

func (s *Server) ownedByUser(path string) error {
	if s.user == nil {
		return nil
	}
	return os.Lchown(path, s.user.UID, s.user.GID)
}

// Stop ends the server and removes its files. Repeating it does nothing.
func (s *Server) Stop(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return errors.Join(s.shutdown(ctx), s.run.Remove())
}

func (s *Server) shutdown(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	if !s.redis.Running() {
		return nil
	}
	_ = s.redis.Signal(syscall.SIGCONT) // a paused one would not hear the next signal
	return s.redis.Stop(ctx, syscall.SIGTERM)
}

// Kill ends the server with SIGKILL, as when the machine fails. Restart brings it back.
func (s *Server) Kill() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.redis.Kill()
	return nil
}

// Restart stops the server in an orderly way if it runs, and starts it on the same port.
func (s *Server) Restart(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.shutdown(ctx); err != nil {
		return fmt.Errorf("restart Redis: %w", err)
	}
	if err := s.launch(ctx); err != nil {
		return fmt.Errorf("restart Redis: %w", err)
	}
	return nil
}

// Pause freezes the server. Its connections stay open and silent, as behind a broken network.
func (s *Server) Pause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.redis.Signal(syscall.SIGSTOP); err != nil {
		return fmt.Errorf("pause Redis: %w; call Restart first", err)
	}
	return nil
}

// Resume lets a paused server go on.
func (s *Server) Resume() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.redis.Signal(syscall.SIGCONT); err != nil {
		return fmt.Errorf("resume Redis: %w; call Restart first", err)
	}
	return nil
}

func findProgram() (string, error) {
	for _, name := range []string{"redis-server", "valkey-server"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", errors.New("no redis-server found; run: make deps  (on Debian and Ubuntu it installs the package redis-server)")
}
