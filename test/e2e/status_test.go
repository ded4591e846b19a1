package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/test/scenario"
)

// tells waits until Ready of each of the objects has this reason, and prints how long that took. Each reason stands for one
// status of Ready.
func tells(ctx context.Context, t *testing.T, ns *scenario.Namespace, reason string, within time.Duration, objects ...string) {
	t.Helper()
	began := time.Now()
	for _, object := range objects {
		_, err := ns.Kubectl(ctx, "wait", `--for=jsonpath={.status.conditions[?(@.type=="Ready")].reason}=`+reason, object,
			"--timeout="+max(time.Until(began.Add(within)), time.Second).Round(time.Second).String())
		if err != nil {
			t.Fatalf("%s does not tell %s within %s: %v\n%s", object, reason, within, err, ns.Show(context.WithoutCancel(ctx)))
		}
		t.Logf("%s tells %s after %.1f s", object, reason, time.Since(began).Seconds())
	}
}

// everything of both pipelines.
var everything = []string{"stream/orders", "consumergroup/orders-sink", "processor/orders-sink", "processor/telemetry"}

// reconciles makes a Stream and waits until it is in its database, which only a manager that works can do.
func reconciles(ctx context.Context, t *testing.T, ns *scenario.Namespace, name string, within time.Duration) {
	t.Helper()
	must(t, ns.Apply(ctx, streamManifest(name, "app-db", 1)))
	tells(ctx, t, ns, "Ready", within, "stream/"+name)
}

// pods lists the running pods of all Processors: name, UID, and how often their containers were started again.
func pods(ctx context.Context, t *testing.T, ns *scenario.Namespace, selector string) []string {
	t.Helper()
	out, err := ns.Kubectl(ctx, "get", "pods", "-l", selector, "-o",
		`go-template={{range .items}}{{if not .metadata.deletionTimestamp}}{{.metadata.name}} {{.metadata.uid}} restarts {{range .status.containerStatuses}}{{.restartCount}}{{end}}{{"\n"}}{{end}}{{end}}`)
	must(t, err)
	list := strings.Split(strings.TrimSpace(out), "\n")
	slices.Sort(list)
	return list
}

const processors = "app.kubernetes.io/name=millrace-processor"

// untouched fails the test unless the pods are those that there were, and none has started again.
func untouched(ctx context.Context, t *testing.T, ns *scenario.Namespace, selector string, before []string) {
	t.Helper()
	if now := pods(ctx, t, ns, selector); !slices.Equal(now, before) {
		t.Errorf("the pods were\n%s\nand are\n%s", strings.Join(before, "\n"), strings.Join(now, "\n"))
	}
}

// managers lists the pods of the manager: name and how often it was started again.
func managers(ctx context.Context) (map[string]string, error) {
	out, err := world.Cluster.Kubectl(ctx, "-n", scenario.SystemNamespace, "get", "pods", "-l", "app.kubernetes.io/name=millrace", "-o",
		`go-template={{range .items}}{{if not .metadata.deletionTimestamp}}{{.metadata.name}} {{range .status.containerStatuses}}{{.restartCount}}{{end}}{{"\n"}}{{end}}{{end}}`)
	restarts := map[string]string{}
	for line := range strings.Lines(out) {
		if name, n, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			restarts[name] = n
		}
	}
	return restarts, err
}

// leads waits until one of the managers holds the Lease, and returns its pod. not is a pod that does not count.
func leads(ctx context.Context, t *testing.T, within time.Duration, not string) (pod string) {
	t.Helper()
	began := time.Now()
	eventually(ctx, t, within, "a manager leads", func(ctx context.Context) error {
		holder, err := world.Cluster.Kubectl(ctx, "-n", scenario.SystemNamespace, "get", "lease", "manager.millrace.dev", "-o", "jsonpath={.spec.holderIdentity}")
		if err != nil {
			return err
		}
		pod, _, _ = strings.Cut(holder, "_")
		now, err := managers(ctx)
		if _, there := now[pod]; err == nil && (!there || pod == not) {
			err = fmt.Errorf("%q leads", holder)
		}
		return err
	})
	t.Logf("pod %s leads, seen after %.1f s", pod, time.Since(began).Seconds())
	return pod
}

// watchAvailable follows the pods of the Processors that are available, until fewest is called, which returns the smallest number of each.
func watchAvailable(ctx context.Context, t *testing.T, ns *scenario.Namespace) (fewest func() map[string]int) {
	t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	out := make(chan string, 1)
	go func() {
		text, _ := ns.Kubectl(ctx, "get", "deployments", "-l", processors, "--watch", "-o",
			`go-template={{.metadata.name}} {{or .status.availableReplicas 0}}{{"\n"}}`)
		out <- text
	}()
	t.Cleanup(cancel)
	return func() map[string]int {
		t.Helper()
		cancel()
		least := map[string]int{}
		for line := range strings.Lines(<-out) {
			var name string
			var n int
			if _, err := fmt.Sscan(line, &name, &n); err != nil {
				continue // cut off by the end
			}
			if before, seen := least[name]; !seen || n < before {
				least[name] = n
			}
		}
		return least
	}
}

// ours is false, with a word about it, for a cluster whose node and control plane belong to somebody else.
func ours(t *testing.T, err error) bool {
	t.Helper()
	if errors.Is(err, errors.ErrUnsupported) {
		t.Log("this cluster is somebody else's, and its node and control plane are left alone")
		return false
	}
	must(t, err)
	return true
}
