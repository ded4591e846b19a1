package redisstream

import (
	"context"
	"fmt"

	"github.com/redis/rueidis"
)

// Extent is how far a stream ever reached. Both parts only grow, as long as it is the same stream.
type Extent struct {
	// Top is the greatest id the stream ever had; 0-0 when there is no stream.
	Top string
	// Added is how many entries were ever added; -1 when Redis does not count them, as before Redis 7.
	Added int64
}

// Before says whether a stream that reaches as far as e cannot be one that reached as far as o.
func (e Extent) Before(o Extent) bool {
	return CompareIDs(e.Top, o.Top) < 0 || e.Added >= 0 && e.Added < o.Added
}

// Join returns the greater of both.
func (e Extent) Join(o Extent) Extent {
	if CompareIDs(e.Top, o.Top) < 0 {
		e.Top = o.Top
	}
	e.Added = max(e.Added, o.Added)
	return e
}

// Incarnations remember streams where Redis cannot lose them.
type Incarnations interface {
	// Observe returns which incarnation of the stream it is, counted from 0: the one it remembers, or the next one when the
	// stream does not reach as far as it once did. known is the incarnation that the caller took it for, saw how far that
	// one reached for it. extent asks Redis. One call at a time is in progress for a stream, in all processes, because an
	// answer of Redis that is older than what is remembered would look like a loss.
	Observe(ctx context.Context, stream string, known int, saw Extent, extent func(context.Context) (Extent, error)) (int, error)
}

// verify finds out whether the stream is still the one that this member has read. A Redis that has lost its data, or a
// stream that was deleted, begins a new incarnation: ids start over, so an id that was seen means nothing, and what is held
// no longer exists (R7).
func (m *Member) verify(ctx context.Context) error {
	m.mu.Lock()
	known, saw := m.incarnation, m.seen
	m.suspect = false
	m.mu.Unlock()
	var now Extent
	fetch := func(ctx context.Context) (_ Extent, err error) {
		now, err = m.extent(ctx)
		return now, err
	}
	next, err := m.observe(ctx, known, saw, fetch)
	if err != nil {
		m.doubt()
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.incarnation != known {
		return nil // found out meanwhile
	}
	if next == known {
		m.seen = m.seen.Join(now)
		return nil
	}
	m.incarnation, m.seen, m.lastRead, m.readNewCount = next, now, "", 0
	m.ownAgain = true
	clear(m.held)
	return nil
}

func (m *Member) observe(ctx context.Context, known int, saw Extent, extent func(context.Context) (Extent, error)) (int, error) {
	if m.cfg.Incarnations != nil {
		return m.cfg.Incarnations.Observe(ctx, m.cfg.Stream, known, saw, extent)
	}
	now, err := extent(ctx)
	if err == nil && now.Before(saw) {
		known++
	}
	return known, err
}

// verified verifies, if something has happened that makes a new incarnation possible.
func (m *Member) verified(ctx context.Context) error {
	m.mu.Lock()
	suspect := m.suspect
	m.mu.Unlock()
	if !suspect {
		return nil
	}
	return m.verify(ctx)
}

func (m *Member) doubt() {
	m.mu.Lock()
	m.suspect = true
	m.mu.Unlock()
}

// Incarnation is how often the stream has begun anew, as far as anybody remembers.
func (m *Member) Incarnation() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.incarnation
}

// extent asks how far the stream reaches.
func (m *Member) extent(ctx context.Context) (Extent, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	info, err := m.client.Do(ctx, m.client.B().XinfoStream().Key(m.cfg.Stream).Build()).AsMap()
	if re, ok := rueidis.IsRedisErr(err); ok && hasPrefix(re.Error(), "no such key") {
		return Extent{Top: "0-0"}, nil
	}
	if err != nil {
		return Extent{}, fmt.Errorf("read the extent of stream %q: %w", m.cfg.Stream, err)
	}
	e := Extent{Added: -1}
	if count, ok := info["entries-added"]; ok {
		if e.Added, err = count.ToInt64(); err != nil {
			return Extent{}, fmt.Errorf("read the extent of stream %q: %w", m.cfg.Stream, err)
		}
	}
	last := info["last-generated-id"]
	e.Top, err = last.ToString()
	return e, err
}
