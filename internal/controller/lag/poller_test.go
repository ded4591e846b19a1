package lag

import (
	"errors"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// L2: who is woken by a reading, and who is not.
func TestRecordWakesWhomItConcerns(t *testing.T) {
	registry := database.NewRegistry(database.Options{})
	db, err := registry.Get("postgres://a:b@h/one")
	if err != nil {
		t.Fatal(err)
	}
	other, err := registry.Get("postgres://a:b@h/two")
	if err != nil {
		t.Fatal(err)
	}
	p := NewPoller(time.Hour)
	for _, kind := range []string{"Stream", "ConsumerGroup"} {
		p.OnWake(kind, func(Follower, bool) {})
	}
	follow := func(kind, name string, db *database.Database, group string) Follower {
		f := Follower{Kind: kind, NamespacedName: types.NamespacedName{Name: name}, UID: types.UID(kind + name)}
		p.Follow(f, db, "orders", group)
		return f
	}
	follow("Stream", "s", db, "")
	a := follow("ConsumerGroup", "a", db, "a")
	follow("ConsumerGroup", "b", db, "b")
	follow("ConsumerGroup", "elsewhere", other, "a")

	at := time.Unix(1_000_000, 0)
	stats := func(lagA, lagB int64, age time.Duration) []pgstream.GroupReport {
		return []pgstream.GroupReport{
			{GroupStats: pgstream.GroupStats{Stream: "orders", Group: "a", Lag: lagA, OldestAge: age}, LastPosition: lagA},
			{GroupStats: pgstream.GroupStats{Stream: "orders", Group: "b", Lag: lagB}},
		}
	}
	lapsed := stats(5, 0, time.Minute+25*time.Second)
	lapsed[0].Lapsed = "lag 5 is above the limit of 4"
	down := phase.Wait("DatabaseUnreachable", 0, errors.New("down"))
	for _, step := range []struct {
		name  string
		stats []pgstream.GroupReport
		err   error
		later time.Duration
		want  map[string]bool // name → verify
	}{
		{"the first reading wakes every group", stats(1, 0, time.Minute), nil, 0, map[string]bool{"a": false, "b": false}},
		{"the same wakes nobody", stats(1, 0, time.Minute), nil, 0, nil},
		{"nor does a backlog that only grows older", stats(1, 0, time.Minute+10*time.Second), nil, 10 * time.Second, nil},
		{"another lag wakes its group", stats(5, 0, time.Minute+20*time.Second), nil, 20 * time.Second, map[string]bool{"a": false}},
		{"a group that lapses is compared with its database", lapsed, nil, 25 * time.Second, map[string]bool{"a": true}},
		{"once", lapsed, nil, 25 * time.Second, nil},
		{"and again when it was reset", stats(5, 0, time.Minute+26*time.Second), nil, 26 * time.Second, map[string]bool{"a": true}},
		{"a busy database wakes nobody", nil, phase.Again(time.Second, errors.New("busy")), 20 * time.Second, nil},
		{"a lost database wakes all of it, Streams too", nil, down, 30 * time.Second, map[string]bool{"s": true, "a": true, "b": true}},
		{"once", nil, down, 40 * time.Second, nil},
		{"and again when it is back", stats(5, 0, time.Minute+50*time.Second), nil, 50 * time.Second, map[string]bool{"s": true, "a": true, "b": true}},
	} {
		woken := map[string]bool{}
		for _, w := range p.record(db.ID(), step.stats, at.Add(step.later), step.err) {
			woken[w.follower.Name] = w.verify
		}
		if len(woken) != len(step.want) {
			t.Errorf("%s: woke %v", step.name, woken)
			continue
		}
		for name, verify := range step.want {
			if got, ok := woken[name]; !ok || got != verify {
				t.Errorf("%s: woke %v", step.name, woken)
			}
		}
		if errors.Is(step.err, down) {
			if f := p.Figures(a); f.Known || f.Lag != 5 {
				t.Errorf("%s: the last figures are %+v", step.name, f)
			}
		}
	}
	p.Unfollow(a)
	if woken := p.record(db.ID(), stats(9, 0, 0), at, nil); len(woken) != 0 {
		t.Errorf("woke one that is gone: %v", woken)
	}
}

// L2: of a stream only what holds it up wakes, and only when it lasts.
func TestRecordStreamsWakesWhenSomethingHoldsAStreamUp(t *testing.T) {
	registry := database.NewRegistry(database.Options{})
	db, err := registry.Get("postgres://a:b@h/one")
	if err != nil {
		t.Fatal(err)
	}
	const interval = 10 * time.Second
	p := NewPoller(interval)
	for _, kind := range []string{"Stream", "ConsumerGroup"} {
		p.OnWake(kind, func(Follower, bool) {})
	}
	s := Follower{Kind: "Stream", NamespacedName: types.NamespacedName{Name: "s"}, UID: "s"}
	p.Follow(s, db, "orders", "")
	p.Follow(Follower{Kind: "ConsumerGroup", NamespacedName: types.NamespacedName{Name: "g"}, UID: "g"}, db, "orders", "g")
	for _, step := range []struct {
		name  string
		stats pgstream.StreamStats
		wakes bool
		held  string
	}{
		{"the first reading wakes", pgstream.StreamStats{Stream: "orders", Messages: 5}, true, ""},
		{"more messages do not", pgstream.StreamStats{Stream: "orders", Messages: 50, Bytes: 8192}, false, ""},
		{"nor does a transaction in passing", pgstream.StreamStats{Stream: "orders", StalledBy: "pid 1", StalledFor: streamsEvery*interval - 1}, false, ""},
		{"one that lasts does", pgstream.StreamStats{Stream: "orders", StalledBy: "pid 1", StalledFor: streamsEvery * interval}, true, "pid 1"},
		{"once", pgstream.StreamStats{Stream: "orders", StalledBy: "pid 1", StalledFor: time.Hour}, false, "pid 1"},
		{"and the next", pgstream.StreamStats{Stream: "orders", StalledBy: "prepared transaction x", StalledFor: time.Hour}, true, "prepared transaction x"},
		{"and its end", pgstream.StreamStats{Stream: "orders"}, true, ""},
		{"another stream concerns nobody", pgstream.StreamStats{Stream: "other", StalledBy: "pid 1", StalledFor: time.Hour}, false, ""},
	} {
		woken := p.recordStreams(db.ID(), []pgstream.StreamStats{step.stats})
		if (len(woken) == 1) != step.wakes || len(woken) > 0 && woken[0].follower != s {
			t.Errorf("%s: woke %v", step.name, woken)
		}
		if f := p.StreamFigures(s); f.HeldBy != step.held {
			t.Errorf("%s: held by %q", step.name, f.HeldBy)
		}
	}

	at := time.Unix(1_000_000, 0)
	for _, look := range []struct {
		after time.Duration
		due   bool
	}{{0, true}, {interval, false}, {(streamsEvery - 1) * interval, false}, {streamsEvery * interval, true}, {(streamsEvery + 1) * interval, false}} {
		if due := p.streamsDue(db.ID(), at.Add(look.after)); due != look.due {
			t.Errorf("after %s due is %t", look.after, due)
		}
	}
}

// A stream that is awaited gets its figures at the next reading; one that was dropped meanwhile waits as long as the others.
func TestStreamsAreReadSoonForOneThatIsAwaited(t *testing.T) {
	db, err := database.NewRegistry(database.Options{}).Get("postgres://a:b@h/one")
	if err != nil {
		t.Fatal(err)
	}
	const interval = 10 * time.Second
	p := NewPoller(interval)
	at := time.Now()
	due := func(after time.Duration, want bool) {
		t.Helper()
		if got := p.streamsDue(db.ID(), at.Add(after)); got != want {
			t.Errorf("after %s due is %t", after, got)
		}
	}
	due(0, true)
	orders, lost := Follower{Kind: "Stream", UID: "s"}, Follower{Kind: "Stream", UID: "lost"}
	p.Follow(orders, db, "orders", "")
	due(interval, false) // it may not be there yet
	p.Await(orders)
	due(interval/10, false)
	due(interval, true)
	due(2*interval, true) // it was not there
	p.recordStreams(db.ID(), []pgstream.StreamStats{{Stream: "orders"}})
	due(3*interval, false)
	p.Await(orders) // which has figures
	due(4*interval, false)
	p.Follow(lost, db, "elsewhere", "")
	p.Await(lost)
	due(4*interval, true)
	due((streamsEvery+4)*interval, true)
	due((streamsEvery+5)*interval, false)
	p.Unfollow(lost)
	p.Await(lost)
	if len(p.awaited) != 0 {
		t.Errorf("awaits %v, which are gone", p.awaited)
	}
}

// What its resource has just made has figures from then on: the next reading wakes nobody unless something has moved, and one that began before takes nothing back.
func TestWhatWasJustMadeIsNotWokenForItsFirstReading(t *testing.T) {
	db, err := database.NewRegistry(database.Options{}).Get("postgres://a:b@h/one")
	if err != nil {
		t.Fatal(err)
	}
	p := NewPoller(10 * time.Second)
	for _, kind := range []string{"Stream", "ConsumerGroup"} {
		p.OnWake(kind, func(Follower, bool) {})
	}
	s, g := Follower{Kind: "Stream", UID: "s"}, Follower{Kind: "ConsumerGroup", UID: "g"}
	p.Follow(s, db, "orders", "")
	p.Follow(g, db, "orders", "billing")
	p.idle(true) // a reading begins
	p.StreamCreated(s, pgstream.StreamStats{Bytes: 8192})
	p.GroupCreated(g, pgstream.GroupReport{GroupStats: pgstream.GroupStats{Paused: true}})
	if f, all := p.StreamFigures(s), p.Figures(g); !f.Known || f.Bytes != 8192 || !all.Known || !all.Paused || all.Lag != 0 {
		t.Errorf("the figures are %+v and %+v", f, all)
	}
	report := pgstream.GroupReport{GroupStats: pgstream.GroupStats{Stream: "orders", Group: "billing", Paused: true}}
	for _, step := range []struct {
		name  string
		stats []pgstream.GroupReport
		lag   int64
		wakes bool
	}{
		{"a reading that began before", nil, 0, false},
		{"the first of it", []pgstream.GroupReport{report}, 0, false},
		{"one with messages", []pgstream.GroupReport{{GroupStats: pgstream.GroupStats{Stream: "orders", Group: "billing", Paused: true, Lag: 3}, LastPosition: 3}}, 3, true},
		{"one without the group", nil, 3, true},
	} {
		woken := p.record(db.ID(), step.stats, time.Now(), nil)
		if f := p.Figures(g); len(woken) > 0 != step.wakes || f.Lag != step.lag || f.Known != (step.name != "one without the group") {
			t.Errorf("%s woke %v, and the figures are %+v", step.name, woken, f)
		}
		p.idle(true)
	}
	if woken := p.recordStreams(db.ID(), []pgstream.StreamStats{{Stream: "orders", Messages: 3}}); len(woken) != 0 {
		t.Errorf("the first reading of a stream that has figures woke %v", woken)
	}
	p.Unfollow(s)
	p.Unfollow(g)
	p.StreamCreated(s, pgstream.StreamStats{})
	p.GroupCreated(g, report)
	if figures, streams := p.All(); len(figures)+len(streams) != 0 {
		t.Errorf("it has figures of what is gone: %v, %v", figures, streams)
	}
}
