package pipeline_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// dryRun runs the real processor for a look, with nothing but the address of its source.
func (w *world) dryRun(configuration string, args ...string) (results []pipeline.PreviewResult, summary string, exit int) {
	w.t.Helper()
	file := filepath.Join(w.t.TempDir(), "processor.yaml")
	if err := os.WriteFile(file, []byte(configuration), 0o600); err != nil {
		w.t.Fatal(err)
	}
	cmd := exec.CommandContext(w.ctx, processorBinary, append([]string{"run", "-f", file, "--dry-run"}, args...)...)
	cmd.Env = append(os.Environ(), config.EnvRedisURL+"="+w.redisURL, config.EnvSourceDatabaseURL+"="+w.dsn)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); cmd.ProcessState == nil {
		w.t.Fatal(err)
	}
	for line := range strings.Lines(out.String()) {
		var r pipeline.PreviewResult
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			w.t.Fatalf("%v in %s", err, line)
		}
		results = append(results, r)
	}
	return results, said.String(), cmd.ProcessState.ExitCode()
}

// state is everything that Redis knows of the stream and its groups.
func (w *world) streamState() string {
	w.t.Helper()
	info, err := w.redis.Do(w.ctx, w.redis.B().XinfoStream().Key(w.stream).Full().Build()).ToAny()
	if err != nil {
		w.t.Fatal(err)
	}
	return fmt.Sprint(info)
}

// A dry run shows what comes next, and Redis is byte by byte as before: no group, no consumer, no pending entry more.
func TestDryRunOfRedisMovesNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.add(position(1, 1), position(2, 2), "{", position(3, 3))
	before := w.streamState()
	results, said, exit := w.dryRun(w.configText())
	if exit != 1 || !strings.Contains(said, "4 read; 3 to write, 0 left out by filters, 1 rejected.") {
		t.Errorf("exit code %d, it said %s", exit, said)
	}
	if len(results) != 4 {
		t.Fatalf("%+v", results)
	}
	if r := results[0]; r.Outcome != pipeline.PreviewWrite || r.To != "table public.positions" || r.Stream != w.stream ||
		!strings.Contains(string(r.Row), `"odometer":9007199254740994`) {
		t.Errorf("%+v", r)
	}
	if r := results[2]; r.Outcome != pipeline.PreviewRejected || !strings.Contains(r.Reason, "not valid JSON") {
		t.Errorf("%+v", r)
	}
	if after := w.streamState(); after != before {
		t.Errorf("the stream was\n%s\nand is\n%s", before, after)
	}

	// With a group that has read two entries, it shows what comes behind them, or all.
	w.do(w.redis.B().XgroupCreate().Key(w.stream).Group("positions").Id("0").Build())
	w.do(w.redis.B().Xreadgroup().Group("positions", "somebody").Count(2).Streams().Key(w.stream).Id(">").Build())
	before = w.streamState()
	results, said, _ = w.dryRun(w.configText())
	if len(results) != 2 || results[0].Outcome != pipeline.PreviewRejected {
		t.Errorf("%+v, it said %s", results, said)
	}
	if results, _, exit = w.dryRun(w.configText(), "--from-start", "--limit", "2"); len(results) != 2 || exit != 0 {
		t.Errorf("from the start: %+v, exit code %d", results, exit)
	}
	if after := w.streamState(); after != before {
		t.Errorf("the stream was\n%s\nand is\n%s", before, after)
	}
	if n := w.count("select count(*) from pg_class where relname in ('positions', 'millrace_dead_letter')"); n != 0 {
		t.Errorf("it made %d tables", n)
	}
}

// A stream that does not exist is not made.
func TestDryRunOfNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	results, said, exit := w.dryRun(w.configText())
	if len(results) != 0 || exit != 0 || !strings.Contains(said, "0 read;") {
		t.Errorf("%+v, exit code %d, it said %s", results, exit, said)
	}
	if n, err := w.redis.Do(w.ctx, w.redis.B().Exists().Key(w.stream).Build()).AsInt64(); err != nil || n != 0 {
		t.Errorf("the stream exists: %d, %v", n, err)
	}
}

// Messages of a group are looked at in the order in which it would get them, and none is claimed.
func TestDryRunOfAGroupClaimsNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeShared)
	w.exec("select millrace.create_stream('orders', p_priorities => 2)")
	w.exec(`select millrace.publish('orders', jsonb_build_object('order_id', 'o-' || i), 'k') from generate_series(1, 5) i`)
	w.exec(`select millrace.publish('orders', '{"order_id": "urgent"}', p_priority => 1)`)
	// The urgent one is settled, and then the first two of the others.
	w.exec(`select millrace.ack(claim) from (select distinct claim from millrace.receive('orders', 'orders_sink', 'somebody', 1)) c`)
	w.exec(`select millrace.ack(claim) from (select distinct claim from millrace.receive('orders', 'orders_sink', 'somebody', 2)) c`)
	stats := func() string {
		var text string
		if err := w.db.QueryRow(w.ctx, `select jsonb_agg(to_jsonb(s) - 'oldest_age')::text from millrace.stats() s`).Scan(&text); err != nil {
			t.Fatal(err)
		}
		return text
	}
	before := stats()
	configuration := strings.Replace(ordersConfig, "MODE", "Shared", 1)
	configuration = strings.Replace(configuration, "columns:", "filter: doc.order_id != 'o-4'\n  columns:", 1)
	results, said, exit := w.dryRun(configuration)
	if exit != 0 || !strings.Contains(said, "3 read; 2 to write, 1 left out by filters, 0 rejected.") {
		t.Errorf("exit code %d, it said %s", exit, said)
	}
	var ids []string
	for _, r := range results {
		ids = append(ids, r.ID+" "+r.Outcome)
	}
	if got := strings.Join(ids, ", "); got != "3 write, 4 filtered, 5 write" {
		t.Errorf("it shows %s", got)
	}
	if after := stats(); after != before {
		t.Errorf("the group was\n%s\nand is\n%s", before, after)
	}
	results, _, _ = w.dryRun(configuration, "--from-start", "--limit", "2")
	if len(results) != 2 || results[0].ID != "p1-1" || results[1].ID != "1" {
		t.Errorf("from the start: %+v", results)
	}
}

// Each branch of a fan-out is shown with what it would send.
func TestDryRunShowsWhatEachBranchSends(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.add(position(1, 1))
	results, said, exit := w.dryRun(`
name: all
source: {redis: {streams: ["` + w.stream + `"], group: all}}
mapping: {columns: [{name: device, path: device_id, type: text, required: true}]}
sink:
  fanOut:
  - name: rows
    table: {name: rows, key: [device]}
  - name: onward
    stream: {route: "'region_' + row.device", key: row.device, headers: {origin: "'redis'"}, payload: doc.attributes}
  - name: hidden
    mapping: {filter: "false"}
    stream: {stream: hidden}
  - name: web
    mapping: {}
    http: {type: org.example.position}
  - name: picky
    mapping: {columns: [{name: n, path: no_such_field, type: text, required: true}]}
    sql: {statement: insert into picky select n from batch}
`)
	if exit != 1 || len(results) != 5 {
		t.Fatalf("%+v, exit code %d, it said %s", results, exit, said)
	}
	if r := results[0]; string(r.Row) != `{"device":"device-0001"}` || r.To != "table public.rows" {
		t.Errorf("rows: %+v", r)
	}
	if r := results[1]; r.To != "stream region_device-0001" || *r.Key != "device-0001" || string(r.Headers) != `{"origin":"redis"}` ||
		string(r.Payload) != `{"io":"9007199254740993","battery":1}` {
		t.Errorf("onward: %+v, payload %s", r, r.Payload)
	}
	if r := results[2]; r.Outcome != pipeline.PreviewFiltered {
		t.Errorf("hidden: %+v", r)
	}
	var event struct {
		ID   string         `json:"id"`
		Type string         `json:"type"`
		Data map[string]any `json:"data"`
	}
	if err := json.Unmarshal(results[3].Event, &event); err != nil || event.Type != "org.example.position" || event.Data["device_id"] != "device-0001" ||
		results[3].To != "http $"+config.EnvHTTPURL || !strings.HasPrefix(event.ID, "all/web/") {
		t.Errorf("web: %+v, %v", results[3], err)
	}
	if r := results[4]; r.Outcome != pipeline.PreviewRejected || !strings.Contains(r.Reason, "no_such_field") {
		t.Errorf("picky: %+v", r)
	}
}
