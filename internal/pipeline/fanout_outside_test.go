package pipeline_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// hookConfig sends orders to a table without a key, which would show every copy, and to the receiver at URL.
const hookConfig = `
name: orders
source: {consumerGroup: {stream: orders, group: orders_sink, mode: MODE}}
mapping:
  columns:
  - {name: order_id, path: order_id, type: text, required: true}
  - {name: amount, path: amount, type: numeric}
  - {name: customer, path: "@key", type: text}
  - {name: position, path: "@position", type: bigint}
sink:
  fanOut:
  - {name: rows, table: {name: orders}}
  - name: hook
    mapping: {filter: "doc.amount != 7", columns: [{name: order, path: order_id, type: text}]}
    http: {url: "URL", mode: Single, timeout: 2s}
errors: {maxDeliveries: 3}
batch: {maxRows: 20}
`

// A receiver that is down stops the branches in the database too, and then has every event. What it refuses is a dead letter of
// its branch while the table has the row; what the table refuses, the receiver has once although it came three times. What the
// branch's filter leaves out, only the table has. F1, F2.
func TestFanOut_WithAReceiver(t *testing.T) {
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		t.Run("from a group in mode "+string(mode), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.newOrders(mode)
			w.createOrders()
			tk := &taken{}
			answer := func(rw http.ResponseWriter, _ *http.Request, events []cloudEvent) {
				if strings.Contains(string(events[0].Data), "unwanted") {
					http.Error(rw, "unwanted", http.StatusUnprocessableEntity)
					return
				}
				tk.take(events...)
			}
			rec := newReceiver(t, answer)
			configuration := strings.NewReplacer("MODE", string(mode), "URL", rec.URL).Replace(hookConfig)
			p := w.start("one", configuration, config.EnvSourceDatabaseURL+"="+w.dsn)
			p.ready()
			w.order("k", orders(0, 10)...) // of which the filter leaves out one
			becomes(t, "rows", 10, w.orderRows)

			rec.restart(answer, func() {
				w.order("k", orders(10, 20)...)
				eventually(t, func() (bool, string) {
					code, text := p.get("/readyz")
					return code == http.StatusServiceUnavailable && strings.HasPrefix(text, "sink: branch hook: "), text
				})
				if n := w.orderRows(); n != 10 {
					t.Errorf("%d rows while the receiver is down", n)
				}
			})
			becomes(t, "rows", 20, w.orderRows)

			w.order("k", `{"order_id":"unwanted","amount":1}`, `{"order_id":"refused","amount":-1}`, `{"order_id":"last","amount":1}`)
			eventually(t, func() (bool, string) {
				unsettled, dead := w.backlog()
				branches := w.deadLetters()
				return unsettled == 0 && dead == 0 && branches == 2 && w.orderRows() == 22,
					fmt.Sprintf("%d unsettled, %d dead letters of the group, %d of branches, %d rows", unsettled, dead, branches, w.orderRows())
			})
			if got := w.text("select string_agg(branch || ': ' || (entry ->> 'payload'), '; ' order by branch) from millrace_dead_letter"); got !=
				`hook: {"amount": 1, "order_id": "unwanted"}; rows: {"amount": -1, "order_id": "refused"}` {
				t.Errorf("dead letters: %s", got)
			}
			w.exactlyOnce(onceSink{shown: []relation{asRows}}, mode, 22)
			tk.mu.Lock()
			defer tk.mu.Unlock()
			for id, n := range tk.counts {
				if n != 1 {
					t.Errorf("event %s came %d times", id, n)
				}
			}
			if len(tk.counts) != 21 {
				t.Errorf("%d events, want 21", len(tk.counts))
			}
			eventually(t, func() (bool, string) { // counted after the commit, which is what was waited for
				_, text := p.get("/metrics")
				return strings.Contains(text, `millrace_processor_branch_entries_total{branch="hook",result="filtered"} 1`) &&
					strings.Contains(text, `millrace_processor_entries_total{result="dead_letter"} 2`), "the metrics do not show what was filtered and set aside:\n" + text
			})
		})
	}
}

// What the filter leaves out is acknowledged in the transaction that writes the others, so nothing is written twice for it,
// and counted. I1, I2.
func TestFilter_ExactlyOnce(t *testing.T) {
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		t.Run("from a group in mode "+string(mode), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.newOrders(mode)
			w.createOrders()
			text := strings.ReplaceAll(strings.ReplaceAll(ordersConfig, "MODE", string(mode)), "mapping:\n", "mapping:\n  filter: int(doc.amount) % 3 == 0\n")
			c, err := config.Parse([]byte(text + "batch: {maxRows: 10}\n"))
			if err != nil {
				t.Fatal(err)
			}
			all := orders(0, 90)
			all[45] = `{"order_id":"refused","amount":-3}`
			all[50] = `{"amount":"undecodable"}`
			w.order("k", all...)
			line, cuts := w.assembleOrders(c)
			line.run(w)
			eventually(t, func() (bool, string) {
				unsettled, dead := w.backlog()
				return unsettled == 0 && dead == 2, fmt.Sprintf("%d dead letters, %d unsettled", dead, unsettled)
			})
			w.exactlyOnce(onceSink{shown: []relation{asRows}}, mode, 29)
			if n := w.count("select count(*) from orders where amount % 3 <> 0"); n != 0 {
				t.Errorf("%d rows that the filter leaves out", n)
			}
			if n := cuts.Load(); n < 8 {
				t.Errorf("only %d commits, so too few were broken", n)
			}
		})
	}
}
