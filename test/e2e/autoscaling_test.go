package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/test/scenario"
)

// TestAutoscalingFromZeroToManyAndBack: no pod runs; a burst brings as many as are allowed; they go when nothing waits, and the next message
// brings one back. The table has no key, so that a message that is written twice, when pods come and go, is two rows.
func TestAutoscalingFromZeroToManyAndBack(t *testing.T) {
	ctx, ns := begin(t, "autoscaling")
	execute(ctx, t, ns.DSN, `create table orders (order_id text not null, amount numeric, "position" bigint not null)`)
	must(t, ns.Apply(ctx, manifest(t, "autoscaling")))
	must(t, ns.WaitReady(ctx, 2*time.Minute))
	wantPods(ctx, t, ns, 0)

	produced := scenario.NewProduced()
	seed := newSeed(t)
	must(t, scenario.Orders{Count: 30_000, Seed: seed, Transactions: 10, PerSecond: 30_000}.Publish(ctx, ns.DSN, produced))
	began := time.Now()
	eventually(ctx, t, time.Minute, "the autoscaler asks for three pods", func(ctx context.Context) error {
		return scaled(ctx, ns, "to 3 pods")
	})
	t.Logf("three pods are asked for %.1f s after the burst", time.Since(began).Seconds())
	settle(ctx, t, ns.OrdersSink(), produced, 2*time.Minute)
	wantPods(ctx, t, ns, 0)
	must(t, ns.WaitReady(ctx, time.Minute))

	must(t, scenario.Orders{Count: 50, Seed: seed + 1}.Publish(ctx, ns.DSN, produced))
	settle(ctx, t, ns.OrdersSink(), produced, time.Minute)
	wantPods(ctx, t, ns, 0)
	eventually(ctx, t, time.Minute, "events", func(ctx context.Context) error {
		return scaled(ctx, ns, "from 0 to 3 pods", "from 0 to 1 pod", "to 0 pods: nothing has been waiting for 5s")
	})
	generation, err := ns.Kubectl(ctx, "get", "prc", "orders-sink", "-o", "jsonpath={.metadata.generation}")
	must(t, err)
	if generation != "1" {
		t.Errorf("the generation is %s: somebody wrote the spec", generation)
	}

	// The same Processor under a HorizontalPodAutoscaler of Kubernetes, by its scale subresource. Below its minimum that needs no metric.
	_, err = ns.Kubectl(ctx, "patch", "prc", "orders-sink", "--type=merge", "-p", `{"spec":{"autoscaling":null,"replicas":1}}`)
	must(t, err)
	wantPods(ctx, t, ns, 1)
	must(t, ns.Apply(ctx, manifest(t, "hpa")))
	wantPods(ctx, t, ns, 2)
	must(t, ns.WaitReady(ctx, time.Minute))
}

// scaled says which of the texts are missing in the events of the autoscaler.
func scaled(ctx context.Context, ns *scenario.Namespace, texts ...string) error {
	events, err := ns.Kubectl(ctx, "get", "events.events.k8s.io", "-o", `jsonpath={.items[?(@.reason=="Scaled")].note}`)
	if err == nil {
		err = contains(events, texts...)
	}
	return err
}

// wantPods waits until a Processor has that many pods, and no more that are on their way out.
func wantPods(ctx context.Context, t *testing.T, ns *scenario.Namespace, n int) {
	t.Helper()
	eventually(ctx, t, 90*time.Second, fmt.Sprintf("%d pods", n), func(ctx context.Context) error {
		has, err := ns.Kubectl(ctx, "get", "prc", "orders-sink", "-o", "jsonpath={.status.desiredReplicas} {.status.replicas}")
		if err != nil {
			return err
		}
		pods, err := ns.Pods(ctx, "orders-sink")
		if err == nil && (has != fmt.Sprintf("%d %d", n, n) || len(pods) != n) {
			err = fmt.Errorf("desired and present: %s, pods %v", has, pods)
		}
		return err
	})
}
