package e2e

import (
	"testing"
	"time"

	"github.com/millrace-dev/millrace/test/scenario"
)

// TestSamplesGiveReadyResourcesAndRows is the README's story: apply config/samples, and rows appear.
func TestSamplesGiveReadyResourcesAndRows(t *testing.T) {
	ctx, ns := begin(t, "samples")
	must(t, ns.ApplySamples(ctx))
	must(t, ns.WaitReady(ctx, 2*time.Minute))

	positions, orders := scenario.NewProduced(), scenario.NewProduced()
	seed := newSeed(t)
	must(t, scenario.Positions{Count: 2000, Seed: seed, Duplicates: 0.05, Undecodable: 0.01}.Produce(ctx, ns.RedisURL, positions))
	must(t, scenario.Orders{Count: 2000, Seed: seed}.Publish(ctx, ns.DSN, orders))
	settle(ctx, t, ns.PositionsSink(), positions, time.Minute)
	settle(ctx, t, ns.OrdersSink(), orders, time.Minute)

	table, err := ns.Kubectl(ctx, "get", "millrace")
	must(t, err)
	t.Logf("$ kubectl get millrace\n%s", table)
	if err := contains(table, "NAME", "READY", "REASON", "LAG", "PARTITIONS", "REPLICAS", "AVAILABLE", "AGE"); err != nil {
		t.Errorf("columns: %v", err)
	}
	t.Logf("$ kubectl get millrace,pods -o wide\n%s", ns.Show(ctx))
}
