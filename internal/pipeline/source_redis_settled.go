package pipeline

import (
	"context"
	"time"
)

// SettledBefore implements SettledSource. What is pending has the time in its id; without anything pending, whatever was
// delivered until now is acknowledged.
func (s *RedisSource) SettledBefore(ctx context.Context) (map[string]time.Time, error) {
	before := map[string]time.Time{}
	for _, m := range s.members {
		asked := time.Now()
		p, err := m.Progress(ctx)
		if err != nil {
			return nil, err
		}
		// A millisecond less, because the id of the oldest has no smaller part.
		before[m.Config().Stream] = asked.Add(-p.OldestPending - time.Millisecond)
	}
	return before, nil
}
