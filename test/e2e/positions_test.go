package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/test/scenario"
)

// TestPositionsSurviveTheDeathOfTheirPods: 100,000 entries with duplicates and undecodable ones, while their pods are deleted and crashed.
func TestPositionsSurviveTheDeathOfTheirPods(t *testing.T) {
	ctx, ns := begin(t, "positions")
	must(t, ns.Apply(ctx, manifest(t, "positions")))
	must(t, ns.WaitReady(ctx, 2*time.Minute))

	const count = 100_000
	produced := scenario.NewProduced()
	o := scenario.Positions{Count: count, Seed: newSeed(t), Duplicates: 0.05, Undecodable: 0.01, PerSecond: 8000}
	wait := load(ctx, t, func(ctx context.Context) error { return o.Produce(ctx, ns.RedisURL, produced) })
	for fifth, fault := range []func(context.Context, *testing.T, *scenario.Namespace, string){kill, crash, kill, crash} {
		during(ctx, t, produced, count/5*(fifth+1), count)
		fault(ctx, t, ns, "telemetry")
	}
	wait()
	settle(ctx, t, ns.PositionsSink(), produced, 2*time.Minute)

	// By the policy of this Processor, undecodable entries become dead letters in the end.
	eventually(ctx, t, 2*time.Minute, "undecodable entries become dead letters", func(ctx context.Context) error {
		l, err := ns.PositionsSink().Ledger(ctx, produced)
		if err == nil {
			err = l.Err()
		}
		if err == nil && l.Dead < l.Undecodable {
			err = fmt.Errorf("%d of %d", l.Dead, l.Undecodable)
		}
		if err == nil {
			t.Logf("in the end\n%s", l)
		}
		return err
	})
	must(t, ns.WaitReady(ctx, time.Minute))
}
