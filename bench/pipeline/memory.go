package pipeline

import (
	"context"
	"fmt"
	"time"

	"github.com/millrace-dev/millrace/bench/proc"
)

// downRate is how many entries per second come while the sink is down.
const downRate = 5000

// sinkDown freezes PostgreSQL for a time while entries come, and returns the most memory that the process had, in MiB. Afterwards every entry
// must arrive.
func (r *runner) sinkDown(ctx context.Context, down time.Duration, group string, members *members, begin func(int) error) ([]float64, error) {
	if err := r.client.Do(ctx, r.client.B().Del().Key(streamName).Build()).Error(); err != nil {
		return nil, err
	}
	if err := r.prepare(ctx, group); err != nil {
		return nil, err
	}
	if err := begin(1); err != nil {
		return nil, err
	}
	const before = 2 // seconds of ordinary work
	seconds := before + int(down.Seconds())
	backlog := NewBacklog(seconds*downRate, 0, false)
	most := 0.0
	frozen := false
	defer func() {
		if frozen {
			_ = r.Postgres.Resume()
		}
	}()
	tick := time.NewTicker(time.Second / 10)
	defer tick.Stop()
	const ticks = 10
	for i := range seconds * ticks {
		if i == before*ticks {
			if err := r.Postgres.Pause(); err != nil {
				return nil, err
			}
			frozen = true
		}
		part := &Backlog{Entries: backlog.Entries[i*downRate/ticks : (i+1)*downRate/ticks]}
		if err := r.append(ctx, part); err != nil {
			return nil, err
		}
		if err := members.running(); err != nil {
			return nil, err
		}
		now, err := proc.ResidentMiB(members.processes[0].Pid())
		if err != nil {
			return nil, err
		}
		most = max(most, now)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if err := r.Postgres.Resume(); err != nil {
		return nil, err
	}
	frozen = false
	if err := r.drained(ctx, group, measureLimit, members.running); err != nil {
		return nil, fmt.Errorf("after the sink came back: %w", err)
	}
	now, err := proc.ResidentMiB(members.processes[0].Pid())
	if err != nil {
		return nil, err
	}
	return []float64{max(most, now)}, r.check(ctx, backlog.Distinct, backlog.Sum)
}
