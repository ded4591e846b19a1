package pipeline_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// redriving is a running "processor redrive".
func (w *world) redriving(configuration string, args ...string) (cmd *exec.Cmd, out *bytes.Buffer) {
	w.t.Helper()
	file := filepath.Join(w.t.TempDir(), "processor.yaml")
	if err := os.WriteFile(file, []byte(configuration), 0o600); err != nil {
		w.t.Fatal(err)
	}
	out = &bytes.Buffer{}
	cmd = exec.Command(processorBinary, append([]string{"redrive", "--config", file}, args...)...)
	cmd.Env = []string{config.EnvSinkDatabaseURL + "=" + w.dsn, config.EnvSourceDatabaseURL + "=" + w.dsn}
	cmd.Stdout, cmd.Stderr = out, w.t.Output()
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	return cmd, out
}

// redrive runs "processor redrive" to its end and returns what it says and whether it succeeded.
func (w *world) redrive(configuration string, args ...string) (said string, ok bool) {
	w.t.Helper()
	cmd, out := w.redriving(configuration, args...)
	err := cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		w.t.Fatal(err)
	}
	return strings.TrimSpace(out.String()), err == nil
}

// What was set aside lands once its cause is repaired, byte for byte; what is still refused stays, with its new reason.
func TestRedrive(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.createPositions("check (odometer >= 0)")
	configuration := w.configText("maxDeliveries: 3", "maxDeliveries: 1")
	p := w.start("one", configuration)
	p.ready()
	w.add(`{"device_id":"a","timestamp":"2026-01-01T00:00:00Z","odometer":-9007199254740993,"attributes":{"text":"\u00fc \u2028","n":1.10}}`)
	becomes(t, "dead letters", 1, w.deadLetters) // before another writer has one: the oldest is tried first
	w.add(`{"device_id":"b","timestamp":"2026-01-01T00:00:00Z","odometer":-2}`, `not json`, "\xff\x00", position(1, 1))
	becomes(t, "dead letters", 4, w.deadLetters)

	if said, ok := w.redrive(configuration); said != "0 dead letters redriven, 4 refused again" || ok {
		t.Errorf("nothing repaired: %q, %t", said, ok)
	}
	if n := w.count("select count(*) from millrace_dead_letter where deliveries = 2 and failed_at > now() - interval '1 min'"); n != 4 {
		t.Errorf("%d dead letters were noted as tried again", n)
	}
	if _, err := w.db.Exec(w.ctx, "alter table positions drop constraint rule, add constraint milder check (odometer <> -2)"); err != nil {
		t.Fatal(err)
	}
	if said, ok := w.redrive(configuration, "--reason", "constraint rule", "--max", "1"); said != "1 dead letters redriven, 0 refused again" || !ok {
		t.Errorf("the first: %q, %t", said, ok)
	}
	if said, ok := w.redrive(configuration); said != "0 dead letters redriven, 3 refused again" || ok {
		t.Errorf("the rest: %q, %t", said, ok)
	}
	if n := w.count(`select count(*) from positions where device_id = 'a' and odometer = -9007199254740993 and attributes = '{"text":"ü \u2028","n":1.10}'`); n != 1 {
		t.Errorf("%d rows as they were sent", n)
	}
	if n := w.count("select count(*) from millrace_dead_letter where reason like '%milder%'"); n != 1 {
		t.Errorf("%d dead letters with the new reason", n)
	}
}

// Redrives that are killed, and two at once, write every dead letter once: a table without a key and a stream would show more.
func TestRedrive_KilledAndConcurrent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := onceSinks[2]
	w.newOrders(pgstream.ModeShared)
	s.prepare(w)
	configuration := s.config(pgstream.ModeShared, "batch: {maxRows: 50}\n")
	c, err := config.Parse([]byte(configuration))
	if err != nil {
		t.Fatal(err)
	}
	if err := pipeline.Migrate(w.ctx, w.db, c); err != nil {
		t.Fatal(err)
	}
	const total = 3000
	var letters []pipeline.DeadLetter
	for n := range total {
		key := fmt.Sprintf("customer-%d", n%37)
		it := &pipeline.Item{ID: fmt.Sprint(n), Stream: "orders", Position: int64(n), Key: &key, Payload: fmt.Sprintf(`{"order_id":"%d","amount":1}`, n)}
		for _, branch := range []string{"rows", "ship", "audit"} {
			letters = append(letters, pipeline.DeadLetter{Item: it, Branch: branch, Deliveries: 3, Reason: "of the test"})
		}
	}
	if err := pipeline.NewDeadLetters(w.db, c).Put(w.ctx, letters); err != nil {
		t.Fatal(err)
	}
	for killed := range 2 {
		before := w.deadLetters()
		cmd, _ := w.redriving(configuration)
		eventually(t, func() (bool, string) { n := w.deadLetters(); return n < before-100, fmt.Sprint(n, " dead letters") })
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		t.Logf("killed %d: %d dead letters left", killed, w.deadLetters())
	}
	first, _ := w.redriving(configuration)
	second, _ := w.redriving(configuration, "--branch", "ship")
	for _, cmd := range []*exec.Cmd{first, second} {
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
	if n := w.deadLetters(); n != 0 {
		t.Errorf("%d dead letters are left", n)
	}
	w.exactlyOnce(s, pgstream.ModeShared, total)
}

// Dead letters that the engine keeps for a group go back to it.
func TestRedrive_OfAGroup(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeShared)
	w.createOrders()
	configuration := strings.ReplaceAll(strings.ReplaceAll(ordersConfig, "MODE", "Shared"), "maxDeliveries: 3", "maxDeliveries: 1")
	p := w.start("one", configuration, config.EnvSourceDatabaseURL+"="+w.dsn)
	p.ready()
	w.order("k", `{"order_id":"refused","amount":-1}`, `{"order_id":"o","amount":1}`)
	eventually(t, func() (bool, string) {
		_, dead := w.backlog()
		return dead == 1 && w.orderRows() == 1, fmt.Sprintf("%d dead letters, %d rows", dead, w.orderRows())
	})
	if _, err := w.db.Exec(w.ctx, "alter table orders drop constraint orders_amount_check"); err != nil {
		t.Fatal(err)
	}
	if said, ok := w.redrive(configuration); said != "1 dead letters given back to group orders_sink, whose processors write them" || !ok {
		t.Errorf("%q, %t", said, ok)
	}
	becomes(t, "rows", 2, w.orderRows)
}

// Dead letters of entries that a receiver has refused reach it, once each, when it takes them.
func TestRedrive_ToAReceiver(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var strict atomic.Bool
	strict.Store(true)
	tk := &taken{}
	rec := newReceiver(t, func(rw http.ResponseWriter, _ *http.Request, events []cloudEvent) {
		if data := string(events[0].Data); strings.Contains(data, "never") || strict.Load() && strings.Contains(data, "later") {
			http.Error(rw, "no", http.StatusUnprocessableEntity)
			return
		}
		tk.take(events...)
	})
	configuration := w.configText("sink:\n  table: {name: positions, key: [device_id, ts], create: IfMissing}\n", "sink:\n  http: {url: "+rec.URL+"}\n",
		"maxDeliveries: 3", "maxDeliveries: 1")
	p := w.start("one", configuration)
	p.ready()
	entry := func(device string) string {
		return fmt.Sprintf(`{"device_id":%q,"timestamp":"2026-01-01T00:00:00Z"}`, device)
	}
	ids := w.add(entry("now"), entry("later"), entry("never"), entry("later still"))
	becomes(t, "dead letters", 3, w.deadLetters)
	strict.Store(false)
	if said, ok := w.redrive(configuration); said != "2 dead letters redriven, 1 refused again" || ok {
		t.Errorf("%q, %t", said, ok)
	}
	if n := w.deadLetters(); n != 1 {
		t.Errorf("%d dead letters are left, want 1", n)
	}
	tk.mu.Lock()
	defer tk.mu.Unlock()
	for i, want := range []int{1, 1, 0, 1} {
		got := 0
		for id, n := range tk.counts {
			if strings.HasSuffix(id, ids[i]) {
				got += n
			}
		}
		if got != want {
			t.Errorf("event %d came %d times, want %d", i, got, want)
		}
	}
}
