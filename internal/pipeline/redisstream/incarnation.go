package redisstream

import "context"

// Incarnations remember streams where Redis cannot lose them.
type Incarnations interface {
	// Observe returns which incarnation of the stream it is, counted from 0: the one it remembers, or the next one when the
	// stream cannot be the one that is remembered. known is the incarnation that the caller took it for, saw how far that
	// one reached for it. look asks Redis how far the stream reaches, and for entries of these ids. One call at a time is in
	// progress for a stream, in all processes, because an answer of Redis that is older than what is remembered would look
	// like a loss.
	Observe(ctx context.Context, stream string, known int, saw Extent, look func(ctx context.Context, ids ...string) (Sight, error)) (int, error)
	// Remember notes how far streams were read, without asking Redis. What was read in another incarnation than the one that
	// is remembered is not noted. It returns for each which incarnation is remembered, -1 when none is. Streams are named in
	// the order of their names, so that two callers do not wait for each other.
	Remember(ctx context.Context, reached []Reached) ([]int, error)
}

// Reached is how far an incarnation of a stream was read.
type Reached struct {
	Stream      string
	Incarnation int
	Mark        Mark  // the greatest entry that was read
	Added       int64 // how many entries were added at least; -1 when Redis does not count them
}

// verify finds out whether the stream is still the one that this member has read. A Redis that has lost its data, or a
// stream that was deleted, begins a new incarnation: ids start over, so an id that was seen means nothing, and what is held
// no longer exists (R7).
func (m *Member) verify(ctx context.Context) error {
	m.mu.Lock()
	known, saw := m.incarnation, m.reach()
	m.suspect, m.opened = false, connectionsOf(m.client)
	m.mu.Unlock()
	var now Sight
	look := func(ctx context.Context, ids ...string) (_ Sight, err error) {
		now, err = m.look(ctx, ids...)
		return now, err
	}
	next, err := m.observe(ctx, known, saw, look)
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
		m.remembered = saw.Join(now.Extent)
		m.seen = m.seen.Join(now.Extent)
		return nil
	}
	m.incarnation, m.seen, m.remembered, m.lastRead, m.readNewCount = next, now.Extent, now.Extent, "", 0
	m.newest = Entry{}
	m.ownAgain = true
	clear(m.held)
	return nil
}

func (m *Member) observe(ctx context.Context, known int, saw Extent, look func(context.Context, ...string) (Sight, error)) (int, error) {
	if m.cfg.Incarnations != nil {
		return m.cfg.Incarnations.Observe(ctx, m.cfg.Stream, known, saw, look)
	}
	now, err := look(ctx, saw.Mark.ID)
	if err == nil && !now.Continues(saw) {
		known++
	}
	return known, err
}

// verified verifies, if something has happened that makes a new incarnation possible.
func (m *Member) verified(ctx context.Context) error {
	if !m.suspicious() {
		return nil
	}
	return m.verify(ctx)
}

// suspicious says whether the stream may have begun anew: something failed, or there is a new connection, which may lead to a
// server that has lost its data while nothing was under way that could have failed.
func (m *Member) suspicious() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.suspect || m.opened != connectionsOf(m.client)
}

func (m *Member) doubt() {
	m.mu.Lock()
	m.suspect = true
	m.mu.Unlock()
}

// Doubt makes the member find out, before it acknowledges or reads anything more, whether the stream is still the one that it
// has read. Call it when an entry that was never delivered before turns out to be known.
func (m *Member) Doubt() { m.doubt() }

// Incarnation is how often the stream has begun anew, as far as anybody remembers.
func (m *Member) Incarnation() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.incarnation
}

// reach is how far the stream reached, as far as this member knows.
func (m *Member) reach() Extent {
	if CompareIDs(m.newest.ID, m.seen.Mark.ID) > 0 {
		m.seen.Mark = Mark{ID: m.newest.ID, Digest: Digest(m.newest.Fields)}
	}
	return m.seen
}

// saw notes that an entry was read. The digest is left to when somebody asks.
func (m *Member) saw(e Entry) {
	if CompareIDs(e.ID, m.newest.ID) > 0 {
		m.newest = e
	}
	if CompareIDs(e.ID, m.seen.Top) > 0 {
		m.seen.Top = e.ID
	}
}

// Reached returns how far the stream was read, if that is further than what is remembered. While it is open which stream that
// was, nothing is to be remembered of it.
func (m *Member) Reached() (Reached, bool) {
	if m.suspicious() {
		return Reached{}, false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if CompareIDs(m.newest.ID, m.remembered.Top) <= 0 {
		return Reached{}, false
	}
	e := m.reach()
	return Reached{Stream: m.cfg.Stream, Incarnation: m.incarnation, Mark: e.Mark, Added: e.Added}, true
}

// Remembered takes in the answer of Incarnations.Remember.
func (m *Member) Remembered(r Reached, incarnation int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.incarnation != r.Incarnation: // found out meanwhile
	case incarnation != r.Incarnation:
		m.suspect = true
	default:
		m.remembered = m.remembered.Join(Extent{Top: r.Mark.ID, Added: r.Added, Mark: r.Mark})
	}
}

// note remembers the first entries of an incarnation, before anything comes of them. Later ones are remembered by who calls
// Reached.
func (m *Member) note(ctx context.Context) error {
	m.mu.Lock()
	noted := m.remembered.Mark.ID != "" || m.cfg.Incarnations == nil
	m.mu.Unlock()
	if noted {
		return nil
	}
	r, further := m.Reached()
	if !further {
		return nil
	}
	now, err := m.cfg.Incarnations.Remember(ctx, []Reached{r})
	if err != nil {
		return err
	}
	m.Remembered(r, now[0])
	return nil
}

// handOut is the last look at entries that were read: is it known which incarnation they are of? When it turns out that the
// stream has begun anew, they keep their old term, whichever stream they are of: what is written under it is never
// acknowledged, and what is of the new one is pending for this member, and comes again.
func (m *Member) handOut(ctx context.Context, entries []Entry) error {
	err := m.verified(ctx)
	if err == nil {
		err = m.note(ctx)
	}
	if err == nil {
		err = m.verified(ctx) // somebody else knew it
	}
	if err != nil {
		for _, e := range entries {
			m.Forget(e.Term, []string{e.ID})
		}
	}
	return err
}
