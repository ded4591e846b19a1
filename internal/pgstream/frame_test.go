package pgstream_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// frames makes a stream with frames, named runs.
func (e *engine) frames(f pgstream.Frames) {
	e.t.Helper()
	plan, err := pgstream.PlanStream(e.ctx, e.Pool, pgstream.StreamSpec{Name: "runs", Frames: f})
	must(e.t, err)
	must(e.t, pgstream.ApplyStream(e.ctx, e.Pool, plan))
}

// frame appends one and returns its id.
func (e *engine) frame(db pgstream.DB, key string, mode pgstream.FrameMode, payload string) string {
	e.t.Helper()
	a, err := pgstream.AppendFrame(e.ctx, db, "runs", key, pgstream.NewFrame{Mode: mode, Payload: []byte(payload)})
	must(e.t, err)
	return a.ID
}

func (e *engine) readFrames(key string, r pgstream.FrameRange) []pgstream.Frame {
	e.t.Helper()
	frames, err := pgstream.ReadFrames(e.ctx, e.Pool, "runs", key, r)
	must(e.t, err)
	return frames
}

func (e *engine) tail(key, after string, opts pgstream.TailOptions) *pgstream.FrameTail {
	e.t.Helper()
	tail, err := pgstream.TailFrames(e.ctx, e.Pool, "runs", key, after, opts)
	must(e.t, err)
	return tail
}

func ids(frames []pgstream.Frame) []string {
	list := make([]string, len(frames))
	for i, f := range frames {
		list[i] = f.ID
	}
	return list
}

// above says whether the id a comes after b.
func above(t testing.TB, a, b string) bool {
	t.Helper()
	var x, y [2]int64
	for id, v := range map[string]*[2]int64{a: &x, b: &y} {
		if _, err := fmt.Sscanf(id, "%d-%d", &v[0], &v[1]); err != nil {
			t.Fatalf("%q is no id: %v", id, err)
		}
	}
	return slices.Compare(x[:], y[:]) > 0
}

// rising tells of neighbours that are not in order.
func rising(t testing.TB, list []string) (broken []string) {
	t.Helper()
	for i := 1; i < len(list); i++ {
		if !above(t, list[i], list[i-1]) {
			broken = append(broken, fmt.Sprintf("%s comes after %s", list[i], list[i-1]))
		}
	}
	return broken
}

// One waits for the key while the other goes on appending: whoever waited comes after everything that was committed meanwhile.
func idsInTheOrderOfCommits(e *engine, waiting, holding pgstream.FrameMode) (broken []string) {
	e.t.Helper()
	holder := e.begin()
	list := []string{e.frame(holder, "a", holding, `{}`)}
	other := e.begin()
	appended := make(chan string, 1)
	go func() { // its statement begins here
		a, err := pgstream.AppendFrame(e.ctx, other, "runs", "a", pgstream.NewFrame{Mode: waiting, Payload: []byte(`{}`)})
		if err != nil {
			e.t.Error(err)
		}
		appended <- a.ID
	}()
	e.waitsForLock(pid(other))
	began := time.Now()
	e.eventually("the clock has moved on", func() bool { return time.Since(began) > 5*time.Millisecond })
	list = append(list, e.frame(holder, "a", holding, `{}`))
	commit(e, holder)
	list = append(list, <-appended)
	commit(e, other)
	return rising(e.t, list)
}

func TestIDsOfFramesGoUpInTheOrderOfCommits(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.DefaultFrames)
	modes := []pgstream.FrameMode{pgstream.FrameDurable, pgstream.FrameDurableSummary, pgstream.FrameBestEffortLive}
	for _, waiting := range modes {
		for _, holding := range modes {
			mustHold(t, idsInTheOrderOfCommits(e, waiting, holding))
		}
	}
	// Told to another session at once: what was rolled back leaves no gap that matters and no id twice.
	tx := e.begin()
	lost := e.frame(tx, "a", pgstream.FrameDurable, `{}`)
	rollback(e, tx)
	if id := e.frame(e, "a", pgstream.FrameDurable, `{}`); id == lost {
		t.Errorf("the id %s was given twice, in one millisecond", id)
	}
	mustHold(t, rising(t, ids(e.readFrames("a", pgstream.FrameRange{}))))
}

// As FlowFabric has it: the clock before the lock, and the number counted within its millisecond.
func TestIDsAreSeenToGoBackWithTheClockBeforeTheLock(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.DefaultFrames)
	e.mutate("millrace_engine.append_frame_1", "now_ := millrace_engine.clock();", "now_ := statement_timestamp();")
	e.mutate("millrace_engine.append_frame_1", "last + 1)", "0)")
	mustBeBroken(t, idsInTheOrderOfCommits(e, pgstream.FrameDurable, pgstream.FrameDurable))
}

// However the clock jumps, and whatever is left of the key.
func TestIDsOfFramesNeverGoBack(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.DefaultFrames)
	e.stopClock()
	var list []string
	add := func(mode pgstream.FrameMode) { t.Helper(); list = append(list, e.frame(e, "a", mode, `{}`)) }
	add(pgstream.FrameDurable)
	add(pgstream.FrameDurable)
	add(pgstream.FrameBestEffortLive)
	e.jump(-time.Hour)
	add(pgstream.FrameBestEffortLive)
	add(pgstream.FrameDurable)
	// Nothing of the key is left: neither in the log nor in the rings.
	e.jump(time.Hour)
	e.run("select millrace.trim('runs', p_max_messages => 0)")
	e.jump(10 * time.Minute)
	e.rotateFrames()
	if left := e.readFrames("a", pgstream.FrameRange{}); len(left) > 0 {
		t.Fatalf("%v are left", ids(left))
	}
	e.jump(-time.Hour)
	add(pgstream.FrameBestEffortLive)
	add(pgstream.FrameDurable)
	e.jump(3 * time.Hour)
	add(pgstream.FrameDurable)
	mustHold(t, rising(t, list))
	if !strings.HasPrefix(list[len(list)-1], fmt.Sprint(one[time.Time](e, "select millrace_engine.clock()").UnixMilli())) {
		t.Errorf("%s is not of the present", list[len(list)-1])
	}

	e.mutate("millrace_engine.append_frame_1", "now_ms / 1000 < high", "false")
	e.run("select millrace.trim('runs', p_max_messages => 0)")
	e.run("truncate millrace_engine.live_frame")
	e.jump(-3 * time.Hour)
	add(pgstream.FrameDurable)
	mustBeBroken(t, rising(t, list))
}

// Writers of every mode, with transactions that roll back, and readers that go on by id: who tails misses nothing that was ever committed.
func TestATailMissesNoFrame(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.Frames{MinLength: 10000, MaxLength: 10000})
	l := e.listener()
	const writers, each = 4, 40
	tails := map[bool]*pgstream.FrameTail{}
	for _, durable := range []bool{false, true} {
		tails[durable] = e.tail("a", "0", pgstream.TailOptions{Listener: l, DurableOnly: durable})
	}
	ctx, stop := context.WithCancel(e.ctx)
	defer stop()
	var tailing sync.WaitGroup
	var mu sync.Mutex
	seen := map[bool][]string{}
	for durable, tail := range tails {
		tailing.Go(func() {
			for {
				frames, err := tail.Next(ctx, 3)
				if ctx.Err() != nil {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				seen[durable] = append(seen[durable], ids(frames)...)
				mu.Unlock()
			}
		})
	}
	var writing sync.WaitGroup
	for w := range writers {
		r := rand.New(rand.NewPCG(uint64(w), 1))
		conn := e.connect()
		writing.Go(func() {
			for range each {
				_ = pgx.BeginFunc(e.ctx, conn, func(tx pgx.Tx) error {
					for range 1 + r.IntN(3) {
						mode := []pgstream.FrameMode{pgstream.FrameDurable, pgstream.FrameDurableSummary, pgstream.FrameBestEffortLive}[r.IntN(3)]
						if _, err := pgstream.AppendFrame(e.ctx, tx, "runs", "a", pgstream.NewFrame{Mode: mode, Payload: []byte(`{"n": 1}`)}); err != nil {
							t.Error(err)
						}
					}
					if r.IntN(4) == 0 {
						return fmt.Errorf("rolled back")
					}
					return nil
				})
			}
		})
	}
	writing.Wait()
	for durable := range tails {
		want := ids(e.readFrames("a", pgstream.FrameRange{DurableOnly: durable, Max: 10000}))
		e.eventually("the tail has everything", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return len(seen[durable]) >= len(want)
		})
		mu.Lock()
		if !slices.Equal(seen[durable], want) {
			t.Errorf("durable only %t: %d frames tailed, %d read", durable, len(seen[durable]), len(want))
		}
		mu.Unlock()
	}
	stop()
	tailing.Wait()
	// Counted from the first, without a gap but those of best-effort frames, of which all are kept here.
	for i, f := range e.readFrames("a", pgstream.FrameRange{Max: 10000}) {
		if f.Count != int64(i+1) {
			t.Fatalf("frame %d has count %d", i+1, f.Count)
		}
	}
}

// Both ends of a range are included, a millisecond with all of its frames; a tail begins behind its cursor.
func TestRangesOfFrames(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.DefaultFrames)
	e.stopClock()
	var all []string
	for range 2 {
		for _, mode := range []pgstream.FrameMode{pgstream.FrameDurable, pgstream.FrameBestEffortLive, pgstream.FrameDurableSummary} {
			all = append(all, e.frame(e, "a", mode, `{}`))
		}
		e.jump(time.Millisecond)
	}
	ms := func(id string) string { return strings.Split(id, "-")[0] }
	for _, c := range []struct {
		r    pgstream.FrameRange
		want []string
	}{
		{pgstream.FrameRange{}, all},
		{pgstream.FrameRange{To: ms(all[0])}, all[:3]},
		{pgstream.FrameRange{From: ms(all[3])}, all[3:]},
		{pgstream.FrameRange{From: all[1], To: all[4]}, all[1:5]},
		{pgstream.FrameRange{From: all[1], To: all[4], Max: 2}, all[1:3]},
		{pgstream.FrameRange{From: all[4], To: all[1]}, nil},
	} {
		if got := ids(e.readFrames("a", c.r)); !slices.Equal(got, c.want) {
			t.Errorf("%+v: %v, not %v", c.r, got, c.want)
		}
	}
	for i, after := range all {
		if frames, err := e.tail("a", after, pgstream.TailOptions{}).TryNext(e.ctx, 10); err != nil || !slices.Equal(ids(frames), all[i+1:]) {
			t.Errorf("behind %s: %v, not %v, %v", after, ids(frames), all[i+1:], err)
		}
	}
	// What was trimmed is gone, wherever it still lies.
	e.run("select millrace.trim('runs', p_max_messages => 1)")
	if got := ids(e.readFrames("a", pgstream.FrameRange{DurableOnly: true})); !slices.Equal(got, all[5:]) {
		t.Errorf("after all but one were trimmed, %v are read", got)
	}
	if got := ids(e.readFrames("a", pgstream.FrameRange{})); !slices.Equal(got, []string{all[1], all[4], all[5]}) {
		t.Errorf("after all durable ones but one were trimmed, %v are read", got)
	}
}

// rotateFrames brings best-effort frames through a whole turn of the rings.
func (e *engine) rotateFrames() {
	e.t.Helper()
	for range 2 {
		e.run("select setval('millrace_engine.live_frame_kept', 0)")
		e.run("select millrace_engine.rotate_frames(0)")
	}
}

// The rule for how many best-effort frames are kept, against a table that is computed here.
func TestTheBoundOfBestEffortFrames(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	f := pgstream.Frames{TTL: 2 * time.Second, MinLength: 3, MaxLength: 40, Alpha: 0.5}
	e.frames(f)
	e.stopClock()
	// Milliseconds since the frame before: slow, faster and faster, many in one millisecond, and slow again.
	gaps := []int{0, 1000, 1000, 500, 250, 250, 100, 100, 50, 20, 0, 0, 0, 0, 10, 0, 5, 1000, 1000, 4000, 4000, 60000}
	rate, burst := 0.0, 0
	for i, gap := range gaps {
		if gap > 0 {
			e.jump(time.Duration(gap) * time.Millisecond)
			if i > 0 {
				rate = f.Alpha*float64(burst)*1000/float64(gap) + (1-f.Alpha)*rate
			}
			burst = 0
		}
		burst++
		want := int(min(max(2*math.Ceil(rate*f.TTL.Seconds()), float64(f.MinLength)), float64(f.MaxLength)))
		e.frame(e, "a", pgstream.FrameBestEffortLive, `{}`)
		if got := one[int](e, "select bound from millrace_engine.live_frame order by frame desc limit 1"); got != want {
			t.Errorf("frame %d, %d ms after the one before, at %.2f a second: the bound is %d, not %d", i+1, gap, rate, got, want)
		}
		if frames := e.readFrames("a", pgstream.FrameRange{}); len(frames) != min(i+1, want) || frames[len(frames)-1].Count != int64(i+1) {
			t.Errorf("frame %d: %d are kept, the last has count %d", i+1, len(frames), frames[len(frames)-1].Count)
		}
	}
	// The rule by itself, with the documented defaults.
	for _, c := range []struct {
		rate float64
		want int
	}{{0, 64}, {3.2, 64}, {3.21, 66}, {4, 80}, {50.01, 1002}, {819.2, 16384}, {4000, 16384}} {
		if got := one[int](e, "select millrace_engine.frame_bound($1, millrace_engine.frame_settings('{}'))", c.rate); got != c.want {
			t.Errorf("at %g a second %d are kept, not %d", c.rate, got, c.want)
		}
	}
}

// Turning rings carries over what is within the bound of its key, and nothing else.
func TestRotationKeepsWhatIsWithinTheBound(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.Frames{TTL: time.Second, MinLength: 5, MaxLength: 5})
	e.stopClock()
	for range 12 {
		e.frame(e, "a", pgstream.FrameBestEffortLive, `{"of": "a"}`)
		e.frame(e, "b", pgstream.FrameBestEffortLive, `{"of": "b"}`)
		e.frame(e, "b", pgstream.FrameDurable, `{"of": "b"}`)
	}
	before := map[string][]string{}
	for _, key := range []string{"a", "b"} {
		before[key] = ids(e.readFrames(key, pgstream.FrameRange{}))
	}
	stored := func() int { return one[int](e, "select count(*) from millrace_engine.live_frame") }
	for turn := range 3 {
		e.rotateFrames()
		if n := stored(); n != 10 {
			t.Errorf("turn %d: %d rows are stored", turn, n)
		}
		for key, want := range before {
			if got := ids(e.readFrames(key, pgstream.FrameRange{})); !slices.Equal(got, want) {
				t.Errorf("turn %d: %s has %v, not %v", turn, key, got, want)
			}
		}
	}
	// Ids, counts and the rate go on from what was carried over.
	e.jump(9 * time.Second)
	e.rotateFrames()
	if n := stored(); n != 10 {
		t.Errorf("after nine times the ttl %d rows are stored", n)
	}
	e.frame(e, "a", pgstream.FrameBestEffortLive, `{}`)
	if frames := e.readFrames("a", pgstream.FrameRange{}); len(frames) != 5 || frames[4].Count != 13 {
		t.Errorf("%d frames, count %d", len(frames), frames[len(frames)-1].Count)
	}
	// A key without best-effort frames for ten times the ttl keeps none, its durable ones stay.
	e.jump(2 * time.Second)
	e.rotateFrames()
	if a, b := e.readFrames("a", pgstream.FrameRange{}), e.readFrames("b", pgstream.FrameRange{}); len(a) != 5 || len(b) != 12 {
		t.Errorf("a has %d, b has %d", len(a), len(b))
	}
	tx := e.beginAs(pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if _, err := tx.Exec(e.ctx, "select millrace_engine.rotate_frames(0)"); sqlState(err) != "MR003" {
		t.Errorf("with an older snapshot: %v", err)
	}
	rollback(e, tx)
	e.run("select millrace_engine.drop_stream('runs')")
	e.rotateFrames()
	if n := stored(); n != 0 {
		t.Errorf("%d rows of a stream that was dropped", n)
	}
}

// A writer that began before its ring was left, and comes while that ring is copied, waits until it is empty: what it writes is in neither the copy nor the truncated ring otherwise.
func TestRotationLosesNoLateWriter(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.DefaultFrames)
	first := e.frame(e, "a", pgstream.FrameBestEffortLive, `{}`)
	e.run("select setval('millrace_engine.live_frame_ring', 1)") // the ring is left
	e.mutate("millrace_engine.rotate_frames", "get diagnostics kept = row_count;", "get diagnostics kept = row_count; "+pass+";")
	e.run("alter function millrace_engine.rotate_frames reset lock_timeout") // the gate is a lock, too
	row := one[string](e, "select to_jsonb(f)::text from millrace_engine.live_frame f")
	reached, open := e.gate()
	turner, late := e.connect(), e.connect()
	turned, written := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := turner.Exec(e.ctx, "select millrace_engine.rotate_frames(0)")
		turned <- err
	}()
	reached()
	go func() {
		_, err := late.Exec(e.ctx, `insert into millrace_engine.live_frame select (jsonb_populate_record(null::millrace_engine.live_frame,
			r || jsonb_build_object('frame', (r -> 'frame')::bigint + 1, 'frame_count', 2, 'live_count', 2))).* from (select $1::text::jsonb as r) x`, row)
		written <- err
	}()
	e.waitsForLock(late.PgConn().PID())
	open()
	must(t, <-turned)
	must(t, <-written)
	if frames := e.readFrames("a", pgstream.FrameRange{}); len(frames) != 2 || frames[0].ID != first {
		t.Errorf("of two frames there are %v", ids(frames))
	}
}

// The rings turn only when that is worth the copying, and maintenance does it.
func TestRingsTurnWhenTheyHaveGrown(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.Frames{MinLength: 100, MaxLength: 100})
	ring := func() int { return one[int](e, "select pg_sequence_last_value('millrace_engine.live_frame_ring')") }
	maintain := func(bytes int64) []string {
		did, err := pgstream.MaintainWithRing(e.ctx, e.Pool, bytes)
		must(t, err)
		return did
	}
	e.run(`select millrace.append_frame('runs', 'a', to_jsonb(repeat('x', 200)), 'BestEffortLive') from generate_series(1, 200)`)
	if did := maintain(1 << 20); ring() != 0 {
		t.Errorf("a small ring was left: %v", did)
	}
	if did := maintain(8192); ring() != 1 {
		t.Errorf("a large ring was not left: %v", did)
	}
	maintain(8192)
	kept := one[int](e, "select pg_relation_size('millrace_engine.live_frame_1')")
	if n := one[int](e, "select count(*) from millrace_engine.live_frame"); n != 100 || kept <= 16384 {
		t.Fatalf("%d rows, %d bytes", n, kept)
	}
	if did := maintain(8192); ring() != 1 {
		t.Errorf("a ring that holds hardly more than is kept was left: %v", did)
	}
	e.run(`select millrace.append_frame('runs', 'a', to_jsonb(repeat('x', 200)), 'BestEffortLive') from generate_series(1, 200)`)
	if did := maintain(8192); ring() != 0 {
		t.Errorf("a ring that has doubled was not left: %v", did)
	}
	if len(e.readFrames("a", pgstream.FrameRange{})) != 100 {
		t.Error("frames were lost")
	}
}

// While rings turn all the time, who reads has the newest frames, all of them, and each once.
func TestReadersMissNothingWhileRingsTurn(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	const bound = 20
	e.frames(pgstream.Frames{MinLength: bound, MaxLength: bound})
	ctx, stop := context.WithCancel(e.ctx)
	var turning sync.WaitGroup
	var turns atomic.Int64
	turner := e.connect()
	turning.Go(func() {
		for ctx.Err() == nil {
			if _, err := turner.Exec(e.ctx, "select setval('millrace_engine.live_frame_kept', 0), millrace_engine.rotate_frames(0)"); err == nil {
				turns.Add(1)
			} else if sqlState(err) != "55P03" {
				t.Error(err)
				return
			}
		}
	})
	reading := e.connect()
	for i := 0; i < 300 || turns.Load() < 4; i++ {
		e.frame(e, "a", pgstream.FrameBestEffortLive, `{}`)
		frames, err := pgstream.ReadFrames(e.ctx, reading, "runs", "a", pgstream.FrameRange{})
		must(t, err)
		if len(frames) != min(i+1, bound) {
			t.Fatalf("after %d frames and %d turns there are %d", i+1, turns.Load(), len(frames))
		}
		for j, f := range frames {
			if f.Count != int64(i+1-len(frames)+j+1) {
				t.Fatalf("after %d frames: frame %d of %d has count %d", i+1, j+1, len(frames), f.Count)
			}
		}
	}
	stop()
	turning.Wait()
}

// bestEffortRun appends, reads, tails and turns the rings.
func bestEffortRun(e *engine) {
	e.t.Helper()
	e.frames(pgstream.Frames{MinLength: 8, MaxLength: 8})
	e.frame(e, "a", pgstream.FrameDurable, `{}`)
	tail := e.tail("a", "0", pgstream.TailOptions{})
	for i := range 200 {
		e.frame(e, fmt.Sprint("k", i%7), pgstream.FrameBestEffortLive, `{"token": "x"}`)
		e.frame(e, "a", pgstream.FrameBestEffortLive, `{"token": "x"}`)
		if _, err := tail.TryNext(e.ctx, 10); err != nil {
			e.t.Fatal(err)
		}
		e.readFrames("a", pgstream.FrameRange{})
		if i%50 == 49 {
			e.rotateFrames()
		}
	}
	if n := one[int](e, "select count(*) from millrace_engine.live_frame where xmax <> 0"); n > 0 {
		e.t.Errorf("%d rows carry a mark of a writer", n)
	}
}

func TestBestEffortFramesLeaveNoDeadTuples(t *testing.T) {
	t.Parallel()
	t.Run("as they are", func(t *testing.T) {
		t.Parallel()
		e := newEngine(t)
		bestEffortRun(e)
		mustHold(t, deadTuples(e, 1))
		if n := one[int](e, "select sum(n_tup_ins) from pg_stat_all_tables where relname like 'live\\_frame\\__'"); n < 400 {
			t.Errorf("the statistics know of %d frames", n)
		}
	})
	t.Run("with trimming by delete", func(t *testing.T) {
		t.Parallel()
		e := newEngine(t)
		bestEffortRun(e)
		e.run("delete from millrace_engine.live_frame f where f.live_count <= 192")
		mustBeBroken(t, deadTuples(e, 1))
	})
}

// The table of RFC 7396, appendix A, and what it has no word for.
func TestMergePatch(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	for _, c := range []struct{ document, patch, want string }{
		{`{"a":"b"}`, `{"a":"c"}`, `{"a":"c"}`},
		{`{"a":"b"}`, `{"b":"c"}`, `{"a":"b","b":"c"}`},
		{`{"a":"b"}`, `{"a":null}`, `{}`},
		{`{"a":"b","b":"c"}`, `{"a":null}`, `{"b":"c"}`},
		{`{"a":["b"]}`, `{"a":"c"}`, `{"a":"c"}`},
		{`{"a":"c"}`, `{"a":["b"]}`, `{"a":["b"]}`},
		{`{"a":{"b":"c"}}`, `{"a":{"b":"d","c":null}}`, `{"a":{"b":"d"}}`},
		{`{"a":[{"b":"c"}]}`, `{"a":[1]}`, `{"a":[1]}`},
		{`["a","b"]`, `["c","d"]`, `["c","d"]`},
		{`{"a":"b"}`, `["c"]`, `["c"]`},
		{`{"a":"foo"}`, `null`, `null`},
		{`{"a":"foo"}`, `"bar"`, `"bar"`},
		{`{"e":null}`, `{"a":1}`, `{"e":null,"a":1}`},
		{`[1,2]`, `{"a":"b","c":null}`, `{"a":"b"}`},
		{`{}`, `{"a":{"bb":{"ccc":null}}}`, `{"a":{"bb":{}}}`},
		// The word for null: at the top, as a member, below one; not as a name, not within an array.
		{`{"a":1}`, `"__millrace_null__"`, `null`},
		{`{"a":1}`, `{"a":"__millrace_null__"}`, `{"a":null}`},
		{`{"a":{"b":1}}`, `{"a":{"b":"__millrace_null__","c":"__millrace_null__"}}`, `{"a":{"b":null,"c":null}}`},
		{`{"a":1}`, `{"a":{"b":{"c":"__millrace_null__"}}}`, `{"a":{"b":{"c":null}}}`},
		{`{}`, `{"__millrace_null__":1,"a":["__millrace_null__",null]}`, `{"__millrace_null__":1,"a":["__millrace_null__",null]}`},
		{`{"a":1}`, `{}`, `{"a":1}`},
		{`null`, `{"a":1}`, `{"a":1}`},
	} {
		var got, want any
		must(t, json.Unmarshal([]byte(one[string](e, "select millrace.merge_patch($1::text::jsonb, $2::text::jsonb)::text", c.document, c.patch)), &got))
		must(t, json.Unmarshal([]byte(c.want), &want))
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s patched with %s is %v, not %s", c.document, c.patch, got, c.want)
		}
	}
}

func TestSummariesOfConcurrentPatchesLoseNone(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.DefaultFrames)
	var writing sync.WaitGroup
	for w := range 4 {
		writing.Go(func() {
			for i := range 25 {
				patch := fmt.Sprintf(`{"w%d": {"n%d": true}}`, w, i)
				if _, err := pgstream.AppendFrame(e.ctx, e.Pool, "runs", "a", pgstream.NewFrame{Mode: pgstream.FrameDurableSummary, Payload: []byte(patch)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writing.Wait()
	s, err := pgstream.ReadSummary(e.ctx, e.Pool, "runs", "a")
	must(t, err)
	var document map[string]map[string]bool
	must(t, json.Unmarshal(s.Document, &document))
	for w := range 4 {
		if n := len(document[fmt.Sprint("w", w)]); n != 25 {
			t.Errorf("writer %d has %d patches in the document", w, n)
		}
	}
	if s.Version != 100 || s.PatchKind != "json-merge-patch" {
		t.Errorf("version %d, kind %s", s.Version, s.PatchKind)
	}
	// A patch whose transaction rolls back has never been.
	tx := e.begin()
	e.frame(tx, "a", pgstream.FrameDurableSummary, `"gone"`)
	rollback(e, tx)
	if again, err := pgstream.ReadSummary(e.ctx, e.Pool, "runs", "a"); err != nil || again.Version != 100 {
		t.Errorf("%+v, %v", again, err)
	}
}

// What is bounded by time goes, and what was appended meanwhile stays.
func TestOldSummariesAreRemoved(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.Frames{SummaryTTL: time.Hour})
	e.run("select millrace.create_stream('kept', p_frames => '{\"summary_ttl_seconds\": 0}')")
	e.run("select millrace.append_frame('kept', 'a', '{}', 'DurableSummary')")
	e.stopClock()
	e.frame(e, "old", pgstream.FrameDurableSummary, `{"n": 1}`)
	e.frame(e, "used", pgstream.FrameDurableSummary, `{"n": 1}`)
	e.run("select millrace.wait_for_frames('runs', 'a')")
	e.run("update millrace_engine.frame_waiter set until = until - interval '2 minutes'")
	e.jump(59 * time.Minute)
	e.frame(e, "used", pgstream.FrameDurableSummary, `{"n": 2}`)
	maintain := func() string {
		did, err := pgstream.Maintain(e.ctx, e.Pool)
		must(t, err)
		return strings.Join(did, ", ")
	}
	if did := maintain(); did != "" {
		t.Errorf("too early: %s", did)
	}
	e.jump(2 * time.Minute)
	// A transaction that has just patched it holds it.
	tx := e.begin()
	e.frame(tx, "old", pgstream.FrameDurableSummary, `{"n": 2}`)
	if did := maintain(); did != "" {
		t.Errorf("what is used was removed: %s", did)
	}
	rollback(e, tx)
	if did := maintain(); did != "removed 1 old summaries" {
		t.Errorf("maintenance did %q", did)
	}
	for key, want := range map[string]bool{"old": false, "used": true} {
		if s, err := pgstream.ReadSummary(e.ctx, e.Pool, "runs", key); err != nil || (s != nil) != want {
			t.Errorf("%s: %+v, %v", key, s, err)
		}
	}
	if n := one[int](e, "select count(*) from millrace_engine.frame_summary"); n != 2 {
		t.Errorf("%d summaries are left", n)
	}
	if n := one[int](e, "select count(*) from millrace_engine.frame_waiter"); n != 0 {
		t.Errorf("%d who waited are left", n)
	}
	// The frames themselves are messages, and retention's.
	if n := len(e.readFrames("old", pgstream.FrameRange{})); n != 1 {
		t.Errorf("%d frames", n)
	}
	if id := e.frame(e, "old", pgstream.FrameDurableSummary, `{"n": 3}`); id == "" {
		t.Error("no id")
	}
	if s, err := pgstream.ReadSummary(e.ctx, e.Pool, "runs", "old"); err != nil || s == nil || s.Version != 1 || string(s.Document) != `{"n": 3}` {
		t.Errorf("a new summary is %+v, %v", s, err)
	}
}

// A patch that has looked at a summary keeps it from being removed for its age until it has written.
func TestASummaryIsNotRemovedUnderAPatch(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.Frames{SummaryTTL: time.Hour})
	e.stopClock()
	e.frame(e, "a", pgstream.FrameDurableSummary, `{"n": 1}`)
	before, err := pgstream.ReadSummary(e.ctx, e.Pool, "runs", "a")
	must(t, err)
	e.jump(2 * time.Hour)
	const then = "document := millrace.merge_patch("
	e.mutate("millrace_engine.append_frame_1", then, pass+"; "+then)
	reached, open := e.gate()
	done := make(chan error, 1)
	go func() {
		_, err := pgstream.AppendFrame(e.ctx, e.Pool, "runs", "a", pgstream.NewFrame{Mode: pgstream.FrameDurableSummary, Payload: []byte(`{"m": 2}`)})
		done <- err
	}()
	reached()
	if n := one[int](e, "select millrace_engine.purge_frames(10)"); n != 0 {
		t.Errorf("%d summaries were removed", n)
	}
	open()
	must(t, <-done)
	if s, err := pgstream.ReadSummary(e.ctx, e.Pool, "runs", "a"); err != nil || s.Version != 2 || !s.FirstAt.Equal(before.FirstAt) {
		t.Errorf("the summary is %+v after %+v, %v", s, before, err)
	}
}

// A purge passes over the summary that a patch holds, and over whoever begins to wait for frames again this moment.
func TestPurgingFramesWaitsForNobody(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.Frames{SummaryTTL: time.Hour})
	e.stopClock()
	e.run("alter function millrace_engine.purge_frames set lock_timeout = '5s'")
	e.frame(e, "a", pgstream.FrameDurableSummary, `{"n": 1}`)
	e.run("select millrace.wait_for_frames('runs', 'a'), millrace.wait_for_frames('runs', 'b')")
	e.run("update millrace_engine.frame_waiter set until = until - interval '2 minutes'")
	e.jump(2 * time.Hour)
	tx := e.begin()
	e.frame(tx, "a", pgstream.FrameDurableSummary, `{"n": 2}`)
	exec(e, tx, "select millrace.wait_for_frames('runs', 'a')")
	for _, left := range []int{1, 0} { // of each
		if n := one[int](e, "select millrace_engine.purge_frames(10)"); n != 1-left {
			t.Errorf("%d summaries were removed, want %d", n, 1-left)
		}
		if n := one[int](e, "select count(*) from millrace_engine.frame_waiter"); n != left {
			t.Errorf("%d who waited are left, want %d", n, left)
		}
		_ = tx.Rollback(e.ctx)
	}
}

// A ring that somebody is busy with is left to a later round, at once.
func TestRotationDoesNotWait(t *testing.T) {
	t.Parallel()
	for what, sql := range map[string]string{
		"a reader": "select from millrace_engine.live_frame_0",
		"a writer": `select millrace.append_frame('runs', 'b', '{}', 'BestEffortLive')`,
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.frames(pgstream.DefaultFrames)
			e.frame(e, "a", pgstream.FrameBestEffortLive, `{}`)
			busy, turner := e.begin(), e.begin()
			exec(e, busy, sql)
			e.run("select setval('millrace_engine.live_frame_ring', 1)") // the ring is left
			exec(e, turner, "set local statement_timeout = '5s'")
			if _, err := turner.Exec(e.ctx, "select millrace_engine.rotate_frames(0)"); sqlState(err) != "55P03" {
				t.Errorf("a rotation: %v; want 55P03", err)
			}
			rollback(e, busy)
			rollback(e, turner)
			e.run("select millrace_engine.rotate_frames(0)")
			if n := one[int](e, "select count(*) from millrace_engine.live_frame_0"); n != 0 {
				t.Errorf("%d frames are left in the old ring", n)
			}
		})
	}
}

// Nobody waits, nobody notifies; and who waits for one key is not woken for another.
func TestFramesNotifyOnlyWhoWaitsForTheKey(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.DefaultFrames)
	listening := e.connect()
	exec(e, listening, "listen millrace")
	heard := func() (list []string) {
		t.Helper()
		e.run("notify millrace, 'end'")
		for {
			n, err := listening.WaitForNotification(e.ctx)
			must(t, err)
			if n.Payload == "end" {
				return list
			}
			list = append(list, n.Payload)
		}
	}
	both := func(key string) {
		for _, mode := range []pgstream.FrameMode{pgstream.FrameDurable, pgstream.FrameBestEffortLive} {
			e.frame(e, key, mode, `{}`)
		}
	}
	both("a")
	if list := heard(); len(list) > 0 {
		t.Errorf("nobody waits, and %v were sent", list)
	}
	payload := one[string](e, "select millrace.wait_for_frames('runs', 'a')")
	both("b")
	if list := heard(); len(list) > 0 {
		t.Errorf("nobody waits for b, and %v were sent", list)
	}
	e.stopClock()
	e.jump(time.Hour) // a millisecond of its own
	e.frame(e, "a", pgstream.FrameBestEffortLive, `{}`)
	e.frame(e, "a", pgstream.FrameDurable, `{}`) // within the same
	if list := heard(); !slices.Equal(list, []string{payload}) {
		t.Errorf("%v were sent, not %s", list, payload)
	}
	// A clock that steps back makes nobody deaf.
	e.jump(-30 * time.Minute)
	e.frame(e, "a", pgstream.FrameDurable, `{}`)
	if list := heard(); !slices.Equal(list, []string{payload}) {
		t.Errorf("after the clock stepped back %v were sent", list)
	}
	// Who is going to prepare the transaction may not notify.
	e.jump(time.Second)
	tx := e.begin()
	exec(e, tx, "set local millrace.notify = off")
	e.frame(tx, "a", pgstream.FrameDurable, `{}`)
	commit(e, tx)
	if list := heard(); len(list) > 0 {
		t.Errorf("with notifications off, %v were sent", list)
	}
	// A consumer group that waits is told of durable frames by the stream's own notification.
	e.run("select millrace_engine.wait_for(array[1])")
	both("b")
	if list := heard(); !slices.Equal(list, []string{"1"}) {
		t.Errorf("for the group, %v were sent", list)
	}
	// It is asked for again when half of the time is over, and no sooner.
	e.run("update millrace_engine.frame_waiter set until = clock_timestamp() + interval '6 seconds'")
	e.run("select millrace.wait_for_frames('runs', 'a')")
	if one[bool](e, "select until > clock_timestamp() + interval '7 seconds' from millrace_engine.frame_waiter") {
		t.Error("asked for again too soon")
	}
	e.run("update millrace_engine.frame_waiter set until = clock_timestamp() + interval '4 seconds'")
	e.run("select millrace.wait_for_frames('runs', 'a')")
	if !one[bool](e, "select until > clock_timestamp() + interval '7 seconds' from millrace_engine.frame_waiter") {
		t.Error("not asked for again")
	}
	e.run("update millrace_engine.frame_waiter set until = clock_timestamp() - interval '1 second'")
	e.jump(2 * time.Hour)
	e.frame(e, "a", pgstream.FrameBestEffortLive, `{}`)
	if list := heard(); len(list) > 0 {
		t.Errorf("nobody waits any more, and %v were sent", list)
	}
}

type tailed struct {
	frames []pgstream.Frame
	err    error
}

// awaits starts a Next and returns when those who append know that somebody waits.
func (e *engine) awaits(tail *pgstream.FrameTail, key string) <-chan tailed {
	e.t.Helper()
	done := make(chan tailed, 1)
	go func() {
		frames, err := tail.Next(e.ctx, 10)
		done <- tailed{frames, err}
	}()
	e.eventually("somebody is registered to wait", func() bool {
		return one[bool](e, "select exists (select from millrace_engine.frame_waiter where key = $1 and until > clock_timestamp())", key)
	})
	return done
}

func (e *engine) wakes(what string, done <-chan tailed, want ...string) {
	e.t.Helper()
	select {
	case r := <-done:
		must(e.t, r.err)
		if got := ids(r.frames); !slices.Equal(got, want) {
			e.t.Errorf("%s: %v, not %v", what, got, want)
		}
	case <-time.After(patience):
		e.t.Fatalf("%s: nothing woke the tail", what)
	}
}

// Through a pool of one connection: a connection that is kept fails. That notifications wake a tail, TestNotificationsWake shows.
func TestATailWaitsWithoutAConnection(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.DefaultFrames)
	config, err := pgxpool.ParseConfig(e.dsn)
	must(t, err)
	config.MaxConns = 1
	pool, err := pgxpool.NewWithConfig(e.ctx, config)
	must(t, err)
	defer pool.Close()
	opts := pgstream.TailOptions{Listener: e.listener(), Poll: never}
	all, err := pgstream.TailFrames(e.ctx, pool, "runs", "a", "0", opts)
	must(t, err)
	opts.DurableOnly = true
	durable, err := pgstream.TailFrames(e.ctx, pool, "runs", "a", "0", opts)
	must(t, err)
	for _, mode := range []pgstream.FrameMode{pgstream.FrameDurable, pgstream.FrameDurableSummary} {
		done, doneToo := e.awaits(all, "a"), e.awaits(durable, "a")
		e.eventually("both look and wait", func() bool { return pool.Stat().AcquiredConns() == 0 })
		id := e.frame(pool, "a", mode, `{}`) // through the pool's only connection
		e.wakes(string(mode), done, id)
		e.wakes(string(mode)+", durable only", doneToo, id)
	}
	done, doneToo := e.awaits(all, "a"), e.awaits(durable, "a")
	live := e.frame(pool, "a", pgstream.FrameBestEffortLive, `{}`)
	e.wakes("a best-effort frame", done, live)
	select {
	case r := <-doneToo:
		t.Errorf("a tail of durable frames got %v, %v", r.frames, r.err)
	default:
	}
	id := e.frame(pool, "a", pgstream.FrameDurable, `{}`)
	e.wakes("durable only, after a best-effort frame", doneToo, id)
	if all.Cursor() != live || durable.Cursor() != id {
		t.Errorf("the cursors are %s and %s", all.Cursor(), durable.Cursor())
	}
	ctx, cancel := context.WithCancel(e.ctx)
	cancel()
	if _, err := durable.Next(ctx, 10); err == nil || e.ctx.Err() != nil {
		t.Errorf("a tail whose context has ended says %v", err)
	}
}

func TestFramesOfBytes(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.run("select millrace.create_stream('raw', p_payload_type => 'Bytes', p_frames => '{}')")
	for _, mode := range []pgstream.FrameMode{pgstream.FrameDurable, pgstream.FrameBestEffortLive} {
		_, err := pgstream.AppendFrameBytes(e.ctx, e.Pool, "raw", "a", pgstream.NewFrame{Mode: mode, Payload: []byte{0, 255, 'x'}})
		must(t, err)
	}
	a, err := pgstream.AppendFrameBytes(e.ctx, e.Pool, "raw", "a", pgstream.NewFrame{Mode: pgstream.FrameDurableSummary, Payload: []byte(`{"ü": 1}`)})
	must(t, err)
	if a.SummaryVersion != 1 || a.Count != 3 {
		t.Errorf("%+v", a)
	}
	frames, err := pgstream.ReadFrames(e.ctx, e.Pool, "raw", "a", pgstream.FrameRange{})
	must(t, err)
	for i, want := range []string{"\x00\xffx", "\x00\xffx", `{"ü": 1}`} {
		if string(frames[i].Payload) != want {
			t.Errorf("frame %d has payload %q", i+1, frames[i].Payload)
		}
	}
	for _, bad := range []string{`{"a":`, "\xff", `{"a": "\u0000"}`} {
		_, err := pgstream.AppendFrameBytes(e.ctx, e.Pool, "raw", "a", pgstream.NewFrame{Mode: pgstream.FrameDurableSummary, Payload: []byte(bad)})
		mustBeRefused(t, err, "is not valid JSON")
	}
}

func mustBeRefused(t testing.TB, err error, text string) {
	t.Helper()
	if !errors.Is(err, pgstream.ErrRefused) || !strings.Contains(err.Error(), text) {
		t.Errorf("%v; want ErrRefused and %q", err, text)
	}
}

// Settings are all there or take their defaults; what cannot be is refused with what can.
func TestSettingsOfFrames(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	want := pgstream.StreamSpec{Name: "runs", Frames: pgstream.Frames{TTL: 2500 * time.Millisecond, MinLength: 1, MaxLength: 1, Alpha: 1, SummaryTTL: pgstream.KeepSummaries}}
	for _, f := range []pgstream.Frames{{Alpha: 0.2}, want.Frames} {
		plan, err := pgstream.PlanStream(e.ctx, e.Pool, pgstream.StreamSpec{Name: "runs", Frames: f})
		must(t, err)
		if len(plan.Steps) != 1 {
			t.Errorf("steps: %v", plan.Steps)
		}
		must(t, pgstream.ApplyStream(e.ctx, e.Pool, plan))
		info, err := pgstream.DescribeStream(e.ctx, e.Pool, "runs")
		must(t, err)
		if f.MinLength == 0 {
			f = pgstream.DefaultFrames
		}
		if info.Spec.Frames != f {
			t.Errorf("%+v became %+v", f, info.Spec.Frames)
		}
		plan, err = pgstream.PlanStream(e.ctx, e.Pool, pgstream.StreamSpec{Name: "runs", Frames: f})
		must(t, err)
		if len(plan.Steps) != 0 {
			t.Errorf("a setting differs from itself: %v", plan.Steps)
		}
	}
	for _, bad := range []string{`[]`, `{"ttl": 5}`, `{"alpha": "0.2"}`, `{"alpha": 0}`, `{"alpha": 1.1}`, `{"ttl_seconds": 0}`, `{"min_length": 0}`, `{"min_length": 2.5}`,
		`{"max_length": 63}`, `{"max_length": 1000001}`, `{"summary_ttl_seconds": -1}`} {
		_, err := e.Exec(e.ctx, "select millrace.create_stream('other', p_frames => $1::text::jsonb)", bad)
		if sqlState(err) != "MR004" {
			t.Errorf("%s: %v", bad, err)
		}
	}
	for _, bad := range []string{"p_versions => true", "p_priorities => 2"} {
		_, err := e.Exec(e.ctx, "select millrace.create_stream('other', p_frames => '{}', "+bad+")")
		if sqlState(err) != "MR004" || !strings.Contains(err.Error(), "a stream with frames has no versions and one priority") {
			t.Errorf("%s: %v", bad, err)
		}
		_, err = e.Exec(e.ctx, "select millrace.create_stream('runs', "+bad+")")
		if sqlState(err) != "MR004" {
			t.Errorf("%s, for a stream with frames: %v", bad, err)
		}
	}
	// What was damaged is found and mended.
	for _, damage := range []string{"drop index millrace_engine.segment_1_2_key_frame_idx", "drop sequence millrace_engine.high_1",
		"drop function millrace_engine.append_frame_1"} {
		e.run(damage)
		plan, err := pgstream.PlanStream(e.ctx, e.Pool, want)
		must(t, err)
		if !plan.Drift || len(plan.Steps) != 1 {
			t.Errorf("after %q the plan is %v", damage, plan.Steps)
		}
		must(t, pgstream.ApplyStream(e.ctx, e.Pool, plan))
		e.frame(e, "a", pgstream.FrameDurable, `{}`)
	}
	// Dropping leaves nothing of it.
	must(t, pgstream.DropStream(e.ctx, e.Pool, "runs", pgstream.Owner{}, false))
	if n := one[int](e, "select count(*) from pg_class where relname ~ '_1(_[0-9])?$' and relname !~ '^(claim|settlement|live_frame)' and relnamespace = 'millrace_engine'::regnamespace"); n != 0 {
		t.Errorf("%d relations are left", n)
	}
}

// Versions and frames are indexed from the beginning, and not by the first repair.
func TestANewStreamHasItsIndexes(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	for name, spec := range map[string]pgstream.StreamSpec{"runs": {Name: "runs", Frames: pgstream.DefaultFrames}, "accounts": {Name: "accounts", Versions: true}} {
		plan, err := pgstream.PlanStream(e.ctx, e.Pool, spec)
		must(t, err)
		must(t, pgstream.ApplyStream(e.ctx, e.Pool, plan))
		plan, err = pgstream.PlanStream(e.ctx, e.Pool, spec)
		must(t, err)
		if len(plan.Steps) > 0 {
			t.Errorf("%s: %v", name, plan.Steps)
		}
	}
}

func TestFramesAreRefusedWithWhatToDo(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.DefaultFrames)
	e.stream("orders")
	e.run("select millrace.create_stream('raw', p_payload_type => 'Bytes', p_frames => '{}')")
	for _, c := range []struct{ call, state, text string }{
		{`append_frame('nowhere', 'a', '{}')`, "MR002", `stream "nowhere" does not exist`},
		{`append_frame('orders', 'a', '{}')`, "MR004", `stream "orders" has no frames`},
		{`append_frame('raw', 'a', '{}')`, "MR004", `payloads of type Bytes`},
		{`append_frame_bytes('runs', 'a', '\x00')`, "MR004", `payloads of type JSON`},
		{`append_frame('runs', null, '{}')`, "MR004", `a key of 1 to 1024 bytes`},
		{`append_frame('runs', '', '{}')`, "MR004", `a key of 1 to 1024 bytes`},
		{`append_frame('runs', repeat('k', 1025), '{}')`, "MR004", `a key of 1 to 1024 bytes`},
		{`append_frame('runs', 'a', null)`, "MR004", `a payload is null`},
		{`append_frame('runs', 'a', '{}', 'durable')`, "MR004", `mode 'durable' of a frame is not known`},
		{`append_frame('runs', 'a', '{}', null)`, "MR004", `mode null of a frame is not known`},
		{`append_frame('runs', 'a', '{}', p_frame_type => '')`, "MR004", `a frame needs a type`},
		{`append_frame('runs', 'a', '{}', p_fields => '[]')`, "MR004", `headers must be a JSON object`},
		{`append_frame('runs', 'a', '{}', p_fields => '{"frame_id": "1-1"}')`, "MR004", `cannot be named frame_id`},
		{`append_frame('runs', 'a', to_jsonb(repeat('x', 2000000)))`, "MR004", `is larger than the 1048576 allowed`},
		{`read_frames('nowhere', 'a')`, "MR002", `stream "nowhere" does not exist`},
		{`read_frames('orders', 'a')`, "MR004", `stream "orders" has no frames`},
		{`read_frames('runs', null)`, "MR004", `frames are read by key`},
		{`read_frames('runs', 'a', p_max => 0)`, "MR004", `cannot read 0 frames`},
		{`read_frames('runs', 'a', p_max => 10001)`, "MR004", `cannot read 10001 frames`},
		{`read_frames('runs', 'a', p_max => null)`, "MR004", `cannot read null frames`},
		{`tail_frames('runs', 'a', '-')`, "MR004", `a tail begins behind a frame`},
		{`tail_frames('runs', 'a', '+')`, "MR004", `a tail begins behind a frame`},
		{`tail_frames('runs', 'a', null)`, "MR004", `null is no cursor`},
		{`read_summary('orders', 'a')`, "MR004", `stream "orders" has no frames`},
		{`wait_for_frames('nowhere', 'a')`, "MR002", `stream "nowhere" does not exist`},
	} {
		_, err := e.Exec(e.ctx, "select millrace."+c.call)
		var pg *pgconn.PgError
		if !errors.As(err, &pg) || pg.Code != c.state || !strings.Contains(pg.Message, c.text) || pg.Hint == "" {
			t.Errorf("%s: %v; want %s, %q and a hint", c.call, err, c.state, c.text)
		}
	}
	for _, bad := range []string{"", "x", "1-", "-1", "1-2-3", "1-x", " 1-1", "1 - 1", "１", "8796093022208", "1-1048576", "99999999999999999", "1.5", "--", "$"} {
		for _, call := range []string{"read_frames('runs', 'a', $1)", "read_frames('runs', 'a', '-', $1)", "tail_frames('runs', 'a', $1)"} {
			_, err := e.Exec(e.ctx, "select millrace."+call, bad)
			var pg *pgconn.PgError
			if !errors.As(err, &pg) || pg.Code != "MR004" || !strings.Contains(pg.Message, "is no cursor of frames") || pg.Hint == "" {
				t.Errorf("%s with %q: %v", call, bad, err)
			}
		}
	}
	for _, level := range []pgx.TxIsoLevel{pgx.RepeatableRead, pgx.Serializable} {
		tx := e.beginAs(pgx.TxOptions{IsoLevel: level})
		if _, err := pgstream.AppendFrame(e.ctx, tx, "runs", "a", pgstream.NewFrame{Payload: []byte(`{}`)}); sqlState(err) != "MR003" {
			t.Errorf("%s: %v", level, err)
		}
		rollback(e, tx)
	}
	_, err := pgstream.AppendFrame(e.ctx, e.Pool, "runs", "a", pgstream.NewFrame{Mode: pgstream.FrameDurableSummary, Payload: []byte(`{"a":`)})
	mustBeRefused(t, err, "invalid input syntax for type json")
	_, err = pgstream.TailFrames(e.ctx, e.Pool, "runs", "a", "soon", pgstream.TailOptions{})
	mustBeRefused(t, err, "is no cursor of frames")
	_, err = pgstream.TailFrames(e.ctx, e.Pool, "nowhere", "a", "0", pgstream.TailOptions{})
	if !errors.Is(err, pgstream.ErrNotFound) {
		t.Errorf("a tail of nothing: %v", err)
	}
	// A document that grows for ever is stopped, and what there was stays.
	e.run("update millrace_engine.stream set max_message_bytes = 300 where name = 'runs'")
	for i := range 2 {
		_, err = pgstream.AppendFrame(e.ctx, e.Pool, "runs", "big", pgstream.NewFrame{Mode: pgstream.FrameDurableSummary,
			Payload: fmt.Appendf(nil, `{"n%d": "%0200d"}`, i, 0)})
	}
	mustBeRefused(t, err, `the summary of key "big" would have`)
	if s, err := pgstream.ReadSummary(e.ctx, e.Pool, "runs", "big"); err != nil || s.Version != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	if n := len(e.readFrames("big", pgstream.FrameRange{})); n != 1 {
		t.Errorf("%d frames", n)
	}
}
