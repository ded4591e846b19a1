package seeds

import (
	"slices"
	"testing"
)

// Many messages in one call, with a delay, dedupe keys and a priority; what comes back is in the order of what was given.
func TestSeed_H02_PublishMany(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('orders', p_priorities => 2)")

	first := d.rows(`select * from millrace.publish_batch('orders', array['{"n": 1}', '{"n": 2}', '{"n": 3}']::jsonb[],
		array['a', null, 'b'], p_dedupe_keys => array['r-1', 'r-2', null])`)
	d.same("positions belong to payloads in order", []string{"1|" + first[0], "2|" + first[1], "3|" + first[2]},
		"select payload -> 'n', position from millrace.orders order by position")

	// Repeated in another order, with one that is new: each duplicate gets the position of its own first.
	again := d.rows(`select * from millrace.publish_batch('orders', array['{"n": 2}', '{"n": 4}', '{"n": 1}']::jsonb[],
		p_dedupe_keys => array['r-2', 'r-4', 'r-1'])`)
	if again[0] != first[1] || again[2] != first[0] || slices.Contains(first, again[1]) {
		t.Errorf("positions %v after %v", again, first)
	}
	d.same("messages after duplicates", []string{"4"}, "select count(*) from millrace.orders")

	d.same("delayed messages have no position yet", []string{"null", "null"},
		`select * from millrace.publish_batch('orders', array['{"n": 5}', '{"n": 6}']::jsonb[], p_delay_seconds => 3600)`)
	d.same("messages with a priority are counted by themselves", []string{"1", "2"},
		`select * from millrace.publish_batch('orders', array['{"n": 7}', '{"n": 8}']::jsonb[], p_priority => 1)`)
}
