package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/test/scenario"
)

// TestFaultsUnderLoad runs both pipelines while what they stand on changes. One namespace serves all parts: the ledger
// grows, so a late loss of an early message would be seen as well.
func TestFaultsUnderLoad(t *testing.T) {
	ctx, ns := begin(t, "faults")
	execute(ctx, t, ns.DSN, `create table orders (order_id text not null, amount numeric, "position" bigint not null)`)
	// The other error policy than in the test of positions: what cannot be decoded stays pending, through everything.
	both := strings.Replace(manifest(t, "positions"), "policy: DeadLetter", "policy: Pending", 1) + "---\n" + manifest(t, "orders")
	must(t, ns.Apply(ctx, both))
	must(t, ns.WaitReady(ctx, 2*time.Minute))
	f := &faults{ns: ns, positions: scenario.NewProduced(), orders: scenario.NewProduced()}

	t.Run("PostgreSQL is killed twice and comes back", func(t *testing.T) {
		stop := f.load(ctx, t)
		for range 2 {
			f.produce(ctx, t, 8000)
			must(t, world.Postgres.Kill())
			// Down long enough that positions pile up.
			f.produce(ctx, t, 8000)
			must(t, world.Postgres.Restart(ctx))
			t.Log("PostgreSQL was killed and is back")
		}
		f.produce(ctx, t, 8000)
		stop()
		f.settle(ctx, t)
		must(t, ns.WaitReady(ctx, time.Minute))
	})
	if t.Failed() {
		return
	}
	t.Run("replicas follow kubectl scale and spec", func(t *testing.T) {
		stop := f.load(ctx, t)
		f.produce(ctx, t, 4000)
		_, err := ns.Kubectl(ctx, "scale", "processor/telemetry", "processor/orders-sink", "--replicas=3")
		must(t, err)
		f.available(ctx, t, 3)
		_, err = ns.Kubectl(ctx, "patch", "processor/telemetry", "processor/orders-sink", "--type=merge", "-p", `{"spec":{"replicas":1}}`)
		must(t, err)
		f.available(ctx, t, 1)
		_, err = ns.Kubectl(ctx, "scale", "processor/telemetry", "processor/orders-sink", "--replicas=2")
		must(t, err)
		f.available(ctx, t, 2)
		stop()
		f.settle(ctx, t)
	})
	if t.Failed() {
		return
	}
	t.Run("Millrace is uninstalled and installed again", func(t *testing.T) {
		stop := f.load(ctx, t)
		f.produce(ctx, t, 4000)
		must(t, world.Uninstall(ctx))
		// Pods do not need the manager.
		before, err := rows(ctx, ns.DSN, "positions")
		must(t, err)
		eventually(ctx, t, time.Minute, "rows without a manager", func(ctx context.Context) error {
			if n, err := rows(ctx, ns.DSN, "positions"); err != nil || n <= before {
				return errors.Join(err, fmt.Errorf("%d rows, as before", n))
			}
			return nil
		})
		must(t, world.Install(ctx))
		f.produce(ctx, t, 4000)
		stop()
		f.settle(ctx, t)
		must(t, ns.WaitReady(ctx, time.Minute))
	})
	if t.Failed() {
		return
	}
	t.Run("resources are deleted and applied again with the data retained", func(t *testing.T) {
		stop := f.load(ctx, t)
		f.produce(ctx, t, 8000)
		_, err := ns.Kubectl(ctx, "delete", "processors,consumergroups,streams", "--all", "--timeout=1m")
		must(t, err)
		eventually(ctx, t, time.Minute, "the pods end", func(ctx context.Context) error {
			pods, err := ns.Kubectl(ctx, "get", "pods", "-o", "name")
			if err == nil && strings.TrimSpace(pods) != "" {
				err = errors.New(pods)
			}
			return err
		})
		// Applications go on publishing: the stream is still there.
		f.produce(ctx, t, 8000)
		stop()
		l, err := ns.OrdersSink().Ledger(ctx, f.orders)
		must(t, err)
		if len(l.Missing) == 0 {
			t.Error("nothing was published while nobody consumed; this run shows nothing")
		}
		must(t, ns.Apply(ctx, both))
		must(t, ns.WaitReady(ctx, 2*time.Minute))
		f.settle(ctx, t)
	})
}

// faults is the load, and what all parts have produced so far.
type faults struct {
	ns                *scenario.Namespace
	positions, orders *scenario.Produced
}

// load produces positions, and half as many orders, until stop is called.
func (f *faults) load(ctx context.Context, t *testing.T) (stop func()) {
	t.Helper()
	seed := newSeed(t)
	const perSecond, forever = 3000, 1 << 30
	ctx, cancel := context.WithCancel(ctx)
	positions := load(ctx, t, func(ctx context.Context) error {
		return scenario.Positions{Count: forever, Seed: seed, Duplicates: 0.05, Undecodable: 0.002, PerSecond: perSecond}.Produce(ctx, f.ns.RedisURL, f.positions)
	})
	orders := load(ctx, t, func(ctx context.Context) error {
		return scenario.Orders{Count: forever, Seed: seed, PerSecond: perSecond / 2}.Publish(ctx, f.ns.DSN, f.orders)
	})
	return func() {
		t.Helper()
		cancel()
		positions()
		orders()
	}
}

// produce waits until so many more positions were produced.
func (f *faults) produce(ctx context.Context, t *testing.T, more int) {
	t.Helper()
	until := f.positions.Entries() + more
	eventually(ctx, t, time.Minute, fmt.Sprintf("%d more positions", more), func(context.Context) error {
		if n := f.positions.Entries(); n < until {
			return fmt.Errorf("%d are to come", until-n)
		}
		return nil
	})
}

func (f *faults) settle(ctx context.Context, t *testing.T) {
	t.Helper()
	if l := settle(ctx, t, f.ns.PositionsSink(), f.positions, 90*time.Second); l.Pending != l.Undecodable || l.Undecodable == 0 {
		t.Errorf("%d of %d undecodable entries are pending, want all", l.Pending, l.Undecodable)
	}
	settle(ctx, t, f.ns.OrdersSink(), f.orders, 90*time.Second)
}

// available waits until both Processors have exactly so many pods, by their own status and by the pods themselves.
func (f *faults) available(ctx context.Context, t *testing.T, replicas int) {
	t.Helper()
	eventually(ctx, t, time.Minute, fmt.Sprintf("%d pods each", replicas), func(ctx context.Context) error {
		for _, name := range []string{"telemetry", "orders-sink"} {
			status, err := f.ns.Kubectl(ctx, "get", "processor", name, "-o", "jsonpath={.status.replicas}/{.status.readyReplicas}")
			if err != nil {
				return err
			}
			pods, err := f.ns.Pods(ctx, name)
			if err != nil {
				return err
			}
			if want := fmt.Sprintf("%d/%d", replicas, replicas); status != want || len(pods) != replicas {
				return fmt.Errorf("%s: status has %s, and there are %d pods", name, status, len(pods))
			}
		}
		return nil
	})
}
