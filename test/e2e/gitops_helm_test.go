package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestHelmWaitsForResources installs a chart that holds the files of examples/gitops/orders. With --wait, Helm reads statuses by kstatus:
// install returns when everything is Ready and not before, and an upgrade to a resource that is Stalled fails at once and names it.
func TestHelmWaitsForResources(t *testing.T) {
	ctx, ns := begin(t, "helm")
	_, err := ns.Kubectl(ctx, "delete", "secret", "app-db") // the chart has its own
	must(t, err)
	const database = "helm_later"
	execute(ctx, t, ns.DSN, "create database "+database+" allow_connections false")
	later := beside(ns, database)
	files := shop(t, later)
	chart := t.TempDir()
	write := func(path, content string) {
		t.Helper()
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(chart, path)), 0o755))
		must(t, os.WriteFile(filepath.Join(chart, path), []byte(content), 0o600))
	}
	write("Chart.yaml", "apiVersion: v2\nname: shop\nversion: 0.1.0\n")
	for path, content := range files {
		write(filepath.Join("templates", filepath.Base(path)), content)
	}
	upgrade := func() error {
		_, err := world.Cluster.Helm(ctx, "upgrade", "--install", "shop", chart, "--namespace", ns.Name, "--wait", "--timeout", "3m")
		return err
	}

	step(t, "install returns when everything is Ready", func(t *testing.T) {
		installed := make(chan error, 1)
		go func() { installed <- upgrade() }()
		saysSo(ctx, t, ns, "stream", "orders", "DatabaseUnreachable", "not currently accepting connections")
		select {
		case err := <-installed:
			t.Fatalf("helm did not wait for the database: %v", err)
		default:
		}
		execute(ctx, t, ns.DSN, "alter database "+database+" allow_connections true")
		must(t, <-installed)
		for _, resource := range []string{"stream/orders", "consumergroup/billing", "processor/billing"} {
			_, err := ns.Kubectl(ctx, "wait", "--for=condition=Ready", resource, "--timeout=0s")
			if err != nil {
				t.Errorf("helm has returned and %s is not ready: %v", resource, err)
			}
		}
	})

	step(t, "an upgrade returns when the new pods are ready", func(t *testing.T) {
		write("templates/processor.yaml", replaced(t, files["orders/processor.yaml"], "  source:", "  errors: {maxDeliveries: 7}\n  source:"))
		must(t, upgrade())
		out, err := ns.Kubectl(ctx, "get", "deployment", "billing-processor", "--output",
			"jsonpath={.metadata.generation} {.status.observedGeneration} {.status.replicas} {.status.updatedReplicas} {.status.availableReplicas}")
		must(t, err)
		if out != "2 2 1 1 1" {
			t.Errorf("helm returned in the middle of the rollout: generation, observed generation and replicas are %s", out)
		}
	})

	step(t, "an upgrade to a Stalled resource fails and names it", func(t *testing.T) {
		write("templates/processor.yaml", replaced(t, files["orders/processor.yaml"], "type: numeric", "type: money"))
		began := time.Now()
		err := upgrade()
		if err == nil {
			t.Fatal("helm is content with a mapping that cannot work")
		}
		t.Logf("after %s: %v", time.Since(began).Round(time.Second), err)
		if err := contains(err.Error(), "Processor/"+ns.Name+"/billing not ready", "status: Failed", "spec.mapping.columns[1].type"); err != nil {
			t.Error(err)
		}
		if strings.Contains(err.Error(), "deadline") || time.Since(began) > time.Minute {
			t.Error("helm has waited for its timeout")
		}
	})

	_, err = world.Cluster.Helm(ctx, "uninstall", "shop", "--namespace", ns.Name, "--wait", "--timeout", "1m")
	must(t, err)
}
