package e2e

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/test/scenario"
)

//go:embed testdata/*.yaml
var manifests embed.FS

func manifest(t *testing.T, name string) string {
	t.Helper()
	text, err := manifests.ReadFile("testdata/" + name + ".yaml")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// begin gives a test its context and its namespace. A failed test shows what a person would look at first.
func begin(t *testing.T, namespace string) (context.Context, *scenario.Namespace) {
	t.Helper()
	return beginOn(t, namespace, world.Servers())
}

// beginOn is begin on servers of the test's own. Such a namespace goes before its servers do.
func beginOn(t *testing.T, namespace string, servers scenario.Servers) (context.Context, *scenario.Namespace) {
	t.Helper()
	if running.Err() != nil {
		t.Fatal("interrupted")
	}
	ctx, cancel := context.WithCancel(running)
	t.Cleanup(cancel)
	ns, err := world.NamespaceOn(ctx, "millrace-e2e-"+namespace, servers)
	if err != nil {
		t.Fatal(err)
	}
	if servers.Own {
		t.Cleanup(func() { stopped(t, ns.Remove) })
	}
	t.Cleanup(func() {
		if t.Failed() && running.Err() == nil {
			t.Log(world.Diagnose(context.Background()))
		}
	})
	return ctx, ns
}

// eventually asks until the answer is nil.
func eventually(ctx context.Context, t *testing.T, patience time.Duration, what string, ask func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := ask(ctx)
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			if running.Err() != nil {
				t.Fatal("interrupted")
			}
			t.Fatalf("%s: not within %s: %v", what, patience, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newSeed makes a seed and prints it, so that a failure can be looked at with the same load.
func newSeed(t *testing.T) uint64 {
	t.Helper()
	seed := rand.Uint64N(1_000_000)
	t.Logf("seed %d", seed)
	return seed
}

// load runs a producer in the background. Its wait fails the test when the producer failed.
func load(ctx context.Context, t *testing.T, produce func(context.Context) error) (wait func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	finished := make(chan error, 1)
	go func() { finished <- produce(ctx) }()
	var once bool
	wait = func() {
		t.Helper()
		if once {
			return
		}
		once = true
		if err := <-finished; err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		cancel()
		if !once {
			_ = <-finished // the test has failed of something else
		}
	})
	return wait
}

// during waits until that many were produced, and says that load is still going on: a fault after its end tests nothing.
func during(ctx context.Context, t *testing.T, p *scenario.Produced, from, total int) {
	t.Helper()
	eventually(ctx, t, 3*time.Minute, fmt.Sprintf("%d produced", from), func(context.Context) error {
		if n := p.Entries(); n < from {
			return fmt.Errorf("%d produced", n)
		}
		return nil
	})
	if n := p.Entries(); n >= total {
		t.Fatalf("the load was over (%d of %d) before the fault; lower its rate", n, total)
	}
}

// kill deletes one pod of a Processor without any grace. Its kubelet sends SIGTERM all the same, two seconds before SIGKILL.
func kill(ctx context.Context, t *testing.T, ns *scenario.Namespace, processor string) {
	t.Helper()
	pods, err := ns.Pods(ctx, processor)
	must(t, err)
	if len(pods) == 0 {
		t.Fatalf("no pod of Processor %s to kill", processor)
	}
	pod := slices.Min(pods)
	_, err = ns.Kubectl(ctx, "delete", "pod", pod, "--force", "--grace-period=0")
	must(t, err)
	t.Logf("deleted pod %s by force", pod)
}

// crash ends the processes in all pods of a Processor with SIGKILL, in the middle of what they do. They start again under
// the same names.
func crash(ctx context.Context, t *testing.T, ns *scenario.Namespace, processor string) {
	t.Helper()
	crashed := map[string]bool{}
	eventually(ctx, t, 30*time.Second, "pods that run", func(ctx context.Context) error {
		pods, err := ns.Pods(ctx, processor)
		if err != nil {
			return err
		}
		for _, pod := range pods {
			if crashed[pod] {
				continue
			}
			err := world.Cluster.Crash(ctx, ns.Name, pod)
			if errors.Is(err, errors.ErrUnsupported) {
				t.Log("only the kubelet can crash a pod of this cluster; deleting one instead")
				kill(ctx, t, ns, processor)
				return nil
			}
			if err != nil {
				return err
			}
			crashed[pod] = true
			t.Logf("crashed pod %s", pod)
		}
		return nil
	})
}

// settle takes the ledger until it is exact, and prints it.
func settle(ctx context.Context, t *testing.T, sink scenario.Sink, p *scenario.Produced, patience time.Duration) *scenario.Ledger {
	t.Helper()
	began := time.Now()
	l, err := sink.Await(ctx, p, patience)
	if l != nil {
		t.Logf("the ledger, %.1f s after the load\n%s", time.Since(began).Seconds(), l)
	}
	must(t, err)
	return l
}

// rows counts a table's rows; -1 while there is no table.
func rows(ctx context.Context, dsn, table string) (n int, err error) {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return 0, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	err = conn.QueryRow(ctx, "select count(*) from "+table).Scan(&n)
	return n, err
}

func execute(ctx context.Context, t *testing.T, dsn, sql string) {
	t.Helper()
	conn, err := pgx.Connect(ctx, dsn)
	must(t, err)
	defer conn.Close(context.WithoutCancel(ctx))
	_, err = conn.Exec(ctx, sql)
	must(t, err)
}

// contains says which of the texts are missing.
func contains(text string, wanted ...string) error {
	var errs []error
	for _, w := range wanted {
		if !strings.Contains(text, w) {
			errs = append(errs, fmt.Errorf("%q is missing", w))
		}
	}
	return errors.Join(errs...)
}
