package seeds

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/client"
)

// A13: pool settings and timeouts. Every setting has its effect, and a server that does not answer is an error within the limit: when connecting, within a call, and
// when no connection is free. A consumer goes on when the server answers again.
func TestSeed_A13_PoolSettingsAndTimeouts(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('orders')")
	d.admin("select millrace.create_group('orders', 'billing')")

	const callTimeout = 3 * time.Second
	wire := newWire(t, d.appDSN)
	c, err := client.Open(d.ctx, wire.dsn, client.Options{CallTimeout: callTimeout, PollInterval: 50 * time.Millisecond, Logger: slog.New(slog.DiscardHandler), Pool: client.PoolOptions{
		MaxConns: 3, MinConns: 1, MaxConnIdleTime: time.Minute, MaxConnLifetime: time.Hour, ConnectTimeout: 2 * time.Second,
		StatementTimeout: 2 * time.Second, IdleInTransactionTimeout: 7 * time.Second, ApplicationName: "shop",
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	for setting, want := range map[string]string{"statement_timeout": "2s", "idle_in_transaction_session_timeout": "7s", "application_name": "shop"} {
		if got := d.rowsOf(c.Pool(), "show "+setting); got[0] != want {
			t.Errorf("%s is %s, want %s", setting, got[0], want)
		}
	}
	if p := c.Pool().Config(); p.MaxConns != 3 || p.MinConns != 1 || p.MaxConnIdleTime != time.Minute || p.MaxConnLifetime != time.Hour {
		t.Errorf("the pool has other settings: %+v", p)
	}
	d.failsIn(c.Pool(), "57014", "select pg_sleep(60)")

	inTime := func(what string, limit time.Duration, f func() error) {
		t.Helper()
		began := time.Now()
		err := f()
		if took := time.Since(began); err == nil || !client.IsTransient(err) || took < limit/2 || took > limit+10*time.Second {
			t.Errorf("%s: %v after %s, want an error that says to try again after %s", what, err, took, limit)
		}
		if err != nil && strings.Contains(err.Error(), appPassword+"@") {
			t.Errorf("%s: the error has the password: %v", what, err)
		}
	}
	publish := func() error {
		_, err := c.Publish(d.ctx, "orders", client.NewMessage{Payload: []byte(`"x"`)})
		return err
	}
	if err := publish(); err != nil {
		t.Fatal(err)
	}

	handled := make(chan string, 100)
	consuming, stop := context.WithCancel(d.ctx)
	ended := make(chan error, 1)
	go func() {
		ended <- c.Consume(consuming, "orders", "billing", func(_ context.Context, d *client.Delivery) error {
			handled <- string(d.Payload)
			return nil
		}, client.ConsumeOptions{})
	}()
	<-handled

	// The server is away, and the network does not say so.
	wire.block()
	inTime("a call that is not answered", callTimeout, publish)
	inTime("reading", callTimeout, func() error {
		for _, err := range c.Read(d.ctx, "orders", client.First) {
			return err
		}
		return nil
	})
	inTime("connecting", 2*time.Second, func() error {
		_, err := client.Open(d.ctx, wire.dsn, client.Options{Pool: client.PoolOptions{ConnectTimeout: 2 * time.Second}})
		return err
	})
	wire.open()
	d.admin(`select millrace.publish('orders', '"after"')`)
	for got := ""; got != `"after"`; {
		select {
		case got = <-handled:
		case <-d.ctx.Done():
			t.Fatal("the consumer does not go on when the server answers again")
		}
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}

	// No connection is free.
	for range 3 {
		conn, err := c.Pool().Acquire(d.ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Release()
	}
	inTime("waiting for a connection", callTimeout, publish)

	if _, err := client.Open(d.ctx, "postgres://user:secret@host:notaport/db", client.Options{}); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("a connection string that cannot be read: %v", err)
	}
}

// wire is a network between a client and PostgreSQL that can swallow everything.
type wire struct {
	dsn    string
	server string

	mu      sync.Mutex
	blocked chan struct{} // nil when open; closed when it opens
}

func newWire(t *testing.T, dsn string) *wire {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{server: u.Host}
	u.Host = listener.Addr().String()
	w.dsn = u.String()
	t.Cleanup(func() { listener.Close() })
	t.Cleanup(w.open)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go w.carry(conn)
		}
	}()
	return w
}

func (w *wire) carry(from net.Conn) {
	defer from.Close()
	w.wait()
	to, err := net.Dial("tcp", w.server)
	if err != nil {
		return
	}
	defer to.Close()
	go func() { _, _ = io.Copy(from, held{to, w}); from.Close() }()
	_, _ = io.Copy(to, held{from, w})
}

// held is a reader whose bytes arrive only while the wire is open.
type held struct {
	io.Reader
	w *wire
}

func (h held) Read(p []byte) (int, error) {
	n, err := h.Reader.Read(p)
	h.w.wait()
	return n, err
}

func (w *wire) wait() {
	w.mu.Lock()
	blocked := w.blocked
	w.mu.Unlock()
	if blocked != nil {
		<-blocked
	}
}

func (w *wire) block() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.blocked = make(chan struct{})
}

func (w *wire) open() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.blocked != nil {
		close(w.blocked)
		w.blocked = nil
	}
}

// childEnv makes the test of A15 the process that it looks at.
const (
	childEnv    = "MILLRACE_SEEDS_LOGGING_CHILD" // its database
	childLogEnv = "MILLRACE_SEEDS_LOGGING_FILE"
)

// H09, the end of it: a client listens while any of its consumers runs, and hangs up when the last one has stopped.
func TestSeed_H09_UnlistenWithTheLast(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	listen, err := pgx.ParseConfig(d.appDSN)
	if err != nil {
		t.Fatal(err)
	}
	listen.RuntimeParams["application_name"] = "listener"
	c, err := client.Open(d.ctx, d.appDSN, client.Options{Logger: slog.New(slog.DiscardHandler), Listen: listen})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	sessions := func(want int) {
		t.Helper()
		d.eventually("sessions that listen", func() (bool, string) {
			n := valueOf[int](d, d.owner, "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'listener'")
			return n == want, strconv.Itoa(n)
		})
	}
	var consumers []func()
	for _, stream := range []string{"orders", "parcels", "letters"} {
		d.admin("select millrace.create_stream($1)", stream)
		d.admin("select millrace.create_group($1, 'g')", stream)
		ctx, cancel := context.WithCancel(d.ctx)
		ended := make(chan error, 1)
		go func() {
			ended <- c.Consume(ctx, stream, "g", func(context.Context, *client.Delivery) error { return nil }, client.ConsumeOptions{})
		}()
		d.waiting(stream)
		sessions(1)
		consumers = append(consumers, func() {
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
	for _, stop := range consumers[:2] {
		stop()
		sessions(1)
	}
	consumers[2]()
	sessions(0)
}

// A15: the user's own logger. A process whose client has all kinds of trouble writes every line to the logger that it was given, and nothing to standard
// error, to standard output, to slog's default logger or to package log's.
func TestSeed_A15_TheUsersOwnLogger(t *testing.T) {
	t.Parallel()
	if os.Getenv(childEnv) != "" {
		loggingChild(os.Getenv(childEnv))
		return
	}
	d := newDatabase(t)
	d.admin("select millrace.create_stream('orders')")
	d.admin("select millrace.create_group('orders', 'billing', p_max_attempts => 2)")
	for _, payload := range []string{`"fails"`, `"panics"`, `"permanent"`, `"a payload"`} {
		d.admin("select millrace.publish('orders', $1)", payload)
	}
	wire := newWire(t, d.appDSN)
	own := filepath.Join(t.TempDir(), "log")
	// The test's own binary, without servers of its own.
	child := exec.CommandContext(d.ctx, os.Args[0], "-test.run=^TestSeed_A15_TheUsersOwnLogger$")
	child.Env = append(os.Environ(), childEnv+"="+wire.dsn, childLogEnv+"="+own, "MILLRACE_TEST_POSTGRES="+d.ownerDSN)
	var stdout, stderr bytes.Buffer
	child.Stdout, child.Stderr = &stdout, &stderr
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	said := func(what string) {
		t.Helper()
		d.eventually(what, func() (bool, string) {
			text, _ := os.ReadFile(own)
			return strings.Contains(string(text), what), string(text)
		})
	}
	d.eventually("everything is settled", func() (bool, string) {
		rows := d.rows("select lag, in_flight, retrying, dead_letters from millrace.stats('orders')")
		return rows[0] == "0|0|0|2", rows[0]
	})
	wire.block()
	said("receiving failed; trying again")
	wire.open()
	said("receiving again")
	if err := child.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := child.Wait(); err != nil {
		t.Fatalf("%v\n%s%s", err, &stdout, &stderr)
	}
	if stderr.Len() > 0 || strings.TrimSpace(stdout.String()) != "PASS" {
		t.Errorf("something went past the logger: standard error %q, standard output %q", &stderr, &stdout)
	}
	text, err := os.ReadFile(own)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"level=INFO msg=\"consumer started\"", "the printer is out of paper", "level=ERROR msg=\"a handler panicked\"", "the panic's value", "a message becomes a dead letter",
		"consumer stopped", "stream=orders", "group=billing", "position=", "attempt=2"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the user's logger was not told %q:\n%s", want, text)
		}
	}
	if strings.Contains(string(text), "a payload") || strings.Contains(string(text), appPassword+"@") {
		t.Errorf("the log has a payload or a password:\n%s", text)
	}
}

// loggingChild is a program with a logger of its own. What is written anywhere else shows. It ends by SIGTERM.
func loggingChild(dsn string) {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	log.SetOutput(os.Stderr)
	file, err := os.Create(os.Getenv(childLogEnv))
	if err != nil {
		panic(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	c, err := client.Open(ctx, dsn, client.Options{Scout: true, CallTimeout: time.Second, PollInterval: 50 * time.Millisecond,
		Logger: slog.New(slog.NewTextHandler(file, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if err != nil {
		panic(err)
	}
	defer c.Close()
	err = c.Consume(ctx, "orders", "billing", func(_ context.Context, d *client.Delivery) error {
		switch string(d.Payload) {
		case `"fails"`:
			return client.RetryAfter(errors.New("the printer is out of paper"), 0)
		case `"panics"`:
			if d.Attempt == 1 {
				panic("the panic's value")
			}
		case `"permanent"`:
			return client.Permanent(errors.New("unreadable"))
		}
		return nil
	}, client.ConsumeOptions{})
	if err != nil {
		panic(err)
	}
}
