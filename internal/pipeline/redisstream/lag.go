package redisstream

import (
	"context"
	"fmt"
	"time"

	"github.com/redis/rueidis"
)

// Progress is how far a group has come.
type Progress struct {
	// Lag is how many entries were never delivered; -1 when Redis cannot tell, as after XDEL or before Redis 7.
	Lag int64
	// Pending is how many were delivered and not yet acknowledged, to any member.
	Pending int64
	// OldestPending is the age of the oldest pending entry, by its id; 0 when there is none.
	OldestPending time.Duration
}

// Progress asks Redis. Its cost does not depend on the backlog.
func (m *Member) Progress(ctx context.Context) (Progress, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	groups, err := m.client.Do(ctx, m.client.B().XinfoGroups().Key(m.cfg.Stream).Build()).ToArray()
	if err != nil {
		return Progress{}, fmt.Errorf("read the progress of group %q: %w", m.cfg.Group, err)
	}
	p := Progress{Lag: -1}
	for _, g := range groups {
		info, err := g.AsMap()
		if err != nil {
			return Progress{}, fmt.Errorf("read the progress of group %q: %w", m.cfg.Group, err)
		}
		nameValue := info["name"]
		if name, _ := nameValue.ToString(); name != m.cfg.Group {
			continue
		}
		pendingValue, lagValue, ok := info["pending"], info["lag"], false
		p.Pending, _ = pendingValue.ToInt64()
		if _, ok = info["lag"]; ok && !lagValue.IsNil() {
			p.Lag, _ = lagValue.ToInt64()
		}
	}
	if p.Pending == 0 {
		return p, nil
	}
	summary, err := m.client.Do(ctx, m.client.B().Xpending().Key(m.cfg.Stream).Group(m.cfg.Group).Build()).ToArray()
	if err != nil && !rueidis.IsRedisNil(err) {
		return Progress{}, fmt.Errorf("read the pending entries of group %q: %w", m.cfg.Group, err)
	}
	if len(summary) > 1 {
		if id, err := summary[1].ToString(); err == nil {
			p.OldestPending = max(time.Since(time.UnixMilli(Millis(id))), 0)
		}
	}
	return p, nil
}
