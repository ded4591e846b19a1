package pipeline_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// outOfOrder counts the rows that were written after a later one of the same customer, in the same lane.
const outOfOrder = `select count(*) from (select position < lag(position) over (partition by customer order by xmin::text::bigint, ctid) as back from orders) x where back`

func (w *world) exec(sql string, args ...any) {
	w.t.Helper()
	if _, err := w.db.Exec(w.ctx, sql, args...); err != nil {
		w.t.Fatal(err)
	}
}

// In a group that parks, the later messages of a key wait for one that fails, undecodable or refused, and those of other keys are written. Then
// the parked ones follow, in order, each once.
func TestParkingGroupGoesOnWithOtherKeys(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeOrdered)
	w.createOrders()
	w.exec("update millrace_engine.consumer_group set failure_policy = 'Park', max_attempts = 0")
	all := orders(0, 60)
	all[20] = `{"order_id":"o-020","amount":-1}`
	for n := range all {
		w.order(fmt.Sprint("customer-", n%3), all[n])
	}
	p := w.start("one", strings.NewReplacer("MODE", "Ordered", "maxDeliveries: 3", "maxDeliveries: 1000").Replace(ordersConfig), config.EnvSourceDatabaseURL+"="+w.dsn)
	p.ready()
	// Of customer-2 those before o-020, which are six, and all of the others.
	becomes(t, "rows", 46, w.orderRows)
	eventually(t, func() (bool, string) {
		n := p.metrics()[`millrace_processor_entries_total{result="rejected"}`]
		return n >= 3, fmt.Sprint(n, " rejections")
	})
	w.order("customer-2", `{"order_id":"o-060","amount":1}`)
	w.order("customer-1", `{"order_id":"o-061","amount":1}`)
	becomes(t, "rows", 47, w.orderRows)
	w.exec("alter table orders drop constraint orders_amount_check")
	becomes(t, "rows", 62, w.orderRows)
	eventually(t, func() (bool, string) {
		unsettled, dead := w.backlog()
		return unsettled+dead == 0, fmt.Sprintf("%d unsettled, %d dead letters", unsettled, dead)
	})
	if n := w.count("select count(distinct order_id) from orders"); n != 62 {
		t.Errorf("%d distinct orders", n)
	}
	if n := w.count(outOfOrder); n != 0 {
		t.Errorf("%d rows were written out of order", n)
	}
}

// What can never be written becomes a dead letter, and its key goes on.
func TestParkingGroupSetsPoisonAside(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeOrdered)
	w.createOrders()
	w.exec("update millrace_engine.consumer_group set failure_policy = 'Park'")
	all := orders(0, 40)
	all[7], all[8] = `{"amount":1}`, `{"amount":2}`
	all[20], all[22] = `{"order_id":"refused","amount":-1}`, `{"order_id":"refused-too","amount":-2}`
	for n := range all {
		w.order(fmt.Sprint("customer-", n%2), all[n])
	}
	w.start("one", strings.ReplaceAll(ordersConfig, "MODE", "Ordered"), config.EnvSourceDatabaseURL+"="+w.dsn).ready()
	eventually(t, func() (bool, string) {
		unsettled, dead := w.backlog()
		rows := w.orderRows()
		return rows == 36 && dead == 4 && unsettled == 0, fmt.Sprintf("%d rows, %d dead letters, %d unsettled", rows, dead, unsettled)
	})
	if n := w.count("select count(distinct order_id) from orders"); n != 36 {
		t.Errorf("%d distinct orders", n)
	}
	if n := w.count(outOfOrder); n != 0 {
		t.Errorf("%d rows were written out of order", n)
	}
}

// Messages of every priority become rows, once, and what fails becomes dead letters, although positions of two priorities may be the same.
func TestExactlyOnce_Priorities(t *testing.T) {
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		t.Run("in a group in mode "+string(mode), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.newOrders(mode)
			w.createOrders()
			if err := pgstream.ApplyStream(w.ctx, w.db, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", Priorities: 3}}); err != nil {
				t.Fatal(err)
			}
			all := orders(0, 90)
			all[30] = `{"order_id":"refused","amount":-1}`
			all[31] = `{"amount":1}`
			for n, payload := range all {
				w.exec("select millrace.publish('orders', $1::text::jsonb, $2, p_priority => $3)", payload, fmt.Sprint("customer-", n%5), n%3)
			}
			w.start("one", strings.ReplaceAll(ordersConfig, "MODE", string(mode)), config.EnvSourceDatabaseURL+"="+w.dsn).ready()
			eventually(t, func() (bool, string) {
				unsettled, dead := w.backlog()
				rows := w.orderRows()
				return rows == 88 && dead == 2 && unsettled == 0, fmt.Sprintf("%d rows, %d dead letters, %d unsettled", rows, dead, unsettled)
			})
			if n := w.count("select count(distinct order_id) from orders"); n != 88 {
				t.Errorf("%d distinct orders", n)
			}
		})
	}
}

// Two messages of different priorities may have the same position. Their ids differ, so a table whose key is @id gets both; with a key of @position alone
// the second would pass for a duplicate of the first, so it is not read, and the pod is not ready and says why.
func TestPrioritiesHaveTheSamePositionsAndOtherIDs(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeShared)
	if err := pgstream.ApplyStream(w.ctx, w.db, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", Priorities: 2}}); err != nil {
		t.Fatal(err)
	}
	configuration := strings.ReplaceAll(ordersConfig, "MODE", "Shared")
	w.exec(`select millrace.publish('orders', '{"order_id":"first"}')`)
	keyed := w.start("one", strings.ReplaceAll(configuration, "name: orders, create", "name: orders, key: [position], create"), config.EnvSourceDatabaseURL+"="+w.dsn)
	keyed.ready()
	becomes(t, "rows", 1, w.orderRows)
	w.exec(`select millrace.publish('orders', '{"order_id":"second"}', p_priority => 1)`)
	keyed.waitFor("the source cannot be read")
	if unsettled, _ := w.backlog(); unsettled != 1 || w.orderRows() != 1 {
		t.Errorf("%d unsettled, %d rows", unsettled, w.orderRows())
	}
	keyed.kill()

	w.exec("drop table orders")
	w.exec("select millrace.reset_group('orders', 'orders_sink', 'Earliest')")
	withID := strings.NewReplacer(`path: "@position", type: bigint`, `path: "@id", type: text`, "name: orders, create", "name: orders, key: [position], create").Replace(configuration)
	w.start("two", withID, config.EnvSourceDatabaseURL+"="+w.dsn).ready()
	becomes(t, "rows", 2, w.orderRows)
	if n := w.count("select count(*) from orders where position in ('1', 'p1-1')"); n != 2 {
		t.Errorf("%d rows have the ids that were expected", n)
	}
}

// A group that has lapsed makes its processors unready at once, with what to do.
func TestLapsedGroupIsNotRead(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeShared)
	w.createOrders()
	p := w.start("one", strings.ReplaceAll(ordersConfig, "MODE", "Shared"), config.EnvSourceDatabaseURL+"="+w.dsn)
	p.ready()
	w.exec("update millrace_engine.consumer_group set lapsed_at = now(), lapse_reason = 'lag 2 is above the limit of 1'")
	w.order("k", orders(0, 3)...)
	if line := p.waitFor("the source cannot be read"); !strings.Contains(fmt.Sprint(line["error"]), "reset_group") {
		t.Errorf("it says %v", line)
	}
	w.exec("select millrace.reset_group('orders', 'orders_sink', 'Earliest')")
	becomes(t, "rows", 3, w.orderRows)
	p.ready()
}
