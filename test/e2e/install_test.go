package e2e

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/test/scenario"
)

// TestInstallation looks at what Helm installed as an administrator would: helm test says that all is well, and says what is
// wrong when no manager works; everything runs where the restricted Pod Security Standard is enforced; the images have no shell.
func TestInstallation(t *testing.T) {
	ctx, ns := begin(t, "installation")
	const enforce = "pod-security.kubernetes.io/enforce=restricted"
	for _, name := range []string{scenario.SystemNamespace, ns.Name} {
		_, err := world.Cluster.Kubectl(ctx, "label", "namespace", name, "--overwrite", enforce)
		must(t, err)
	}
	system := func(args ...string) (string, error) {
		return world.Cluster.Kubectl(ctx, append([]string{"--namespace", scenario.SystemNamespace}, args...)...)
	}
	// Pods that were there before are not looked at again, so let new ones come.
	_, err := system("rollout", "restart", "deployment/"+scenario.Release)
	must(t, err)
	_, err = system("rollout", "status", "deployment/"+scenario.Release, "--timeout=2m")
	must(t, err)

	out, err := helmTest(ctx)
	t.Logf("helm test\n%s", out)
	must(t, err)
	must(t, contains(out, "ok    the CRDs are those of this version", "ok    the manager may read what it looks after", "ok    a manager works", "ok    the metrics are refused to strangers"))

	execute(ctx, t, ns.DSN, ordersTable)
	must(t, ns.Apply(ctx, manifest(t, "orders")))
	must(t, ns.WaitReady(ctx, 2*time.Minute))
	pods, err := ns.Pods(ctx, "orders-sink")
	must(t, err)
	for _, shell := range []string{"sh", "/bin/sh", "/bin/bash", "/busybox/sh"} {
		if _, err := ns.Kubectl(ctx, "exec", pods[0], "--container", "processor", "--", shell, "-c", "true"); err == nil {
			t.Errorf("the pods of Processors have %s", shell)
		}
		if _, err := system("exec", "deployment/"+scenario.Release, "--", shell, "-c", "true"); err == nil {
			t.Errorf("the manager's pods have %s", shell)
		}
	}

	_, err = system("scale", "deployment/"+scenario.Release, "--replicas=0")
	must(t, err)
	_, err = system("wait", "pod", "--selector=app.kubernetes.io/component=manager", "--for=delete", "--timeout=1m")
	must(t, err)
	out, err = helmTest(ctx)
	t.Logf("helm test without a manager\n%s", out)
	if err == nil {
		t.Error("helm test succeeds without a manager")
	}
	logs, err := system("logs", scenario.Release+"-test")
	must(t, errors.Join(err, contains(logs, "FAIL  a manager works: nobody holds Lease manager.millrace.dev: look at the manager's pods", "ok    the manager may read what it looks after")))
	_, err = system("scale", "deployment/"+scenario.Release, "--replicas=1")
	must(t, err)
	_, err = system("rollout", "status", "deployment/"+scenario.Release, "--timeout=2m")
	must(t, err)
	_, err = helmTest(ctx)
	must(t, err)
}

func helmTest(ctx context.Context) (string, error) {
	return world.Cluster.Helm(ctx, "test", scenario.Release, "--namespace", scenario.SystemNamespace, "--logs", "--timeout", "3m")
}
