package controller_test

import (
	"fmt"
	"testing"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// A Stream becomes a table of segments with its partitions, a ConsumerGroup a group in it, a Processor a Deployment; each follows its resource, and the Deployment the backlog.
func TestSeed_D01_ResourcesBecomeSchemaAndDeployments(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	conn := w.orders(dsn)
	w.readyDeployments()
	p := newProcessor("sink", "sink", autoscaled(1, 5))
	w.create(p)
	w.wantReady(p)
	for what, want := range map[string]int{
		"select count(*)::int from pg_inherits where inhparent = 'millrace.orders'::regclass": 4,
		"select partitions from millrace_engine.stream where name = 'orders'":                 2,
		"select count(*)::int from millrace_engine.consumer_group where name = 'sink'":        1,
	} {
		if got := scalar[int](w, conn, what); got != want {
			t.Errorf("%s: %d, want %d", what, got, want)
		}
	}
	w.kubectl("patch", "stream", "orders", "--type=merge", "-p", `{"spec": {"partitions": 12}}`)
	w.eventually("twelve partitions", func() error {
		info, err := pgstream.DescribeStream(w.Context(), conn, "orders")
		if err == nil && info.Spec.Partitions != 12 {
			err = fmt.Errorf("there are %d", info.Spec.Partitions)
		}
		return err
	})
	w.wantPods(p, 1)
	w.publish(conn, 35)
	w.wantPods(p, 4)
	w.exec(conn, "select millrace.reset_group('orders', 'sink', 'Latest')")
	w.wantPods(p, 1)
}
