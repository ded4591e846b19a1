package pipeline_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// remembered is what a receiver is sent with a memory, and answers.
type remembered struct {
	Message struct {
		OrderID string `json:"order_id"`
		N       int64  `json:"n"`
		Note    string `json:"note"`
	} `json:"message"`
	Memory struct {
		Subject   string          `json:"subject"`
		Version   int64           `json:"version"`
		State     json.RawMessage `json:"state"`
		Parent    string          `json:"parent"`
		Metadata  json.RawMessage `json:"metadata"`
		Completed bool            `json:"completed"`
	} `json:"memory"`
}

func rememberedIn(t testing.TB, e cloudEvent) remembered {
	var r remembered
	if err := json.Unmarshal(e.Data, &r); err != nil {
		t.Errorf("%v in %s", err, e.Data)
	}
	return r
}

// seen is the state of a workflow in these tests: the messages that it has seen.
func seen(t testing.TB, state json.RawMessage) []string {
	var s []string
	if state != nil {
		if err := json.Unmarshal(state, &s); err != nil {
			t.Errorf("%v in %s", err, state)
		}
	}
	return s
}

func asJSON(t testing.TB, v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		t.Error(err)
	}
	return b
}

// statefulSink opens a sink with a memory in a database of its own.
func statefulSink(t *testing.T, w *world, url, memory string) (pipeline.Sink, *pgstream.Memory) {
	t.Helper()
	w.newOrders(pgstream.ModeShared)
	c, err := config.Parse([]byte(strings.ReplaceAll(strings.NewReplacer("URL", url, "MODE", "Single", "OPTIONS", "timeout: 5s").Replace(httpConfig), "sink:", "memory: "+memory+"\nsink:")))
	if err != nil {
		t.Fatal(err)
	}
	if err := pipeline.Migrate(w.ctx, w.db, c); err != nil {
		t.Fatal(err)
	}
	sink, err := pipeline.NewSink(w.ctx, pipeline.SinkOptions{Config: c, Pool: w.db, Metrics: pipeline.NewMetrics()})
	if err != nil {
		t.Fatal(err)
	}
	m, err := pgstream.OpenMemory(w.ctx, w.db, "flows")
	if err != nil {
		t.Fatal(err)
	}
	return sink, m
}

// What an answer says is the next state: for the next message of the workflow in the same batch, and in the database when the batch is written.
func TestStatesGoWithRequestsAndComeWithAnswers(t *testing.T) {
	t.Parallel()
	for _, inOrder := range []bool{false, true} {
		t.Run(fmt.Sprintf("in order %t", inOrder), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			rec := newReceiver(t, func(rw http.ResponseWriter, _ *http.Request, es []cloudEvent) {
				r := rememberedIn(t, es[0])
				if r.Memory.Subject == "silent" {
					fmt.Fprint(rw, "thanks") // no JSON: nothing changes
					return
				}
				answer := map[string]any{"state": append(seen(t, r.Memory.State), fmt.Sprint(r.Message.N))}
				if r.Memory.Subject == "b" && r.Memory.Version == 0 {
					answer["parent"], answer["metadata"] = "a", map[string]string{"by": "receiver"}
				}
				if r.Memory.Subject == "b" && r.Memory.Version == 1 {
					answer = map[string]any{"completed": true} // the rest stays
				}
				if err := json.NewEncoder(rw).Encode(map[string]any{"memory": answer}); err != nil {
					t.Error(err)
				}
			})
			sink, m := statefulSink(t, w, rec.URL, "{name: flows, create: IfMissing, keepCompleted: 1h, table: public.flows}")
			if n := w.count("select keep_completed_seconds from millrace.memories()"); n != 3600 {
				t.Errorf("completed workflows are kept for %d seconds", n)
			}
			os, err := sink.Write(w.ctx, &pipeline.Batch{InOrder: inOrder, Items: []*pipeline.Item{event(1, "a"), event(2, "a"), event(3, "silent"), event(4, "a")}})
			if err != nil || results(os) != "written written written written" {
				t.Fatalf("%v, error %v", os, err)
			}
			os, err = sink.Write(w.ctx, &pipeline.Batch{InOrder: inOrder, Items: []*pipeline.Item{event(5, "b"), event(6, "b"), event(7, "a"), event(8, "b")}})
			if err != nil || results(os) != "written written written written" {
				t.Fatalf("%v, error %v", os, err)
			}
			for subject, want := range map[string]string{"a": `4 ["1", "2", "4", "7"]  false`, "b": `3 ["5", "8"] a true`, "silent": "0   false"} {
				wf, err := m.Read(w.ctx, w.db, subject)
				if err != nil {
					t.Fatal(err)
				}
				if got := fmt.Sprintf("%d %s %s %t", wf.Version, wf.State, wf.Parent, !wf.CompletedAt.IsZero()); got != want {
					t.Errorf("%s is %s, not %s", subject, got, want)
				}
			}
			for _, e := range rec.got() {
				if r := rememberedIn(t, e); r.Message.N == 8 && (r.Memory.Version != 2 || r.Memory.Parent != "a" || !r.Memory.Completed || string(r.Memory.Metadata) != `{"by":"receiver"}`) {
					t.Errorf("the last message of b came with %+v", r.Memory)
				}
			}
		})
	}
}

// Who has been overtaken writes nothing, and its event is sent again; others of the batch are written.
func TestAStateThatChangedMeanwhileIsNotOverwritten(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var m *pgstream.Memory
	rec := newReceiver(t, func(rw http.ResponseWriter, _ *http.Request, es []cloudEvent) {
		r := rememberedIn(t, es[0])
		if r.Message.N == 2 && r.Memory.Version == 1 {
			if _, err := m.Write(w.ctx, w.db, "a", pgstream.MemoryWrite{State: []byte(`["other"]`), Expected: 1}); err != nil {
				t.Error(err)
			}
		}
		fmt.Fprintf(rw, `{"memory": {"state": %s}}`, asJSON(t, append(seen(t, r.Memory.State), fmt.Sprint(r.Message.N))))
	})
	sink, m2 := statefulSink(t, w, rec.URL, "{name: flows, create: IfMissing, subject: key}")
	m = m2
	if _, err := m.Write(w.ctx, w.db, "a", pgstream.MemoryWrite{State: []byte(`["0"]`)}); err != nil {
		t.Fatal(err)
	}
	lock, err := m.TryLock(w.ctx, w.db, "locked", pgstream.LockOptions{TTL: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	b := &pipeline.Batch{Items: []*pipeline.Item{event(1, "b"), event(2, "a"), event(3, "a"), event(4, "locked"), event(5, ""), event(6, "b")}}
	os, err := sink.Write(w.ctx, b)
	if err != nil || results(os) != "written retry retry retry rejected written" {
		t.Fatalf("%v, error %v", os, err)
	}
	if err := lock.Unlock(w.ctx, w.db); err != nil {
		t.Fatal(err)
	}
	os, err = sink.Write(w.ctx, &pipeline.Batch{Items: b.Items[1:4]})
	if err != nil || results(os) != "written written written" {
		t.Fatalf("%v, error %v", os, err)
	}
	for subject, want := range map[string]string{"a": `["other", "2", "3"]`, "b": `["1", "6"]`, "locked": `["4"]`} {
		if wf, err := m.Read(w.ctx, w.db, subject); err != nil || string(wf.State) != want {
			t.Errorf("%s is %s, error %v", subject, wf.State, err)
		}
	}
	// In a batch that keeps its order nothing comes after what was not written.
	if _, err := m.Write(w.ctx, w.db, "a", pgstream.MemoryWrite{State: []byte(`[]`), Expected: pgstream.AnyVersion}); err != nil {
		t.Fatal(err)
	}
	lock, err = m.TryLock(w.ctx, w.db, "locked", pgstream.LockOptions{TTL: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	os, err = sink.Write(w.ctx, &pipeline.Batch{InOrder: true, Items: []*pipeline.Item{event(7, "a"), event(8, "locked"), event(9, "b")}})
	if err != nil || results(os) != "written retry retry" {
		t.Fatalf("%v, error %v", os, err)
	}
	if wf, _ := m.Read(w.ctx, w.db, "b"); string(wf.State) != `["1", "6"]` {
		t.Errorf("b is %s", wf.State)
	}
	_ = lock
}

// State and ack are one transaction: who has lost the claim writes no state, and what is written is settled.
func TestAStateIsWrittenWithItsAck(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	rec := newReceiver(t, func(rw http.ResponseWriter, _ *http.Request, es []cloudEvent) {
		r := rememberedIn(t, es[0])
		fmt.Fprintf(rw, `{"memory": {"state": %s}}`, asJSON(t, append(seen(t, r.Memory.State), r.Message.OrderID)))
	})
	w.newOrders(pgstream.ModeShared)
	c, err := config.Parse([]byte(strings.ReplaceAll(strings.ReplaceAll(ordersConfig, "MODE", "Shared"), "sink: {table: {name: orders, create: IfMissing}}",
		"memory: {name: flows, create: IfMissing}\nsink: {http: {url: \""+rec.URL+"\"}}")))
	if err != nil {
		t.Fatal(err)
	}
	if err := pipeline.Migrate(w.ctx, w.db, c); err != nil {
		t.Fatal(err)
	}
	sink, err := pipeline.NewSink(w.ctx, pipeline.SinkOptions{Config: c, Pool: w.db, Metrics: pipeline.NewMetrics()})
	if err != nil {
		t.Fatal(err)
	}
	source := w.streamSource("m", pgstream.ModeShared)
	decode, err := pipeline.NewTransform(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pipeline.SettleTogether(w.ctx, c, source, w.db, sink, w.db); err != nil {
		t.Fatal(err)
	}
	m, err := pgstream.OpenMemory(w.ctx, w.db, "flows")
	if err != nil {
		t.Fatal(err)
	}
	state := func() string {
		wf, err := m.Read(w.ctx, w.db, "k")
		if err != nil {
			t.Fatal(err)
		}
		return string(wf.State)
	}
	next := func() *pipeline.Batch {
		b := w.next(source)
		for _, it := range b.Items {
			it.Row = make([]pipeline.Value, len(c.Mapping.Columns))
			if err := decode.Decode(it); err != nil {
				t.Fatal(err)
			}
		}
		return b
	}
	w.order("k", orders(0, 2)...)
	b := next()
	if os, err := sink.Write(w.ctx, b); err != nil || !b.Settled || slices.ContainsFunc(os, func(o pipeline.Outcome) bool { return o.Result != pipeline.Written }) {
		t.Fatalf("%v, settled %t, error %v", os, b.Settled, err)
	}
	if unsettled, _ := w.backlog(); unsettled != 0 {
		t.Errorf("%d are not settled, and their states are %s", unsettled, state())
	}
	before := state()
	w.order("k", orders(2, 4)...)
	b = next()
	if _, err := w.db.Exec(w.ctx, "select millrace.reset_group('orders', 'orders_sink', 'Latest')"); err != nil {
		t.Fatal(err)
	}
	if _, err := sink.Write(w.ctx, b); pipeline.Classify(err) != pipeline.ClassFenced || state() != before {
		t.Errorf("error %v, and the state is %s after %s", err, state(), before)
	}
}

func TestAnAnswerThatCannotBeRememberedIsAProblemOfTheReceiver(t *testing.T) {
	t.Parallel()
	for answer, want := range map[string]string{
		`{"memory": {"stat": 1}}`:         `unknown field "stat"`,
		`{"memory": 7}`:                   "cannot be read",
		`{"memory": {"completed": true}}`: "has no state, and the workflow has none yet",
	} {
		t.Run(answer, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			rec := newReceiver(t, func(rw http.ResponseWriter, _ *http.Request, _ []cloudEvent) { fmt.Fprint(rw, answer) })
			sink, _ := statefulSink(t, w, rec.URL, "{name: flows, create: IfMissing}")
			_, err := sink.Write(w.ctx, &pipeline.Batch{Items: []*pipeline.Item{event(1, "a")}})
			if err == nil || pipeline.Classify(err) != pipeline.ClassConfiguration || !strings.Contains(err.Error(), want) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestAMemoryThatIsNotThereIsAProblemOfTheConfiguration(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeShared)
	text := strings.ReplaceAll(strings.ReplaceAll(ordersConfig, "MODE", "Shared"), "sink: {table: {name: orders, create: IfMissing}}",
		"memory: {name: flows}\nsink: {sql: {statement: select from batch}}")
	open := func() error {
		c, err := config.Parse([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if err := pipeline.Migrate(w.ctx, w.db, c); err != nil {
			return err
		}
		_, err = pipeline.NewSink(w.ctx, pipeline.SinkOptions{Config: c, Pool: w.db, Metrics: pipeline.NewMetrics()})
		return err
	}
	if err := open(); pipeline.Classify(err) != pipeline.ClassConfiguration || !strings.Contains(err.Error(), "memory 'flows' does not exist") {
		t.Errorf("without the memory: %v", err)
	}
	if _, err := w.db.Exec(w.ctx, "select millrace.create_memory('flows')"); err != nil {
		t.Fatal(err)
	}
	if err := open(); err != nil {
		t.Error(err)
	}
	if _, err := w.db.Exec(w.ctx, `alter table millrace."flows.memory" drop column state`); err != nil {
		t.Fatal(err)
	}
	if err := open(); pipeline.Classify(err) != pipeline.ClassConfiguration || !strings.Contains(err.Error(), "column state jsonb is missing") {
		t.Errorf("with another table: %v", err)
	}
}

// Two processors and a receiver that count the messages of each workflow in its state. One is killed while it works; each message counts once, although some are sent twice.
func TestExactlyOnce_StatesOfWorkflows(t *testing.T) {
	for name, sink := range map[string]string{
		"http": `{http: {url: "URL"}}`,
		"sql": `{sql: {statement: "select millrace.write_memory('flows', b.customer, coalesce(m.state, '[]') || to_jsonb(b.order_id), m.version)
			from (select * from batch order by customer, position) b, millrace.read_memory('flows', b.customer) m"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.newOrders(pgstream.ModeShared)
			var requests atomic.Int64
			rec := newReceiver(t, func(rw http.ResponseWriter, _ *http.Request, es []cloudEvent) {
				requests.Add(1)
				r := rememberedIn(t, es[0])
				fmt.Fprintf(rw, `{"memory": {"state": %s}}`, asJSON(t, append(seen(t, r.Memory.State), r.Message.OrderID)))
			})
			configuration := strings.ReplaceAll(strings.ReplaceAll(ordersConfig, "MODE", "Shared"), "sink: {table: {name: orders, create: IfMissing}}",
				"memory: {name: flows, create: IfMissing}\nbatch: {maxRows: 20}\nsink: "+strings.ReplaceAll(sink, "URL", rec.URL))
			env := config.EnvSourceDatabaseURL + "=" + w.dsn
			const total, flows = 600, 7
			for i := range total {
				w.order(fmt.Sprintf("flow-%d", i%flows), fmt.Sprintf(`{"order_id": "o-%d"}`, i))
			}
			first := w.start("first", configuration, env)
			w.start("second", configuration, env)
			eventually(t, func() (bool, string) {
				n := w.count(`select case when to_regclass('millrace."flows.memory"') is null then 0 else
					(xpath('/row/n/text()', query_to_xml('select coalesce(sum(jsonb_array_length(state)), 0) as n from millrace."flows.memory"', false, true, '')))[1]::text::int end`)
				return n > total/6, fmt.Sprint(n)
			})
			first.kill()
			eventually(t, func() (bool, string) {
				unsettled, dead := w.backlog()
				return unsettled == 0, fmt.Sprintf("%d unsettled, %d dead letters", unsettled, dead)
			})
			var all []string
			rows, err := w.db.Query(w.ctx, `select state from millrace."flows.memory"`)
			if err != nil {
				t.Fatal(err)
			}
			for rows.Next() {
				var state json.RawMessage
				if err := rows.Scan(&state); err != nil {
					t.Fatal(err)
				}
				all = append(all, seen(t, state)...)
			}
			if err := rows.Err(); err != nil {
				t.Fatal(err)
			}
			slices.Sort(all)
			t.Logf("%d requests for %d messages", requests.Load(), total)
			if len(all) != total || len(slices.Compact(all)) != total {
				t.Errorf("%d messages counted, %d of them different, of %d", len(all), len(slices.Compact(all)), total)
			}
		})
	}
}
