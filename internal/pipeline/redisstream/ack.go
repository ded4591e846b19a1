package redisstream

import (
	"context"
	"fmt"

	"github.com/redis/rueidis"
)

// Ack takes entries off the pending list and stops holding them. Repeating it is harmless. After an error all of them
// are still held.
func (m *Member) Ack(ctx context.Context, ids []string) error {
	if len(ids) == 0 {
		return nil
	}
	callCtx, cancel := call(ctx)
	defer cancel()
	err := m.client.Do(callCtx, m.client.B().Xack().Key(m.cfg.Stream).Group(m.cfg.Group).Id(ids...).Build()).Error()
	if err != nil {
		return fmt.Errorf("ack %d entries of stream %q: %w", len(ids), m.cfg.Stream, err)
	}
	m.Forget(ids)
	return nil
}

// Deliveries asks Redis how often entries have been delivered. An entry that is no longer pending has 0.
func (m *Member) Deliveries(ctx context.Context, ids []string) ([]int, error) {
	counts := make([]int, 0, len(ids))
	for len(ids) > 0 {
		page := ids[:min(len(ids), pendingLookup)]
		ids = ids[len(page):]
		cmds := make(rueidis.Commands, len(page))
		for i, id := range page {
			cmds[i] = m.client.B().Xpending().Key(m.cfg.Stream).Group(m.cfg.Group).Start(id).End(id).Count(1).Build()
		}
		callCtx, cancel := call(ctx)
		answers := m.client.DoMulti(callCtx, cmds...)
		cancel()
		for _, a := range answers {
			n, err := deliveries(a)
			if err != nil {
				return nil, fmt.Errorf("read delivery counts of stream %q: %w", m.cfg.Stream, err)
			}
			counts = append(counts, n)
		}
	}
	return counts, nil
}

// deliveries reads the fourth part of XPENDING's only row: id, consumer, idle, deliveries.
func deliveries(answer rueidis.RedisResult) (int, error) {
	rows, err := answer.ToArray()
	if err != nil || len(rows) == 0 {
		return 0, err
	}
	row, err := rows[0].ToArray()
	if err != nil {
		return 0, err
	}
	if len(row) != 4 {
		return 0, fmt.Errorf("unexpected row of %d parts", len(row))
	}
	n, err := row[3].ToInt64()
	return int(n), err
}
