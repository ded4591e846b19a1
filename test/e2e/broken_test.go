package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/test/scenario"
)

// TestBrokenResourcesSayWhatToDo makes the mistakes that people make, and reads what kubectl describe tells them. The
// message has to name what is wrong and what to do, and never a password.
func TestBrokenResourcesSayWhatToDo(t *testing.T) {
	ctx, ns := begin(t, "broken")
	must(t, ns.Secret(ctx, "wrong-password", "dsn", change(t, ns.DSN, func(u *url.URL) { u.User = url.UserPassword(u.User.Username(), "swordfish") })))
	must(t, ns.Secret(ctx, "nobody-home", "dsn", change(t, ns.DSN, func(u *url.URL) { u.Host = u.Hostname() + ":1" })))

	for _, c := range []struct {
		name, kind, object, manifest, reason string
		says                                 []string
	}{
		{
			name: "the Secret is missing", kind: "stream", object: "no-secret", reason: "SecretMissing",
			manifest: streamManifest("no-secret", "does-not-exist", 8),
			says:     []string{`Secret "does-not-exist"`, "Create it"},
		},
		{
			name: "the password is wrong", kind: "stream", object: "wrong-password", reason: "AuthenticationFailed",
			manifest: streamManifest("wrong-password", "wrong-password", 8),
			says:     []string{"password authentication failed", "Correct user and password in the Secret"},
		},
		{
			name: "the database is unreachable", kind: "stream", object: "nobody-home", reason: "DatabaseUnreachable",
			manifest: streamManifest("nobody-home", "nobody-home", 8),
			says:     []string{"connection refused"},
		},
		{
			name: "the mapping is bad", kind: "processor", object: "bad-mapping", reason: "InvalidConfiguration",
			manifest: strings.NewReplacer("name: telemetry}", "name: bad-mapping}", "type: double precision", "type: money", "key: [device_id, ts]", "key: [device_id, when]").
				Replace(manifest(t, "positions")),
			says: []string{"spec.mapping.columns[2].type", "money", "write", "spec.sink.table.key[1]", "when"},
		},
		{
			name: "the pods cannot log in", kind: "processor", object: "locked-out", reason: "PodsFailing",
			manifest: strings.NewReplacer("name: telemetry}", "name: locked-out}", "name: app-db", "name: wrong-password", "replicas: 2", "replicas: 1").
				Replace(manifest(t, "positions")),
			says: []string{"0 of 1 pods are ready", "password authentication failed"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			must(t, ns.Apply(ctx, c.manifest))
			saysSo(ctx, t, ns, c.kind, c.object, c.reason, c.says...)
		})
	}

	t.Run("the Secrets are corrected, and nothing else has to be done", func(t *testing.T) {
		for _, name := range []string{"does-not-exist", "wrong-password", "nobody-home"} {
			must(t, ns.Secret(ctx, name, "dsn", ns.DSN))
		}
		_, err := ns.Kubectl(ctx, "wait", "--for=condition=Ready", "stream/no-secret", "stream/wrong-password", "stream/nobody-home",
			"processor/locked-out", "--timeout=90s")
		must(t, err)
		t.Logf("$ kubectl get millrace\n%s", ns.Show(ctx))
	})

	t.Run("partitions are lowered", func(t *testing.T) {
		must(t, ns.Apply(ctx, streamManifest("lanes", "app-db", 8)))
		_, err := ns.Kubectl(ctx, "wait", "--for=condition=Ready", "stream/lanes", "--timeout=1m")
		must(t, err)
		err = ns.Apply(ctx, streamManifest("lanes", "app-db", 4))
		if err == nil {
			t.Fatal("kubectl apply accepted fewer partitions")
		}
		t.Logf("$ kubectl apply\n%v", err)
		if err := contains(err.Error(), "partitions only grow", "create another Stream"); err != nil {
			t.Error(err)
		}
		// A resource that is deleted and made again meets the database's older stream.
		_, err = ns.Kubectl(ctx, "delete", "stream/lanes", "--timeout=1m")
		must(t, err)
		must(t, ns.Apply(ctx, streamManifest("lanes", "app-db", 4)))
		saysSo(ctx, t, ns, "stream", "lanes", "PartitionsLowered", "8", "4")
	})
}

// saysSo waits for the reason, shows what kubectl describe prints, and looks into it.
func saysSo(ctx context.Context, t *testing.T, ns *scenario.Namespace, kind, name, reason string, says ...string) {
	t.Helper()
	eventually(ctx, t, 90*time.Second, reason, func(ctx context.Context) error {
		ready, err := ns.Kubectl(ctx, "get", kind, name, "-o", `jsonpath={range .status.conditions[?(@.type=="Ready")]}{.status} {.reason}: {.message}{end}`)
		if err != nil {
			return err
		}
		if !strings.HasPrefix(ready, "False "+reason+": ") {
			return fmt.Errorf("Ready is %s", ready)
		}
		if err := contains(ready, says...); err != nil {
			return errors.Join(err, errors.New(ready))
		}
		return nil
	})
	described, err := ns.Kubectl(ctx, "describe", kind, name)
	must(t, err)
	t.Logf("$ kubectl describe %s %s\n%s", kind, name, fromStatus(described))
	for _, secret := range []string{"swordfish", password(t, ns.DSN), password(t, ns.RedisURL)} {
		if strings.Contains(described, secret) {
			t.Error("kubectl describe shows a password")
		}
	}
	if kind == "stream" && !strings.Contains(described[strings.LastIndex(described, "Events:"):], reason) {
		t.Errorf("no event says %s", reason)
	}
}

// fromStatus cuts off the part of kubectl describe that repeats the manifest.
func fromStatus(described string) string {
	_, status, found := strings.Cut(described, "\nStatus:\n")
	if !found {
		return described
	}
	return "Status:\n" + status
}

func streamManifest(name, secret string, partitions int) string {
	return fmt.Sprintf("apiVersion: millrace.dev/v1alpha1\nkind: Stream\nmetadata: {name: %s}\nspec:\n  databaseSecretRef: {name: %s, key: dsn}\n  partitions: %d\n", name, secret, partitions)
}

func change(t *testing.T, address string, edit func(*url.URL)) string {
	t.Helper()
	u, err := url.Parse(address)
	must(t, err)
	edit(u)
	return u.String()
}

func password(t *testing.T, address string) string {
	t.Helper()
	u, err := url.Parse(address)
	must(t, err)
	text, _ := u.User.Password()
	if text == "" {
		t.Fatal("this address has no password to look for")
	}
	return text
}
