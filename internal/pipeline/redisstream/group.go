package redisstream

import (
	"context"
	"fmt"

	"github.com/redis/rueidis"
)

// Join creates the stream and the group when they are missing. Any number of members may call it at once.
func (m *Member) Join(ctx context.Context) error {
	start := earliest
	if m.cfg.FromLatest {
		start = latest
	}
	return m.create(ctx, start)
}

// rejoin creates a group that vanished while this member was reading (R6): Redis was restarted without its data, or
// somebody destroyed the group. A group that began at the end of the stream goes on after the last entry this member
// has read, unless ids have started over, in which case everything in the stream is new.
func (m *Member) rejoin(ctx context.Context) error {
	start := earliest
	m.mu.Lock()
	last := m.lastRead
	m.mu.Unlock()
	if m.cfg.FromLatest && last != "" {
		top, err := m.lastGenerated(ctx)
		if err != nil {
			return err
		}
		if compareIDs(top, last) >= 0 {
			start = last
		}
	} else if m.cfg.FromLatest {
		start = latest
	}
	return m.create(ctx, start)
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

// lastGenerated returns the greatest id that the stream ever had, or 0-0 when there is no stream.
func (m *Member) lastGenerated(ctx context.Context) (string, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	info, err := m.client.Do(ctx, m.client.B().XinfoStream().Key(m.cfg.Stream).Build()).AsMap()
	if re, ok := rueidis.IsRedisErr(err); ok && hasPrefix(re.Error(), "ERR no such key") {
		return "0-0", nil
	}
	if err != nil {
		return "", fmt.Errorf("read the last id of stream %q: %w", m.cfg.Stream, err)
	}
	last := info["last-generated-id"]
	return last.ToString()
}
