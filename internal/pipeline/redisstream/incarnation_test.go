package redisstream

import (
	"testing"
	"time"
)

// R7: the same ids again are other entries, whether this member notices by an error, by ids that go back, or not yet.
func TestAStreamThatBeginsAnewIsAnotherIncarnation(t *testing.T) {
	f := newFixture(t)
	m, other := f.member("a"), f.member("b")
	f.addIDs("5-0", "6-0")
	old := f.read(m, 2)
	f.do("DEL", f.stream)
	f.addIDs("5-0")
	if entries, _, err := m.Read(f.ctx, 1, time.Millisecond); err != nil || len(entries) > 0 { // no group: it is made again
		t.Fatal(ids(entries), err)
	}
	got := f.read(other, 1) // it has not read before, so it has nothing to mistake
	if err := m.Ack(f.ctx, old[0].Term, ids(old)); err != nil {
		t.Fatal(err)
	}
	if n := f.pending(); n != 1 {
		t.Errorf("%d pending: old entries acknowledged new ones", n)
	}
	if c := m.Counters(); c.Fenced != 2 || m.Incarnation() != 1 || m.Held() != 0 {
		t.Errorf("%+v, incarnation %d, %d held", c, m.Incarnation(), m.Held())
	}
	if err := other.Ack(f.ctx, got[0].Term, ids(got)); err != nil {
		t.Fatal(err)
	}

	// Nobody gets an error when the stream is replaced between two reads. Its ids tell.
	f.addIDs("9-0")
	f.read(m, 1)
	f.do("DEL", f.stream)
	f.addIDs("5-0")
	f.do("XGROUP", "CREATE", f.stream, "g", "0")
	// One entry was added to this one, too; its id is one that was seen.
	if e := f.read(m, 1)[0]; e.Term.Incarnation != 2 {
		t.Errorf("incarnation %d", e.Term.Incarnation)
	}
}

// A client that has turned to another server, such as the successor of a failed one, reports no error. Its new connection is reason
// enough to look, also for a stream whose ids say nothing.
func TestANewConnectionIsReasonToLook(t *testing.T) {
	f := newFixture(t)
	m := f.member("a")
	f.addIDs("5-0")
	f.read(m, 1)
	f.nothing(m, 30*time.Millisecond) // every connection of its own is there, and looked at
	f.do("DEL", f.stream)
	f.do("XADD", f.stream, "5-0", "n", "another")
	f.do("XADD", f.stream, "6-0", "n", "another")
	f.do("XGROUP", "CREATE", f.stream, "g", "5-0")
	for range 2 { // one may have been at hand
		other, release := f.client.Dedicate()
		defer release()
		if err := other.Do(f.ctx, other.B().Ping().Build()).Error(); err != nil {
			t.Fatal(err)
		}
	}
	if e := f.read(m, 1)[0]; e.ID != "6-0" || e.Term.Incarnation != 1 {
		t.Errorf("entry %s of incarnation %d", e.ID, e.Term.Incarnation)
	}
}

// A group that is set back delivers entries of the same stream again.
func TestAGroupThatIsSetBackIsNoNewIncarnation(t *testing.T) {
	f := newFixture(t)
	m := f.member("a")
	f.add(3)
	for range 3 {
		got := f.read(m, 3)
		if got[0].Term.Incarnation != 0 {
			t.Fatalf("incarnation %d", got[0].Term.Incarnation)
		}
		if err := m.Ack(f.ctx, got[0].Term, ids(got)); err != nil {
			t.Fatal(err)
		}
		f.do("XGROUP", "SETID", f.stream, "g", "0")
		m.doubt()
	}
}

// R6: a group that vanishes again and again is made again ever more slowly.
func TestAGroupThatKeepsVanishingIsMadeAgainSlowly(t *testing.T) {
	f := newFixture(t)
	m := f.member("a")
	read := func() error {
		_, _, err := m.Read(f.ctx, 1, time.Millisecond)
		return err
	}
	began := time.Now()
	for range 4 {
		f.do("XGROUP", "DESTROY", f.stream, "g")
		for read() != nil {
			if time.Since(began) > patience {
				t.Fatal("the group is not made again")
			}
		}
	}
	if took := time.Since(began); took < (1+2+4)*rejoinPause {
		t.Errorf("made again three times after %s", took)
	}
}
