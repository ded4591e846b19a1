package redisstream

import (
	"testing"
	"time"
)

func (f *fixture) length() int64 {
	f.t.Helper()
	n, err := f.client.Do(f.ctx, f.client.B().Xlen().Key(f.stream).Build()).AsInt64()
	if err != nil {
		f.t.Fatal(err)
	}
	return n
}

func TestAckDeletesEntriesWhenAskedTo(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"shared": func(c *Config) { c.Delete = true }, "exclusive": func(c *Config) { c.Delete, c.Exclusive, c.ReclaimAfter = true, true, time.Hour },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			m := f.member("a", change)
			if m.cfg.Exclusive {
				f.tend(m)
			}
			total := ackPage + 5
			f.add(total)
			got := f.read(m, total)
			for range 2 {
				if err := m.Ack(f.ctx, got[0].Term, ids(got[1:])); err != nil {
					t.Fatal(err)
				}
			}
			if n := f.length(); n != 1 || f.pending() != 1 {
				t.Errorf("%d entries, %d pending", n, f.pending())
			}
		})
	}
}

// What some group of the stream has not acknowledged stays.
func TestTrimDeletesWhatEveryGroupHasAcknowledged(t *testing.T) {
	f := newFixture(t)
	m := f.member("a")
	all := f.add(10)
	got := f.read(m, 6)
	trim := func(want int64, why string) {
		t.Helper()
		if _, err := m.Trim(f.ctx); err != nil {
			t.Fatal(err)
		}
		if n := f.length(); n != want {
			t.Fatalf("%s: %d entries, want %d", why, n, want)
		}
	}
	trim(10, "nothing is acknowledged")
	if err := m.Ack(f.ctx, got[0].Term, append(ids(got[:3]), got[4].ID)); err != nil {
		t.Fatal(err)
	}
	other := f.member("a", func(c *Config) { c.Group = "other" })
	trim(10, "the other group has read nothing")
	if err := other.Ack(f.ctx, Term{}, ids(f.read(other, 10))); err != nil {
		t.Fatal(err)
	}
	trim(7, "the first group has the fourth entry")
	if err := m.Ack(f.ctx, got[0].Term, []string{all[3], all[5]}); err != nil {
		t.Fatal(err)
	}
	trim(4, "the first group has read six")
	if err := m.Ack(f.ctx, got[0].Term, ids(f.read(m, 4))); err != nil {
		t.Fatal(err)
	}
	trim(0, "both have acknowledged everything")
	if p, err := m.Progress(f.ctx); err != nil || p.Lag != 0 {
		t.Errorf("%+v, %v", p, err)
	}
	f.addIDs("18446744073709551615-18446744073709551615") // the last id there is
	last := f.read(m, 1)
	if err := m.Ack(f.ctx, last[0].Term, ids(last)); err != nil {
		t.Fatal(err)
	}
	trim(1, "one entry more stays than has to")
}

// The lag is what can still be delivered, or -1; never a number that is wrong.
func TestLagIsHonest(t *testing.T) {
	f := newFixture(t)
	m := f.member("a")
	lag := func(want int64, why string) {
		t.Helper()
		if p, err := m.Progress(f.ctx); err != nil || p.Lag != want {
			t.Fatalf("%s: %+v, %v; want %d", why, p, err, want)
		}
	}
	all := f.add(10)
	f.read(m, 4)
	lag(6, "Redis counts")
	f.do("XDEL", f.stream, all[6])
	lag(5, "an entry was deleted, and Redis does not know any more")
	f.do("XTRIM", f.stream, "MAXLEN", "3")
	lag(3, "entries were trimmed before they were delivered")
	for range (countLimit + 100) / 100 {
		f.add(100)
	}
	f.do("XDEL", f.stream, all[8])
	lag(-1, "there are too many to count")
	f.read(m, 2+countLimit+100)
	lag(0, "everything was delivered")
}
