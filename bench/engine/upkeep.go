package engine

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sync/errgroup"
)

// upkeep measures producers beside consumers, first while nothing is ever removed and then while a system's upkeep rotates and
// removes without a pause. Each half of the messages flows in one of these.
func (b *bed) upkeep(ctx context.Context) (map[string]float64, error) {
	keeper, ok := b.queue.(Upkeeper)
	if !ok {
		return nil, errors.New("the system has no upkeep of its own")
	}
	half := max(b.n/2, 1)
	if err := b.warmUp(ctx, batchProducers, publishBatch, max(half/10, 10*publishBatch), consumers, publishBatch); err != nil {
		return nil, err
	}
	off, err := b.pump(ctx, half)
	if err != nil {
		return nil, err
	}
	keeping, enough := context.WithCancel(ctx)
	defer enough()
	var removals int
	var kept errgroup.Group
	kept.Go(func() (err error) {
		removals, err = keeper.Upkeep(keeping)
		return err
	})
	on, err := b.pump(ctx, half)
	enough()
	if err := errors.Join(err, kept.Wait()); err != nil {
		return nil, err
	}
	return map[string]float64{
		"maintenance-off":      float64(half) / off.Seconds(),
		"maintenance-on":       float64(half) / on.Seconds(),
		"maintenance-removals": float64(removals),
	}, nil
}

// pump publishes n messages in batches while the hired consumers take them, and returns how long the publishing took.
func (b *bed) pump(ctx context.Context, n int) (took time.Duration, err error) {
	ms := b.messages(0, n)
	g, work := errgroup.WithContext(ctx)
	g.Go(func() error {
		_, err := b.consume(work, 0, n)
		return err
	})
	g.Go(func() error {
		start := time.Now()
		err := b.produce(work, ms, batchProducers, publishBatch)
		took = time.Since(start)
		return err
	})
	return took, g.Wait()
}
