package pipeline_test

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// SIGTERM: the scout's place is free at once, nothing more is claimed, nobody listens, and what was read is written and acked before the process ends. Then nothing of it is
// left: no claim, no member, no session.
func TestSeed_H18_ShutdownInOrder(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeOrdered)
	if _, err := w.db.Exec(w.ctx, "create table orders (order_id text, amount numeric, customer text, position bigint)"); err != nil {
		t.Fatal(err)
	}
	p := w.start("one", strings.ReplaceAll(ordersConfig, "MODE", "Ordered"), config.EnvSourceDatabaseURL+"="+w.dsn)
	p.ready()
	const (
		scouts   = "select count(*) from millrace_engine.scout where expires_at > clock_timestamp()"
		held     = `select in_flight::int from millrace.stats('orders')`
		rest     = `select lag::int from millrace.stats('orders')`
		sessions = "select count(*) from pg_stat_activity where datname = current_database() and application_name like 'millrace%' and pid <> pg_backend_pid()"
		// The listener says so, or has asked whether it hears itself.
		listeners = "select count(*) from pg_stat_activity where datname = current_database() and (query ilike 'listen millrace%' or query ilike '%notify millrace, ''probe%') and pid <> pg_backend_pid()"
	)
	becomes(t, "scouts", 1, func() int { return w.count(scouts) })
	becomes(t, "listeners", 1, func() int { return w.count(listeners) })
	conn := w.connect()
	if _, err := conn.Exec(w.ctx, "begin; lock table orders in share mode"); err != nil {
		t.Fatal(err)
	}
	publish := func(id int) {
		t.Helper()
		if _, err := w.db.Exec(w.ctx, "select millrace.publish('orders', jsonb_build_object('order_id', $1::text, 'amount', 1), $1)", fmt.Sprint(id)); err != nil {
			t.Fatal(err)
		}
	}
	publish(1)
	becomes(t, "messages held", 1, func() int { return w.count(held) })
	p.signal(syscall.SIGTERM)
	p.waitFor("stopping")
	becomes(t, "scouts while it drains", 0, func() int { return w.count(scouts) })
	becomes(t, "listeners while it drains", 0, func() int { return w.count(listeners) })
	publish(2)
	if n := w.count("select count(*) from orders"); n != 0 || w.count(held) != 1 {
		t.Errorf("%d rows, %d held, although the table is locked", n, w.count(held))
	}
	if _, err := conn.Exec(w.ctx, "rollback"); err != nil {
		t.Fatal(err)
	}
	if code := p.exited(patience); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if rows, open, behind := w.count("select count(*) from orders where order_id = '1'"), w.count(held), w.count(rest); rows != 1 || open != 0 || behind != 1 {
		t.Errorf("%d rows, %d held, %d left for others; want 1, 0, 1", rows, open, behind)
	}
	if n := w.count("select count(*) from millrace_engine.member"); n != 0 {
		t.Errorf("%d members are left", n)
	}
	becomes(t, "sessions", 0, func() int { return w.count(sessions) })
}

// Several instances that start at once on an empty database: each migrates or finds it done, and all of them work. One that is told to stop drains, and the others go on; nothing
// is lost or written twice.
func TestSeed_T11_SeveralInstances(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var all []*processor
	for n := range 3 {
		all = append(all, w.start(fmt.Sprintf("member-%d", n), w.configText()))
	}
	for _, p := range all {
		p.ready()
		p.waitFor("migrations applied")
	}
	for n := range 200 {
		w.add(position(n, n))
		if n == 100 {
			all[0].signal(syscall.SIGTERM)
		}
	}
	if code := all[0].exited(patience); code != 0 {
		t.Errorf("exit code %d of the one that drained", code)
	}
	becomes(t, "rows", 200, w.rows)
	becomes(t, "pending entries", 0, w.pending)
}
