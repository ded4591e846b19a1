package seeds

import (
	"slices"
	"testing"
)

// E07: partitions for tenants and modules. One key in two tenants is two entities, in tables of their own; the order is one, consumers get both or one, and a tenant can leave.
// An application's role appends, and may be kept to one tenant.
func TestSeed_E07_PartitionsForTenantsAndModules(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('orders', p_versions => true)")
	for _, tenant := range []string{"acme", "globex", "acme.billing"} { // the last is a module of the first
		d.admin("select millrace.add_tenant('orders', $1)", tenant)
	}
	d.admin(`create function public.latest(document jsonb, payload jsonb, headers jsonb) returns jsonb language sql as 'select payload'`)
	d.admin("select millrace.create_projection('orders', 'latest', 'public.latest', 'public.latest_orders')")
	d.admin("select millrace.create_group('orders', 'everybody', 'Ordered')")
	d.admin(`select millrace.create_group('orders', 'acme_only', 'Ordered', p_filter => '{"key_prefix": "acme/"}')`)

	want := []string{"1|1", "1|2", "2|3", "1|4", "1|5"} // version and position: one order over all
	var got []string
	for _, append := range [][2]string{{"acme/order-1", `{"total": 1}`}, {"globex/order-1", `{"total": 2}`}, {"acme/order-1", `{"total": 3}`},
		{"acme.billing/order-1", `{"total": 4}`}, {"order-1", `{"total": 5}`}} {
		got = slices.Concat(got, d.rows("select version, position from millrace.append('orders', $1, array[$2::text::jsonb])", append[0], append[1]))
	}
	if !slices.Equal(got, want) {
		t.Errorf("appended as %v, not %v", got, want)
	}
	d.fails("MR011", "select millrace.append('orders', 'globex/order-1', array['{}'::jsonb], 2)")
	d.fails("MR004", "select millrace.append('orders', 'initech/order-1', array['{}'::jsonb])") // a tenant that nobody has added
	for sql, want := range map[string][]string{
		`select position from millrace."orders.acme" order by 1`:                                                           {"1", "3"},
		`select position from millrace."orders.globex"`:                                                                    {"2"},
		`select position from millrace."orders.acme.billing"`:                                                              {"4"},
		"select version, payload ->> 'total' from millrace.read_entity('orders', 'acme/order-1')":                          {"1|1", "2|3"},
		"select position from millrace.read('orders', 1)":                                                                  {"1", "2", "3", "4", "5"},
		"select key, document ->> 'total' from public.latest_orders where key like '%/order-1' order by key collate \"C\"": {"acme.billing/order-1|4", "acme/order-1|3", "globex/order-1|2"},
		"select tenant, entities from millrace.tenants('orders')":                                                          {"acme|1", "acme.billing|1", "globex|1"},
	} {
		if got := d.rows(sql); !slices.Equal(got, want) {
			t.Errorf("%s: %v, not %v", sql, got, want)
		}
	}
	if got := d.rows("select position from millrace.receive('orders', 'acme_only', 'm')"); !slices.Equal(got, []string{"1", "3"}) {
		t.Errorf("the group of one tenant got %v", got)
	}

	// A tenant leaves, and nothing of it is left; the others' order and groups go on.
	d.admin("select millrace.drop_tenant('orders', 'acme')")
	for sql, want := range map[string][]string{
		"select position from millrace.read('orders', 1)":                       {"2", "4", "5"},
		"select count(*) from public.latest_orders where key like 'acme/%'":     {"0"},
		"select count(*) from millrace.read_entity('orders', 'acme/order-1')":   {"0"},
		"select count(*) from millrace.read_entity('orders', 'globex/order-1')": {"1"},
		"select to_regclass('millrace.\"orders.acme\"')":                        {"null"},
	} {
		if got := d.rows(sql); !slices.Equal(got, want) {
			t.Errorf("after it has left: %s: %v, not %v", sql, got, want)
		}
	}
	if got := d.rows("select version from millrace.append('orders', 'globex/order-1', array['{}'::jsonb], 1)"); !slices.Equal(got, []string{"2"}) {
		t.Errorf("the other tenant's next version is %v", got)
	}
	var all []string
	for {
		rows := d.rows("select position from millrace.receive('orders', 'everybody', 'm', p_auto_ack => true)")
		if len(rows) == 0 {
			break
		}
		all = append(all, rows...)
	}
	slices.Sort(all)
	if !slices.Equal(all, []string{"2", "4", "5", "6"}) {
		t.Errorf("the group of all got %v", all)
	}
}
