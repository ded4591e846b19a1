package pipeline_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

// An XREADGROUP loop that resumes its group; making the group tolerates BUSYGROUP.
func TestSeed_T01_ResumesItsGroup(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	// The group is there, an entry is pending for an earlier life of this consumer, and another was never delivered.
	w.do(w.redis.B().XgroupCreate().Key(w.stream).Group("positions").Id("0").Mkstream().Build())
	w.add(position(1, 1))
	w.do(w.redis.B().Xreadgroup().Group("positions", "one").Count(1).Streams().Key(w.stream).Id(">").Build())
	w.add(position(1, 2))
	p := w.start("one", w.configText("reclaimAfter: 1s", "reclaimAfter: 1h"))
	p.ready()
	becomes(t, "rows", 2, w.rows)
	w.add(position(1, 3))
	becomes(t, "rows", 3, w.rows)
	becomes(t, "pending entries", 0, w.pending)
}

// An undecodable entry is logged, skipped, left pending, and never acked speculatively. I1.
func TestSeed_T02_UndecodableEntryIsLeftPending(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("one", w.configText("policy: DeadLetter", "policy: Pending", "reclaimAfter: 1s", "reclaimAfter: 100ms"))
	p.ready()
	ids := w.add(position(1, 1), `{"device_id":`, position(1, 2))
	becomes(t, "rows", 2, w.rows)
	line := p.waitFor("entry cannot be decoded")
	if line["id"] != ids[1] || line["level"] != "WARN" || line["reason"] != "the document is not valid JSON" {
		t.Errorf("logged as %v", line)
	}
	becomes(t, "pending entries", 1, w.pending)
	// It is delivered again and again, beyond maxDeliveries, and stays.
	eventually(t, func() (bool, string) {
		n := w.deliveries(ids[1])
		return n > 4, fmt.Sprintf("delivered %d times", n)
	})
	if w.pending() != 1 || w.rows() != 2 {
		t.Errorf("%d pending, %d rows", w.pending(), w.rows())
	}
	// The log says so once, not at every delivery.
	if n := countMessages(p, "entry cannot be decoded", "WARN"); n != 1 {
		t.Errorf("warned %d times", n)
	}
}

// Only ids that were inserted or are duplicates are acked. I1.
func TestSeed_T03_PartialAck(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.createPositions("check (odometer >= 0)")
	p := w.start("one", w.configText("policy: DeadLetter", "policy: Pending", "reclaimAfter: 1s", "reclaimAfter: 1h"))
	p.ready()
	ids := w.add(position(1, 1), `{"device_id":"bad","timestamp":"2026-01-01T00:00:00Z","odometer":-1}`, position(1, 1), position(1, 2))
	becomes(t, "rows", 2, w.rows)
	becomes(t, "pending entries", 1, w.pending)
	if n := w.deliveries(ids[1]); n != 1 {
		t.Errorf("the refused entry is not the one that is pending")
	}
}

// The write is idempotent and chunked; duplicates are found by set difference; 64-bit and binary attributes are kept.
func TestSeed_T05_IdempotentWrite(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("one", w.configText("state: {key: device_id, time: ts}", "batch: {maxRows: 7, writers: 1}"))
	p.ready()
	var entries []string
	for n := range 100 {
		entries = append(entries, position(n, n))
	}
	entries = append(entries, entries[:40]...)
	entries = append(entries, `{"device_id":"binary","timestamp":"2026-01-01T00:00:00.1234567Z","odometer":9223372036854775807,
		"attributes":{"big":9007199254740993,"raw":{"type":"Buffer","data":[0,255]}}}`)
	w.add(entries...)
	becomes(t, "rows", 101, w.rows)
	becomes(t, "pending entries", 0, w.pending)
	inserted, duplicates := 0, 0
	for _, l := range p.messages() {
		if l.msg() != "batch written" {
			continue
		}
		i, d := int(l["inserted"].(float64)), int(l["duplicates"].(float64))
		if i+d > 7 {
			t.Errorf("a write of %d rows", i+d)
		}
		inserted, duplicates = inserted+i, duplicates+d
	}
	if inserted != 101 || duplicates != 40 {
		t.Errorf("inserted %d, duplicates %d", inserted, duplicates)
	}
	var odometer int64
	var big, raw string
	var ts time.Time
	err := w.db.QueryRow(w.ctx, `select odometer, attributes->>'big', attributes->>'raw', ts from positions where device_id = 'binary'`).Scan(&odometer, &big, &raw, &ts)
	if err != nil || odometer != 9223372036854775807 || big != "9007199254740993" || raw != "AP8=" || ts.Nanosecond() != 123456000 {
		t.Errorf("odometer %d, big %s, raw %s, ts %s, %v", odometer, big, raw, ts, err)
	}
}

// Start order: configuration, logger, database, migrations, Redis, state, writer, sink, consumer.
func TestSeed_T06_StartOrder(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("one", w.configText())
	p.ready()
	want := []string{"processor starting", "Postgres connected", "migrations applied", "Redis connected",
		fmt.Sprintf("consumer started on stream %s group positions consumer one", w.stream), "processor ready"}
	var got []string
	for _, l := range p.messages() {
		if l["level"] == "INFO" {
			got = append(got, l.msg())
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("logged %q\nwant   %q", got, want)
	}
}

// The lifecycle lines of the seed, and two lines per batch.
func TestSeed_T09_LogLines(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("one", w.configText())
	for _, msg := range []string{"processor starting", "Postgres connected", "Redis connected", "migrations applied",
		fmt.Sprintf("consumer started on stream %s group positions consumer one", w.stream), "processor ready"} {
		if l := p.waitFor(msg); l["level"] != "INFO" || l.msg() != msg {
			t.Errorf("%v", l)
		}
	}
	// A duplicate next to its original makes one batch with an inserted and a duplicate row, or two batches.
	w.add(position(1, 1), position(1, 1), `broken`)
	becomes(t, "pending entries", 1, w.pending)
	if l := p.waitFor("batch consumed"); l["n"] == nil || l["level"] != "DEBUG" {
		t.Errorf("%v", l)
	}
	l := p.waitFor("batch written")
	if l["inserted"] != 1.0 || l["failed"] != 0.0 || l["duplicates"] == nil || l["level"] != "DEBUG" {
		t.Errorf("%v", l)
	}
}

// T06: a processor waits for servers that are down, and exits, saying why, when only a person can help.
func TestSeed_T06_StartWithoutServers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	t.Run("a wrong password ends it with the reason and without the secret", func(t *testing.T) {
		bad := *w
		bad.t = t
		bad.dsn = strings.Replace(w.dsn, "://postgres:", "://postgres:wrongsecret", 1)
		if bad.dsn == w.dsn {
			t.Fatal("the DSN has another form than expected")
		}
		p := bad.start("one", w.configText())
		if code := p.exited(patience); code != 1 {
			t.Errorf("exit code %d", code)
		}
		if log := p.tail(10000); !strings.Contains(log, "password authentication failed") || strings.Contains(log, "wrongsecret") {
			t.Errorf("%s", log)
		}
	})
	t.Run("a server that is down is waited for", func(t *testing.T) {
		bad := *w
		bad.t = t
		bad.redisURL = "redis://127.0.0.1:1/0"
		p := bad.start("one", w.configText())
		p.waitFor("waiting for Redis")
		if code, text := p.get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(text, "waiting for Redis") {
			t.Errorf("/readyz: %d %s", code, text)
		}
		if code, _ := p.get("/healthz"); code != http.StatusOK {
			t.Errorf("/healthz: %d", code)
		}
		p.signal(syscall.SIGTERM)
		if code := p.exited(prompt); code != 0 {
			t.Errorf("exit code %d", code)
		}
	})
}

// State before write: while the write waits for a lock, the state has seen the record. I1, I6.
func TestSeed_T07_StateBeforeWrite(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := w.config()
	line := w.assemble(c, "one")
	unlock := w.lockPositions()
	stop := line.run(w)
	w.add(position(1, 1))
	eventually(t, func() (bool, string) {
		r, ok := line.state.Get("device-0001")
		return ok && r.Count == 1, fmt.Sprintf("%+v", r)
	})
	if n := w.pending(); n != 1 {
		t.Errorf("%d entries pending while the write has not happened", n)
	}
	unlock()
	becomes(t, "rows", 1, w.rows)
	becomes(t, "pending entries", 0, w.pending)
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// SIGTERM when idle exits cleanly; with writes in flight it waits for them; a forced exit is the backstop.
func TestSeed_T08_Shutdown(t *testing.T) {
	t.Parallel()
	t.Run("when idle it exits cleanly", func(t *testing.T) {
		w := newWorld(t)
		p := w.start("one", w.configText())
		p.ready()
		p.signal(syscall.SIGTERM)
		if code := p.exited(prompt); code != 0 {
			t.Errorf("exit code %d", code)
		}
		for _, l := range p.messages() {
			if l["level"] == "ERROR" || l["level"] == "WARN" {
				t.Errorf("%v", l)
			}
		}
	})
	t.Run("with writes in flight it waits for them", func(t *testing.T) {
		w := newWorld(t)
		p := w.start("one", w.configText())
		p.ready()
		unlock := w.lockPositions()
		w.add(position(1, 1), position(2, 1))
		becomes(t, "pending entries", 2, w.pending)
		p.signal(syscall.SIGTERM)
		p.waitFor("stopping")
		eventually(t, func() (bool, string) {
			code, text := p.get("/readyz")
			return code == http.StatusServiceUnavailable && strings.Contains(text, "drain"), text
		})
		unlock()
		if code := p.exited(prompt); code != 0 {
			t.Errorf("exit code %d", code)
		}
		if w.rows() != 2 || w.pending() != 0 {
			t.Errorf("%d rows, %d pending", w.rows(), w.pending())
		}
	})
	t.Run("it gives up in time, and what is unfinished goes back", func(t *testing.T) {
		w := newWorld(t)
		slow := []string{"reclaimAfter: 1s", "reclaimAfter: 1h", "state: {key: device_id, time: ts}", "drain: {timeout: 500ms}"}
		p := w.start("one", w.configText(slow...))
		p.ready()
		unlock := w.lockPositions()
		w.add(position(1, 1))
		becomes(t, "pending entries", 1, w.pending)
		p.signal(syscall.SIGTERM)
		if code := p.exited(prompt); code != 1 {
			t.Errorf("exit code %d", code)
		}
		unlock()
		w.start("two", w.configText(slow...)) // does not wait an hour for what was given back
		becomes(t, "rows", 1, w.rows)
		becomes(t, "pending entries", 0, w.pending)
	})
	t.Run("a second signal exits at once", func(t *testing.T) {
		w := newWorld(t)
		p := w.start("one", w.configText())
		p.ready()
		defer w.lockPositions()()
		w.add(position(1, 1))
		becomes(t, "pending entries", 1, w.pending)
		p.signal(syscall.SIGTERM)
		p.waitFor("stopping")
		p.signal(syscall.SIGTERM)
		if code := p.exited(prompt); code != 1 {
			t.Errorf("exit code %d", code)
		}
	})
}

// Real metrics, in Prometheus's format, that say what happened.
func TestSeed_T10_Metrics(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("one", w.configText("reclaimAfter: 1s", "reclaimAfter: 100ms"))
	p.ready()
	w.add(position(1, 1), position(1, 1), position(2, 1), `broken`)
	becomes(t, "dead letters", 1, w.deadLetters)
	becomes(t, "pending entries", 0, w.pending)
	want := map[string]float64{
		`millrace_processor_entries_total{result="written"}`:   2,
		`millrace_processor_entries_total{result="duplicate"}`: 1,
		`millrace_processor_entries_total{result="rejected"}`:  3,
		"millrace_processor_entries_read_total":                6,
		"millrace_processor_undecodable_total":                 3,
		"millrace_processor_dead_letters_total":                1,
		"millrace_processor_state_keys":                        2,
		"millrace_processor_ready":                             1,
		"millrace_processor_ack_backlog_entries":               0,
		"millrace_processor_in_flight_bytes":                   0,
		"millrace_processor_breaker_open":                      0,
		"millrace_processor_end_to_end_seconds_count":          2,
	}
	eventually(t, func() (bool, string) {
		got := p.metrics()
		for name, value := range want {
			if got[name] != value {
				return false, fmt.Sprintf("%s is %v, want %v", name, got[name], value)
			}
		}
		return true, ""
	})
}

// metrics scrapes the endpoint. Histograms appear by their count.
func (p *processor) metrics() map[string]float64 {
	p.t.Helper()
	_, text := p.get("/metrics")
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		p.t.Fatal(err)
	}
	values := map[string]float64{}
	for name, f := range families {
		for _, m := range f.Metric {
			full := name
			if len(m.Label) > 0 {
				var labels []string
				for _, l := range m.Label {
					labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
				}
				full += "{" + strings.Join(labels, ",") + "}"
			}
			switch {
			case m.Counter != nil:
				values[full] = m.Counter.GetValue()
			case m.Gauge != nil:
				values[full] = m.Gauge.GetValue()
			case m.Histogram != nil:
				values[full+"_count"] = float64(m.Histogram.GetSampleCount())
			}
		}
	}
	return values
}

// The entries of a dead instance are taken over by another.
func TestSeed_T11_TakeoverOfADeadInstance(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("one", w.configText())
	p.ready()
	unlock := w.lockPositions()
	w.add(position(1, 1), position(2, 1))
	becomes(t, "pending entries", 2, w.pending)
	p.kill()
	unlock()
	w.start("two", w.configText())
	becomes(t, "rows", 2, w.rows)
	becomes(t, "pending entries", 0, w.pending)
}

// A Position published to telemetry:t is a row in positions within seconds.
func TestSeed_T12_PositionBecomesARow(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.stream = "telemetry:t"
	p := w.start("one", w.configText())
	p.ready()
	began := time.Now()
	w.add(position(1, 1))
	becomes(t, "rows", 1, w.rows)
	t.Logf("a row after %s", time.Since(began))
	becomes(t, "pending entries", 0, w.pending)
}

// A dead letter keeps the whole entry and says why.
func TestDeadLetterHoldsTheEntryAndTheReason(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("one", w.configText("reclaimAfter: 1s", "reclaimAfter: 100ms"))
	p.ready()
	id, err := w.redis.Do(w.ctx, w.redis.B().Xadd().Key(w.stream).Id("*").FieldValue().
		FieldValue("payload", "\x00broken").FieldValue("trace", "abc").FieldValue("payload", "{").Build()).ToString()
	if err != nil {
		t.Fatal(err)
	}
	becomes(t, "dead letters", 1, w.deadLetters)
	becomes(t, "pending entries", 0, w.pending)
	var processor, stream, entry, why string
	var deliveries int
	var fields json.RawMessage
	err = w.db.QueryRow(w.ctx, "select processor, stream, entry_id, deliveries, reason, entry from millrace_dead_letter").
		Scan(&processor, &stream, &entry, &deliveries, &why, &fields)
	if err != nil {
		t.Fatal(err)
	}
	if processor != "telemetry" || stream != w.stream || entry != id || deliveries != 3 || why != "the document is not valid JSON" {
		t.Errorf("%s %s %s %d %s", processor, stream, entry, deliveries, why)
	}
	const want = `[{"name": "payload", "base64": "AGJyb2tlbg=="}, {"name": "trace", "value": "abc"}, {"name": "payload", "value": "{"}]`
	if string(fields) != want {
		t.Errorf("%s\nwant %s", fields, want)
	}
}

func countMessages(p *processor, msg, level string) int {
	n := 0
	for _, l := range p.messages() {
		if l.msg() == msg && l["level"] == level {
			n++
		}
	}
	return n
}

// assembled is a pipeline in this process, from the parts that cmd/processor uses.
type assembled struct {
	*pipeline.Pipeline
	state  *pipeline.State
	health *pipeline.Health
}

func (w *world) assemble(c *config.Config, member string, change ...func(*pipeline.Options)) *assembled {
	w.t.Helper()
	pool, err := pipeline.OpenPool(w.ctx, config.Fixed("DSN", w.dsn), c.Name, c.PoolConnections())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(pool.Close)
	if err := pipeline.Migrate(w.ctx, pool, c); err != nil {
		w.t.Fatal(err)
	}
	client, version, err := redisstream.Connect(w.ctx, w.redisURL, member)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(client.Close)
	sink, err := pipeline.NewTableSink(w.ctx, pool, c)
	if err != nil {
		w.t.Fatal(err)
	}
	a := &assembled{state: pipeline.NewState(c), health: pipeline.NewHealth()}
	a.health.Clear("start")
	log := slog.New(slog.NewTextHandler(w.t.Output(), nil))
	metrics := pipeline.NewMetrics()
	source := pipeline.NewRedisSource(pipeline.RedisOptions{
		Client: client, Version: version, Consumer: member, Config: c, Pool: pool, Metrics: metrics, Logger: log,
	})
	if err := source.Join(w.ctx); err != nil {
		w.t.Fatal(err)
	}
	o := pipeline.Options{Config: c, Source: source, Sink: sink, State: a.state, Metrics: metrics, Health: a.health, Logger: log}
	for _, f := range change {
		f(&o)
	}
	if a.Pipeline, err = pipeline.New(o); err != nil {
		w.t.Fatal(err)
	}
	return a
}

// run starts the pipeline. The function it returns ends it and returns Run's error; the test's end does so otherwise.
func (a *assembled) run(w *world) (stop func() error) {
	ctx, cancel := context.WithCancel(w.ctx)
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	var err error
	ended := false
	stop = func() error {
		if !ended {
			cancel()
			err, ended = <-done, true
		}
		return err
	}
	w.t.Cleanup(func() { _ = stop() })
	return stop
}

// createPositions makes the table with a constraint of its own.
func (w *world) createPositions(constraint string) {
	w.t.Helper()
	_, err := w.db.Exec(w.ctx, `create table positions (device_id text, ts timestamptz, latitude float8, longitude float8, odometer bigint,
		attributes jsonb, source_id text, primary key (device_id, ts), constraint rule `+constraint+`)`)
	if err != nil {
		w.t.Fatal(err)
	}
}

// lockPositions keeps every writer of the table waiting until the function it returns is called.
func (w *world) lockPositions() (unlock func()) {
	w.t.Helper()
	conn := w.connect()
	if _, err := conn.Exec(w.ctx, "begin; lock table positions in share mode"); err != nil {
		w.t.Fatal(err)
	}
	return func() {
		w.t.Helper()
		if _, err := conn.Exec(w.ctx, "rollback"); err != nil {
			w.t.Error(err)
		}
	}
}
