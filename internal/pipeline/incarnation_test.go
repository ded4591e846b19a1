package pipeline_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
	"github.com/millrace-dev/millrace/test/env/postgres"
	"github.com/millrace-dev/millrace/test/env/redis"
)

// pod is the source of one processor whose rows are told apart by @id. What it reads is not written: a test settles it. A test
// that does not release it has killed it.
type pod struct {
	w      *world
	source *pipeline.RedisSource
}

// pod joins, after adding settings to the Redis source.
func (w *world) pod(member string, settings ...string) *pod {
	w.t.Helper()
	c := w.config("key: [device_id, ts]", "key: [source_id]", `path: "@id", type: text`, `path: "@id", type: text, required: true`,
		"reclaimAfter: 1s", strings.Join(append([]string{"reclaimAfter: 1s"}, settings...), ", "))
	pool, err := pipeline.OpenPool(w.ctx, config.Fixed("DSN", w.dsn), c.Name, 4)
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
	p := &pod{w: w, source: pipeline.NewRedisSource(pipeline.RedisOptions{
		Client: client, Version: version, Consumer: member, Config: c, Pool: pool, Metrics: pipeline.NewMetrics(),
		Logger: slog.New(slog.NewTextHandler(w.t.Output(), nil)),
	})}
	if err := p.source.Join(w.ctx); err != nil {
		w.t.Fatal(err)
	}
	return p
}

// read reads until it has n entries, and goes on after errors.
func (p *pod) read(n int) *pipeline.Batch {
	p.w.t.Helper()
	all := &pipeline.Batch{}
	eventually(p.w.t, func() (bool, string) {
		b, err := p.source.Readers()[0].Next(p.w.ctx, n-len(all.Items))
		if err == nil {
			all.Items = append(all.Items, b.Items...)
		}
		return len(all.Items) == n, fmt.Sprint(len(all.Items), " entries; ", err)
	})
	return all
}

// idle reads an empty stream, so that all connections are there: a new one would make it look how far the stream reaches.
func (p *pod) idle() *pod {
	p.w.t.Helper()
	for range 3 { // what is pending, what is new by a connection that waits, and a look because of that
		if b, err := p.source.Readers()[0].Next(p.w.ctx, 1); err != nil || len(b.Items) > 0 {
			p.w.t.Fatal("the stream is not empty: ", err)
		}
	}
	return p
}

// settle settles a batch with the same result for all.
func (p *pod) settle(b *pipeline.Batch, r pipeline.Result) {
	p.w.t.Helper()
	os := make([]pipeline.Outcome, len(b.Items))
	for i := range os {
		os[i].Result = r
	}
	if err := p.source.Settle(p.w.ctx, b, os); err != nil {
		p.w.t.Fatal(err)
	}
}

// reads checks the ids of the next entries.
func (p *pod) reads(want ...string) *pipeline.Batch {
	p.w.t.Helper()
	b := p.read(len(want))
	var got []string
	for _, it := range b.Items {
		got = append(got, it.ID)
	}
	if !slices.Equal(got, want) {
		p.w.t.Fatalf("read %v, want %v", got, want)
	}
	return b
}

func (p *pod) stop() {
	p.w.t.Helper()
	if err := p.source.Release(p.w.ctx); err != nil {
		p.w.t.Fatal(err)
	}
}

// addIDs adds entries 7-first to 7-last, whose content tells generations apart.
func (w *world) addIDs(generation string, first, last int) {
	w.t.Helper()
	for i := first; i <= last; i++ {
		w.do(w.redis.B().Xadd().Key(w.stream).Id(fmt.Sprintf("7-%d", i)).FieldValue().FieldValue("payload", generation+position(i, 1)).Build())
	}
}

// command runs a command on the stream.
func (w *world) command(name string, args ...string) {
	w.t.Helper()
	w.do(w.redis.B().Arbitrary(strings.Fields(name)...).Keys(w.stream).Args(args...).Build())
}

func (w *world) top() string {
	w.t.Helper()
	var top string
	if err := w.db.QueryRow(w.ctx, "select coalesce(max(top_id), '') from millrace_redis_stream").Scan(&top); err != nil {
		w.t.Fatal(err)
	}
	return top
}

// Between two processors the stream is replaced, trimmed, deleted from, or left alone. Only a replaced one is another
// incarnation, however far it has grown. R7.
func TestIncarnation_BetweenTwoProcessors(t *testing.T) {
	const same, other = "", "r1-"
	for name, c := range map[string]struct {
		settings []string
		killed   bool // after it has read 10 entries at once, and 40 more within the second
		between  func(*world)
		next     int // entry that the second processor reads first
		want     string
	}{
		"a shorter stream after an orderly stop": {between: func(w *world) { w.command("DEL"); w.addIDs("new", 1, 30) }, next: 1, want: other},
		"a stream as long":                       {between: func(w *world) { w.command("DEL"); w.addIDs("new", 1, 50) }, next: 1, want: other},
		"a longer stream":                        {between: func(w *world) { w.command("DEL"); w.addIDs("new", 1, 80) }, next: 1, want: other},
		"a longer stream after a kill":           {killed: true, between: func(w *world) { w.command("DEL"); w.addIDs("new", 1, 80) }, next: 1, want: other},
		"a stream that reaches further than what is remembered and not as far as what was read": {
			killed: true, between: func(w *world) { w.command("DEL"); w.addIDs("new", 1, 30) }, next: 1, want: other},
		"a longer stream without the id": {
			between: func(w *world) { w.command("DEL"); w.addIDs("new", 1, 49); w.addIDs("new", 51, 80) }, next: 1, want: other},
		"a longer stream that was trimmed to what came before the id": {
			between: func(w *world) { w.command("DEL"); w.addIDs("new", 1, 80); w.command("XTRIM", "MINID", "7-40") }, next: 40, want: other},
		"a longer stream from which others deleted": {settings: []string{"afterAck: Delete"},
			between: func(w *world) { w.command("DEL"); w.addIDs("new", 1, 80); w.command("XDEL", "7-1", "7-2") }, next: 3, want: other},

		"nothing":               {between: func(*world) {}, want: same},
		"nothing, after a kill": {killed: true, between: func(*world) {}, want: same},
		"the stream is trimmed": {between: func(w *world) { w.addIDs("more", 51, 60); w.command("XTRIM", "MINID", "7-51") }, next: 51, want: same},
		"the stream is emptied": {between: func(w *world) { w.command("XTRIM", "MAXLEN", "0") }, want: same},
		"the last entry is deleted": {
			between: func(w *world) { w.command("XDEL", "7-50"); w.addIDs("more", 51, 60) }, next: 51, want: same},
		"the last entry is deleted with others": {
			between: func(w *world) { w.command("XDEL", "7-20", "7-50", "7-49") }, want: same},
		"the group is destroyed":                          {between: func(w *world) { w.command("XGROUP DESTROY", "positions") }, next: 1, want: same},
		"the group is set back":                           {between: func(w *world) { w.command("XGROUP SETID", "positions", "0") }, next: 1, want: same},
		"after Delete, all that was acknowledged is gone": {settings: []string{"afterAck: Delete"}, between: func(*world) {}, want: same},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			one := w.pod("one", c.settings...).idle()
			w.addIDs("old", 1, 10)
			one.settle(one.read(10), pipeline.Written)
			w.addIDs("old", 11, 50)
			one.settle(one.read(40), pipeline.Written)
			if !c.killed {
				one.stop()
			}
			want := "7-50"
			if c.killed {
				want = "7-10"
			}
			if top := w.top(); top != want {
				t.Fatalf("remembered %s, want %s", top, want)
			}
			c.between(w)
			two := w.pod("two", c.settings...)
			if c.next == 0 {
				w.addIDs("more", 51, 51)
				c.next = 51
			}
			two.reads(fmt.Sprintf("%s7-%d", c.want, c.next))
		})
	}
}

// A processor that is killed is at most a second behind with what it remembers.
func TestIncarnation_IsRememberedWhileReading(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.pod("one")
	ctx, cancel := context.WithCancel(w.ctx)
	done := make(chan error, 1)
	go func() { done <- p.source.Run(ctx, ctx) }()
	for n := range 3 {
		w.addIDs("old", n*10+1, n*10+10)
		p.settle(p.read(10), pipeline.Written)
		want := fmt.Sprintf("7-%d", n*10+10)
		eventually(t, func() (bool, string) { top := w.top(); return top == want, top })
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// While the database cannot note the first entries of an incarnation, none is handed out. None is lost.
func TestIncarnation_FirstEntriesWaitForTheDatabase(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.pod("one").idle()
	w.addIDs("old", 1, 10)
	rename := func(from, to string) {
		if _, err := w.db.Exec(w.ctx, "alter table "+from+" rename to "+to); err != nil {
			t.Fatal(err)
		}
	}
	rename("millrace_redis_stream", "away")
	for range 3 {
		if b, err := p.source.Readers()[0].Next(w.ctx, 10); err == nil && len(b.Items) > 0 {
			t.Fatalf("%d entries were handed out", len(b.Items))
		}
	}
	rename("away", "millrace_redis_stream")
	b := p.read(10)
	if b.Items[0].ID != "7-1" || w.top() != "7-10" {
		t.Errorf("first entry %s, remembered %s", b.Items[0].ID, w.top())
	}
}

// A processor that cannot reach the database when it stops has remembered what it read a second before; it stops all the same.
func TestIncarnation_StopsWithoutTheDatabase(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.pod("one")
	w.addIDs("old", 1, 10)
	one.settle(one.read(10), pipeline.Written)
	w.addIDs("old", 11, 50)
	one.settle(one.read(40), pipeline.Written)
	lock := w.connect()
	if _, err := lock.Exec(w.ctx, "begin; lock table millrace_redis_stream"); err != nil {
		t.Fatal(err)
	}
	one.stop()
	if _, err := lock.Exec(w.ctx, "rollback"); err != nil {
		t.Fatal(err)
	}
	w.command("DEL")
	w.addIDs("new", 1, 80)
	w.pod("two").reads("r1-7-1")
}

// One of two processors sees that the stream was replaced. The other one had nothing to see: it has not read yet.
func TestIncarnation_OfAProcessorThatHasNotReadYet(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.pod("one").idle(), w.pod("two").idle()
	w.addIDs("old", 1, 10)
	one.settle(one.read(10), pipeline.Written)
	w.command("DEL")
	w.addIDs("new", 1, 10)
	one.reads("r1-7-1")
	// It reads what it cannot place once under the ids of before. That is not acknowledged, and comes again under its own.
	two.settle(two.reads("7-2"), pipeline.Written)
	two.reads("r1-7-2")
}

// Nobody sees that the stream was replaced, and it has grown past all that was read by this processor. That the rows of
// entries that were never delivered before are there shows it, before the entries are acknowledged.
func TestIncarnation_IsSeenByDuplicatesOfEntriesNeverDeliveredBefore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.pod("one"), w.pod("two")
	w.addIDs("old", 1, 50)
	two.settle(two.read(10), pipeline.Written)
	one.settle(one.read(40), pipeline.Written)
	one.stop()
	w.command("DEL")
	w.addIDs("new", 1, 80)
	w.command("XGROUP CREATE", "positions", "7-19")
	two.settle(two.reads("7-20"), pipeline.Duplicate)
	if n := w.pending(); n != 1 {
		t.Errorf("%d pending", n)
	}
	two.reads("r1-7-20")
}

// The same in a group that a person has set back: the entries are those of before, and are acknowledged.
func TestIncarnation_DuplicatesOfAGroupThatWasSetBackAreAcknowledged(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.pod("one")
	w.addIDs("old", 1, 50)
	p.settle(p.read(50), pipeline.Written)
	w.command("XGROUP SETID", "positions", "0")
	p.settle(p.reads("7-1", "7-2"), pipeline.Duplicate)
	if n := w.pending(); n != 0 {
		t.Errorf("%d pending", n)
	}
}

// Redis restarts without its data between two reads of a processor, and before the second one, another processor has made the
// group again and read.
func TestIncarnation_OfAServerThatRestartedBetweenTwoReads(t *testing.T) {
	t.Parallel()
	server := redis.NewServer(t, redis.Options{})
	w := newWorldAt(t, postgres.NewDatabase(t), server.URL())
	one, two := w.pod("one"), w.pod("two")
	w.addIDs("old", 1, 50)
	two.settle(two.read(10), pipeline.Written)
	one.settle(one.read(40), pipeline.Written)
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := server.Restart(w.ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() (bool, string) {
		err := w.redis.Do(w.ctx, w.redis.B().Ping().Build()).Error()
		return err == nil, fmt.Sprint(err)
	})
	w.addIDs("new", 1, 30)
	one.read(19)
	two.reads("r1-7-20")
}

// The table of an earlier release has no marks. It gets them, and keeps what it has; a processor of that release may go on
// writing it.
func TestIncarnation_TableOfAnEarlierRelease(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.addIDs("old", 1, 50)
	w.command("XGROUP CREATE", "positions", "7-50")
	for _, sql := range []string{
		`create table millrace_redis_stream (processor text not null, stream text not null, incarnation integer not null, top_id text not null,
			added bigint not null, changed_at timestamptz not null default now(), constraint millrace_redis_stream_pkey primary key (processor, stream))`,
		`insert into millrace_redis_stream values ('telemetry', '` + w.stream + `', 3, '7-50', 50)`,
	} {
		if _, err := w.db.Exec(w.ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	one := w.pod("one")
	w.addIDs("old", 51, 51)
	one.settle(one.reads("r3-7-51"), pipeline.Written)
	one.stop()
	// A processor of the earlier release sees another stream. The mark is not of that one.
	w.command("DEL")
	w.addIDs("new", 1, 60)
	if _, err := w.db.Exec(w.ctx, "update millrace_redis_stream set incarnation = 4, top_id = '7-60', added = 60"); err != nil {
		t.Fatal(err)
	}
	w.pod("two").reads("r4-7-1")
	if n := w.count("select count(*) from millrace_redis_stream where mark_incarnation = 4 and mark_id = '7-60'"); n != 1 {
		t.Error("no mark")
	}
}
