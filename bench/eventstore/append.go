package eventstore

import (
	"context"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
)

// appendRounds is how often each entity is appended to.
const appendRounds = 8

// appends measures appends to entities, each with the version that it must have, and returns them per second.
func (b *bed) appends(ctx context.Context, clients, events int) (float64, error) {
	rounds := min(appendRounds, b.n)
	task := Task{Verb: Append, Prefix: "account", Entities: b.n / rounds, Rounds: rounds, Events: events, Clients: clients}
	if err := b.warmUp(ctx, task); err != nil {
		return 0, err
	}
	o, err := b.store.Perform(ctx, task)
	if err != nil {
		return 0, err
	}
	if err := b.check(ctx, task); err != nil {
		return 0, err
	}
	return float64(o.Calls) / o.Seconds, nil
}

// warmUp does a fifth of a task with other entities, so that connections are open, statements prepared and caches filled.
func (b *bed) warmUp(ctx context.Context, t Task) error {
	t.Prefix, t.Entities = "warm", max(t.Entities/5, min(t.Clients, t.Entities))
	if _, err := b.store.Perform(ctx, t); err != nil {
		return fmt.Errorf("warm up: %w", err)
	}
	return b.analyze(ctx)
}

// check compares what is stored with what a task has appended: every event once, with the version that it must have.
func (b *bed) check(ctx context.Context, t Task) error {
	want := map[string]map[int64]int64{}
	for i := range t.Entities {
		history := map[int64]int64{}
		for k := range t.Rounds * t.Events {
			history[int64(k+1)] = int64(t.number(i, k))
		}
		want[t.entity(i)] = history
	}
	return b.compare(ctx, want)
}

// compare takes the numbers of events by entity and version. What the warm-up has left does not count.
func (b *bed) compare(ctx context.Context, want map[string]map[int64]int64) error {
	rows, err := b.Pool.Query(ctx, b.store.History())
	if err != nil {
		return err
	}
	var entity string
	var version, n int64
	if _, err := pgx.ForEachRow(rows, []any{&entity, &version, &n}, func() error {
		history, known := want[entity]
		if !known {
			return nil
		}
		if expected, ok := history[version]; !ok || n != expected {
			return fmt.Errorf("version %d of %s is event %d, and must not be", version, entity, n)
		}
		delete(history, version)
		return nil
	}); err != nil {
		return err
	}
	for entity, history := range want {
		if len(history) > 0 {
			return fmt.Errorf("%d events of %s are missing", len(history), entity)
		}
	}
	return nil
}

// contended is how many entities all clients append to.
const contended = 4

// conflict measures appends of many clients to few entities. handled is the share of calls that ended as they must: accepted and stored once, with the version that
// was returned, or refused because there was something new.
func (b *bed) conflict(ctx context.Context) (map[string]float64, error) {
	task := Task{Verb: Contend, Prefix: "account", Entities: contended, Rounds: max(b.n/clients, 1), Events: 1, Clients: clients}
	warm := task
	warm.Prefix, warm.Rounds = "warm", max(task.Rounds/5, 1)
	if _, err := b.store.Perform(ctx, warm); err != nil {
		return nil, fmt.Errorf("warm up: %w", err)
	}
	if err := b.analyze(ctx); err != nil {
		return nil, err
	}
	o, err := b.store.Perform(ctx, task)
	if err != nil {
		return nil, err
	}
	want := map[string]map[int64]int64{}
	for i := range task.Entities {
		want[task.entity(i)] = map[int64]int64{}
	}
	slices.SortFunc(o.Accepted, func(a, c accepted) int { return slices.Compare(a[:], c[:]) })
	for _, a := range o.Accepted {
		history := want[task.entity(int(a[0]))]
		if n, twice := history[a[1]]; twice {
			return nil, fmt.Errorf("events %d and %d were both told that they are version %d of %s", n, a[2], a[1], task.entity(int(a[0])))
		}
		history[a[1]] = a[2]
	}
	if len(o.Accepted) != task.Rounds*clients || o.Calls != len(o.Accepted)+o.Refused {
		return nil, fmt.Errorf("%d of %d appends were accepted, after %d calls, %d of them refused", len(o.Accepted), task.Rounds*clients, o.Calls, o.Refused)
	}
	if err := b.compare(ctx, want); err != nil {
		return nil, err
	}
	calls := float64(o.Calls)
	return map[string]float64{
		"append-conflict":         float64(len(o.Accepted)) / o.Seconds,
		"append-conflict-refused": float64(o.Refused) / calls,
		"append-conflict-handled": float64(o.Calls-o.Unfounded) / calls,
	}, nil
}
