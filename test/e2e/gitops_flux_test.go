package e2e

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/test/env/gitops"
)

// TestFluxAppliesTheExample gives the files of examples/gitops to Flux's kustomize-controller, which waits for them by kstatus. The source of
// the Kustomization is an ExternalArtifact, since source-controller is not there to read git; everything after that is Flux.
func TestFluxAppliesTheExample(t *testing.T) {
	ctx, ns := begin(t, "flux")
	flux, err := gitops.StartFlux(ctx, world.Cluster)
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(flux.Log())
		}
		if err := flux.Stop(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	})
	_, err = ns.Kubectl(ctx, "delete", "secret", "app-db")
	must(t, err)
	repository, err := gitops.NewRepository(ctx, t.TempDir())
	must(t, err)
	push := func(message string, files map[string]string) string {
		t.Helper()
		commit, err := repository.Commit(ctx, message, files)
		must(t, err)
		must(t, flux.Publish(ctx, "shop", repository, commit))
		return commit
	}
	// ready waits until Flux says of a commit that it is ready, or is not.
	ready := func(status, commit string, says ...string) {
		t.Helper()
		eventually(ctx, t, 90*time.Second, "Kustomization with Ready "+status, func(ctx context.Context) error {
			got, err := world.Cluster.Kubectl(ctx, "--namespace=flux-system", "get", "kustomization", "orders", "--output",
				`jsonpath={.status.lastAttemptedRevision} {range .status.conditions[?(@.type=="Ready")]}{.status} {.reason}: {.message}{end}`)
			if err != nil {
				return err
			}
			if !strings.HasPrefix(got, "main@sha1:"+commit+" "+status+" ") {
				return fmt.Errorf("it is %s", got)
			}
			return errors.Join(contains(got, says...))
		})
	}

	files := shop(t, ns.DSN)
	commit := push("the shop", files)
	manifest := replaced(t, example(t, "flux/orders.yaml"), "kind: GitRepository", "kind: ExternalArtifact")
	must(t, world.Cluster.Apply(ctx, replaced(t, manifest, "targetNamespace: shop", "targetNamespace: "+ns.Name)))
	ready("True", commit)
	// Flux says so only after everything was.
	for _, resource := range []string{"stream/orders", "consumergroup/billing", "processor/billing"} {
		_, err := ns.Kubectl(ctx, "wait", "--for=condition=Ready", resource, "--timeout=0s")
		if err != nil {
			t.Errorf("Flux is ready and %s is not: %v", resource, err)
		}
	}
	publishOneOrder(ctx, t, ns.DSN)

	// Long before the timeout of five minutes.
	commit = push("a type that is none", map[string]string{
		"orders/processor.yaml": replaced(t, files["orders/processor.yaml"], "type: numeric", "type: money"),
	})
	ready("False", commit, "HealthCheckFailed", "Processor/"+ns.Name+"/billing", "Failed")
	ready("True", push("back again", map[string]string{"orders/processor.yaml": files["orders/processor.yaml"]}))

	gone := map[string]string{}
	for _, name := range []string{"stream.yaml", "consumergroup.yaml", "processor.yaml"} {
		gone[filepath.Join("orders", name)] = ""
	}
	ready("True", push("no more orders", gone))
	ordersAreGone(ctx, t, ns, ns.DSN, 1)
}
