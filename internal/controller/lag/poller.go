package lag

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
	logf "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Follower is one resource that wants to be woken.
type Follower struct {
	Kind string // of our kinds
	types.NamespacedName
	UID types.UID
}

// Wake enqueues a resource. verify is true when its database was lost or found again, or its group lapsed or was brought back, so that the
// resource has to be compared with its database; false when only figures changed.
type Wake func(f Follower, verify bool)

// streamsEvery is how many intervals lie between two readings of streams: sizes cost more to read than progress, and move less.
const streamsEvery = 6

// target is what a follower follows: a database, and in it a stream, or one group of a stream.
type target struct {
	db            *database.Database
	stream, group string
}

// Poller reads the statistics of the databases that it was told to follow. Its methods are safe for concurrent use.
type Poller struct {
	interval time.Duration
	kick     chan struct{}

	mu        sync.Mutex
	wake      map[string]Wake // by kind
	followers map[Follower]target
	awaited   map[Follower]time.Time // streams without figures that are in their database, and since when that is known
	figures   map[Follower]Figures
	streams   map[Follower]StreamFigures
	polling   map[database.ID]time.Time // in flight, and since when
	urgent    map[database.ID]bool      // to be polled before the next tick
	lost      map[database.ID]bool      // the last poll failed
	took      time.Duration             // the last poll that did not

	tookStreams time.Duration             // the last reading of streams
	streamsAt   map[database.ID]time.Time // when streams were read
}

// NewPoller returns a poller that reads every interval once it runs.
func NewPoller(interval time.Duration) *Poller {
	return &Poller{
		interval: interval, kick: make(chan struct{}, 1),
		wake: map[string]Wake{}, followers: map[Follower]target{}, awaited: map[Follower]time.Time{}, figures: map[Follower]Figures{},
		streams: map[Follower]StreamFigures{}, streamsAt: map[database.ID]time.Time{},
		polling: map[database.ID]time.Time{}, urgent: map[database.ID]bool{}, lost: map[database.ID]bool{},
	}
}

// OnWake sets how followers of a kind are woken. Call it before Run.
func (p *Poller) OnWake(kind string, w Wake) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wake[kind] = w
}

// Follow makes f follow a database and in it a stream or, unless group is empty, one consumer group of it. Repeating it is harmless. Figures come with the next
// reading; who cannot wait for it calls Created, Now or Await.
func (p *Poller) Follow(f Follower, db *database.Database, stream, group string) {
	t := target{db, stream, group}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.followers[f] != t {
		p.followers[f] = t
		p.reset(f)
	}
}

// reset forgets what is known of f. The caller holds mu.
func (p *Poller) reset(f Follower) {
	delete(p.awaited, f)
	delete(p.figures, f)
	delete(p.streams, f)
}

// GroupCreated gives the figures of a group that its resource has just made, so that it need not be woken for its first reading. The next reading goes on from there.
func (p *Poller) GroupCreated(f Follower, report pgstream.GroupReport) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, followed := p.followers[f]; followed {
		p.figures[f] = figuresOf(report, time.Now(), Figures{}, streamsEvery*p.interval)
	}
}

// StreamCreated is GroupCreated for a stream.
func (p *Poller) StreamCreated(f Follower, stats pgstream.StreamStats) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, followed := p.followers[f]; followed {
		p.streams[f] = streamFiguresOf(stats, streamsEvery*p.interval)
	}
}

// Await has streams read at the next interval: f's is in its database, and has no figures yet. Repeating it is harmless.
func (p *Poller) Await(f Follower) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, followed := p.followers[f]
	if _, awaited := p.awaited[f]; followed && !awaited && !p.streams[f].Known {
		p.awaited[f] = time.Now()
	}
}

// Now polls a database before the next interval, because there is reason to think that it was lost or found again, or that it has a group without figures.
func (p *Poller) Now(db *database.Database) {
	p.mu.Lock()
	p.urgent[db.ID()] = true
	p.mu.Unlock()
	p.wakeRun()
}

func (p *Poller) wakeRun() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// Unfollow forgets f.
func (p *Poller) Unfollow(f Follower) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.followers, f)
	p.reset(f)
}

// Followed returns the database that f was made to follow last, and the stream in it; nil when nothing is known of f.
func (p *Poller) Followed(f Follower) (db *database.Database, stream string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := p.followers[f]
	return t.db, t.stream
}

// Figures returns the last reading of a follower's group.
func (p *Poller) Figures(f Follower) Figures {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.figures[f]
}

// StreamFigures returns the last reading of a follower's stream.
func (p *Poller) StreamFigures(f Follower) StreamFigures {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.streams[f]
}

// All returns the last readings of all groups and of all streams, for metrics.
func (p *Poller) All() (map[Follower]Figures, map[Follower]StreamFigures) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.figures), maps.Clone(p.streams)
}

// Run polls until ctx ends, and returns when the last query has.
func (p *Poller) Run(ctx context.Context) error {
	tick := time.NewTicker(p.interval)
	defer tick.Stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	var soon <-chan time.Time
	for {
		all := true
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-soon:
			soon, all = nil, false
		case <-p.kick:
			// Not at once: where one follower is new, more are coming, and a reading for each of a thousand would read a thousand each time.
			if soon == nil {
				soon = time.After(p.pause())
			}
			continue
		}
		for _, db := range p.idle(all) {
			wg.Go(func() { p.poll(ctx, db) })
		}
	}
}

// pause is how long a reading out of turn waits for more that ask for one: twenty times what a reading takes, so that they never keep a database busy,
// and not more than an interval.
func (p *Poller) pause() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return min(max(p.interval/10, 20*p.took), p.interval)
}

// idle marks as in flight, and returns, the followed databases of which no poll is: all of them, or only the urgent ones.
func (p *Poller) idle(all bool) []*database.Database {
	p.mu.Lock()
	defer p.mu.Unlock()
	var dbs []*database.Database
	for _, t := range p.followers {
		if id := t.db.ID(); p.polling[id].IsZero() && (all || p.urgent[id]) {
			p.polling[id] = time.Now()
			delete(p.urgent, id)
			dbs = append(dbs, t.db)
		}
	}
	return dbs
}

// poll reads one database and wakes whom it concerns.
func (p *Poller) poll(ctx context.Context, db *database.Database) {
	db.Touch()
	var reports []pgstream.GroupReport
	begin := time.Now()
	err := db.Look(ctx, func(ctx context.Context, conn pgstream.DB) error {
		var err error
		reports, err = pgstream.GroupReports(ctx, conn)
		return err
	})
	at := time.Now()
	if err == nil {
		p.mu.Lock()
		p.took = at.Sub(begin)
		p.mu.Unlock()
	}
	woken := p.record(db.ID(), reports, at, err)
	if err != nil && !phase.IsAgain(err) && !errors.Is(err, context.Canceled) {
		logf.FromContext(ctx).V(1).Info("reading lag failed", "database", db.String(), "reason", phase.Reason(err, "Failed"))
	}
	if err == nil && p.streamsDue(db.ID(), at) {
		woken = append(woken, p.pollStreams(ctx, db)...)
	}
	for _, w := range woken {
		w.wake(w.follower, w.verify)
	}
}

// streamsDue says whether it is time to read the streams of a database, and then that it is done. One that is new has no figures yet, and does not have
// to wait as long.
func (p *Poller) streamsDue(id database.ID, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch age := now.Sub(p.streamsAt[id]); {
	case age >= streamsEvery*p.interval:
	case age < max(p.interval, 20*p.tookStreams) || !p.awaitsStream(id, now):
		return false
	}
	p.streamsAt[id] = now
	return true
}

// awaitsStream says whether somebody awaits the figures of a stream since a short time. One that stays without was dropped meanwhile, and is not
// waited for. The caller holds mu.
func (p *Poller) awaitsStream(id database.ID, now time.Time) bool {
	for f, since := range p.awaited {
		if p.followers[f].db.ID() == id && now.Sub(since) < streamsEvery*p.interval {
			return true
		}
	}
	return false
}

// pollStreams reads the streams of a database, and returns whom to wake. A failure concerns nobody: groups are read more often and say it.
func (p *Poller) pollStreams(ctx context.Context, db *database.Database) []wakeUp {
	var stats []pgstream.StreamStats
	begin := time.Now()
	err := db.Look(ctx, func(ctx context.Context, conn pgstream.DB) error {
		var err error
		stats, err = pgstream.AllStreamStats(ctx, conn)
		return err
	})
	if err != nil {
		if !phase.IsAgain(err) && ctx.Err() == nil {
			logf.FromContext(ctx).V(1).Info("reading streams failed", "database", db.String(), "reason", phase.Reason(err, "Failed"))
		}
		return nil
	}
	p.mu.Lock()
	p.tookStreams = time.Since(begin)
	p.mu.Unlock()
	return p.recordStreams(db.ID(), stats)
}

// recordStreams keeps a reading of streams and returns whom to wake: at the first one, and when something begins or ends to hold a stream up.
// Sizes wake nobody.
func (p *Poller) recordStreams(id database.ID, stats []pgstream.StreamStats) []wakeUp {
	byName := make(map[string]pgstream.StreamStats, len(stats))
	for _, s := range stats {
		byName[s.Stream] = s
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var woken []wakeUp
	for f, t := range p.followers {
		s, ok := byName[t.stream]
		if t.db.ID() != id || t.group != "" || !ok {
			continue
		}
		before, now := p.streams[f], streamFiguresOf(s, streamsEvery*p.interval)
		p.streams[f] = now
		delete(p.awaited, f)
		if w := p.wake[f.Kind]; w != nil && (now.Known != before.Known || now.HeldBy != before.HeldBy) {
			woken = append(woken, wakeUp{w, f, true})
		}
	}
	return woken
}

type wakeUp struct {
	wake     Wake
	follower Follower
	verify   bool
}

// record keeps a reading and returns whom to wake.
func (p *Poller) record(id database.ID, reports []pgstream.GroupReport, at time.Time, err error) []wakeUp {
	type name struct{ stream, group string }
	byName := make(map[name]pgstream.GroupReport, len(reports))
	for _, r := range reports {
		byName[name{r.Stream, r.Group}] = r
	}

	p.mu.Lock()
	defer p.mu.Unlock()
	began := p.polling[id]
	delete(p.polling, id)
	if p.urgent[id] { // meanwhile; this reading may be from before
		p.wakeRun()
	}
	if phase.IsAgain(err) {
		return nil // a busy database is not a lost one; the figures stay for one more interval
	}
	verify := p.lost[id] != (err != nil)
	if err != nil {
		p.lost[id] = true
	} else {
		delete(p.lost, id)
	}

	var woken []wakeUp
	for f, t := range p.followers {
		if t.db.ID() != id {
			continue
		}
		changed, verify := verify, verify
		if t.group != "" {
			before := p.figures[f]
			r, found := byName[name{t.stream, t.group}]
			if !found && err == nil && before.At.After(began) {
				continue // it was made while this was read
			}
			now := before
			now.Known, now.Err = false, err
			if found && err == nil {
				now = figuresOf(r, at, before, streamsEvery*p.interval)
			}
			changed = changed || !now.equal(before) || ratesMoved(before.ratesTold, now.Rates)
			if changed {
				now.ratesTold = now.Rates
			} else {
				now.ratesTold = before.ratesTold
			}
			p.figures[f] = now
			// Whether a group has lapsed is read from the database itself, with the rest of what it is.
			verify = verify || (now.Lapsed == "") != (before.Lapsed == "")
		}
		if w := p.wake[f.Kind]; changed && w != nil {
			woken = append(woken, wakeUp{w, f, verify})
		}
	}
	return woken
}
