package pipeline

import (
	"context"
	"sync"
	"time"
)

// BreakerOptions say when rows that cannot be written are no longer the rows' fault.
type BreakerOptions struct {
	Window   time.Duration // over which rows are counted; default 1m
	Share    float64       // of failed rows that opens the breaker; default 0.2
	MinRows  int           // failed rows that it takes at least; default 100
	Cooldown time.Duration // pause before the next try; default 10s
}

func (o BreakerOptions) withDefaults() BreakerOptions {
	if o.Window == 0 {
		o.Window = time.Minute
	}
	if o.Share == 0 {
		o.Share = 0.2
	}
	if o.MinRows == 0 {
		o.MinRows = 100
	}
	if o.Cooldown == 0 {
		o.Cooldown = 10 * time.Second
	}
	return o
}

// breaker stops writing when too many rows fail, because then a migration is to blame and not the rows, and a bad
// migration must not flood the dead letters. Only first deliveries count: a few bad rows that come back again and again
// while nothing else is going on say nothing about the table.
//
// States: closed; open until a time, when nobody writes; after that one batch is a probe while the others wait. A probe
// with too many failures opens it again, any other closes it.
type breaker struct {
	opts BreakerOptions
	now  func() time.Time

	mu       sync.Mutex
	start    time.Time // of the window
	good     int
	bad      int
	open     bool
	until    time.Time
	probing  bool
	released chan struct{} // closed and replaced when a probe ends
}

func newBreaker(opts BreakerOptions) *breaker {
	return &breaker{opts: opts.withDefaults(), now: time.Now, released: make(chan struct{})}
}

// enter waits until a batch may be written. It reports false when ctx ended.
func (b *breaker) enter(ctx context.Context) bool {
	for {
		b.mu.Lock()
		if !b.open {
			b.mu.Unlock()
			return true
		}
		wait := b.until.Sub(b.now())
		if wait <= 0 && !b.probing {
			b.probing = true
			b.mu.Unlock()
			return true
		}
		released := b.released
		b.mu.Unlock()
		t := time.NewTimer(max(wait, time.Millisecond))
		if wait <= 0 {
			t.Stop() // only the end of the probe matters
		}
		select {
		case <-ctx.Done():
			t.Stop()
			return false
		case <-released:
		case <-t.C:
		}
		t.Stop()
	}
}

// leave records how the first deliveries of a batch fared. It reports whether the breaker is open now: then the failed
// rows are to be kept, not dead-lettered.
func (b *breaker) leave(good, bad int) (open bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	if b.open {
		if !b.probing {
			return true // began before it opened; its failures are the same story
		}
		b.probing = false
		close(b.released)
		b.released = make(chan struct{})
		if b.tooMany(good, bad, 1) {
			b.until = now.Add(b.opts.Cooldown)
			return true
		}
		b.open, b.start, b.good, b.bad = false, now, 0, 0
		return false
	}
	if now.Sub(b.start) > b.opts.Window {
		b.start, b.good, b.bad = now, 0, 0
	}
	b.good += good
	b.bad += bad
	if b.tooMany(b.good, b.bad, b.opts.MinRows) {
		b.open, b.until = true, now.Add(b.opts.Cooldown)
	}
	return b.open
}

// abandon ends a probe that came to no result.
func (b *breaker) abandon() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.probing {
		b.probing = false
		close(b.released)
		b.released = make(chan struct{})
	}
}

func (b *breaker) tooMany(good, bad, least int) bool {
	return bad >= least && float64(bad) > b.opts.Share*float64(good+bad)
}

func (b *breaker) isOpen() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.open
}
