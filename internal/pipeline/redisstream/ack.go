package redisstream

import (
	"context"
	"fmt"

	"github.com/redis/rueidis"
)

// Ack takes entries off the pending list and stops holding them; with Delete it deletes them too. Repeating it is harmless.
// After an error all of them are still held. Entries of a term that has ended are not acknowledged, but counted: an id may
// mean another entry by now (R7), and what another member owns is its own to acknowledge (R8).
func (m *Member) Ack(ctx context.Context, t Term, ids []string) error {
	if err := m.verified(ctx); err != nil {
		return err
	}
	for len(ids) > 0 {
		page := ids
		if m.cfg.Delete || m.cfg.Exclusive { // a script takes a limited number of arguments
			page = ids[:min(len(ids), ackPage)]
		}
		if !m.Current(t) {
			m.fenced(len(ids))
			return nil
		}
		ok, err := m.ack(ctx, page)
		if err != nil {
			m.doubt()
			return fmt.Errorf("ack %d entries of stream %q: %w", len(page), m.cfg.Stream, err)
		}
		if !ok {
			m.fenced(len(ids))
			return nil
		}
		m.Forget(t, page)
		ids = ids[len(page):]
	}
	return nil
}

// ack acknowledges one page. It returns false when another member owns the stream.
func (m *Member) ack(ctx context.Context, ids []string) (bool, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	switch {
	case m.cfg.Exclusive:
		answer, err := m.owned(ctx, append([]string{"XACK", m.cfg.Stream, m.cfg.Group}, ids...)...)
		if err != nil || answer == nil || !m.cfg.Delete {
			return answer != nil, err
		}
		// What was acknowledged stays acknowledged when it cannot be deleted, so the next try deletes it.
		return true, m.client.Do(ctx, m.client.B().Xdel().Key(m.cfg.Stream).Id(ids...).Build()).Error()
	case m.cfg.Delete:
		return true, ackDeleteScript.Exec(ctx, m.client, []string{m.cfg.Stream}, append([]string{m.cfg.Group}, ids...)).Error()
	}
	return true, m.client.Do(ctx, m.client.B().Xack().Key(m.cfg.Stream).Group(m.cfg.Group).Id(ids...).Build()).Error()
}

func (m *Member) fenced(n int) {
	m.mu.Lock()
	m.counters.Fenced += int64(n)
	m.mu.Unlock()
}

// Trim deletes what every group of the stream has acknowledged, from the oldest entry on as far as there is none that some
// group still needs. It returns how many entries were deleted.
func (m *Member) Trim(ctx context.Context) (int, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	n, err := trimScript.Exec(ctx, m.client, []string{m.cfg.Stream}, nil).AsInt64()
	if err != nil {
		return 0, fmt.Errorf("trim stream %q: %w", m.cfg.Stream, err)
	}
	return int(n), nil
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
