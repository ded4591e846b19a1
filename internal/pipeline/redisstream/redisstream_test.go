package redisstream

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/redis/rueidis"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/test/env/redis"
)

func TestMain(m *testing.M) { os.Exit(redis.Main(m, redis.Options{})) }

const reclaimAfter = 200 * time.Millisecond

// patience is how long tests wait for what must come. It is long because test machines can be busy.
const patience = time.Minute

// fixture is one stream on the shared server.
type fixture struct {
	t      *testing.T
	ctx    context.Context
	client rueidis.Client
	stream string
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	t.Parallel()
	return fixtureAt(t, redis.Shared(t).URL())
}

func fixtureAt(t *testing.T, url string) *fixture {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	t.Cleanup(cancel)
	client, version, err := connect(ctx, Endpoint{URL: config.Fixed("the URL", url)})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("Redis %s", version)
	t.Cleanup(client.Close)
	return &fixture{t: t, ctx: ctx, client: client, stream: "s:" + t.Name() + ":" + rand.Text()}
}

// connect tries again when the server was too late with an answer: a machine that is starved takes longer than the few seconds that Connect has.
func connect(ctx context.Context, e Endpoint) (rueidis.Client, Version, error) {
	for deadline := time.Now().Add(patience); ; {
		client, version, err := e.Connect(ctx, "test")
		var late net.Error
		if !errors.As(err, &late) || !late.Timeout() || time.Now().After(deadline) {
			return client, version, err
		}
	}
}

func (f *fixture) member(consumer string, change ...func(*Config)) *Member {
	f.t.Helper()
	cfg := Config{Stream: f.stream, Group: "g", Consumer: consumer, ReclaimAfter: reclaimAfter}
	for _, c := range change {
		c(&cfg)
	}
	m := NewMember(f.client, cfg)
	if err := m.Join(f.ctx); err != nil {
		f.t.Fatal(err)
	}
	return m
}

func (f *fixture) add(n int) []string {
	f.t.Helper()
	ids := make([]string, n)
	for i := range ids {
		var err error
		ids[i], err = f.client.Do(f.ctx, f.client.B().Xadd().Key(f.stream).Id("*").FieldValue().FieldValue("n", fmt.Sprint(i)).Build()).ToString()
		if err != nil {
			f.t.Fatal(err)
		}
	}
	return ids
}

// read reads until it has n entries.
func (f *fixture) read(m *Member, n int) []Entry {
	f.t.Helper()
	var all []Entry
	for deadline := time.Now().Add(patience); len(all) < n; {
		entries, _, err := m.Read(f.ctx, n-len(all), 10*time.Millisecond)
		if err != nil {
			f.t.Fatal(err)
		}
		all = append(all, entries...)
		if time.Now().After(deadline) {
			f.t.Fatalf("read %d entries of %d", len(all), n)
		}
	}
	return all
}

// nothing reads for a while and fails when an entry comes.
func (f *fixture) nothing(m *Member, for_ time.Duration) {
	f.t.Helper()
	for end := time.Now().Add(for_); time.Now().Before(end); {
		entries, _, err := m.Read(f.ctx, 10, 10*time.Millisecond)
		if err != nil {
			f.t.Fatal(err)
		}
		if len(entries) > 0 {
			f.t.Fatalf("read %v", ids(entries))
		}
	}
}

func (f *fixture) pending() int64 {
	f.t.Helper()
	p, err := f.member("observer").Progress(f.ctx)
	if err != nil {
		f.t.Fatal(err)
	}
	return p.Pending
}

func ids(entries []Entry) []string {
	out := make([]string, len(entries))
	for i, e := range entries {
		out[i] = e.ID
	}
	return out
}

// The seed's T01: any number of members may create the group.
func TestJoinToleratesAGroupThatIsThere(t *testing.T) {
	f := newFixture(t)
	f.add(1)
	for range 3 {
		f.member("a")
	}
	if got := f.read(f.member("a"), 1); got[0].Deliveries != 1 {
		t.Errorf("deliveries %d", got[0].Deliveries)
	}
}

func TestJoinFromLatestLeavesOutWhatWasThere(t *testing.T) {
	f := newFixture(t)
	f.add(1)
	m := f.member("a", func(c *Config) { c.FromLatest = true })
	f.nothing(m, 50*time.Millisecond)
	f.add(1)
	f.read(m, 1)
}

func TestReadKeepsOrderAndRepetitionOfFields(t *testing.T) {
	f := newFixture(t)
	m := f.member("a")
	f.client.Do(f.ctx, f.client.B().Xadd().Key(f.stream).Id("*").FieldValue().FieldValue("z", "1").FieldValue("a", "2").FieldValue("z", "3").Build())
	if got := fmt.Sprint(f.read(m, 1)[0].Fields); got != "[{z 1} {a 2} {z 3}]" {
		t.Errorf("%s", got)
	}
}

// R1: what a member held comes back to the same name first.
func TestReadBeginsWithOwnPendingEntries(t *testing.T) {
	f := newFixture(t)
	f.add(5)
	first := f.read(f.member("a"), 3)
	again := f.read(f.member("a"), 5)
	if fmt.Sprint(ids(again[:3])) != fmt.Sprint(ids(first)) {
		t.Errorf("%v, want %v first", ids(again), ids(first))
	}
	if again[0].Deliveries != 0 || again[3].Deliveries != 1 {
		t.Errorf("deliveries %d and %d", again[0].Deliveries, again[3].Deliveries)
	}
}

// R2: after a lost answer the pending list is read anew, without what is held.
func TestReadAfterAnErrorReturnsNothingTwice(t *testing.T) {
	f := newFixture(t)
	f.add(4)
	m := f.member("a")
	f.read(m, 2)
	canceled, cancel := context.WithCancel(f.ctx)
	cancel()
	if _, _, err := m.Read(canceled, 1, time.Second); err == nil {
		t.Fatal("no error")
	}
	seen := map[string]bool{}
	for _, e := range f.read(m, 2) {
		seen[e.ID] = true
	}
	f.nothing(m, 50*time.Millisecond)
	if len(seen) != 2 {
		t.Errorf("%v", seen)
	}
}

func TestAckTakesEntriesOffThePendingList(t *testing.T) {
	f := newFixture(t)
	f.add(3)
	m := f.member("a")
	got := ids(f.read(m, 3))
	for range 2 { // repeating it is harmless
		if err := m.Ack(f.ctx, m.term(), got[:2]); err != nil {
			t.Fatal(err)
		}
	}
	if n := f.pending(); n != 1 || m.Held() != 1 {
		t.Errorf("%d pending, %d held", n, m.Held())
	}
}

func TestReclaimTakesOverFromADeadMember(t *testing.T) {
	f := newFixture(t)
	f.add(3)
	f.read(f.member("dead"), 3)
	m := f.member("alive")
	began := time.Now()
	got := f.read(m, 3)
	if waited := time.Since(began); waited < reclaimAfter/2 {
		t.Errorf("taken over after %s already", waited)
	}
	if c := m.Counters(); c.Reclaimed != 3 {
		t.Errorf("%+v", c)
	}
	counts, err := m.Deliveries(f.ctx, ids(got))
	if err != nil || fmt.Sprint(counts) != "[2 2 2]" {
		t.Errorf("deliveries %v, %v", counts, err)
	}
}

func TestRefreshKeepsHeldEntriesFromBeingTakenOver(t *testing.T) {
	f := newFixture(t)
	f.add(3)
	const after = 10 * reclaimAfter // a busy machine may keep the member from refreshing for a while
	slow := func(c *Config) { c.ReclaimAfter = after }
	busy, other := f.member("busy", slow), f.member("other", slow)
	f.read(busy, 3)
	for end := time.Now().Add(2 * after); time.Now().Before(end); {
		if err := busy.Refresh(f.ctx); err != nil {
			t.Fatal(err)
		}
		f.nothing(other, reclaimAfter/10)
	}
	if c := busy.Counters(); c.Stolen != 0 {
		t.Errorf("%+v", c)
	}
}

// R3: a member that slept past its time does not take its entries back.
func TestRefreshLeavesEntriesWithTheirNewHolder(t *testing.T) {
	f := newFixture(t)
	f.add(2)
	zombie, other := f.member("zombie"), f.member("other")
	f.read(zombie, 2)
	f.read(other, 2)
	if err := zombie.Refresh(f.ctx); err != nil {
		t.Fatal(err)
	}
	if c := zombie.Counters(); c.Stolen != 2 {
		t.Errorf("%+v", c)
	}
	rows, err := f.client.Do(f.ctx, f.client.B().Xpending().Key(f.stream).Group("g").Start("-").End("+").Count(10).Consumer("other").Build()).ToArray()
	if err != nil || len(rows) != 2 {
		t.Errorf("the other member has %d entries, %v", len(rows), err)
	}
}

// R2: what a member holds already is not handed out again when its own look for abandoned entries finds it.
func TestReclaimLeavesOutWhatIsHeld(t *testing.T) {
	f := newFixture(t)
	f.add(2)
	m := f.member("a")
	held := ids(f.read(m, 2))
	f.nothing(m, 3*reclaimAfter)
	m.Forget(m.term(), held)
	if got := f.read(m, 2); len(got) != 2 {
		t.Errorf("%v", ids(got))
	}
}

// R4, R5.
func TestReleaseGivesEverythingToOthersAtOnce(t *testing.T) {
	f := newFixture(t)
	slow := func(c *Config) { c.ReclaimAfter = time.Hour }
	total := releasePage + 10
	f.add(total)
	m := f.member("leaving", slow)
	f.read(m, total)
	n, err := m.Release(f.ctx)
	if err != nil || n != total {
		t.Fatalf("released %d, %v", n, err)
	}
	other := f.member("other", slow)
	got := f.read(other, total)
	counts, err := other.Deliveries(f.ctx, ids(got[:1]))
	if err != nil || counts[0] != 2 {
		t.Errorf("releasing counted as a delivery: %v, %v", counts, err)
	}
	if names := f.consumers(); names["leaving"] {
		t.Errorf("the consumer is still there: %v", names)
	}
}

func (f *fixture) consumers() map[string]bool {
	f.t.Helper()
	list, err := f.client.Do(f.ctx, f.client.B().XinfoConsumers().Key(f.stream).Group("g").Build()).ToArray()
	if err != nil {
		f.t.Fatal(err)
	}
	names := map[string]bool{}
	for _, c := range list {
		info, err := c.AsMap()
		if err != nil {
			f.t.Fatal(err)
		}
		v := info["name"]
		name, _ := v.ToString()
		names[name] = true
	}
	return names
}

// R4.
func TestRemoveStaleKeepsConsumersWithPendingEntries(t *testing.T) {
	f := newFixture(t)
	f.add(2)
	f.read(f.member("pending"), 1)
	idle := f.member("idle")
	if err := idle.Ack(f.ctx, idle.term(), ids(f.read(idle, 1))); err != nil {
		t.Fatal(err)
	}
	m := f.member("a")
	f.nothingPending(m)
	if err := m.removeStale(f.ctx, 0); err != nil {
		t.Fatal(err)
	}
	if names := f.consumers(); names["idle"] || !names["pending"] {
		t.Errorf("%v", names)
	}
	// Also when an entry becomes pending after the consumer looked stale: the script checks again.
	if err := m.remove(f.ctx, "pending", 0); err != nil {
		t.Fatal(err)
	}
	if n := f.pending(); n != 1 {
		t.Errorf("%d pending", n)
	}
}

// nothingPending registers a consumer by one read.
func (f *fixture) nothingPending(m *Member) {
	f.t.Helper()
	if _, _, err := m.Read(f.ctx, 1, time.Millisecond); err != nil {
		f.t.Fatal(err)
	}
}

// R1: trimmed pending entries are counted and leave the pending list, both when they are read again and when they are
// taken over.
func TestTrimmedPendingEntriesAreCounted(t *testing.T) {
	f := newFixture(t)
	f.add(4)
	f.read(f.member("own"), 2)
	f.read(f.member("dead"), 2)
	if err := f.client.Do(f.ctx, f.client.B().Xtrim().Key(f.stream).Maxlen().Threshold("0").Build()).Error(); err != nil {
		t.Fatal(err)
	}
	m := f.member("own")
	deadline := time.Now().Add(patience)
	for m.Counters().Trimmed < 4 {
		f.nothing(m, 20*time.Millisecond)
		if time.Now().After(deadline) {
			t.Fatalf("%+v", m.Counters())
		}
	}
	if n := f.pending(); n != 0 {
		t.Errorf("%d pending", n)
	}
}

// R6: the group is made again, and nothing that this member has not seen is skipped.
func TestReadMakesAVanishedGroupAgain(t *testing.T) {
	destroy := func(f *fixture) rueidis.Completed {
		return f.client.B().XgroupDestroy().Key(f.stream).Group("g").Build()
	}
	remove := func(f *fixture) rueidis.Completed { return f.client.B().Del().Key(f.stream).Build() }
	for name, tc := range map[string]struct {
		fromLatest bool
		vanish     func(*fixture) rueidis.Completed
		after      []string // ids added afterwards
		want       int      // entries delivered afterwards
	}{
		"from the first entry":                             {false, destroy, []string{"7-0", "7-1"}, 5},
		"from the last entry read":                         {true, destroy, []string{"7-0", "7-1"}, 2},
		"from the first entry of a stream that began anew": {true, remove, []string{"1-0", "1-1"}, 2},
		// The ids alone do not tell: the new stream reaches as far as the old one.
		"from the first entry of a stream with the same ids": {true, remove, []string{"6-0", "6-1"}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			m := f.member("a", func(c *Config) { c.FromLatest = tc.fromLatest })
			f.nothing(m, time.Millisecond)
			f.addIDs("5-0", "6-0", "6-1")
			if err := m.Ack(f.ctx, m.term(), ids(f.read(m, 3))); err != nil {
				t.Fatal(err)
			}
			if err := f.client.Do(f.ctx, tc.vanish(f)).Error(); err != nil {
				t.Fatal(err)
			}
			f.addIDs(tc.after...)
			f.read(m, tc.want)
			f.nothing(m, 30*time.Millisecond)
		})
	}
}

func (f *fixture) addIDs(ids ...string) {
	f.t.Helper()
	for _, id := range ids {
		if err := f.client.Do(f.ctx, f.client.B().Xadd().Key(f.stream).Id(id).FieldValue().FieldValue("n", id).Build()).Error(); err != nil {
			f.t.Fatal(err)
		}
	}
}

func TestConnectNeverShowsThePassword(t *testing.T) {
	for _, url := range []string{
		"redis://user:secret@127.0.0.1:1/0", "redis://user:secret@127.0.0.1:port/0", "http://user:secret@127.0.0.1", "redis://user:sec%ret@host", "secret",
	} {
		_, _, err := Connect(context.Background(), url, "test")
		if err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%v", err)
		}
	}
}

func TestConnectTellsAWrongPasswordFromAServerThatIsDown(t *testing.T) {
	s := redis.NewServer(t, redis.Options{Password: "right"})
	wrong := Endpoint{URL: config.Fixed("the URL", strings.Replace(s.URL(), "right", "wrong", 1))}
	if _, _, err := connect(t.Context(), wrong); !IsUnusable(err) {
		t.Errorf("wrong password: %v", err)
	}
	if _, _, err := Connect(context.Background(), "redis://127.0.0.1:1", "test"); err == nil || IsUnusable(err) {
		t.Errorf("server down: %v", err)
	}
	fixtureAt(t, s.URL()).member("a")
}

func TestVersions(t *testing.T) {
	v := parseVersion("# Server\r\nredis_version:7.0.15\r\nredis_git_sha1:0\r\n")
	if v != (Version{7, 0, 15}) || !v.AtLeast(Version{6, 2, 0}) || v.AtLeast(Version{7, 2, 0}) || v.String() != "7.0.15" {
		t.Errorf("%v", v)
	}
	if !errors.As(error(&tooOldError{Version{5, 0, 0}}), new(*tooOldError)) || !IsUnusable(&tooOldError{Version{5, 0, 0}}) {
		t.Error("a server that is too old is not reported as unusable")
	}
}
