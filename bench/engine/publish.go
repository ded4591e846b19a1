package engine

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// publish measures producers, each with one transaction at a time of batch messages. Consuming them afterwards is the check
// and is not measured.
func (b *bed) publish(ctx context.Context, row string, producers, batch int) (map[string]float64, error) {
	warm := min(max(b.n/10, producers*batch*2), 20*batch*producers)
	if err := b.warmUp(ctx, producers, batch, warm, consumers, 1000); err != nil {
		return nil, err
	}
	ms := b.messages(0, b.n)
	start := time.Now()
	if err := b.produce(ctx, ms, producers, batch); err != nil {
		return nil, err
	}
	took := time.Since(start)
	if _, err := b.consume(ctx, 0, b.n); err != nil {
		return nil, err
	}
	return map[string]float64{row: float64(b.n) / took.Seconds()}, nil
}

// produce publishes the messages by that many producers, who take the next batch when they have finished one.
func (b *bed) produce(ctx context.Context, ms []Message, producers, batch int) error {
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range producers {
		g.Go(func() error {
			for {
				from := int(next.Add(int64(batch))) - batch
				if from >= len(ms) {
					return nil
				}
				var err error
				if batch == 1 {
					err = b.queue.Publish(ctx, ms[from])
				} else {
					err = b.queue.PublishBatch(ctx, ms[from:min(from+batch, len(ms))])
				}
				if err != nil {
					return fmt.Errorf("publish: %w", err)
				}
			}
		})
	}
	return g.Wait()
}

// warmUp publishes and consumes some messages in the way that will be measured, so that connections are open, statements
// prepared, members known and caches filled, and lets PostgreSQL look at the tables while there is something in them: it
// would plan for empty tables otherwise. The consumers stay for the measurement.
func (b *bed) warmUp(ctx context.Context, producers, publishBatch, n, consumers, consumeBatch int) error {
	if err := b.hire(ctx, consumers, consumeBatch); err != nil {
		return err
	}
	if err := b.produce(ctx, b.messages(warmFirst, n), producers, publishBatch); err != nil {
		return fmt.Errorf("warm up: %w", err)
	}
	if err := b.analyze(ctx); err != nil {
		return err
	}
	if _, err := b.consume(ctx, warmFirst, n); err != nil {
		return fmt.Errorf("warm up: %w", err)
	}
	return nil
}

// warmFirst is the number of the first message of a warm-up; none of a measurement reaches it.
const warmFirst = 1 << 30
