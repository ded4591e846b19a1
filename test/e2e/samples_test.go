package e2e

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/test/env/source"
	"github.com/millrace-dev/millrace/test/scenario"
)

// TestSamplesGiveReadyResourcesAndRows is the README's story: apply config/samples, and rows appear.
func TestSamplesGiveReadyResourcesAndRows(t *testing.T) {
	ctx, ns := begin(t, "samples")
	must(t, ns.ApplySamples(ctx))
	// Their Secrets lead nowhere; that they are valid is all that can be said.
	root, err := source.Root()
	must(t, err)
	_, err = ns.Kubectl(ctx, "apply", "--dry-run=server", "-f", filepath.Join(root, "config", "samples"))
	must(t, err)
	must(t, ns.WaitReady(ctx, 2*time.Minute))

	positions, orders := scenario.NewProduced(), scenario.NewProduced()
	seed := newSeed(t)
	must(t, scenario.Positions{Count: 2000, Seed: seed, Duplicates: 0.05, Undecodable: 0.01}.Produce(ctx, ns.RedisURL, positions))
	must(t, scenario.Orders{Count: 2000, Seed: seed}.Publish(ctx, ns.DSN, orders))
	settle(ctx, t, ns.PositionsSink(), positions, time.Minute)
	settle(ctx, t, ns.OrdersSink(), orders, time.Minute)

	eventually(ctx, t, time.Minute, "the lag is known and zero", func(ctx context.Context) error {
		lag, err := ns.Kubectl(ctx, "get", "consumergroup/orders-sink", "processor/orders-sink", "-o", "jsonpath={.items[*].status.lag}")
		if err == nil && lag != "0 0" {
			err = fmt.Errorf("lag is %q", lag)
		}
		return err
	})
	table, err := ns.Kubectl(ctx, "get", "millrace")
	must(t, err)
	t.Logf("$ kubectl get millrace\n%s", table)
	if err := contains(table, "NAME", "READY", "REASON", "LAG", "PARTITIONS", "REPLICAS", "AVAILABLE", "AGE"); err != nil {
		t.Errorf("columns: %v", err)
	}
	t.Logf("$ kubectl get millrace,pods -o wide\n%s", ns.Show(ctx))
}
