package engine

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// laneBatch is how many messages are published to a stream, or consumed from it, at a time when there are many.
const laneBatch = 100

// lanes measures the time that a delivery takes two workers who look after many streams or groups, going from one to the next. There
// are n deliveries, however many lanes they come from. Publishing is measured too, where published names its row.
//
// Nothing is analysed, which would take longer than all the rest: the lanes are compared only with fewer lanes of the same system.
func (b *bed) lanes(ctx context.Context, consumed, published string) (map[string]float64, error) {
	streams, groups := max(b.shape.Streams, 1), max(b.shape.Groups, 1)
	queue, ok := b.queue.(Lanes)
	if !ok {
		return nil, errors.New("the system has only one stream and one group")
	}
	f := &fleet{queue: queue, streams: streams, groups: groups}
	for w := range f.workers {
		for s := range streams {
			for g := range groups {
				c, err := queue.Lane(s, g).Consumer(ctx, laneBatch)
				if err != nil {
					return nil, fmt.Errorf("start a consumer: %w", err)
				}
				f.workers[w] = append(f.workers[w], c)
			}
		}
	}
	// Each worker meets each stream on a connection that has seen it; a second message for each worker.
	if _, _, err := f.round(ctx, b, warmFirst, 2*laneBatch); err != nil {
		return nil, fmt.Errorf("warm up: %w", err)
	}
	each := max(b.n/streams/groups, 1)
	publishing, consuming, err := f.round(ctx, b, 0, each)
	if err != nil {
		return nil, err
	}
	got := map[string]float64{consumed: micros(consuming, each*streams*groups)}
	if published != "" {
		got[published] = micros(publishing, each*streams)
	}
	return got, nil
}

// micros is the time of one of n in microseconds.
func micros(d time.Duration, n int) float64 {
	return float64(d) / float64(time.Microsecond) / float64(n)
}

// fleet is the consumers of all lanes, once for each worker.
type fleet struct {
	queue           Lanes
	streams, groups int
	workers         [consumers][]Consumer // by stream and group
}

// round publishes so many messages to each stream and consumes them in each group, and checks that every group got every message.
func (f *fleet) round(ctx context.Context, b *bed, first, each int) (publishing, consuming time.Duration, err error) {
	start := time.Now()
	if err := f.publish(ctx, b, first, each); err != nil {
		return 0, 0, err
	}
	publishing = time.Since(start)
	tallies, consuming, err := f.consume(ctx, each)
	if err != nil {
		return 0, 0, err
	}
	for g, of := range tallies {
		if err := check(first, each*f.streams, of); err != nil {
			return 0, 0, fmt.Errorf("group %d of %d: %w", g+1, f.groups, err)
		}
	}
	return publishing, consuming, nil
}

// publish goes round the streams with a batch for each until all have their messages.
func (f *fleet) publish(ctx context.Context, b *bed, first, each int) error {
	var next atomic.Int64
	batches := (each + laneBatch - 1) / laneBatch
	g, ctx := errgroup.WithContext(ctx)
	for range batchProducers {
		g.Go(func() error {
			for {
				i := int(next.Add(1)) - 1
				if i >= batches*f.streams {
					return nil
				}
				stream, from := i%f.streams, i/f.streams*laneBatch
				ms := b.messages(first+stream*each+from, min(laneBatch, each-from))
				if err := f.queue.Lane(stream, 0).PublishBatch(ctx, ms); err != nil {
					return fmt.Errorf("publish: %w", err)
				}
			}
		})
	}
	return g.Wait()
}

// consume goes round the lanes until each has given all. Settling what was received last is not measured: where there are many lanes, that is
// many last times. The tallies are by group.
func (f *fleet) consume(ctx context.Context, each int) ([][]*tally, time.Duration, error) {
	tallies := make([][]*tally, f.groups)
	for g := range tallies {
		for range f.workers {
			tallies[g] = append(tallies[g], &tally{})
		}
	}
	lanes := f.streams * f.groups
	received := make([]atomic.Int64, lanes)
	start := time.Now()
	g, work := errgroup.WithContext(ctx)
	for w, own := range f.workers {
		g.Go(func() error {
			moved := time.Now()
			for {
				open, idle := false, true
				for i := range lanes {
					lane := (i + w*lanes/len(f.workers)) % lanes
					if received[lane].Load() >= int64(each) {
						continue
					}
					open = true
					payloads, err := own[lane].Next(work, false)
					if err != nil {
						return fmt.Errorf("consume: %w", err)
					}
					if err := tallies[lane%f.groups][w].add(payloads); err != nil {
						return err
					}
					if len(payloads) > 0 {
						received[lane].Add(int64(len(payloads)))
						idle, moved = false, time.Now()
					}
				}
				switch {
				case !open:
					return nil
				case time.Since(moved) > stalled:
					return fmt.Errorf("consume: nothing came for %s", stalled)
				case idle:
					time.Sleep(emptyPause)
				}
			}
		})
	}
	err := g.Wait()
	took := time.Since(start)
	for _, own := range f.workers {
		for _, c := range own {
			if err == nil {
				err = c.Settle(ctx)
			}
		}
	}
	return tallies, took, err
}
