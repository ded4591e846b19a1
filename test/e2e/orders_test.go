package e2e

import (
	"context"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/test/scenario"
)

// TestOrdersArriveExactlyOnce: 100,000 messages of ten concurrent transactions with rollbacks, while the pods are deleted and
// crashed. The table has no key, so a message that is written twice is two rows, and nothing but the ack in the sink's
// transaction keeps it from that.
func TestOrdersArriveExactlyOnce(t *testing.T) {
	ctx, ns := begin(t, "orders")
	execute(ctx, t, ns.DSN, `create table orders (order_id text not null, amount numeric, "position" bigint not null)`)
	must(t, ns.Apply(ctx, manifest(t, "orders")))
	must(t, ns.WaitReady(ctx, 2*time.Minute))

	const count = 100_000
	produced := scenario.NewProduced()
	o := scenario.Orders{Count: count, Seed: newSeed(t), Transactions: 10, PerSecond: 8000}
	wait := load(ctx, t, func(ctx context.Context) error { return o.Publish(ctx, ns.DSN, produced) })
	for fifth, fault := range []func(context.Context, *testing.T, *scenario.Namespace, string){kill, crash, kill, crash} {
		during(ctx, t, produced, count/5*(fifth+1), count)
		fault(ctx, t, ns, "orders-sink")
	}
	wait()
	settle(ctx, t, ns.OrdersSink(), produced, 2*time.Minute)

	var rolledBack *scenario.Ledger
	rolledBack, err := ns.OrdersSink().Ledger(ctx, produced)
	must(t, err)
	if rolledBack.Rollbacks == 0 {
		t.Error("no transaction rolled back; this run shows nothing about rollbacks")
	}
	must(t, ns.WaitReady(ctx, time.Minute))
}
