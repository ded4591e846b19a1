package redisstream

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/redis/rueidis"
)

// Progress is how far a group has come.
type Progress struct {
	// Lag is how many entries were never delivered and can still be. Where Redis cannot tell, as after XDEL or before
	// Redis 7, a few are counted; -1 says that there are more, and nobody knows how many.
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
		pendingValue := info["pending"]
		p.Pending, _ = pendingValue.ToInt64()
		if p.Lag, err = m.lag(ctx, info); err != nil {
			return Progress{}, fmt.Errorf("read the lag of group %q: %w", m.cfg.Group, err)
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

// lag reads a group's lag. Redis counts entries that were trimmed before they were delivered, too; they will never be.
func (m *Member) lag(ctx context.Context, group map[string]rueidis.RedisMessage) (int64, error) {
	if known, ok := group["lag"]; ok && !known.IsNil() {
		lag, err := known.ToInt64()
		if err != nil || lag == 0 {
			return lag, err
		}
		length, err := m.client.Do(ctx, m.client.B().Xlen().Key(m.cfg.Stream).Build()).AsInt64()
		return min(lag, length), err
	}
	last := group["last-delivered-id"]
	id, err := last.ToString()
	if err != nil {
		return 0, err
	}
	n, err := countScript.Exec(ctx, m.client, []string{m.cfg.Stream}, []string{id, strconv.Itoa(countLimit)}).AsInt64()
	if n == countLimit {
		n = -1
	}
	return n, err
}
