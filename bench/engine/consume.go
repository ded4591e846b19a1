package engine

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// emptyPause is how long a consumer that found nothing lets the others work before it looks again.
const emptyPause = 200 * time.Microsecond

// drain measures consumers that empty a backlog, every message settled.
func (b *bed) drain(ctx context.Context, row string, batch int) (map[string]float64, error) {
	if err := b.warmUp(ctx, batchProducers, publishBatch, max(b.n/10, 10*batch), consumers, batch); err != nil {
		return nil, err
	}
	if err := b.produce(ctx, messages(0, b.n), batchProducers, publishBatch); err != nil {
		return nil, err
	}
	// The backlog is much more than the warm-up was, and statistics belong to what is there.
	if err := b.analyze(ctx); err != nil {
		return nil, err
	}
	took, err := b.consume(ctx, 0, b.n, batch)
	if err != nil {
		return nil, err
	}
	return map[string]float64{row: float64(b.n) / took.Seconds()}, nil
}

// hire starts consumers for this bed; later works of the bed go on with them.
func (b *bed) hire(ctx context.Context, n, batch int) error {
	for range n {
		c, err := b.queue.Consumer(ctx, batch)
		if err != nil {
			return fmt.Errorf("start a consumer: %w", err)
		}
		b.staff = append(b.staff, c)
	}
	return nil
}

// consume receives and settles the n messages numbered from first with the hired consumers, checks them, and returns how
// long it took until the last was settled.
func (b *bed) consume(ctx context.Context, first, n, batch int) (time.Duration, error) {
	tallies := make([]*tally, len(b.staff))
	var received, moved atomic.Int64 // how many; and when the last came, in nanoseconds since start
	start := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for i, c := range b.staff {
		t := &tally{numbers: make([]int, 0, n)}
		tallies[i] = t
		g.Go(func() error {
			for received.Load() < int64(n) {
				payloads, err := c.Next(ctx, false)
				if err != nil {
					return fmt.Errorf("consume: %w", err)
				}
				if err := t.add(payloads); err != nil {
					return err
				}
				if len(payloads) > 0 {
					received.Add(int64(len(payloads)))
					moved.Store(int64(time.Since(start)))
					continue
				}
				if time.Since(start)-time.Duration(moved.Load()) > stalled {
					return fmt.Errorf("consume: nothing came for %s, after %d of %d messages", stalled, received.Load(), n)
				}
				time.Sleep(emptyPause)
			}
			if err := c.Settle(ctx); err != nil {
				return fmt.Errorf("settle: %w", err)
			}
			return nil
		})
	}
	err := g.Wait()
	took := time.Since(start)
	if err != nil {
		return 0, err
	}
	return took, check(first, n, tallies)
}
