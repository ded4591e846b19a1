package redisstream

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/test/env/redis"
)

// The lease is long enough for a busy machine to do what a test does meanwhile.
func exclusive(c *Config) { c.Exclusive, c.ReclaimAfter = true, 3*time.Second }

// tend tends members one after the other, as their processes would all the time.
func (f *fixture) tend(members ...*Member) {
	f.t.Helper()
	for _, m := range members {
		if err := m.Tend(f.ctx, 0); err != nil {
			f.t.Fatal(err)
		}
	}
}

// R8: only the owner reads, and its successor begins with what it left, in the order of the stream.
func TestAStreamIsReadByItsOwnerAlone(t *testing.T) {
	f := newFixture(t)
	a := f.member("a", exclusive)
	f.tend(a)
	b := f.member("b", exclusive)
	f.tend(b)
	if !a.Owner() || b.Owner() {
		t.Fatalf("a owns: %v, b owns: %v", a.Owner(), b.Owner())
	}
	all := f.add(6)
	f.nothing(b, 30*time.Millisecond)
	got := f.read(a, 4)
	if err := a.Ack(f.ctx, got[1].Term, ids(got[1:2])); err != nil {
		t.Fatal(err)
	}
	// a falls silent. Its lease ends, b takes over, entries that a had before those that nobody had.
	for deadline := time.Now().Add(patience); !b.Owner(); f.tend(b) {
		if time.Now().After(deadline) {
			t.Fatal("b does not take over")
		}
	}
	want := []string{all[0], all[2], all[3], all[4], all[5]}
	rest := f.read(b, 5)
	if !slices.Equal(ids(rest), want) {
		t.Fatalf("read %v, want %v", ids(rest), want)
	}

	// a wakes up. What it does now is nothing, whether it knows already or not.
	if s := a.Standing(got[0].Term); s != Unknown {
		t.Errorf("standing %d before it has asked", s)
	}
	if err := a.Ack(f.ctx, got[0].Term, ids(got[:1])); err != nil {
		t.Fatal(err)
	}
	a.mu.Lock()
	a.lease.until = time.Now().Add(time.Minute) // its clock has stood still
	a.mu.Unlock()
	f.add(1)
	if err := a.Ack(f.ctx, got[0].Term, ids(got[:1])); err != nil {
		t.Fatal(err)
	}
	f.nothing(a, 30*time.Millisecond)
	f.tend(a)
	if s := a.Standing(got[0].Term); s != Lost {
		t.Errorf("standing %d after it has asked", s)
	}
	if c := a.Counters(); c.Fenced != 2 {
		t.Errorf("%+v", c)
	}
	// Now that it is alive again the stream is its own by share, and comes back once it is settled.
	f.tend(b)
	if err := b.Ack(f.ctx, rest[0].Term, ids(rest)); err != nil {
		t.Fatal(err)
	}
	f.tend(b, a)
	last := f.read(a, 1)
	if err := a.Ack(f.ctx, last[0].Term, ids(last)); err != nil {
		t.Fatal(err)
	}
	if n := f.pending(); n != 0 {
		t.Errorf("%d pending", n)
	}
}

// A stream changes hands only when its owner has settled what it read.
func TestAStreamIsGivenToItsNewOwnerOnceEverythingIsSettled(t *testing.T) {
	f := newFixture(t)
	slow := func(c *Config) { c.Exclusive, c.ReclaimAfter = true, time.Hour }
	b := f.member("b", slow)
	f.tend(b)
	f.add(4)
	got := f.read(b, 2)
	a := f.member("a", slow) // the first by name
	f.tend(a, b)
	if a.Owner() || !b.Owner() {
		t.Fatal("given away while two entries are not settled")
	}
	f.nothing(b, 30*time.Millisecond)
	if err := b.Ack(f.ctx, got[0].Term, ids(got)); err != nil {
		t.Fatal(err)
	}
	f.tend(b, a)
	if !a.Owner() || b.Owner() {
		t.Fatalf("a owns: %v, b owns: %v", a.Owner(), b.Owner())
	}
	f.read(a, 2)
	// Leaving gives the stream away at once, and what was read with it.
	if _, err := a.Release(f.ctx); err != nil {
		t.Fatal(err)
	}
	f.tend(b)
	if !b.Owner() {
		t.Fatal("b does not own the stream that a has left")
	}
	f.read(b, 2)
}

// Streams are shared evenly, and shared anew when a member comes or leaves.
func TestStreamsAreSharedEvenly(t *testing.T) {
	f := newFixture(t)
	join := func(name string) (all []*Member) {
		for i := range 6 {
			one := *f
			one.stream = fmt.Sprintf("%s:%d", f.stream, i)
			all = append(all, one.member(name, func(c *Config) { c.Exclusive, c.ReclaimAfter = true, time.Hour }))
		}
		return all
	}
	tend := func(groups ...[]*Member) (owned []int) {
		for range 3 { // give, take, and see
			owned = make([]int, len(groups))
			for n, g := range groups {
				for i, m := range g {
					if err := m.Tend(f.ctx, i); err != nil {
						t.Fatal(err)
					}
					if m.Owner() {
						owned[n]++
					}
				}
			}
		}
		return owned
	}
	a, b, c := join("a"), join("b"), join("c")
	if got := fmt.Sprint(tend(a), tend(a, b), tend(a, b, c)); got != "[6] [3 3] [2 2 2]" {
		t.Errorf("owned %s", got)
	}
	for _, m := range b {
		if _, err := m.Release(f.ctx); err != nil {
			t.Fatal(err)
		}
	}
	if got := fmt.Sprint(tend(a, c)); got != "[3 3]" {
		t.Errorf("owned %s", got)
	}
}

// A Redis that has lost its data has lost the lease too. What was read before may be written, because nobody else has it,
// and its acknowledgement is nothing.
func TestALeaseThatRedisHasLostIsTakenAnew(t *testing.T) {
	f := newFixture(t)
	m := f.member("a", exclusive)
	f.tend(m)
	f.addIDs("5-0", "6-0")
	old := f.read(m, 2)
	f.do("DEL", f.stream, m.leaseKey())
	f.addIDs("5-0")
	if err := m.Tend(f.ctx, 0); err != nil {
		t.Fatal(err)
	}
	if s := m.Standing(old[0].Term); s != Held {
		t.Errorf("standing %d", s)
	}
	anew := f.read(m, 1)
	if anew[0].Term.Incarnation != 1 || anew[0].Term.Epoch <= old[0].Term.Epoch {
		t.Errorf("term %+v after %+v", anew[0].Term, old[0].Term)
	}
	if err := m.Ack(f.ctx, old[0].Term, ids(old)); err != nil {
		t.Fatal(err)
	}
	if n := f.pending(); n != 1 {
		t.Errorf("%d pending", n)
	}
}

// A member that waits for a stream notices that it cannot get it.
func TestAMemberWithoutRightsToTheLeaseSaysSo(t *testing.T) {
	t.Parallel()
	s := redis.New(t)
	f := fixtureAt(t, s.URL())
	f.do("ACL", "SETUSER", "reader", "on", ">p", "~s:*", "+@all")
	client, _, err := connect(f.ctx, Endpoint{URL: config.Fixed("URL", "redis://reader:p@"+s.Addr())})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	f.client = client
	m := f.member("a", exclusive)
	if err := m.Tend(f.ctx, 0); !IsConfiguration(err) {
		t.Errorf("tended: %v", err)
	}
	if _, _, err := m.Read(f.ctx, 1, time.Millisecond); !IsConfiguration(err) {
		t.Errorf("read: %v", err)
	}
}
