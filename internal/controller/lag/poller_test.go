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
	stats := func(lagA, lagB int64, age time.Duration) []pgstream.GroupStats {
		return []pgstream.GroupStats{
			{Stream: "orders", Group: "a", Lag: lagA, OldestAge: age}, {Stream: "orders", Group: "b", Lag: lagB},
		}
	}
	down := phase.Wait("DatabaseUnreachable", 0, errors.New("down"))
	for _, step := range []struct {
		name  string
		stats []pgstream.GroupStats
		err   error
		later time.Duration
		want  map[string]bool // name → verify
	}{
		{"the first reading wakes every group", stats(1, 0, time.Minute), nil, 0, map[string]bool{"a": false, "b": false}},
		{"the same wakes nobody", stats(1, 0, time.Minute), nil, 0, nil},
		{"nor does a backlog that only grows older", stats(1, 0, time.Minute+10*time.Second), nil, 10 * time.Second, nil},
		{"another lag wakes its group", stats(5, 0, time.Minute+20*time.Second), nil, 20 * time.Second, map[string]bool{"a": false}},
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
