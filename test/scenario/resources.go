package scenario

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/millrace-dev/millrace/test/env/source"
)

// ApplySamples applies config/samples, but for the Secrets: those of this namespace lead somewhere.
func (ns *Namespace) ApplySamples(ctx context.Context) error {
	root, err := source.Root()
	if err != nil {
		return err
	}
	samples, err := filepath.Glob(filepath.Join(root, "config", "samples", "*.yaml"))
	if err != nil {
		return err
	}
	args := []string{"apply"}
	for _, sample := range samples {
		if filepath.Base(sample) != "00_secrets.yaml" && filepath.Base(sample) != "kustomization.yaml" {
			args = append(args, "-f", sample)
		}
	}
	if len(args) == 1 {
		return errors.New("apply the samples: there are none in config/samples")
	}
	if _, err := ns.Kubectl(ctx, args...); err != nil {
		return fmt.Errorf("apply the samples: %w", err)
	}
	return nil
}

// Apply applies a manifest.
func (ns *Namespace) Apply(ctx context.Context, manifest string) error {
	return ns.scenario.Cluster.Apply(ctx, manifest, "--namespace", ns.Name)
}

// Secret makes a Secret with one key.
func (ns *Namespace) Secret(ctx context.Context, name, key, value string) error {
	return ns.scenario.Cluster.Apply(ctx, secret(ns.Name, name, key, value))
}

// Kubectl runs kubectl in this namespace.
func (ns *Namespace) Kubectl(ctx context.Context, args ...string) (string, error) {
	return ns.scenario.Cluster.Kubectl(ctx, append([]string{"--namespace", ns.Name}, args...)...)
}

// WaitReady waits until every Millrace resource of the namespace is Ready, and pods too, as kubectl wait sees it.
func (ns *Namespace) WaitReady(ctx context.Context, patience time.Duration) error {
	deadline := time.Now().Add(patience)
	for _, kind := range []string{"streams", "consumergroups", "processors"} {
		names, err := ns.Kubectl(ctx, "get", kind, "-o", "name")
		if err != nil {
			return err
		}
		if strings.TrimSpace(names) == "" {
			continue
		}
		if _, err := ns.Kubectl(ctx, "wait", "--for=condition=Ready", kind, "--all", "--timeout="+time.Until(deadline).Round(time.Second).String()); err != nil {
			return fmt.Errorf("%w\n%s", err, ns.Show(context.WithoutCancel(ctx)))
		}
	}
	return nil
}

// Show is what `kubectl get millrace,pods` prints, with its wide columns.
func (ns *Namespace) Show(ctx context.Context) string {
	resources, err := ns.Kubectl(ctx, "get", "millrace", "-o", "wide")
	if err != nil {
		return err.Error()
	}
	pods, err := ns.Kubectl(ctx, "get", "pods", "-o", "wide")
	if err != nil {
		return err.Error()
	}
	return resources + "\n" + pods
}

// Pods returns the names of a Processor's pods that are not on their way out.
func (ns *Namespace) Pods(ctx context.Context, processor string) ([]string, error) {
	out, err := ns.Kubectl(ctx, "get", "pods", "-l", "millrace.dev/processor="+processor, "-o",
		`go-template={{range .items}}{{if not .metadata.deletionTimestamp}}{{.metadata.name}}{{"\n"}}{{end}}{{end}}`)
	return strings.Fields(out), err
}

// PositionsSink is where the Processor telemetry of config/samples writes.
func (ns *Namespace) PositionsSink() Sink {
	return Sink{
		DSN: ns.DSN, Table: "positions", RowsQuery: PositionsQuery("positions"),
		RedisURL: ns.RedisURL, RedisStream: PositionsStream, RedisGroup: "positions", Processor: "telemetry",
	}
}

// OrdersSink is where the Processor orders-sink of config/samples writes.
func (ns *Namespace) OrdersSink() Sink {
	return Sink{DSN: ns.DSN, Table: "orders", RowsQuery: OrdersQuery("orders"), Stream: OrdersStream, Group: "orders_sink"}
}

// PositionsQuery reads ids and contents of Positions from a table.
func PositionsQuery(table string) string {
	return "select device_id || '@' || (extract(epoch from ts) * 1000000)::bigint, coalesce(latitude::text, 'null') from " + table
}

// OrdersQuery reads ids and contents of Orders from a table.
func OrdersQuery(table string) string {
	return "select order_id, coalesce(amount::text, 'null') from " + table
}

// Remove deletes the namespace with everything in it. Its database stays with the server.
func (ns *Namespace) Remove(ctx context.Context) error {
	ns.made.Store(false)
	// Millrace's resources first and while the manager runs: what has a finalizer needs it.
	_, err := ns.Kubectl(ctx, "delete", "processors,consumergroups,streams", "--all", "--ignore-not-found", "--timeout=1m")
	if err != nil && strings.Contains(err.Error(), "doesn't have a resource type") {
		err = nil
	}
	_, err2 := ns.scenario.Cluster.Kubectl(ctx, "delete", "namespace", ns.Name, "--ignore-not-found", "--timeout=1m")
	return errors.Join(err, err2)
}
