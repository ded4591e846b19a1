package pipeline

import (
	"context"
	"sync"
)

// permits bound what has been read and not yet settled, by entries and by bytes. Readers reserve entries before they read
// and correct the number afterwards; bytes are only known after a read, so they may exceed their bound by one read.
type permits struct {
	maxEntries, maxBytes int

	mu       sync.Mutex
	entries  int // reservations included
	reserved int // of entries, those that are not read yet
	bytes    int
	seen     float64       // smoothed bytes per entry, to guess how many entries fit
	freed    chan struct{} // closed and replaced when something was given back
}

func newPermits(maxEntries, maxBytes int) *permits {
	return &permits{maxEntries: maxEntries, maxBytes: maxBytes, freed: make(chan struct{})}
}

// reserve waits until at least one entry may be read, and reserves up to want. It returns 0 when ctx ended.
func (p *permits) reserve(ctx context.Context, want int) int {
	for {
		p.mu.Lock()
		n := min(want, p.maxEntries-p.entries)
		if p.seen > 0 {
			n = min(n, int(float64(p.maxBytes-p.bytes)/p.seen)+1)
		}
		if n > 0 && p.bytes < p.maxBytes {
			p.entries += n
			p.reserved += n
			p.mu.Unlock()
			return n
		}
		freed := p.freed
		p.mu.Unlock()
		select {
		case <-ctx.Done():
			return 0
		case <-freed:
		}
	}
}

// use turns a reservation into what was read.
func (p *permits) use(reserved, entries, bytes int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.entries += entries - reserved
	p.reserved -= reserved
	p.bytes += bytes
	if entries > 0 {
		size := float64(bytes) / float64(entries)
		if p.seen == 0 {
			p.seen = size
		}
		p.seen += (size - p.seen) / 8
	}
	if entries < reserved {
		p.wake()
	}
}

// free gives back what was settled.
func (p *permits) free(entries, bytes int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.entries -= entries
	p.bytes -= bytes
	if p.entries < 0 || p.bytes < 0 {
		panic("pipeline I4: more was settled than was read")
	}
	p.wake()
}

func (p *permits) wake() {
	close(p.freed)
	p.freed = make(chan struct{})
}

// inFlight returns what was read and is not settled.
func (p *permits) inFlight() (entries, bytes int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.entries - p.reserved, p.bytes
}
