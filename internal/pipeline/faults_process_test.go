package pipeline_test

import (
	"fmt"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/test/env/postgres"
	"github.com/millrace-dev/millrace/test/env/redis"
)

// stall is how long servers stand still: short, or as MILLRACE_SOAK says.
func stall(t testing.TB, short time.Duration) time.Duration {
	t.Helper()
	text := os.Getenv("MILLRACE_SOAK")
	if text == "" {
		return short
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("MILLRACE_SOAK=%q: %v", text, err)
	}
	return d
}

// Killed without warning at each point where it matters: what was read is written by another, what was committed is not
// written twice. I1, I2, I3.
func TestFault_KilledBetweenReadAndAck(t *testing.T) {
	t.Run("after the read", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		l := seeded(t, &load{total: 20_000, duplicates: 0.05, undecodable: 0.002})
		p := w.startWriting(l) // its writes wait for a lock
		p.kill()
		p.unlock()
		w.start("two", w.configText()).ready()
		w.balanced(l)
	})
	t.Run("after the commit and before the ack", func(t *testing.T) {
		t.Parallel()
		server := redis.NewServer(t, redis.Options{})
		w := newWorldAt(t, postgres.NewDatabase(t), server.URL())
		l := seeded(t, &load{total: 20_000, undecodable: 0.002}) // so each duplicate is a redelivery
		p := w.startWriting(l)
		if err := server.Pause(); err != nil { // no ack is answered, so no more than what is on its way is acknowledged
			t.Fatal(err)
		}
		p.unlock()
		var committed int
		eventually(t, func() (bool, string) {
			committed = w.rows()
			return committed > 500, fmt.Sprint(committed, " rows")
		})
		p.kill()
		if err := server.Resume(); err != nil {
			t.Fatal(err)
		}
		if n := w.pending(); n == 0 {
			t.Fatalf("%d rows are committed and nothing is pending", committed)
		}
		next := w.start("two", w.configText())
		next.ready()
		w.balanced(l)
		if n := next.metrics()[`millrace_processor_entries_total{result="duplicate"}`]; n == 0 {
			t.Errorf("no duplicates of %d rows that were committed before", committed)
		}
	})
}

// XACK is refused after the commit, as long as it takes somebody to give back the right. I1, I2, I9.
func TestFault_AckRefusedAfterCommit(t *testing.T) {
	t.Parallel()
	server := redis.NewServer(t, redis.Options{})
	w := newWorldAt(t, postgres.NewDatabase(t), server.URL())
	l := seeded(t, &load{total: 20_000, duplicates: 0.05})
	p := w.start("one", w.configText("state: {key: device_id, time: ts}", "batch: {maxInFlight: 3000}"))
	p.ready()
	w.do(w.redis.B().Arbitrary("ACL", "SETUSER", "default", "-xack").Build())
	w.produce(l)
	p.waitFor("settling failed; trying again")
	eventually(t, func() (bool, string) {
		code, text := p.get("/readyz")
		return code == http.StatusServiceUnavailable && strings.Contains(text, "xack"), text
	})
	if n := p.metrics()["millrace_processor_entries_read_total"]; n > 3000 {
		t.Errorf("read %v entries while nothing could be acknowledged", n)
	}
	w.do(w.redis.B().Arbitrary("ACL", "SETUSER", "default", "+xack").Build())
	w.balanced(l)
	eventually(t, func() (bool, string) {
		code, text := p.get("/readyz")
		return code == http.StatusOK, text
	})
}

// Everything is delivered ten times more. I3.
func TestFault_RedeliveredTenTimes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	l := seeded(t, &load{total: 5_000, duplicates: 0.05, undecodable: 0.002})
	p := w.start("one", w.configText("reclaimAfter: 1s", "reclaimAfter: 200ms"))
	p.ready()
	w.produce(l)
	w.balanced(l)
	for n := 1; n <= 10; n++ {
		w.do(w.redis.B().XgroupSetid().Key(w.stream).Group("positions").Id("0").Build())
		eventually(t, func() (bool, string) {
			read := p.metrics()["millrace_processor_entries_read_total"]
			return int(read) >= (n+1)*l.total, fmt.Sprint(read, " entries read")
		})
		w.balanced(l)
	}
	if n := p.metrics()[`millrace_processor_stream_incarnation{stream="`+w.stream+`"}`]; n != 0 {
		t.Errorf("incarnation %v", n)
	}
}

// Two processors write the same rows, each stream in the opposite order of the other. I8.
func TestFault_WritersInOppositeOrder(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.createPositions("check (true)")
	const total = 20_000
	l := seeded(t, &load{total: 2 * total})
	there, back := make([]string, total), make([]string, total)
	for n := range total {
		there[n], back[total-1-n] = l.position(n), l.position(n)
	}
	l.valid.Store(total)
	l.duplicated.Store(total)
	other := *w
	other.stream += ":back"
	for page := 0; page < total; page += 1000 {
		w.add(there[page : page+1000]...)
		other.add(back[page : page+1000]...)
	}
	one, two := w.start("one", w.configText()), other.start("two", other.configText())
	one.ready()
	two.ready()
	other.settled(time.Minute)
	w.balanced(l)
	for _, p := range []*processor{one, two} {
		if n := p.metrics()[`millrace_processor_sink_errors_total{class="transient"}`]; n != 0 {
			t.Errorf("%v writes failed, as in a deadlock", n)
		}
	}
}

// settled waits until nothing of the stream is left to do.
func (w *world) settled(within time.Duration) {
	w.t.Helper()
	eventually(w.t, func() (bool, string) {
		undelivered, pending := w.undelivered(), w.pending()
		return undelivered == 0 && pending == 0, fmt.Sprintf("undelivered %d, pending %d", undelivered, pending)
	})
}

// Redis' clock is an hour ahead, or behind: its ids say so, and nothing depends on them.
func TestFault_ClockSkewOfAnHour(t *testing.T) {
	for name, skew := range map[string]time.Duration{"ahead": time.Hour, "behind": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			l := seeded(t, &load{total: 5_000})
			p := w.start("one", w.configText())
			p.ready()
			for n := range l.total {
				id := fmt.Sprint(time.Now().Add(skew).UnixMilli(), "-", n)
				w.do(w.redis.B().Xadd().Key(w.stream).Id(id).FieldValue().FieldValue("payload", l.position(n)).Build())
				l.valid.Add(1)
				if n == l.total/2 {
					p.kill() // another takes over what it has not acknowledged
					p = w.start("two", w.configText())
				}
			}
			w.balanced(l)
			if age := p.metrics()[`millrace_processor_oldest_pending_seconds{stream="`+w.stream+`"}`]; age < 0 {
				t.Errorf("the oldest pending entry is %v seconds old", age)
			}
		})
	}
}

// Columns are added, widened and dropped while rows are written. I2, I9.
func TestFault_AlterTableLive(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	l := seeded(t, &load{total: 60_000, duplicates: 0.05, undecodable: 0.002})
	p := w.start("one", w.configText("state: {key: device_id, time: ts}", "batch: {maxRows: 200}"))
	p.ready()
	producing := make(chan error, 1)
	go func() { producing <- l.produce(w.ctx, w.redis, w.stream) }()
	for n, change := range []string{
		"add column note text",
		"alter column odometer type numeric",
		"add column checked boolean not null default false",
		"drop column note",
		"alter column device_id type varchar(40)",
		"add constraint sane check (odometer >= 0) not valid",
	} {
		eventually(t, func() (bool, string) { rows := w.rows(); return rows > n*3000, fmt.Sprint(rows, " rows") })
		if _, err := w.db.Exec(w.ctx, "alter table positions "+change); err != nil {
			t.Fatalf("%s: %v", change, err)
		}
	}
	if err := <-producing; err != nil {
		t.Fatal(err)
	}
	w.balanced(l)
}

// Twenty replicas start at once on an empty database: one of them makes the tables, and all of them work. I1, I2.
func TestFault_TwentyReplicasStartAtOnce(t *testing.T) {
	t.Parallel()
	server := postgres.NewServer(t, postgres.Options{Settings: map[string]string{"max_connections": "300"}})
	w := newWorldAt(t, server.DSN("postgres"), sharedRedis.URL())
	l := seeded(t, &load{total: 20_000, duplicates: 0.05, undecodable: 0.002})
	w.produce(l)
	configuration := w.configText("state: {key: device_id, time: ts}", "batch: {writers: 1}", "reclaimAfter: 1s", "reclaimAfter: 10s",
		"maxDeliveries: 3", "maxDeliveries: 1")
	all := make([]*processor, 20)
	for n := range all {
		all[n] = w.start(fmt.Sprintf("pod-%02d", n), configuration)
	}
	for _, p := range all {
		p.ready()
	}
	w.balanced(l)
	for _, p := range all {
		p.signal(syscall.SIGTERM)
	}
	for _, p := range all {
		if code := p.exited(patience); code != 0 {
			t.Errorf("exit code %d", code)
		}
	}
}

// The sink is down while the load goes on: reading stops at its bounds and memory is flat, under 128 MiB. I4.
func TestFault_MemoryIsFlatWhileTheSinkIsDown(t *testing.T) {
	t.Parallel()
	server := postgres.NewServer(t, postgres.Options{})
	w := newWorldAt(t, server.DSN("postgres"), sharedRedis.URL())
	l := seeded(t, &load{total: 150_000, duplicates: 0.05})
	p := w.start("one", w.configText())
	p.ready()
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	producing := make(chan error, 1)
	go func() { producing <- l.produce(w.ctx, w.redis, w.stream) }()
	batch := w.config().Batch
	const mib = 1 << 20
	resident, bytes, live := 0.0, 0.0, 0.0 // at most; in flight; what the last collection of garbage left, which is half of where the next begins
	look := func() {
		m := p.metrics()
		resident, bytes, live = max(resident, m["process_resident_memory_bytes"]/mib), m["millrace_processor_in_flight_bytes"], m["go_memstats_next_gc_bytes"]/2/mib
		if n := m["millrace_processor_in_flight_entries"]; n > float64(batch.MaxInFlight) || bytes > 1.1*float64(batch.MaxInFlightBytes) {
			t.Fatalf("%v entries and %v bytes in flight", n, bytes)
		}
	}
	// How long it takes to collect garbage, and to read what may be in flight or find a place between the stages, is up to the machine.
	collected := func() {
		look()
		before := live
		eventually(t, func() (bool, string) {
			look()
			return live != before, fmt.Sprintf("%.1f MiB are live, as before", live)
		})
	}
	for before := -1.0; bytes != before || bytes == 0; {
		before = bytes
		collected()
	}
	early := live
	for end := time.Now().Add(stall(t, 0)); ; {
		if collected(); time.Now().After(end) {
			break
		}
	}
	t.Logf("resident: %.0f MiB; live: %.1f MiB when reading had stopped, %.1f MiB in the end", resident, early, live)
	if raceFlags == nil && (resident > 128 || live > 1.15*early) {
		t.Errorf("resident: %.0f MiB; live: %.1f MiB when reading had stopped, %.1f MiB in the end", resident, early, live)
	}
	if err := <-producing; err != nil {
		t.Fatal(err)
	}
	if err := server.Restart(w.ctx); err != nil {
		t.Fatal(err)
	}
	w.db.Reset()
	w.balanced(l)
}
