package redisstream

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/redis/rueidis"
)

// reclaim takes over up to count entries that have been idle for ReclaimAfter, whoever held them: a dead member, or this
// one when it has forgotten them. When the list is through, the next look is due after a third of that time.
func (m *Member) reclaim(ctx context.Context, count int) ([]Entry, error) {
	entries, next, err := m.autoclaim(ctx, m.cfg.ReclaimAfter, m.claimCursor, count)
	if err != nil {
		return nil, err
	}
	m.claimCursor = next
	if next == firstID {
		m.claimDue = time.Now().Add(min(max(m.cfg.ReclaimAfter/3, reclaimPause), reclaimEvery))
		if m.claimsByReading() {
			m.claimDue = time.Now().Add(reclaimTrimmed)
		}
	}
	m.mu.Lock()
	m.counters.Reclaimed += int64(len(entries))
	m.mu.Unlock()
	return entries, nil
}

// autoclaim takes over up to count entries that have been idle for so long, from a place in the group's pending list on.
// It returns the place to go on from.
func (m *Member) autoclaim(ctx context.Context, idle time.Duration, from string, count int) ([]Entry, string, error) {
	failed := func(err error) ([]Entry, string, error) {
		return nil, "", fmt.Errorf("reclaim from stream %q: %w", m.cfg.Stream, err)
	}
	callCtx, cancel := call(ctx)
	defer cancel()
	command := []string{"XAUTOCLAIM", m.cfg.Stream, m.cfg.Group, m.cfg.Consumer, strconv.FormatInt(idle.Milliseconds(), 10), from, "COUNT", strconv.Itoa(count)}
	var answer []rueidis.RedisMessage
	var err error
	if m.cfg.Exclusive {
		var whole *rueidis.RedisMessage
		if whole, err = m.owned(callCtx, command...); err == nil && whole == nil {
			return nil, from, nil // no longer the owner
		} else if err == nil {
			answer, err = whole.ToArray()
		}
	} else {
		answer, err = m.client.Do(callCtx, m.client.B().Arbitrary(command[0]).Keys(command[1]).Args(command[2:]...).Build()).ToArray()
	}
	if err == nil && len(answer) < 2 {
		err = fmt.Errorf("unexpected answer of %d parts", len(answer))
	}
	if err != nil {
		return failed(err)
	}
	next, err := answer[0].ToString()
	if err != nil {
		return failed(err)
	}
	raw, err := answer[1].AsXRangeSlices()
	if err != nil {
		return failed(err)
	}
	entries, trimmed := split(raw, 0)
	if err := m.dropTrimmed(ctx, trimmed); err != nil { // Redis 6.2 lists them among the entries
		return nil, "", err
	}
	if len(answer) > 2 { // Redis 7 has taken them off the pending list itself
		if ids, err := answer[2].ToArray(); err == nil {
			m.mu.Lock()
			m.counters.Trimmed += int64(len(ids))
			m.mu.Unlock()
		}
	}
	return m.hold(entries), next, nil
}

// Refresh shows that this member is alive for every held entry that has shown no sign of life for a third of
// ReclaimAfter. Entries that another member has taken over are no longer held, and stay with it (R3). Call it about that
// often.
func (m *Member) Refresh(ctx context.Context) error {
	if m.cfg.Exclusive {
		return nil // the lease says so
	}
	now := time.Now()
	old := now.Add(-m.cfg.ReclaimAfter / 3)
	m.mu.Lock()
	var ids []string
	for id, seen := range m.held {
		if !seen.After(old) {
			ids = append(ids, id)
		}
	}
	m.mu.Unlock()
	for len(ids) > 0 {
		page := ids[:min(len(ids), refreshPage)]
		ids = ids[len(page):]
		if err := m.refresh(ctx, page, now); err != nil {
			return err
		}
	}
	return nil
}

func (m *Member) refresh(ctx context.Context, ids []string, now time.Time) error {
	ctx, cancel := call(ctx)
	defer cancel()
	args := append([]string{m.cfg.Group, m.cfg.Consumer}, ids...)
	lost, err := refreshScript.Exec(ctx, m.client, []string{m.cfg.Stream}, args).AsStrSlice()
	if err != nil {
		return fmt.Errorf("refresh %d entries of stream %q: %w", len(ids), m.cfg.Stream, err)
	}
	gone := make(map[string]bool, len(lost))
	for _, id := range lost {
		gone[id] = true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, id := range ids {
		if _, ok := m.held[id]; !ok {
			continue // settled meanwhile
		}
		if gone[id] {
			m.counters.Stolen++
			// Still in hand: its outcome will be settled as usual. It is only no longer refreshed, and the time in the
			// far future keeps it from being looked at again.
			m.held[id] = now.Add(24 * time.Hour)
			continue
		}
		m.held[id] = now
	}
	return nil
}

// Release gives everything that is pending for this member back to the group: any member's next look takes it (R5). Before
// Redis 8.8 that is to give it to a consumer that nobody runs, as idle as if it had been there for an hour. Then it removes
// this member's consumer (R4), and gives up the lease. Deliveries are
// not counted up. Call it after the last Read and Ack.
func (m *Member) Release(ctx context.Context) (int, error) {
	total := 0
	for {
		n, err := m.releasePage(ctx)
		if err != nil {
			return total, fmt.Errorf("release entries of stream %q: %w", m.cfg.Stream, err)
		}
		total += n
		if n == releasePage {
			continue
		}
		if err := m.remove(ctx, m.cfg.Consumer, 0); err != nil || !m.cfg.Exclusive {
			return total, err
		}
		_, err = m.tend(ctx, leaseLeave)
		return total, err
	}
}

func (m *Member) releasePage(ctx context.Context) (int, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	args := []string{m.cfg.Group, m.cfg.Consumer, strconv.Itoa(releasePage)}
	release := releaseNackScript
	if !m.claimsByReading() || !m.cfg.Version.AtLeast(hasNack) {
		release, args = releaseScript, append(args, releasedName, strconv.Itoa(releasedIdle))
	}
	n, err := release.Exec(ctx, m.client, []string{m.cfg.Stream}, args).AsInt64()
	if re, ok := rueidis.IsRedisErr(err); ok && hasPrefix(re.Error(), "NOGROUP") {
		return 0, nil
	}
	return int(n), err
}

// RemoveStale removes the consumers of members that have shown no sign of life for a long time and have nothing pending.
func (m *Member) RemoveStale(ctx context.Context) error {
	stale := max(staleFactor*m.cfg.ReclaimAfter, minStale)
	return m.removeStale(ctx, stale)
}

func (m *Member) removeStale(ctx context.Context, stale time.Duration) error {
	callCtx, cancel := call(ctx)
	defer cancel()
	consumers, err := m.client.Do(callCtx, m.client.B().XinfoConsumers().Key(m.cfg.Stream).Group(m.cfg.Group).Build()).ToArray()
	if err != nil {
		return fmt.Errorf("list the consumers of group %q: %w", m.cfg.Group, err)
	}
	for _, c := range consumers {
		info, err := c.AsMap()
		if err != nil {
			return fmt.Errorf("list the consumers of group %q: %w", m.cfg.Group, err)
		}
		nameValue, pendingValue, idleValue := info["name"], info["pending"], info["idle"]
		name, _ := nameValue.ToString()
		pending, _ := pendingValue.ToInt64()
		idle, _ := idleValue.ToInt64()
		if name == m.cfg.Consumer || pending > 0 || time.Duration(idle)*time.Millisecond < stale {
			continue
		}
		if err := m.remove(ctx, name, stale); err != nil {
			return err
		}
	}
	return nil
}

// remove deletes a consumer when, at that very moment, nothing is pending for it and it has been idle for as long.
func (m *Member) remove(ctx context.Context, consumer string, idle time.Duration) error {
	ctx, cancel := call(ctx)
	defer cancel()
	err := removeStaleScript.Exec(ctx, m.client, []string{m.cfg.Stream},
		[]string{m.cfg.Group, consumer, strconv.FormatInt(idle.Milliseconds(), 10)}).Error()
	if re, ok := rueidis.IsRedisErr(err); ok && (hasPrefix(re.Error(), "NOGROUP") || hasPrefix(re.Error(), "no such key")) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove consumer %q of group %q: %w", consumer, m.cfg.Group, err)
	}
	return nil
}
