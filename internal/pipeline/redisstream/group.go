package redisstream

import (
	"context"
	"fmt"
	"time"

	"github.com/redis/rueidis"
)

// Join creates the stream and the group when they are missing. Any number of members may call it at once.
func (m *Member) Join(ctx context.Context) error {
	start := earliest
	if m.cfg.FromLatest {
		start = latest
	}
	if err := m.verify(ctx); err != nil {
		return err
	}
	return m.create(ctx, start)
}

// rejoin creates a group that vanished while this member was reading (R6): Redis was restarted without its data, or
// somebody destroyed the group. A group that began at the end of the stream goes on after the last entry this member
// has read, unless ids have started over, in which case everything in the stream is new. A group that vanishes again and
// again is made again ever more slowly.
func (m *Member) rejoin(ctx context.Context) error {
	now := time.Now()
	if now.Before(m.rejoinDue) {
		return fmt.Errorf("group %q of stream %q has vanished again; it is made again in %s",
			m.cfg.Group, m.cfg.Stream, time.Until(m.rejoinDue).Round(time.Millisecond))
	}
	if now.Sub(m.rejoinDue) > rejoinCalm {
		m.rejoinPause = rejoinPause
	} else {
		m.rejoinPause = min(2*m.rejoinPause, maxRejoinPause)
	}
	m.rejoinDue = now.Add(m.rejoinPause)

	before := m.Incarnation()
	m.mu.Lock()
	last := m.lastRead
	m.mu.Unlock()
	if err := m.verify(ctx); err != nil {
		return err
	}
	switch {
	case !m.cfg.FromLatest, m.Incarnation() != before:
		return m.create(ctx, earliest)
	case last == "":
		return m.create(ctx, latest)
	}
	return m.create(ctx, last)
}

func (m *Member) create(ctx context.Context, start string) error {
	ctx, cancel := call(ctx)
	defer cancel()
	err := m.client.Do(ctx, m.client.B().XgroupCreate().Key(m.cfg.Stream).Group(m.cfg.Group).Id(start).Mkstream().Build()).Error()
	if re, ok := rueidis.IsRedisErr(err); ok && re.IsBusyGroup() {
		return nil // another member was first, or the group has always been there
	}
	if err != nil {
		return fmt.Errorf("create group %q of stream %q: %w", m.cfg.Group, m.cfg.Stream, err)
	}
	return nil
}
