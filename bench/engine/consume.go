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
	if err := b.stock(ctx, 0, b.n, batch); err != nil {
		return nil, err
	}
	took, err := b.consume(ctx, 0, b.n)
	if err != nil {
		return nil, err
	}
	return map[string]float64{row: float64(b.n) / took.Seconds()}, nil
}

// stock publishes a backlog of n messages numbered from first, which will be consumed batch at a time, and has it analysed: it can be much
// more than the warm-up was, and statistics belong to what is there.
func (b *bed) stock(ctx context.Context, first, n, batch int) error {
	var next atomic.Int64
	stocker, special := b.queue.(Stocker)
	g, work := errgroup.WithContext(ctx)
	for range batchProducers {
		g.Go(func() error {
			for {
				from := int(next.Add(publishBatch)) - publishBatch
				if from >= n {
					return nil
				}
				ms := b.messages(first+from, min(publishBatch, n-from))
				var err error
				if special {
					err = stocker.Stock(work, ms, batch)
				} else {
					err = b.queue.PublishBatch(work, ms)
				}
				if err != nil {
					return fmt.Errorf("publish: %w", err)
				}
			}
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return b.analyze(ctx)
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
func (b *bed) consume(ctx context.Context, first, n int) (time.Duration, error) {
	h := b.harvest(n)
	took, err := h.take(ctx, n)
	if err != nil {
		return 0, err
	}
	return took, h.check(first, n)
}

// harvest is what the hired consumers have received of a backlog so far.
type harvest struct {
	staff    []Consumer
	tallies  []*tally
	received atomic.Int64
}

// harvest begins one of about n messages.
func (b *bed) harvest(n int) *harvest {
	h := &harvest{staff: b.staff}
	for range b.staff {
		h.tallies = append(h.tallies, &tally{numbers: make([]int, 0, n)})
	}
	return h
}

func (h *harvest) check(first, n int) error { return check(first, n, h.tallies) }

// take receives and settles until there are n messages in all, and returns how long that took.
func (h *harvest) take(ctx context.Context, n int) (time.Duration, error) {
	var moved atomic.Int64 // when the last message came, in nanoseconds since start
	start := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for i, c := range h.staff {
		t := h.tallies[i]
		g.Go(func() error {
			for h.received.Load() < int64(n) {
				payloads, err := c.Next(ctx, false)
				if err != nil {
					return fmt.Errorf("consume: %w", err)
				}
				if err := t.add(payloads); err != nil {
					return err
				}
				if len(payloads) > 0 {
					h.received.Add(int64(len(payloads)))
					moved.Store(int64(time.Since(start)))
					continue
				}
				if time.Since(start)-time.Duration(moved.Load()) > stalled {
					return fmt.Errorf("consume: nothing came for %s, after %d of %d messages", stalled, h.received.Load(), n)
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
	return time.Since(start), err
}
