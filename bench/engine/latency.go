package engine

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/millrace-dev/millrace/bench/report"
)

// waitBatch is how many messages a waiting consumer takes at most.
const waitBatch = 100

// latency measures the time from the call that publishes a message to its arrival, with one producer at 500 messages per
// second and one waiting consumer.
func (b *bed) latency(ctx context.Context) (map[string]float64, error) {
	const rate = 500
	if err := b.warmUp(ctx, 1, 1, rate, 1, waitBatch); err != nil {
		return nil, err
	}
	f, err := b.flow(ctx, flowPlan{n: b.n, producers: 1, rate: rate})
	if err != nil {
		return nil, err
	}
	return map[string]float64{
		"latency-500-p50": report.Percentile(f.latencies, 50),
		"latency-500-p99": report.Percentile(f.latencies, 99),
	}, nil
}

// flowPlan says how messages flow.
type flowPlan struct {
	n, producers, rate int           // messages; producers; messages per second of all producers
	lead               time.Duration // how long consumers wait before the first message is published
}

// flow is a steady stream of messages from producers to waiting consumers.
type flow struct {
	latencies []float64 // in ms, by message number, which is also the order of publishing
}

// flow runs messages through the bed and checks them. The consumers are not used again: they were interrupted while they waited.
//
// A message's time begins when it is due and its producer is free to send it; when a producer is late because its last message
// took too long, the time begins when the message was due. A slow system is not spared the messages that it has delayed.
func (b *bed) flow(ctx context.Context, plan flowPlan) (*flow, error) {
	n := plan.n
	ms := b.messages(0, n)
	began := make([]atomic.Int64, n) // in nanoseconds since start
	f := &flow{latencies: make([]float64, n)}
	tallies := make([]*tally, len(b.staff))
	var received, moved atomic.Int64

	all, cancel := context.WithCancel(ctx)
	defer cancel()
	g, work := errgroup.WithContext(all)
	waiting, enough := context.WithCancel(work)
	defer enough()
	start := time.Now().Add(50*time.Millisecond + plan.lead) // consumers are waiting by then

	for i, c := range b.staff {
		t := &tally{}
		tallies[i] = t
		g.Go(func() error {
			for {
				payloads, err := c.Next(waiting, true)
				now := time.Since(start)
				if err != nil {
					if received.Load() >= int64(n) && errors.Is(waiting.Err(), context.Canceled) {
						return nil
					}
					return fmt.Errorf("consume: %w", err)
				}
				for _, p := range payloads {
					if number, err := number(p); err == nil && number >= 0 && number < n {
						f.latencies[number] = float64(now-time.Duration(began[number].Load())) / float64(time.Millisecond)
					}
				}
				if err := t.add(payloads); err != nil {
					return err
				}
				moved.Store(int64(now))
				if received.Add(int64(len(payloads))) >= int64(n) {
					if err := c.Settle(work); err != nil {
						return fmt.Errorf("settle: %w", err)
					}
					enough()
					return nil
				}
			}
		})
	}
	for p := range plan.producers {
		g.Go(func() error {
			for i := p; i < n; i += plan.producers {
				due := time.Duration(i) * time.Second / time.Duration(plan.rate)
				if wait := due - time.Since(start); wait > 0 {
					if err := sleep(work, wait); err != nil {
						return err
					}
					due = time.Since(start)
				}
				began[i].Store(int64(due))
				if err := b.queue.Publish(work, ms[i]); err != nil {
					return fmt.Errorf("publish: %w", err)
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		for sleep(waiting, time.Second) == nil {
			if time.Since(start)-time.Duration(moved.Load()) > stalled {
				return fmt.Errorf("consume: nothing came for %s, after %d of %d messages", stalled, received.Load(), n)
			}
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return f, check(0, n, tallies)
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
