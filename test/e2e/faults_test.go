package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/test/scenario"
)

// The bounds within which status has to tell what is. A database that is lost is noticed when its lag is read, every ten
// seconds; everything else sooner.
const (
	noticed  = 20 * time.Second
	repaired = 20 * time.Second
	// tookOver is for a leader that says nothing any more: its Lease has to expire, which takes fifteen seconds.
	tookOver = 30 * time.Second
	// rolledOut is for new pods, with the drain of old ones.
	rolledOut = time.Minute
	// outage of the API server.
	outage = time.Minute
)

// TestFaultsUnderLoad runs both pipelines while what they stand on fails or changes. All parts share one namespace.
func TestFaultsUnderLoad(t *testing.T) {
	ctx, ns := begin(t, "faults")
	execute(ctx, t, ns.DSN, ordersTable)
	must(t, ns.Apply(ctx, pipelines(t)))
	must(t, world.LoadImages(ctx, next)) // while the pods start
	must(t, ns.WaitReady(ctx, 2*time.Minute))
	f := &faults{steady: newSteady(ns, 2000)}

	for _, part := range []struct {
		name string
		run  func(ctx context.Context, t *testing.T)
	}{
		{"PostgreSQL is killed twice and comes back", f.postgresIsKilled},
		{"replicas follow kubectl scale and spec", f.replicasFollow},
		{"the manager is upgraded", f.managerIsUpgraded},
		{"the processors are upgraded", f.processorsAreUpgraded},
		{"the manager and all pods are killed", f.everythingIsKilled},
		{"the leader stands still and comes back", f.leaderStandsStill},
		{"the API server is away", f.apiServerIsAway},
		{"kubelet and containerd are killed and start again", f.agentsAreKilled},
		{"the node loses its power", f.nodeLosesPower},
		{"Millrace is uninstalled with all of its resources and installed again", f.uninstalled},
	} {
		t.Run(part.name, func(t *testing.T) {
			f.start(ctx, t)
			f.goOn(ctx, t, time.Second)
			part.run(ctx, t)
			f.settle(ctx, t)
			must(t, ns.WaitReady(ctx, repaired))
		})
		if t.Failed() {
			return
		}
	}
}

type faults struct {
	*steady
	values []string // of the chart, as they are now
}

// upgrade upgrades the installation, and the parts that follow go on with that.
func (f *faults) upgrade(ctx context.Context, t *testing.T, values ...string) {
	t.Helper()
	f.values = append(f.values, values...)
	must(t, world.Install(ctx, f.values...))
}

func (f *faults) postgresIsKilled(ctx context.Context, t *testing.T) {
	before := pods(ctx, t, f.ns, processors)
	t.Cleanup(func() {
		if t.Failed() { // the tests that follow need it
			must(t, world.Postgres.Restart(running))
		}
	})
	must(t, world.Postgres.Kill())
	tells(ctx, t, f.ns, "DatabaseUnreachable", noticed, "stream/orders", "consumergroup/orders-sink")
	tells(ctx, t, f.ns, "PodsFailing", noticed, "processor/orders-sink", "processor/telemetry")
	must(t, world.Postgres.Restart(ctx))
	tells(ctx, t, f.ns, "Ready", repaired, everything...)
	f.goOn(ctx, t, time.Second)
	// The second time while everybody is still catching up.
	must(t, world.Postgres.Kill())
	must(t, world.Postgres.Restart(ctx))
	f.goOn(ctx, t, time.Second)
	tells(ctx, t, f.ns, "Ready", repaired, everything...)
	untouched(ctx, t, f.ns, processors, before)
}

func (f *faults) replicasFollow(ctx context.Context, t *testing.T) {
	_, err := f.ns.Kubectl(ctx, "scale", "processor/telemetry", "processor/orders-sink", "--replicas=3")
	must(t, err)
	f.available(ctx, t, 3)
	_, err = f.ns.Kubectl(ctx, "patch", "processor/telemetry", "processor/orders-sink", "--type=merge", "-p", `{"spec":{"replicas":1}}`)
	must(t, err)
	f.available(ctx, t, 1)
	_, err = f.ns.Kubectl(ctx, "scale", "processor/telemetry", "processor/orders-sink", "--replicas=2")
	must(t, err)
	f.available(ctx, t, 2)
}

// next is the tag of the images after an upgrade. They differ in nothing else: that releases get along is tested elsewhere.
const next = "next"

// managerIsUpgraded also makes a Stream while one manager hands over to the other.
func (f *faults) managerIsUpgraded(ctx context.Context, t *testing.T) {
	before, old := pods(ctx, t, f.ns, processors), leads(ctx, t, noticed, "")
	during := load(ctx, t, func(ctx context.Context) error { return f.ns.Apply(ctx, streamManifest("during-upgrade", "app-db", 1)) })
	f.upgrade(ctx, t, "manager.image.tag="+next)
	during()
	leads(ctx, t, repaired, old)
	tells(ctx, t, f.ns, "Ready", repaired, "stream/during-upgrade")
	reconciles(ctx, t, f.ns, "after-upgrade", repaired)
	untouched(ctx, t, f.ns, processors, before)
}

func (f *faults) processorsAreUpgraded(ctx context.Context, t *testing.T) {
	fewest := watchAvailable(ctx, t, f.ns)
	f.upgrade(ctx, t, "processor.image.tag="+next)
	eventually(ctx, t, rolledOut, "pods of the new image", func(ctx context.Context) error {
		images, err := f.ns.Kubectl(ctx, "get", "pods", "-l", processors, "-o", `jsonpath={range .items[*]}{.spec.containers[0].image}{"\n"}{end}`)
		if err == nil && strings.Count(images, ":"+next+"\n") != strings.Count(images, "\n") {
			err = errors.New(images)
		}
		return err
	})
	tells(ctx, t, f.ns, "Ready", repaired, everything...)
	least := fewest()
	t.Logf("pods that were available all the time: %v", least)
	for _, deployment := range []string{"telemetry-processor", "orders-sink-processor"} {
		if least[deployment] < 2 {
			t.Errorf("only %d pods of %s were available at some moment, want 2", least[deployment], deployment)
		}
	}
}

func (f *faults) everythingIsKilled(ctx context.Context, t *testing.T) {
	leader := leads(ctx, t, noticed, "")
	before, err := managers(ctx)
	must(t, err)
	if !ours(t, world.Cluster.Crash(ctx, scenario.SystemNamespace, leader)) {
		return
	}
	for _, processor := range []string{"orders-sink", "telemetry"} {
		crash(ctx, t, f.ns, processor)
	}
	reconciles(ctx, t, f.ns, "after-kill", repaired)
	f.arrive(ctx, t, repaired)
	if now, err := managers(ctx); err != nil || now[leader] == before[leader] {
		t.Errorf("the manager was not killed: %v restarts before, %v now", before, now)
	}
}

// leaderStandsStill: a manager that is stopped does not know that it leads no more. When it goes on it has to find out before
// it does harm.
func (f *faults) leaderStandsStill(ctx context.Context, t *testing.T) {
	f.upgrade(ctx, t, "manager.replicas=2")
	old := leads(ctx, t, tookOver, "")
	before := pods(ctx, t, f.ns, processors)
	restarts, err := managers(ctx)
	must(t, err)
	if !ours(t, world.Cluster.Signal(ctx, scenario.SystemNamespace, old, "SIGSTOP")) {
		return
	}
	must(t, f.ns.Apply(ctx, streamManifest("during-stop", "app-db", 1)))
	leader := leads(ctx, t, tookOver, old)
	tells(ctx, t, f.ns, "Ready", repaired, "stream/during-stop")
	must(t, world.Cluster.Signal(ctx, scenario.SystemNamespace, old, "SIGCONT"))
	// It ends at once, and is started again after the ten seconds that the kubelet waits if it was killed before.
	eventually(ctx, t, tookOver, "the old leader gives up and starts again", func(ctx context.Context) error {
		now, err := managers(ctx)
		if err == nil && now[old] == restarts[old] {
			err = fmt.Errorf("%v restarts", now)
		}
		return err
	})
	reconciles(ctx, t, f.ns, "after-stop", repaired)
	if now := leads(ctx, t, noticed, ""); now != leader {
		t.Errorf("%s leads, and %s did", now, leader)
	}
	untouched(ctx, t, f.ns, processors, before)
	// One manager again, and which of the two stays is for Kubernetes to say.
	f.upgrade(ctx, t, "manager.replicas=1")
	eventually(ctx, t, repaired, "one manager", func(ctx context.Context) error {
		now, err := managers(ctx)
		if err == nil && len(now) != 1 {
			err = fmt.Errorf("%v", slices.Collect(maps.Keys(now)))
		}
		return err
	})
	leads(ctx, t, tookOver, "")
}

// apiServerIsAway for longer than a leader goes on without it (ten seconds), so that the manager has to start again without an
// API server.
func (f *faults) apiServerIsAway(ctx context.Context, t *testing.T) {
	before := pods(ctx, t, f.ns, processors)
	start, err := world.Cluster.StopControlPlane(ctx)
	if !ours(t, err) {
		return
	}
	f.goOn(ctx, t, outage)
	f.arrive(ctx, t, repaired)
	must(t, start(ctx))
	reconciles(ctx, t, f.ns, "after-outage", repaired)
	restarts, err := managers(ctx)
	must(t, err)
	t.Logf("restarts of the manager: %v", restarts)
	tells(ctx, t, f.ns, "Ready", repaired, everything...)
	untouched(ctx, t, f.ns, processors, before)
}

func (f *faults) agentsAreKilled(ctx context.Context, t *testing.T) {
	before := pods(ctx, t, f.ns, processors)
	start, err := world.Cluster.StopNodeAgents(ctx)
	if !ours(t, err) {
		return
	}
	f.arrive(ctx, t, repaired)
	must(t, start(ctx))
	// The kubelet works again when it makes a pod.
	_, err = f.ns.Kubectl(ctx, "scale", "processor/telemetry", "--replicas=3")
	must(t, err)
	eventually(ctx, t, rolledOut, "a third pod", func(ctx context.Context) error {
		if now := pods(ctx, t, f.ns, processors); len(now) != len(before)+1 {
			return fmt.Errorf("%d pods", len(now))
		}
		return nil
	})
	tells(ctx, t, f.ns, "Ready", rolledOut, everything...)
	now := pods(ctx, t, f.ns, processors)
	for _, pod := range before {
		if !slices.Contains(now, pod) {
			t.Errorf("pod %s is gone or has started again; now there are\n%s", pod, strings.Join(now, "\n"))
		}
	}
	_, err = f.ns.Kubectl(ctx, "scale", "processor/telemetry", "--replicas=2")
	must(t, err)
	f.available(ctx, t, 2)
}

// nodeLosesPower takes the manager along.
func (f *faults) nodeLosesPower(ctx context.Context, t *testing.T) {
	before := pods(ctx, t, f.ns, processors)
	on, err := world.Cluster.PowerOff(ctx)
	if !ours(t, err) {
		return
	}
	f.goOn(ctx, t, 2*time.Second)
	must(t, on(ctx))
	f.arrive(ctx, t, rolledOut)
	reconciles(ctx, t, f.ns, "after-power", rolledOut)
	tells(ctx, t, f.ns, "Ready", repaired, everything...)
	if now := pods(ctx, t, f.ns, processors); slices.Equal(now, before) {
		t.Error("no pod was started again; the node was not off")
	}
}

// uninstalled removes Millrace as thoroughly as a user can, while applications go on publishing.
func (f *faults) uninstalled(ctx context.Context, t *testing.T) {
	must(t, world.Uninstall(ctx))
	f.arrive(ctx, t, repaired) // pods do not need the manager
	must(t, world.RemoveCRDs(ctx))
	eventually(ctx, t, rolledOut, "the pods end", func(ctx context.Context) error {
		pods, err := f.ns.Kubectl(ctx, "get", "pods", "-o", "name")
		if err == nil && strings.TrimSpace(pods) != "" {
			err = errors.New(pods)
		}
		return err
	})
	f.goOn(ctx, t, time.Second)
	l, err := f.ns.OrdersSink().Ledger(ctx, f.orders)
	must(t, err)
	if len(l.Missing) == 0 {
		t.Error("nothing was published while nobody consumed; this run shows nothing")
	}
	f.values = nil
	f.upgrade(ctx, t)
	must(t, f.ns.Apply(ctx, pipelines(t)))
	must(t, f.ns.WaitReady(ctx, 2*time.Minute))
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
