package pipeline_test

import (
	"context"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/test/env/postgres"
	"github.com/millrace-dev/millrace/test/env/redis"
)

// balanced waits until everything that was produced has come to its end, prints the ledger and checks it.
func (w *world) balanced(l *load) {
	w.t.Helper()
	dead := int(l.broken.Load() + l.poisoned.Load())
	eventually(w.t, func() (bool, string) {
		rows, undelivered, pending, letters := w.rows(), w.undelivered(), w.pending(), w.deadLetters()
		return rows == int(l.valid.Load()) && undelivered == 0 && pending == 0 && letters == dead,
			fmt.Sprintf("rows %d of %d, undelivered %d, pending %d, dead letters %d of %d", rows, l.valid.Load(), undelivered, pending, letters, dead)
	})
	end := w.ledger(l)
	w.t.Log(end)
	if end.Missing != 0 || end.Pending != 0 {
		w.t.Error("the ledger does not balance")
	}
}

func (w *world) produce(l *load) {
	w.t.Helper()
	if err := l.produce(w.ctx, w.redis, w.stream); err != nil {
		w.t.Fatal(err)
	}
}

// PostgreSQL is killed in mid-commit, twice, and comes back. The fate of what was being committed is unknown, so it is
// written again and found as duplicates. I1, I2, I3.
func TestFault_PostgresKilledInMidCommit(t *testing.T) {
	t.Parallel()
	server := postgres.NewServer(t, postgres.Options{Settings: map[string]string{"fsync": "on"}})
	w := newWorldAt(t, server.DSN("postgres"), sharedRedis.URL())
	l := seeded(t, &load{total: 60_000, duplicates: 0.05, undecodable: 0.002})
	p := w.start("one", w.configText("state: {key: device_id, time: ts}", "batch: {maxRows: 200}"))
	p.ready()
	w.produce(l)
	for _, after := range []int{5_000, 25_000} {
		eventually(t, func() (bool, string) { n := w.rows(); return n > after, fmt.Sprint(n, " rows") })
		if err := server.Kill(); err != nil {
			t.Fatal(err)
		}
		w.add(l.position(0)) // however fast the load was written, there is something to write
		l.duplicated.Add(1)
		l.total++
		p.waitFor("writing failed; trying again")
		eventually(t, func() (bool, string) {
			code, text := p.get("/readyz")
			return code == http.StatusServiceUnavailable, text
		})
		if err := server.Restart(w.ctx); err != nil {
			t.Fatal(err)
		}
		w.db.Reset()
	}
	w.balanced(l)
	eventually(t, func() (bool, string) {
		code, text := p.get("/readyz")
		return code == http.StatusOK, text
	})
}

// The sink stands still for a while: reading stops at its bounds, nothing is lost, and all goes on afterwards. I4.
func TestFault_PostgresStalls(t *testing.T) {
	t.Parallel()
	server := postgres.NewServer(t, postgres.Options{})
	w := newWorldAt(t, server.DSN("postgres"), sharedRedis.URL())
	l := seeded(t, &load{total: 40_000, duplicates: 0.05})
	p := w.start("one", w.configText("state: {key: device_id, time: ts}", "batch: {maxRows: 500, maxInFlight: 3000}"))
	p.ready()
	if err := server.Pause(); err != nil {
		t.Fatal(err)
	}
	w.produce(l)
	// Longer than reclaimAfter: what is held is shown to be alive, and is not delivered anew.
	for end := time.Now().Add(stall(t, 3*time.Second)); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if n := p.metrics()["millrace_processor_in_flight_entries"]; n > 3000 {
			t.Fatalf("%v entries in flight", n)
		}
	}
	metrics := p.metrics()
	read, resident := metrics["millrace_processor_entries_read_total"], metrics["process_resident_memory_bytes"]
	t.Logf("%.0f MiB resident", resident/(1<<20))
	if raceFlags == nil && resident > 128<<20 {
		t.Errorf("%.0f MiB resident", resident/(1<<20))
	}
	if err := server.Resume(); err != nil {
		t.Fatal(err)
	}
	if read > 3000 {
		t.Errorf("read %v entries while nothing could be written", read)
	}
	w.balanced(l)
}

// Redis is killed while entries are being written, so that they cannot be acked, and comes back with its data.
func TestFault_RedisRestarts(t *testing.T) {
	t.Parallel()
	server := redis.NewServer(t, redis.Options{Persist: true})
	w := newWorldAt(t, postgres.NewDatabase(t), server.URL())
	l := seeded(t, &load{total: 40_000, duplicates: 0.05, undecodable: 0.002})
	p := w.startWriting(l)
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	p.unlock()
	p.waitFor("settling failed; trying again")
	if err := server.Restart(w.ctx); err != nil {
		t.Fatal(err)
	}
	w.balanced(l)
}

// writing is a processor whose writes wait for a lock.
type writing struct {
	*processor
	unlock func()
}

// startWriting starts a processor, produces the load, and returns when entries have been read and none can be written
// before unlock.
func (w *world) startWriting(l *load) writing {
	w.t.Helper()
	p := w.start("one", w.configText("state: {key: device_id, time: ts}", "batch: {maxRows: 200}"))
	p.ready()
	unlock := w.lockPositions()
	w.produce(l)
	eventually(w.t, func() (bool, string) {
		n := w.pending()
		return n > 500, fmt.Sprint(n, " pending")
	})
	return writing{p, unlock}
}

// Redis restarts without its data while entries are written: what was read is written, the group is made again, and what
// comes afterwards is written too. What nobody had read is lost, and the ledger says how much.
func TestFault_RedisRestartsEmpty(t *testing.T) {
	t.Parallel()
	server := redis.NewServer(t, redis.Options{})
	w := newWorldAt(t, postgres.NewDatabase(t), server.URL())
	before := seeded(t, &load{total: 20_000, duplicates: 0.05})
	p := w.startWriting(before)
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	read := int(p.metrics()["millrace_processor_entries_read_total"])
	p.unlock()
	if err := server.Restart(w.ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() (bool, string) {
		err := w.redis.Do(w.ctx, w.redis.B().Ping().Build()).Error()
		return err == nil, fmt.Sprint(err)
	})
	after := seeded(t, &load{total: 5_000, duplicates: 0.05})
	after.devices = 10_000 // other devices, so other rows
	w.produce(after)
	eventually(t, func() (bool, string) {
		m := p.metrics()
		done := m[`millrace_processor_entries_total{result="written"}`] + m[`millrace_processor_entries_total{result="duplicate"}`]
		return int(done) >= read+after.total, fmt.Sprintf("%v entries of %d", done, read+after.total)
	})
	becomes(t, "pending entries", 0, w.pending)
	end := w.ledger(after)
	t.Logf("%d entries read before; after: %s", read, end)
	if end.Missing != 0 || end.Undelivered != 0 {
		t.Error("the ledger does not balance")
	}
}

// Redis stands still for a while: acks fail first, and reading has stopped at its bounds.
func TestFault_RedisStalls(t *testing.T) {
	t.Parallel()
	server := redis.NewServer(t, redis.Options{})
	w := newWorldAt(t, postgres.NewDatabase(t), server.URL())
	l := seeded(t, &load{total: 30_000, duplicates: 0.05})
	p := w.startWriting(l)
	if err := server.Pause(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	p.unlock()
	p.waitFor("settling failed; trying again")
	time.Sleep(time.Until(began.Add(stall(t, 0)))) // as long as somebody wants to know
	if err := server.Resume(); err != nil {
		t.Fatal(err)
	}
	w.balanced(l)
}

// Poison rows, which the table refuses, are found by halving; the others land.
func TestFault_PoisonRows(t *testing.T) {
	for _, share := range []float64{0.01, 0.03} {
		t.Run(fmt.Sprintf("at %g percent they become dead letters and the others rows", 100*share), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.createPositions("check (odometer >= 0)")
			l := seeded(t, &load{total: 10_000, duplicates: 0.05, poison: share})
			w.start("one", w.configText()).ready()
			w.produce(l)
			w.balanced(l)
			if n := w.count("select count(*) from millrace_dead_letter where reason like '%violates check constraint%(constraint rule)%23514%'"); n != int(l.poisoned.Load()) {
				t.Errorf("%d dead letters with the constraint as reason", n)
			}
		})
	}
	// I9: half of the rows failing is the table's fault. Nothing is set aside, and all land once it is repaired.
	t.Run("at 50 percent writing stops until the table is repaired", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		w.createPositions("check (odometer >= 0)")
		l := seeded(t, &load{total: 2_000, poison: 0.5})
		c := w.config("state: {key: device_id, time: ts}", "batch: {maxRows: 500}")
		line := w.assemble(c, "one", func(o *pipeline.Options) {
			o.Breaker = pipeline.BreakerOptions{Cooldown: 300 * time.Millisecond}
		})
		stop := line.run(w)
		w.produce(l)
		eventually(t, func() (bool, string) {
			ready, text := line.health.Ready()
			return !ready && strings.Contains(text, "too many rows cannot be written"), text
		})
		if n := w.deadLetters(); n != 0 {
			t.Errorf("%d dead letters", n)
		}
		if _, err := w.db.Exec(w.ctx, "alter table positions drop constraint rule"); err != nil {
			t.Fatal(err)
		}
		all := int(l.valid.Load() + l.poisoned.Load())
		becomes(t, "rows", all, w.rows)
		becomes(t, "pending entries", 0, w.pending)
		eventually(t, func() (bool, string) { return line.health.Ready() })
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

// I9: a table that is dropped while the processor runs makes it unready, and nothing is acknowledged until it is back.
func TestFault_TableDroppedAndMadeAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("one", w.configText())
	p.ready()
	w.add(position(1, 1))
	becomes(t, "rows", 1, w.rows)
	if _, err := w.db.Exec(w.ctx, "alter table positions rename to elsewhere"); err != nil {
		t.Fatal(err)
	}
	w.add(position(1, 2), position(1, 3))
	eventually(t, func() (bool, string) {
		code, text := p.get("/readyz")
		return code == http.StatusServiceUnavailable && strings.Contains(text, "does not exist"), text
	})
	if n := w.pending(); n != 2 {
		t.Errorf("%d entries pending", n)
	}
	if _, err := w.db.Exec(w.ctx, "alter table elsewhere rename to positions"); err != nil {
		t.Fatal(err)
	}
	becomes(t, "rows", 3, w.rows)
	becomes(t, "pending entries", 0, w.pending)
	eventually(t, func() (bool, string) {
		code, text := p.get("/readyz")
		return code == http.StatusOK, text
	})
}

// Pending entries are trimmed from the stream: they are counted and reported, nothing waits for them, and every entry is
// either a row or counted.
func TestFault_PendingEntriesTrimmed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.do(w.redis.B().XgroupCreate().Key(w.stream).Group("positions").Id("0").Mkstream().Build())
	for n := range 300 {
		w.add(position(n, 1))
	}
	w.do(w.redis.B().Xreadgroup().Group("positions", "dead").Count(200).Streams().Key(w.stream).Id(">").Build())
	w.do(w.redis.B().Xtrim().Key(w.stream).Maxlen().Threshold("150").Build())
	p := w.start("one", w.configText("reclaimAfter: 1s", "reclaimAfter: 100ms"))
	p.ready()
	becomes(t, "rows", 150, w.rows)
	becomes(t, "pending entries", 0, w.pending)
	trimmed := func() int {
		return int(p.metrics()[fmt.Sprintf("millrace_processor_trimmed_entries{stream=%q}", w.stream)])
	}
	becomes(t, "trimmed entries", 150, trimmed)
	if l := p.waitFor("entries were deleted or trimmed"); l["n"] != 150.0 {
		t.Errorf("reported %v", l)
	}
	t.Logf("produced 300 = 150 kept + 150 trimmed while pending; rows %d, counted as trimmed %d, pending %d", w.rows(), trimmed(), w.pending())
}

// SIGTERM under load, again and again: every processor exits cleanly, and nothing waits for an hour to be taken over.
func TestFault_TerminatedUnderLoad(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	l := seeded(t, &load{total: 60_000, duplicates: 0.05})
	configuration := w.configText("reclaimAfter: 1s", "reclaimAfter: 1h")
	producing := make(chan error, 1)
	go func() { producing <- l.produce(w.ctx, w.redis, w.stream) }()
	p := w.start("pod-0", configuration)
	for n := 1; n <= 3; n++ {
		p.ready()
		before := w.rows()
		next := w.start(fmt.Sprintf("pod-%d", n), configuration)
		eventually(t, func() (bool, string) {
			rows := w.rows()
			return rows > before+3000 || rows == int(l.valid.Load()), fmt.Sprint(rows, " rows")
		})
		p.signal(syscall.SIGTERM)
		if code := p.exited(patience); code != 0 {
			t.Fatalf("exit code %d", code)
		}
		p = next
	}
	if err := <-producing; err != nil {
		t.Fatal(err)
	}
	w.balanced(l)
	names := w.consumers()
	for n := range 3 {
		if names[fmt.Sprintf("pod-%d", n)] {
			t.Errorf("the consumer of pod-%d is still there: %v", n, names)
		}
	}
}

// A zombie: stopped for longer than its claim to its entries, it wakes and goes on. Its entries were taken over, and its
// own writes are duplicates. I3.
func TestFault_ZombieWakesUp(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	l := seeded(t, &load{total: 20_000, duplicates: 0.05})
	configuration := w.configText("reclaimAfter: 1s", "reclaimAfter: 300ms")
	zombie := w.start("zombie", configuration)
	zombie.ready()
	w.produce(l)
	eventually(t, func() (bool, string) { n := w.rows(); return n > 1000, fmt.Sprint(n, " rows") })
	zombie.signal(syscall.SIGSTOP)
	w.start("other", configuration)
	eventually(t, func() (bool, string) {
		rows, pending := w.rows(), w.pending()
		return rows == int(l.valid.Load()) && pending == 0, fmt.Sprintf("%d rows, %d pending", rows, pending)
	})
	zombie.signal(syscall.SIGCONT)
	w.balanced(l)
	zombie.signal(syscall.SIGTERM)
	if code := zombie.exited(patience); code != 0 {
		t.Errorf("exit code %d", code)
	}
	w.balanced(l)
}

// I5: when Run has returned, none of its goroutines is left.
func TestRunLeavesNoGoroutine(t *testing.T) {
	w := newWorld(t) // not parallel: it looks at every goroutine of the process
	line := w.assemble(w.config(), "one")
	stop := line.run(w)
	w.add(position(1, 1))
	becomes(t, "rows", 1, w.rows)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if left := goroutinesOf("internal/pipeline.(*Pipeline)", "internal/pipeline.(*RedisSource)"); left != "" {
		t.Errorf("still running:\n%s", left)
	}
}

// goroutinesOf returns the stacks that hold one of the texts.
func goroutinesOf(texts ...string) string {
	buf := make([]byte, 4<<20)
	var found []string
	for _, stack := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		for _, text := range texts {
			if strings.Contains(stack, text) {
				found = append(found, stack)
				break
			}
		}
	}
	return strings.Join(found, "\n\n")
}

// brokenSink panics, as a bug would.
type brokenSink struct{}

func (brokenSink) Write(context.Context, *pipeline.Batch) ([]pipeline.Outcome, error) {
	panic("a bug")
}

// A panic in a stage ends Run with an error, and what was in hand goes back to the group at once. I2, I5.
func TestRunSurvivesAPanicLongEnoughToGiveEntriesBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := w.config("reclaimAfter: 1s", "reclaimAfter: 1h")
	line := w.assemble(c, "one", func(o *pipeline.Options) { o.Sink = brokenSink{} })
	done := make(chan error, 1)
	go func() { done <- line.Run(w.ctx) }()
	w.add(position(1, 1), position(2, 1), position(3, 1))
	select {
	case err := <-done:
		if err == nil || !strings.Contains(err.Error(), "a bug") {
			t.Fatalf("error %v", err)
		}
	case <-time.After(patience):
		t.Fatal("Run did not return")
	}
	w.assemble(c, "two").run(w)
	becomes(t, "rows", 3, w.rows)
	becomes(t, "pending entries", 0, w.pending)
}
