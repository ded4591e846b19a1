package redisstream

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/redis/rueidis"
)

// Read returns up to count entries: first those pending under this member's own name, from an earlier life or a lost
// answer, then abandoned ones, then new ones. It waits at most block, and may return none. The second result says that
// more is likely to be there at once. After an error, call it again after a pause: it reads its pending list anew, so an
// answer that got lost on the way is not lost to the group.
func (m *Member) Read(ctx context.Context, count int, block time.Duration) ([]Entry, bool, error) {
	entries, more, err := m.read(ctx, count, block)
	if err == nil && len(entries) > 0 {
		err = m.handOut(ctx, entries)
	}
	if err == nil {
		return entries, more, nil
	}
	m.doubt()
	m.mu.Lock()
	m.ownAgain = true
	m.mu.Unlock()
	if isNoGroup(err) {
		if err := m.rejoin(ctx); err != nil {
			return nil, false, err
		}
		return nil, true, nil
	}
	return nil, false, err
}

func (m *Member) read(ctx context.Context, count int, block time.Duration) ([]Entry, bool, error) {
	if err := m.verified(ctx); err != nil {
		return nil, false, err
	}
	m.mu.Lock()
	if m.ownAgain {
		m.ownAgain, m.ownCursor = false, earliest
	}
	m.mu.Unlock()
	if m.cfg.Exclusive {
		return m.readOwned(ctx, count, block)
	}
	if m.ownCursor != "" {
		return m.readOwn(ctx, count)
	}
	if !time.Now().Before(m.claimDue) {
		entries, err := m.reclaim(ctx, count)
		if err != nil || len(entries) > 0 {
			return entries, true, err
		}
	}
	return m.readNew(ctx, count, block)
}

func (m *Member) readOwn(ctx context.Context, count int) ([]Entry, bool, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	raw, err := m.xreadgroup(ctx, m.client.B().Xreadgroup().Group(m.cfg.Group, m.cfg.Consumer).Count(int64(count)).
		Streams().Key(m.cfg.Stream).Id(m.ownCursor).Build())
	if err != nil {
		return nil, false, err
	}
	if len(raw) == 0 {
		m.ownCursor = ""
		return nil, true, nil
	}
	m.ownCursor = raw[len(raw)-1].ID
	entries, trimmed := split(raw, 0)
	if err := m.dropTrimmed(ctx, trimmed); err != nil {
		return nil, false, err
	}
	return m.hold(entries), true, nil
}

func (m *Member) readNew(ctx context.Context, count int, block time.Duration) ([]Entry, bool, error) {
	ctx, cancel := context.WithTimeout(ctx, block+callTimeout)
	defer cancel()
	wait := max(block.Milliseconds(), 1)
	if m.claimsByReading() {
		return m.readAndClaim(ctx, count, wait)
	}
	cmd := m.client.B().Xreadgroup().Group(m.cfg.Group, m.cfg.Consumer).Count(int64(count)).Block(wait).Streams().Key(m.cfg.Stream).Id(undelivered).Build()
	raw, err := m.xreadgroup(ctx, cmd)
	if err != nil || len(raw) == 0 {
		return nil, false, err
	}
	entries, err := m.holdNew(ctx, raw)
	return entries, len(raw) == count, err
}

// holdNew holds entries that were never delivered before.
func (m *Member) holdNew(ctx context.Context, raw []rueidis.XRangeSlice) ([]Entry, error) {
	m.mu.Lock()
	rewound := m.lastRead != "" && CompareIDs(raw[0].ID, m.lastRead) <= 0
	m.mu.Unlock()
	if rewound { // new entries have greater ids, unless the stream has begun anew or somebody has set the group back
		if err := m.verify(ctx); err != nil {
			return nil, err // they are pending for this member, and read again
		}
		m.mu.Lock()
		m.readNewCount = 0
		m.mu.Unlock()
	}
	entries, _ := split(raw, 1)
	m.mu.Lock()
	m.lastRead = raw[len(raw)-1].ID
	m.readNewCount += int64(len(raw))
	if m.cfg.Version.AtLeast(hasCounts) {
		m.seen.Added = max(m.seen.Added, m.readNewCount)
	}
	m.mu.Unlock()
	return m.hold(entries), nil
}

// xreadgroup returns the entries of the one stream. Redis 7 answers RESP3 clients with a map, others with an array.
func (m *Member) xreadgroup(ctx context.Context, cmd rueidis.Completed) ([]rueidis.XRangeSlice, error) {
	streams, err := m.client.Do(ctx, cmd).AsXReadSlices()
	if rueidis.IsRedisNil(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read stream %q as group %q: %w", m.cfg.Stream, m.cfg.Group, err)
	}
	return streams[m.cfg.Stream], nil
}

// split parts the entries that still exist from the ids of those that do not: Redis lists a pending entry that was
// trimmed or deleted without fields.
func split(raw []rueidis.XRangeSlice, deliveries int) (entries []Entry, trimmed []string) {
	entries = make([]Entry, 0, len(raw))
	for _, r := range raw {
		if r.FieldValues == nil {
			trimmed = append(trimmed, r.ID)
			continue
		}
		entries = append(entries, Entry{ID: r.ID, Fields: r.FieldValues, Deliveries: deliveries})
	}
	return entries, trimmed
}

// dropTrimmed takes ids off the pending list whose entries are gone, and counts them (R1). Those that this member holds
// stay: they were read before they were trimmed, and are settled in the usual way.
func (m *Member) dropTrimmed(ctx context.Context, ids []string) error {
	m.mu.Lock()
	gone := ids[:0]
	for _, id := range ids {
		if _, ok := m.held[id]; !ok {
			gone = append(gone, id)
		}
	}
	m.mu.Unlock()
	if len(gone) == 0 {
		return nil
	}
	n, err := m.client.Do(ctx, m.client.B().Xack().Key(m.cfg.Stream).Group(m.cfg.Group).Id(gone...).Build()).AsInt64()
	if err != nil {
		return fmt.Errorf("drop %d trimmed entries of stream %q: %w", len(gone), m.cfg.Stream, err)
	}
	m.mu.Lock()
	m.counters.Trimmed += n
	m.mu.Unlock()
	return nil
}

func isNoGroup(err error) bool {
	var re *rueidis.RedisError
	return errors.As(err, &re) && hasPrefix(re.Error(), "NOGROUP")
}
