package engine

import (
	"context"
	"time"
)

const (
	backlogBatch = 100
	smallBacklog = 10_000
	smallRounds  = 10 // times that the small backlog is filled and emptied, because once is over too soon
)

// backlog measures the time that a message takes at the head of a backlog of n messages, and of one of ten thousand. All the rest is consumed
// afterwards, for the check.
func (b *bed) backlog(ctx context.Context) (map[string]float64, error) {
	small := min(smallBacklog, b.n)
	if err := b.warmUp(ctx, batchProducers, publishBatch, small, consumers, backlogBatch); err != nil {
		return nil, err
	}
	var took time.Duration
	for i := range smallRounds {
		first := warmFirst/2 + i*small
		if err := b.stock(ctx, first, small, backlogBatch); err != nil {
			return nil, err
		}
		t, err := b.consume(ctx, first, small)
		if err != nil {
			return nil, err
		}
		took += t
	}
	if err := b.stock(ctx, 0, b.n, backlogBatch); err != nil {
		return nil, err
	}
	all := b.harvest(b.n)
	head, err := all.take(ctx, min(smallRounds*small, b.n))
	if err != nil {
		return nil, err
	}
	taken := int(all.received.Load())
	if _, err := all.take(ctx, b.n); err != nil {
		return nil, err
	}
	return map[string]float64{"backlog-10m": micros(head, taken), "backlog-10k": micros(took, smallRounds*small)}, all.check(0, b.n)
}
