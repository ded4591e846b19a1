package seeds

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// ids are those of the frames that a call shows.
func (d *database) ids(call string, args ...any) []string {
	d.t.Helper()
	return d.rows("select id from millrace."+call, args...)
}

// The three modes, in the caller's transaction: what is in the log, in the summary, and only live; the length of the live frames against a table.
func TestSeed_F01_AppendModes(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin(`select millrace.create_stream('runs', p_frames => '{"ttl_seconds": 2, "min_length": 3, "max_length": 40, "alpha": 0.5}')`)
	d.admin("select millrace.create_group('runs', 'audit', 'Ordered')")
	// The engine's clock stands still, so that the rates are known.
	d.admin("create table public.test_clock as select clock_timestamp() as now")
	d.admin("grant select on public.test_clock to public")
	d.admin("create or replace function millrace_engine.clock() returns timestamptz language sql volatile as 'select now from public.test_clock'")

	tx, err := d.app.Begin(d.ctx)
	if err != nil {
		t.Fatal(err)
	}
	d.rowsOf(tx, `select millrace.append_frame('runs', 'gone/1', '{}', mode) from unnest('{Durable,DurableSummary,BestEffortLive}'::text[]) mode`)
	if err := tx.Rollback(d.ctx); err != nil {
		t.Fatal(err)
	}
	d.same("a transaction that rolled back", nil, "select * from millrace.read_frames('runs', 'gone/1') union all select null, null, null, null, document, null, null, null, null, null from millrace.read_summary('runs', 'gone/1')")

	// Durable frames are messages; a summary is a document that patches make; a live frame is neither.
	d.rows(`select millrace.append_frame('runs', 'run-1/1', '"compiling"', 'Durable', 'stdout')`)
	for _, patch := range []string{
		`{"step": "compile", "progress": {"done": 1, "of": 3}, "error": "none"}`,
		`{"progress": {"done": 2}, "error": null, "owner": "__millrace_null__"}`,
		`{"progress": {"eta": "__millrace_null__"}}`,
	} {
		d.rows(`select millrace.append_frame('runs', 'run-1/1', $1::text::jsonb, 'DurableSummary', 'progress')`, patch)
	}
	d.rows(`select millrace.append_frame('runs', 'run-1/1', '"tok"', 'BestEffortLive', 'token')`)
	var document, want map[string]any
	for text, v := range map[string]*map[string]any{
		value[string](d, "select document::text from millrace.read_summary('runs', 'run-1/1')"): &document,
		`{"step": "compile", "progress": {"done": 2, "of": 3, "eta": null}, "owner": null}`:     &want,
	} {
		if err := json.Unmarshal([]byte(text), v); err != nil {
			t.Fatal(err)
		}
	}
	if !reflect.DeepEqual(document, want) {
		t.Errorf("the summary is %v", document)
	}
	d.same("the modes, as a reader sees them", []string{"1|Durable|stdout", "2|DurableSummary|progress", "3|DurableSummary|progress", "4|DurableSummary|progress", "5|BestEffortLive|token"},
		"select frame_count, mode, frame_type from millrace.read_frames('runs', 'run-1/1')")
	d.same("a consumer group gets the durable ones", []string{"stdout", "progress", "progress", "progress"},
		"select headers ->> 'frame_type' from millrace.receive('runs', 'audit', 'm', 100)")

	// K = 2 * ceil(EMA * ttl) between floor and ceiling, computed here from the gaps in milliseconds.
	rate := 0.0
	for i, gap := range []int{0, 1000, 500, 250, 100, 100, 50, 20, 10, 10, 1000, 1000, 5000, 5000} {
		if i > 0 {
			d.admin("update public.test_clock set now = now + $1 * interval '1 millisecond'", gap)
			rate = 0.5*1000/float64(gap) + 0.5*rate
		}
		d.rows("select millrace.append_frame('runs', 'run-2/1', to_jsonb($1::integer), 'BestEffortLive', 'token')", i)
		k := int(min(max(2*math.Ceil(rate*2), 3), 40))
		var newest []string
		for n := max(0, i+1-k); n <= i; n++ {
			newest = append(newest, fmt.Sprint(n))
		}
		d.same(fmt.Sprintf("frame %d, at %.2f a second: the newest %d", i+1, rate, k), newest, "select payload from millrace.read_frames('runs', 'run-2/1')")
	}

	// Live frames cost no dead rows, however many come and go: no update and no delete, also when their rings turn.
	d.rows("select millrace.append_frame('runs', 'run-3/1', to_jsonb(repeat('x', 500)), 'BestEffortLive') from generate_series(1, 500)")
	for range 4 {
		if _, err := pgstream.Maintain(d.ctx, d.owner); err != nil {
			t.Fatal(err)
		}
		d.admin("select millrace_engine.rotate_frames(0)")
	}
	d.app.Close() // a backend reports its statistics at the latest when it ends
	d.app = d.pool(d.appDSN)
	d.eventually("the statistics know of the frames", func() (bool, string) {
		n := valueOf[int](d, d.owner, "select sum(n_tup_ins) from pg_stat_all_tables where relname like 'live\\_frame\\__'")
		return n >= 500, fmt.Sprint(n)
	})
	if got := d.rowsOf(d.owner, "select sum(n_tup_upd)::bigint, sum(n_tup_del)::bigint from pg_stat_all_tables where relname like 'live\\_frame\\__'"); got[0] != "0|0" {
		t.Errorf("updates and deletes of live frames: %v", got)
	}
	if n := valueOf[int](d, d.owner, "select count(*) from millrace_engine.live_frame"); n > 40*3 {
		t.Errorf("%d live frames are stored", n)
	}
}

// FlowFabric reads its clock before it waits for its lock, so that a frame that commits later can have the lower id. Here a transaction that waited for another one
// comes after everything that the other did meanwhile; and neither a clock that steps back nor retention makes an id go back.
func TestSeed_F02_IDsGoUpInCommitOrder(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('runs', p_frames => '{}')")
	for _, mode := range []string{"Durable", "DurableSummary", "BestEffortLive"} {
		const frame = "select id from millrace.append_frame('runs', 'run-1/1', '{}', $1)"
		first, second := d.connect(d.appDSN), d.connect(d.appDSN)
		holding, err := first.Begin(d.ctx)
		if err != nil {
			t.Fatal(err)
		}
		earlier := valueOf[string](d, holding, frame, mode)
		waited := make(chan string, 1)
		go func() { // this statement, and the clock of whoever reads it now, are before the next frame
			var id string
			if err := second.QueryRow(d.ctx, frame, mode).Scan(&id); err != nil {
				t.Error(err)
			}
			waited <- id
		}()
		d.eventually("the second waits", func() (bool, string) {
			return valueOf[bool](d, d.owner, "select exists (select from pg_stat_activity where pid = $1 and wait_event_type = 'Lock')", second.PgConn().PID()), ""
		})
		asked := time.Now()
		d.eventually("the clock has moved on", func() (bool, string) { return time.Since(asked) > 5*time.Millisecond, "" })
		later := valueOf[string](d, holding, frame, mode)
		if err := holding.Commit(d.ctx); err != nil {
			t.Fatal(err)
		}
		last := <-waited
		if !slices.IsSortedFunc([]string{earlier, later, last}, compareIDs) || last == later {
			t.Errorf("%s: ids in the order of commits: %s, %s, %s", mode, earlier, later, last)
		}
	}
	before := d.ids("read_frames('runs', 'run-1/1')")
	// The clock steps back by an hour, with the key's frames and then without them.
	d.admin("create or replace function millrace_engine.clock() returns timestamptz language sql volatile as $$select clock_timestamp() - interval '1 hour'$$")
	next := d.ids("append_frame('runs', 'run-1/1', '{}')")[0]
	if compareIDs(next, before[len(before)-1]) <= 0 {
		t.Errorf("with a clock that stepped back %s follows %s", next, before[len(before)-1])
	}
	d.admin("select millrace.trim('runs', p_max_messages => 0)")
	d.admin("truncate millrace_engine.live_frame")
	if got := d.ids("append_frame('runs', 'run-1/1', '{}')")[0]; compareIDs(got, next) <= 0 {
		t.Errorf("with nothing left of the key %s follows %s", got, next)
	}
}

func compareIDs(a, b string) int {
	var x, y [2]int64
	_, _ = fmt.Sscanf(a, "%d-%d", &x[0], &x[1])
	_, _ = fmt.Sscanf(b, "%d-%d", &y[0], &y[1])
	return slices.Compare(x[:], y[:])
}

func TestSeed_F03_RangeRead(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin(`select millrace.create_stream('runs', p_frames => '{"min_length": 100}')`)
	d.admin("create or replace function millrace_engine.clock() returns timestamptz language sql volatile as $$select '2026-01-01Z'::timestamptz$$")
	// Ten frames in one millisecond, of mixed modes, then one in the next.
	d.rows(`select millrace.append_frame('runs', 'run-1/1', to_jsonb(n), case when n % 2 = 0 then 'Durable' else 'BestEffortLive' end) from generate_series(0, 9) n`)
	d.admin("create or replace function millrace_engine.clock() returns timestamptz language sql volatile as $$select '2026-01-01 00:00:00.001Z'::timestamptz$$")
	d.rows(`select millrace.append_frame('runs', 'run-1/1', '10')`)
	const ms = "1767225600000"
	numbers := func(from, to int) (list []string) {
		for n := from; n <= to; n++ {
			list = append(list, fmt.Sprint(n))
		}
		return list
	}
	for _, c := range []struct {
		from, to string
		max      int
		want     []string
	}{
		{"-", "+", 1000, numbers(0, 10)},
		{"-", "+", 4, numbers(0, 3)},
		{ms + "-3", ms + "-5", 1000, numbers(3, 5)}, // both included
		{ms + "-3", ms + "-3", 1000, numbers(3, 3)},
		{"-", ms + "-2", 1000, numbers(0, 2)},
		{ms + "-9", "+", 1000, numbers(9, 10)},
		{ms, ms, 1000, numbers(0, 9)}, // the whole millisecond: FlowFabric takes its first number for the end, too
		{"1767225600001", "+", 1000, numbers(10, 10)},
		{"0", "1", 1000, nil},
		{ms + "-5", ms + "-3", 1000, nil},
		{"+", "+", 1000, nil},
		{"-", "-", 1000, nil},
	} {
		d.same(fmt.Sprintf("from %s to %s, at most %d", c.from, c.to, c.max), c.want, "select payload from millrace.read_frames('runs', 'run-1/1', $1, $2, $3)", c.from, c.to, c.max)
	}
	d.same("durable ones", []string{"0", "2", "4", "6", "8", "10"}, "select payload from millrace.read_frames('runs', 'run-1/1', p_best_effort => false)")
	d.same("durable ones, both included", []string{"2", "4"}, "select payload from millrace.read_frames('runs', 'run-1/1', $1, $2, p_best_effort => false)", ms+"-2", ms+"-4")
	d.same("the ids", []string{ms + "-0", ms + "-1"}, "select id from millrace.read_frames('runs', 'run-1/1', p_max => 2)")
	d.same("another key", nil, "select payload from millrace.read_frames('runs', 'run-1/2')")
	d.fails("MR004", "select millrace.read_frames('runs', 'run-1/1', p_max => 10001)")
	d.rows("select count(millrace.append_frame('runs', 'many', '{}')) from generate_series(1, 10001)")
	d.same("10000 in one read", []string{"10000"}, "select count(*) from millrace.read_frames('runs', 'many', p_max => 10000)")
}

// By Go and by SQL: a tail asks to be woken before it looks, holds no connection, is woken by a reconnection, and can leave live frames out.
func TestSeed_F04_BlockingTail(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('runs', p_frames => '{}')")
	config, err := pgx.ParseConfig(d.appDSN)
	if err != nil {
		t.Fatal(err)
	}
	listener := pgstream.NewListener(config)
	ctx, stop := context.WithCancel(d.ctx)
	ended := make(chan error, 1)
	go func() { ended <- listener.Run(ctx) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	d.eventually("the listener listens", func() (bool, string) { return listener.Alive(), "" })
	// Without a notification it would look after an hour.
	opts := pgstream.TailOptions{Listener: listener, Poll: time.Hour}
	tail := func(key string, opts pgstream.TailOptions) <-chan []string {
		t.Helper()
		x, err := pgstream.TailFrames(d.ctx, d.app, "runs", key, "0", opts)
		if err != nil {
			t.Fatal(err)
		}
		got := make(chan []string, 1)
		go func() {
			frames, err := x.Next(d.ctx, 10)
			if err != nil {
				t.Errorf("tail of %s: %v", key, err)
			}
			var list []string
			for _, f := range frames {
				list = append(list, string(f.Mode)+" "+string(f.Payload))
			}
			got <- list
		}()
		d.eventually("the tail waits", func() (bool, string) {
			return valueOf[bool](d, d.owner, "select exists (select from millrace_engine.frame_waiter where key = $1)", key) && d.app.Stat().AcquiredConns() == 0, ""
		})
		return got
	}
	wakes := func(what string, got <-chan []string, want ...string) {
		t.Helper()
		select {
		case list := <-got:
			if !slices.Equal(list, want) {
				t.Errorf("%s: %q, not %q", what, list, want)
			}
		case <-d.ctx.Done():
			t.Fatalf("%s: nothing woke the tail", what)
		}
	}
	got := tail("run-1/1", opts)
	d.rows("select millrace.append_frame('runs', 'run-1/1', '1', 'BestEffortLive')")
	wakes("a live frame", got, "BestEffortLive 1")

	opts.DurableOnly = true
	got = tail("run-2/1", opts)
	d.rows("select millrace.append_frame('runs', 'run-2/1', '1', 'BestEffortLive')")
	d.rows("select millrace.append_frame('runs', 'run-2/1', '2')")
	wakes("durable frames only", got, "Durable 2")

	// While the listener is cut off a frame is appended that nobody hears of. The reconnection wakes.
	got = tail("run-3/1", opts)
	u, err := url.Parse(d.ownerDSN)
	if err != nil {
		t.Fatal(err)
	}
	name := pgx.Identifier{u.Path[1:]}.Sanitize()
	u.Path = "/postgres"
	outside := d.connect(u.String())
	must := func(sql string) {
		t.Helper()
		if _, err := outside.Exec(d.ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	must("alter database " + name + " allow_connections false")
	d.admin("select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and query like 'notify millrace%'")
	d.eventually("the listener knows", func() (bool, string) { return !listener.Alive(), "" })
	d.rows("select millrace.append_frame('runs', 'run-3/1', '3')")
	must("alter database " + name + " allow_connections true")
	wakes("the reconnection", got, "Durable 3")

	// The same by SQL alone: LISTEN, ask, look, wait.
	session := d.connect(d.appDSN)
	d.rowsOf(session, "listen millrace")
	payload := valueOf[string](d, session, "select millrace.wait_for_frames('runs', 'run-4/1')")
	if rows := d.rowsOf(session, "select id from millrace.tail_frames('runs', 'run-4/1', '0')"); len(rows) > 0 {
		t.Errorf("%v before there is any", rows)
	}
	d.rows("select millrace.append_frame('runs', 'run-4/2', '1')") // another key
	first := d.ids("append_frame('runs', 'run-4/1', '1')")[0]
	for {
		n, err := session.WaitForNotification(d.ctx)
		if err != nil {
			t.Fatal(err)
		}
		if n.Payload == payload {
			break
		}
		if strings.Contains(n.Payload, "/") {
			t.Errorf("notified of %s", n.Payload)
		}
	}
	d.same("behind the cursor", []string{first}, "select id from millrace.tail_frames('runs', 'run-4/1', '0')")
	d.same("behind the first", nil, "select id from millrace.tail_frames('runs', 'run-4/1', $1)", first)
}

func TestSeed_F05_ReadSummary(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('runs', p_frames => '{}')")
	d.admin("create table public.test_clock as select '2026-01-01Z'::timestamptz as now")
	d.admin("grant select on public.test_clock to public")
	d.admin("create or replace function millrace_engine.clock() returns timestamptz language sql volatile as 'select now from public.test_clock'")
	const read = "select document::text, version, patch_kind, to_char(first_at at time zone 'UTC', 'HH24:MI:SS'), to_char(last_at at time zone 'UTC', 'HH24:MI:SS') from millrace.read_summary('runs', 'run-1/1')"
	d.same("before the first patch", nil, read)
	d.rows(`select millrace.append_frame('runs', 'run-1/1', '{}')`)
	d.same("a frame that is no patch", nil, read)
	for i, patch := range []string{`{"a": 1}`, `{"b": {"c": 2}}`, `{"a": null}`} {
		d.admin("update public.test_clock set now = now + interval '1 second'")
		d.same("the version that the append tells", []string{fmt.Sprint(i + 1)}, "select summary_version from millrace.append_frame('runs', 'run-1/1', $1::text::jsonb, 'DurableSummary')", patch)
	}
	d.same("after three", []string{`{"b": {"c": 2}}|3|json-merge-patch|00:00:01|00:00:03`}, read)
	// A patch that is no object replaces the document, as RFC 7396 has it; FlowFabric leaves its word for null in there as a text.
	d.rows(`select millrace.append_frame('runs', 'run-1/1', '"__millrace_null__"', 'DurableSummary')`)
	d.same("after a patch that is no object", []string{`null|4|json-merge-patch|00:00:01|00:00:03`}, read)
	d.rows(`select millrace.append_frame('runs', 'run-1/1', '{"d": 4}', 'DurableSummary')`)
	d.same("and another object", []string{`{"d": 4}|5|json-merge-patch|00:00:01|00:00:03`}, read)
	s, err := pgstream.ReadSummary(d.ctx, d.app, "runs", "run-1/1")
	if err != nil || string(s.Document) != `{"d": 4}` || s.Version != 5 || s.PatchKind != "json-merge-patch" || s.LastAt.Sub(s.FirstAt) != 2*time.Second {
		t.Errorf("by Go: %+v, %v", s, err)
	}
}

func TestSeed_F06_FrameFields(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('runs', p_frames => '{}')")
	d.admin("select millrace.create_group('runs', 'audit')")
	for i, mode := range []string{"Durable", "DurableSummary", "BestEffortLive"} {
		a, err := pgstream.AppendFrame(d.ctx, d.app, "runs", "run-1/1", pgstream.NewFrame{
			Mode: pgstream.FrameMode(mode), Type: "stdout", CorrelationID: "call-7", Fields: []byte(`{"source": "worker", "line": 12}`), Payload: []byte(`{"text": "hä"}`)})
		if err != nil || a.Count != int64(i+1) || (a.Position > 0) != (mode != "BestEffortLive") || (a.SummaryVersion == 1) != (mode == "DurableSummary") {
			t.Errorf("%s: %+v, %v", mode, a, err)
		}
		frames, err := pgstream.ReadFrames(d.ctx, d.app, "runs", "run-1/1", pgstream.FrameRange{From: a.ID, To: a.ID})
		if err != nil || len(frames) != 1 {
			t.Fatalf("%v, %v", frames, err)
		}
		f := frames[0]
		if f.ID != a.ID || string(f.Mode) != mode || f.Type != "stdout" || f.CorrelationID != "call-7" || string(f.Fields) != `{"line": 12, "source": "worker"}` ||
			string(f.Payload) != `{"text": "hä"}` || f.Count != a.Count || f.Position != a.Position || f.CreatedAt.IsZero() {
			t.Errorf("%s: %+v", mode, f)
		}
	}
	// The count goes on where live frames have gone: a gap tells of them.
	d.rows("select millrace.append_frame('runs', 'run-1/1', '{}')")
	d.same("without the live one", []string{"1", "2", "4"}, "select frame_count from millrace.read_frames('runs', 'run-1/1', p_best_effort => false)")
	d.same("what is left out", []string{"event|null|{}"}, "select frame_type, correlation_id, fields::text from millrace.read_frames('runs', 'run-1/1') where frame_count = 4")
	// A consumer finds all of it in the headers.
	d.same("as a message", []string{"worker|stdout|call-7|Durable|true"}, `select headers ->> 'source', headers ->> 'frame_type', headers ->> 'correlation_id', headers ->> 'frame_mode',
		headers ->> 'frame_id' = (select id from millrace.read_frames('runs', 'run-1/1', p_max => 1)) from millrace.receive('runs', 'audit', 'm', 1)`)
}

func TestSeed_F07_Validation(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('runs', p_frames => '{}')")
	d.admin("select millrace.create_stream('raw', p_payload_type => 'Bytes', p_frames => '{}')")
	for _, cursor := range []string{"", "x", "1-", "-1", "1-x", "1-2-3", " 1", "8796093022208", "1-1048576", "99999999999999999999", "$"} {
		for _, call := range []string{"read_frames('runs', 'k', $1)", "read_frames('runs', 'k', '-', $1)", "tail_frames('runs', 'k', $1)"} {
			d.fails("MR004", "select millrace."+call, cursor)
		}
	}
	for _, cursor := range []string{"-", "+"} { // a tail needs a concrete one
		d.fails("MR004", "select millrace.tail_frames('runs', 'k', $1)", cursor)
	}
	for _, patch := range []string{`{"a":`, "\xff\xfe", ""} {
		d.fails("MR004", "select millrace.append_frame_bytes('raw', 'k', $1::bytea, 'DurableSummary')", []byte(patch))
	}
	d.fails("MR004", "select millrace.append_frame('runs', 'k', null, 'DurableSummary')")
	for _, key := range []string{"", strings.Repeat("k", 1025)} {
		d.fails("MR004", "select millrace.append_frame('runs', $1, '{}')", key)
	}
	d.fails("MR004", "select millrace.append_frame('runs', null, '{}')")
	d.fails("MR004", "select millrace.append_frame('runs', 'k', '{}', 'Volatile')")
	d.fails("MR004", "select millrace.append_frame('runs', 'k', '{}', p_fields => '[1]')")
	d.fails("MR002", "select millrace.append_frame('nothing', 'k', '{}')")
	d.same("what was refused left nothing", nil, "select id from millrace.read_frames('runs', 'k') union all select id from millrace.read_frames('raw', 'k')")
	// Every refusal says what to write instead.
	_, err := d.app.Exec(d.ctx, "select millrace.read_frames('runs', 'k', 'yesterday')")
	if err == nil || !strings.Contains(err.Error(), "'yesterday' is no cursor of frames") {
		t.Error(err)
	}
	if _, err := pgstream.ReadFrames(d.ctx, d.app, "runs", "k", pgstream.FrameRange{From: "yesterday"}); err == nil || !strings.Contains(err.Error(), "such as 1767225600000-0, or milliseconds") {
		t.Error(err)
	}
}
