package eventstore

import (
	"context"
	"fmt"
)

// A history that is read has as many events as this, and there are as many entities.
const (
	historyEvents = 100
	histories     = 200
)

// reads measures clients that read or aggregate whole histories, and returns calls per second.
func (b *bed) reads(ctx context.Context, verb Verb) (float64, error) {
	entities := min(histories, b.n)
	stock := Task{Verb: Append, Prefix: "account", Entities: entities, Rounds: historyEvents / 10, Events: 10, Clients: min(clients, entities)}
	if _, err := b.store.Perform(ctx, stock); err != nil {
		return 0, err
	}
	if err := b.check(ctx, stock); err != nil {
		return 0, err
	}
	if err := b.analyze(ctx); err != nil {
		return 0, err
	}
	task := stock
	task.Verb, task.Rounds = verb, max(b.n/entities, 1)
	warm := task
	warm.Rounds = max(task.Rounds/5, 1)
	if _, err := b.store.Perform(ctx, warm); err != nil {
		return 0, fmt.Errorf("warm up: %w", err)
	}
	o, err := b.store.Perform(ctx, task)
	if err != nil {
		return 0, err
	}
	if verb == Read && o.Events != o.Calls*historyEvents {
		return 0, fmt.Errorf("%d histories of %d events had %d events", o.Calls, historyEvents, o.Events)
	}
	var sum int64
	for i := range entities {
		for k := range historyEvents {
			sum += amounts[stock.number(i, k)%distinct]
		}
	}
	if sum *= int64(task.Rounds); verb == Aggregate && o.Sum != sum {
		return 0, fmt.Errorf("the aggregates add up to %d, not to %d", o.Sum, sum)
	}
	return float64(o.Calls) / o.Seconds, nil
}
