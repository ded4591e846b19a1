package lag

import (
	"context"
	"errors"
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

// Wake enqueues a resource. verify is true when its database was lost or found again, so that the resource has to be
// compared with it; false when only figures changed.
type Wake func(f Follower, verify bool)

// target is what a follower follows: a database, and one group in it or none.
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
	figures   map[Follower]Figures
	polling   map[database.ID]bool // in flight
	lost      map[database.ID]bool // the last poll failed
}

// NewPoller returns a poller that reads every interval once it runs.
func NewPoller(interval time.Duration) *Poller {
	return &Poller{
		interval: interval, kick: make(chan struct{}, 1),
		wake: map[string]Wake{}, followers: map[Follower]target{}, figures: map[Follower]Figures{},
		polling: map[database.ID]bool{}, lost: map[database.ID]bool{},
	}
}

// OnWake sets how followers of a kind are woken. Call it before Run.
func (p *Poller) OnWake(kind string, w Wake) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wake[kind] = w
}

// Follow makes f follow a database and, unless group is empty, one consumer group in it. Repeating it is harmless.
func (p *Poller) Follow(f Follower, db *database.Database, stream, group string) {
	t := target{db, stream, group}
	p.mu.Lock()
	known := p.followers[f] == t
	if !known {
		p.followers[f] = t
		delete(p.figures, f)
	}
	p.mu.Unlock()
	if !known && group != "" {
		select {
		case p.kick <- struct{}{}:
		default:
		}
	}
}

// Unfollow forgets f.
func (p *Poller) Unfollow(f Follower) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.followers, f)
	delete(p.figures, f)
}

// Figures returns the last reading of a follower's group.
func (p *Poller) Figures(f Follower) Figures {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.figures[f]
}

// All returns the last readings of all groups, for metrics.
func (p *Poller) All() map[Follower]Figures {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make(map[Follower]Figures, len(p.figures))
	for f, v := range p.figures {
		all[f] = v
	}
	return all
}

// Run polls until ctx ends, and returns when the last query has.
func (p *Poller) Run(ctx context.Context) error {
	tick := time.NewTicker(p.interval)
	defer tick.Stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-p.kick:
		}
		for _, db := range p.idle() {
			wg.Go(func() { p.poll(ctx, db) })
		}
	}
}

// idle marks as in flight, and returns, the followed databases of which no poll is.
func (p *Poller) idle() []*database.Database {
	p.mu.Lock()
	defer p.mu.Unlock()
	var dbs []*database.Database
	for _, t := range p.followers {
		if id := t.db.ID(); !p.polling[id] {
			p.polling[id] = true
			dbs = append(dbs, t.db)
		}
	}
	return dbs
}

// poll reads one database and wakes whom it concerns.
func (p *Poller) poll(ctx context.Context, db *database.Database) {
	db.Touch()
	var stats []pgstream.GroupStats
	err := db.Do(ctx, func(ctx context.Context, conn pgstream.DB) error {
		var err error
		stats, err = pgstream.Stats(ctx, conn)
		return err
	})
	at := time.Now()
	woken := p.record(db.ID(), stats, at, err)
	if err != nil && !phase.IsAgain(err) && !errors.Is(err, context.Canceled) {
		logf.FromContext(ctx).V(1).Info("reading lag failed", "database", db.String(), "reason", phase.Reason(err, "Failed"))
	}
	for _, w := range woken {
		w.wake(w.follower, w.verify)
	}
}

type wakeUp struct {
	wake     Wake
	follower Follower
	verify   bool
}

// record keeps a reading and returns whom to wake.
func (p *Poller) record(id database.ID, stats []pgstream.GroupStats, at time.Time, err error) []wakeUp {
	type name struct{ stream, group string }
	byName := make(map[name]pgstream.GroupStats, len(stats))
	for _, s := range stats {
		byName[name{s.Stream, s.Group}] = s
	}

	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.polling, id)
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
		changed := verify
		if t.group != "" {
			before := p.figures[f]
			now := before
			now.Known, now.Err = false, err
			if s, ok := byName[name{t.stream, t.group}]; ok && err == nil {
				now = figuresOf(s, at, before)
			}
			p.figures[f] = now
			changed = changed || !now.equal(before)
		}
		if w := p.wake[f.Kind]; changed && w != nil {
			woken = append(woken, wakeUp{w, f, verify})
		}
	}
	return woken
}
