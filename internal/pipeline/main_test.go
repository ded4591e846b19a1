package pipeline_test

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/rueidis"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
	"github.com/millrace-dev/millrace/test/env/postgres"
	"github.com/millrace-dev/millrace/test/env/redis"
)

// processorBinary is the real cmd/processor, built once for all tests of the package.
var processorBinary string

// sharedRedis serves every test that does not break its server. Each uses a stream of its own.
var sharedRedis *redis.Server

func TestMain(m *testing.M) {
	if part := os.Getenv(tracePartEnv); part != "" {
		os.Exit(tracePart(part)) // a program of TestSeed_A06
	}
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "millrace-processor-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	processorBinary = filepath.Join(dir, "processor")
	build := exec.Command("go", append(append([]string{"build"}, raceFlags...), "-o", processorBinary, "../../cmd/processor")...)
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the processor: %v\n%s", err, out)
		return 1
	}
	sharedRedis, err = redis.Start(context.Background(), redis.Options{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() {
		if err := sharedRedis.Stop(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}()
	return postgres.Main(m, postgres.Options{})
}

// positionsConfig is the seed's pipeline. Tests replace pieces of it.
const positionsConfig = `
name: telemetry
source:
  redis: {streams: ["STREAM"], group: positions, reclaimAfter: 1s}
codec: {type: JSON, field: payload}
mapping:
  columns:
  - {name: device_id, path: device_id, type: text, required: true}
  - {name: ts, path: timestamp, type: timestamptz, required: true}
  - {name: latitude, path: latitude, type: double precision}
  - {name: longitude, path: longitude, type: double precision}
  - {name: odometer, path: odometer, type: bigint}
  - {name: attributes, path: attributes, type: jsonb, default: "{}"}
  - {name: source_id, path: "@id", type: text}
state: {key: device_id, time: ts}
sink:
  table: {name: positions, key: [device_id, ts], create: IfMissing}
errors: {maxDeliveries: 3, policy: DeadLetter}
`

// world is one test's stream and database.
type world struct {
	t        testing.TB
	ctx      context.Context
	stream   string
	dsn      string
	redisURL string
	db       *pgxpool.Pool
	redis    rueidis.Client
}

// newWorld uses the shared servers.
func newWorld(t testing.TB) *world {
	t.Helper()
	return newWorldAt(t, postgres.NewDatabase(t), sharedRedis.URL())
}

// newWorldAt uses the given database and Redis.
func newWorldAt(t testing.TB, dsn, redisURL string) *world {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute+stall(t, 0))
	t.Cleanup(cancel)
	w := &world{t: t, ctx: ctx, dsn: dsn, redisURL: redisURL, stream: "telemetry:" + strings.ReplaceAll(t.Name(), "/", ":") + ":" + rand.Text()[:8]}
	var err error
	if w.db, err = pgxpool.New(ctx, dsn); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.db.Close)
	if w.redis, _, err = redisstream.Connect(ctx, redisURL, t.Name()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.redis.Close)
	return w
}

// config parses the seed's pipeline for this world, after replacing pairs of texts.
func (w *world) config(replacements ...string) *config.Config {
	w.t.Helper()
	c, err := config.Parse([]byte(w.configText(replacements...)))
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

func (w *world) configText(replacements ...string) string {
	w.t.Helper()
	text := strings.ReplaceAll(positionsConfig, "STREAM", w.stream)
	for i := 0; i < len(replacements); i += 2 {
		if !strings.Contains(text, replacements[i]) {
			w.t.Fatalf("the configuration holds no %q", replacements[i])
		}
		text = strings.ReplaceAll(text, replacements[i], replacements[i+1])
	}
	return text
}

// add appends entries with one field each and returns their ids.
func (w *world) add(payloads ...string) []string {
	w.t.Helper()
	return addTo(w.t, w.ctx, w.redis, w.stream, payloads...)
}

func addTo(t testing.TB, ctx context.Context, client rueidis.Client, stream string, payloads ...string) []string {
	t.Helper()
	cmds := make(rueidis.Commands, len(payloads))
	for i, p := range payloads {
		cmds[i] = client.B().Xadd().Key(stream).Id("*").FieldValue().FieldValue("payload", p).Build()
	}
	ids := make([]string, len(payloads))
	for i, r := range client.DoMulti(ctx, cmds...) {
		var err error
		if ids[i], err = r.ToString(); err != nil {
			t.Fatal(err)
		}
	}
	return ids
}

// position writes a Position of the given device at the given second.
func position(device, second int) string {
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).Add(time.Duration(second) * time.Second)
	return fmt.Sprintf(`{"device_id":"device-%04d","timestamp":%q,"latitude":52.%04d,"longitude":13.4,"odometer":%d,"attributes":{"io":"9007199254740993","battery":%d}}`,
		device, at.Format(time.RFC3339), second%10000, int64(9007199254740993)+int64(second), second%100)
}

// count runs a query for one number. A table that does not exist counts 0.
func (w *world) count(sql string, args ...any) int {
	w.t.Helper()
	var n int
	if err := w.db.QueryRow(w.ctx, sql, args...).Scan(&n); err != nil && !strings.Contains(err.Error(), "42P01") {
		w.t.Fatalf("%s: %v", sql, err)
	}
	return n
}

func (w *world) rows() int { w.t.Helper(); return w.count("select count(*) from positions") }

func (w *world) deadLetters() int {
	w.t.Helper()
	return w.count("select count(*) from millrace_dead_letter")
}

// pending is how many entries the group has delivered and not acknowledged.
func (w *world) pending() int {
	w.t.Helper()
	summary, err := w.redis.Do(w.ctx, w.redis.B().Xpending().Key(w.stream).Group("positions").Build()).ToArray()
	if err != nil {
		w.t.Fatal(err)
	}
	n, err := summary[0].ToInt64()
	if err != nil {
		w.t.Fatal(err)
	}
	return int(n)
}

// undelivered is how many entries the group has not delivered yet.
func (w *world) undelivered() int {
	w.t.Helper()
	m := redisstream.NewMember(w.redis, redisstream.Config{Stream: w.stream, Group: "positions"})
	p, err := m.Progress(w.ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	return int(p.Lag)
}

// patience is how long tests wait for what must come; prompt is how long a process may take to stop that has nothing to wait for. Both are long because test
// machines can be busy.
const (
	patience = 2 * time.Minute
	prompt   = 20 * time.Second
)

// eventually waits until a condition holds; describe says what was seen last.
func eventually(t testing.TB, holds func() (bool, string)) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		ok, seen := holds()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", patience, seen)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// becomes waits until a number is what is wanted.
func becomes(t testing.TB, what string, want int, read func() int) {
	t.Helper()
	eventually(t, func() (bool, string) {
		got := read()
		return got == want, fmt.Sprintf("%s: %d, want %d", what, got, want)
	})
}

// processor is a running cmd/processor.
type processor struct {
	t    testing.TB
	cmd  *exec.Cmd
	exit chan struct{} // closed when it has ended

	mu    sync.Mutex
	lines []logLine
	raw   strings.Builder
}

type logLine map[string]any

func (l logLine) msg() string { s, _ := l["msg"].(string); return s }

// start runs the processor with a configuration. A test that ends kills it.
func (w *world) start(member, configuration string, env ...string) *processor {
	w.t.Helper()
	file := filepath.Join(w.t.TempDir(), "processor.yaml")
	if err := os.WriteFile(file, []byte(configuration), 0o600); err != nil {
		w.t.Fatal(err)
	}
	p := &processor{t: w.t, exit: make(chan struct{})}
	p.cmd = exec.Command(processorBinary, "--config", file, "--listen", "127.0.0.1:0", "--member", member, "--log-level", "debug")
	p.cmd.Env = append([]string{
		config.EnvRedisURL + "=" + w.redisURL,
		config.EnvSinkDatabaseURL + "=" + w.dsn,
	}, env...)
	out, err := p.cmd.StderrPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	go p.follow(out)
	w.t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.exit
		if w.t.Failed() {
			w.t.Logf("log of %s ends with:\n%s", member, p.tail(6000))
		}
	})
	return p
}

func (p *processor) follow(out io.Reader) {
	scan := bufio.NewScanner(out)
	scan.Buffer(nil, 1<<20)
	for scan.Scan() {
		line := logLine{}
		_ = json.Unmarshal(scan.Bytes(), &line)
		p.mu.Lock()
		p.lines = append(p.lines, line)
		p.raw.WriteString(scan.Text() + "\n")
		p.mu.Unlock()
	}
	_ = p.cmd.Wait()
	close(p.exit)
}

func (p *processor) tail(n int) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	text := p.raw.String()
	return text[max(len(text)-n, 0):]
}

// messages are the log's lines so far.
func (p *processor) messages() []logLine {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]logLine(nil), p.lines...)
}

// waitFor waits for a line of the log that begins with the text.
func (p *processor) waitFor(msg string) logLine {
	p.t.Helper()
	var found logLine
	eventually(p.t, func() (bool, string) {
		for _, l := range p.messages() {
			if strings.HasPrefix(l.msg(), msg) {
				found = l
				return true, ""
			}
		}
		return false, fmt.Sprintf("no %q in the log", msg)
	})
	return found
}

func (p *processor) ready() {
	p.t.Helper()
	p.waitFor("processor ready")
}

// kill ends the process as a node failure does.
func (p *processor) kill() {
	p.t.Helper()
	if err := p.cmd.Process.Kill(); err != nil {
		p.t.Fatal(err)
	}
	<-p.exit
}

// signal sends a signal.
func (p *processor) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// exited waits for the end and returns the exit code.
func (p *processor) exited(within time.Duration) int {
	p.t.Helper()
	select {
	case <-p.exit:
	case <-time.After(within):
		p.t.Fatalf("still running after %s", within)
	}
	return p.cmd.ProcessState.ExitCode()
}

// get asks the processor's HTTP endpoint.
func (p *processor) get(path string) (int, string) {
	p.t.Helper()
	address, _ := p.waitFor("listening")["address"].(string)
	resp, err := http.Get("http://" + address + path)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// connect opens one connection to the world's database.
func (w *world) connect() *pgx.Conn {
	w.t.Helper()
	conn, err := pgx.Connect(w.ctx, w.dsn)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// do runs a command of Redis that must succeed.
func (w *world) do(cmd rueidis.Completed) {
	w.t.Helper()
	if err := w.redis.Do(w.ctx, cmd).Error(); err != nil {
		w.t.Fatal(err)
	}
}

// deliveries is how often a pending entry has been delivered.
func (w *world) deliveries(id string) int {
	w.t.Helper()
	n, err := redisstream.NewMember(w.redis, redisstream.Config{Stream: w.stream, Group: "positions"}).Deliveries(w.ctx, []string{id})
	if err != nil {
		w.t.Fatal(err)
	}
	return n[0]
}

// consumers are the names of the group's consumers.
func (w *world) consumers() map[string]bool {
	w.t.Helper()
	list, err := w.redis.Do(w.ctx, w.redis.B().XinfoConsumers().Key(w.stream).Group("positions").Build()).ToArray()
	if err != nil {
		w.t.Fatal(err)
	}
	names := map[string]bool{}
	for _, c := range list {
		info, err := c.AsMap()
		if err != nil {
			w.t.Fatal(err)
		}
		v := info["name"]
		name, _ := v.ToString()
		names[name] = true
	}
	return names
}
