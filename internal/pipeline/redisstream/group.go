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
	if !m.cfg.FromLatest {
		return m.create(ctx, earliest)
	}
	m.mu.Lock()
	last, read := m.lastRead, m.readNewCount
	m.mu.Unlock()
	if last == "" {
		return m.create(ctx, latest)
	}
	top, added, err := m.extent(ctx)
	if err != nil {
		return err
	}
	if compareIDs(top, last) < 0 || added >= 0 && added < read {
		return m.create(ctx, earliest)
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

// extent returns the greatest id that the stream ever had, or 0-0 when there is no stream, and how many entries were
// ever added to it, or -1 when Redis does not count them.
func (m *Member) extent(ctx context.Context) (top string, added int64, err error) {
	ctx, cancel := call(ctx)
	defer cancel()
	info, err := m.client.Do(ctx, m.client.B().XinfoStream().Key(m.cfg.Stream).Build()).AsMap()
	if re, ok := rueidis.IsRedisErr(err); ok && hasPrefix(re.Error(), "ERR no such key") {
		return "0-0", 0, nil
	}
	if err != nil {
		return "", 0, fmt.Errorf("read the extent of stream %q: %w", m.cfg.Stream, err)
	}
	added = -1
	if count, ok := info["entries-added"]; ok {
		if added, err = count.ToInt64(); err != nil {
			return "", 0, fmt.Errorf("read the extent of stream %q: %w", m.cfg.Stream, err)
		}
	}
	last := info["last-generated-id"]
	top, err = last.ToString()
	return top, added, err
}
