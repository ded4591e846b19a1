package eventstore

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// verbs are the calls of a system that is used from this program, by many goroutines at once.
type verbs interface {
	// append returns the entity's new version, or errConflict when it has not the expected one.
	append(ctx context.Context, entity string, expected int64, events [][]byte) (version int64, err error)
	// read returns the events from a version on, at most a thousand.
	read(ctx context.Context, entity string, from int64) ([][]byte, error)
	// aggregate adds up the amounts of all events.
	aggregate(ctx context.Context, entity string) (int64, error)
}

// entity is the name of one.
func (t Task) entity(i int) string { return t.Prefix + "-" + strconv.Itoa(i) }

// perform makes the calls of a task. Programs in other languages do the same by themselves (peers/emmett/main.mjs).
func perform(ctx context.Context, v verbs, t Task) (Outcome, error) {
	var o Outcome
	var mu sync.Mutex
	start := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for client := range t.Clients {
		g.Go(func() error {
			var own Outcome
			var err error
			if t.Verb == Contend {
				own, err = contend(ctx, v, t, client)
			} else {
				own, err = rounds(ctx, v, t, client)
			}
			mu.Lock()
			defer mu.Unlock()
			o.Calls += own.Calls
			o.Events += own.Events
			o.Sum += own.Sum
			o.Refused += own.Refused
			o.Unfounded += own.Unfounded
			o.Accepted = append(o.Accepted, own.Accepted...)
			return err
		})
	}
	err := g.Wait()
	o.Seconds = time.Since(start).Seconds()
	return o, err
}

// rounds goes over the client's share of the entities, again and again.
func rounds(ctx context.Context, v verbs, t Task, client int) (Outcome, error) {
	var o Outcome
	events := make([][]byte, t.Events)
	for round := range t.Rounds {
		for i := client; i < t.Entities; i += t.Clients {
			o.Calls++
			switch t.Verb {
			case Append:
				for k := range events {
					events[k] = event(t.number(i, round*t.Events+k))
				}
				if _, err := v.append(ctx, t.entity(i), int64(round*t.Events), events); err != nil {
					return o, fmt.Errorf("append: %w", err)
				}
			case Read:
				got, err := v.read(ctx, t.entity(i), 1)
				if err != nil {
					return o, fmt.Errorf("read: %w", err)
				}
				o.Events += len(got)
			case Aggregate:
				sum, err := v.aggregate(ctx, t.entity(i))
				if err != nil {
					return o, fmt.Errorf("aggregate: %w", err)
				}
				o.Sum += sum
			}
		}
	}
	return o, nil
}

// number is that of an entity's event, counted from 0.
func (t Task) number(entity, event int) int { return t.First + entity*t.Rounds*t.Events + event }

func contend(ctx context.Context, v verbs, t Task, client int) (Outcome, error) {
	var o Outcome
	known := make([]int64, t.Entities)
	for round := range t.Rounds {
		i := (client + round) % t.Entities
		n := t.First + client*t.Rounds + round
		for {
			o.Calls++
			version, err := v.append(ctx, t.entity(i), known[i], [][]byte{event(n)})
			if err == nil {
				known[i] = version
				o.Accepted = append(o.Accepted, accepted{int64(i), version, int64(n)})
				break
			}
			if !errors.Is(err, errConflict) {
				return o, fmt.Errorf("append: %w", err)
			}
			o.Refused++
			newer, err := v.read(ctx, t.entity(i), known[i]+1)
			if err != nil {
				return o, fmt.Errorf("read: %w", err)
			}
			if len(newer) == 0 {
				o.Unfounded++
			}
			known[i] += int64(len(newer))
		}
	}
	return o, nil
}
