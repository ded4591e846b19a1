package lag

import (
	"errors"
	"slices"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"

	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// A steady stream shows one rate, whatever its last digits do, and one that ends shows none after the window.
func TestRatesAreThoseOfTheLastWindow(t *testing.T) {
	registry := database.NewRegistry(database.Options{})
	db, err := registry.Get("postgres://a:b@h/one")
	if err != nil {
		t.Fatal(err)
	}
	const interval = 10 * time.Second
	p := NewPoller(interval)
	p.OnWake("ConsumerGroup", func(Follower, bool) {})
	g := Follower{Kind: "ConsumerGroup", NamespacedName: types.NamespacedName{Name: "g"}, UID: "g"}
	p.Follow(g, db, "orders", "g")
	at, last := time.Unix(1_000_000, 0), int64(500)
	read := func(published int64, err error) (woken bool) {
		at = at.Add(interval)
		last += published
		report := pgstream.GroupReport{GroupStats: pgstream.GroupStats{Stream: "orders", Group: "g", Lag: 100, InFlight: 20}, LastPosition: last}
		return len(p.record(db.ID(), []pgstream.GroupReport{report}, at, err)) > 0
	}
	if !read(0, nil) || p.Figures(g).Rates != nil {
		t.Errorf("the first reading: %+v", p.Figures(g).Rates)
	}
	if read(0, nil) || *p.Figures(g).Rates != (Rates{}) {
		t.Errorf("nothing moves: %+v", p.Figures(g).Rates)
	}
	for range streamsEvery {
		read(1000, nil)
	}
	if r := *p.Figures(g).Rates; r.Published != 100 || r.Settled != 100 {
		t.Errorf("a hundred per second for a minute: %+v", r)
	}
	for range 20 {
		if read(1004, nil) || read(997, nil) {
			t.Error("a steady stream wakes its group")
		}
	}
	_ = read(0, phase.Wait("DatabaseUnreachable", 0, errors.New("down")))
	if !read(2000, nil) {
		t.Error("the database is back and nobody is woken")
	}
	if r := *p.Figures(g).Rates; r.Published < 90 || r.Published > 110 {
		t.Errorf("after a gap: %+v", r)
	}
	var woken []bool
	for range streamsEvery + 4 {
		woken = append(woken, read(0, nil))
	}
	if r := *p.Figures(g).Rates; r != (Rates{}) || woken[len(woken)-1] || !slices.Contains(woken, true) {
		t.Errorf("after the end: %+v, woken %v", r, woken)
	}
}

// A group is in trouble when its messages wait for the whole window and nothing becomes of them, or when one of them fails again and again.
func TestTroubleIsWhatLasts(t *testing.T) {
	const window = time.Minute
	start := time.Unix(1_000_000, 0)
	for _, c := range []struct {
		name   string
		change func(minute int, r *pgstream.GroupReport)
		want   []Trouble // minute by minute
	}{
		{"nothing waits", func(int, *pgstream.GroupReport) {}, []Trouble{"", "", ""}},
		{"nobody receives", func(m int, r *pgstream.GroupReport) {
			r.Lag, r.LastPosition, r.OldestAge = 5, 5, time.Duration(m)*window
		}, []Trouble{"", NobodyReceives, NobodyReceives}},
		{"a slow consumer", func(m int, r *pgstream.GroupReport) {
			r.Lag, r.LastPosition, r.OldestAge = int64(9-m), 9, time.Hour
		}, []Trouble{"", "", ""}},
		{"one that holds a message for long", func(_ int, r *pgstream.GroupReport) {
			r.Lag, r.InFlight, r.LastPosition, r.OldestAge, r.Deliveries = 5, 1, 6, time.Hour, 1
		}, []Trouble{"", "", ""}},
		{"messages that just came", func(m int, r *pgstream.GroupReport) {
			r.Lag, r.LastPosition, r.OldestAge = 5, 5, time.Second
		}, []Trouble{"", "", ""}},
		{"a pause", func(_ int, r *pgstream.GroupReport) {
			r.Lag, r.LastPosition, r.OldestAge, r.Paused = 5, 5, time.Hour, true
		}, []Trouble{"", "", ""}},
		{"a retry that waits for its time", func(_ int, r *pgstream.GroupReport) {
			r.Retrying, r.LastPosition, r.OldestAge, r.Deliveries = 1, 1, time.Hour, 2
		}, []Trouble{"", "", ""}},
		{"a member that has given its messages back for a while", func(_ int, r *pgstream.GroupReport) {
			r.Lag, r.LastPosition, r.OldestAge, r.Deliveries, r.Members = 5, 5, time.Hour, 1, []pgstream.GroupMember{{Name: "m"}}
		}, []Trouble{"", "", ""}},
		{"a message that fails", func(m int, r *pgstream.GroupReport) {
			r.InFlight, r.LastPosition, r.OldestAge, r.Deliveries = 1, 1, time.Hour, 3+m
		}, []Trouble{"", "", MessageFails}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var f Figures
			for m, want := range c.want {
				r := pgstream.GroupReport{GroupStats: pgstream.GroupStats{Stream: "orders", Group: "g"}}
				c.change(m, &r)
				if f = figuresOf(r, start.Add(time.Duration(m)*window), f, window); f.Trouble != want {
					t.Errorf("after %d minutes: %q, want %q", m, f.Trouble, want)
				}
			}
		})
	}
}

func TestPerMinuteIsReadByAPerson(t *testing.T) {
	for _, c := range []struct {
		perSecond float64
		shown     *int64
		want      int64
	}{
		{0, nil, 0}, {1.0 / 60, nil, 1}, {1.55, nil, 93}, {20.57, nil, 1200}, {2057, nil, 120_000},
		{20.57, ptr.To[int64](1100), 1100}, {20.57, ptr.To[int64](1000), 1200}, {0, ptr.To[int64](100), 0}, {1, ptr.To[int64](0), 60},
	} {
		if got := PerMinute(c.perSecond, c.shown); got != c.want {
			t.Errorf("%f per second after %v: %d, want %d", c.perSecond, c.shown, got, c.want)
		}
	}
}

func TestHoldersAreThoseWithTheMost(t *testing.T) {
	report := pgstream.GroupReport{
		GroupStats: pgstream.GroupStats{Members: []pgstream.GroupMember{{Name: "a", Partitions: []int32{0, 1, 2, 5}}, {Name: "b", Partitions: []int32{3}}, {Name: "idle"}}},
		Holders:    []pgstream.Holder{{Name: "b", Messages: 7}, {Name: "left", Messages: 2}},
	}
	want := []Holder{{"b", "3", 7}, {"left", "", 2}, {"a", "0-2,5", 0}}
	if got := holdersOf(report); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for i := range int32(20) {
		report.Members = append(report.Members, pgstream.GroupMember{Name: string('m' + i), Partitions: []int32{10 + i}})
	}
	if got := holdersOf(report); len(got) != holdersMax || !slices.Equal(got[:3], want) {
		t.Errorf("of many: %v", got)
	}
}
