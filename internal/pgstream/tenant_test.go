package pgstream_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// One key in two tenants is two entities, in two tables, in one stream: groups and projections get both, and one of them can leave.
func TestTenantsAreApartInOneStream(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.sums()
	plan, err := pgstream.PlanStream(e.ctx, e.Pool, pgstream.StreamSpec{Name: "accounts", Versions: true, Tenants: []string{"acme", "globex"}})
	must(t, err)
	must(t, pgstream.ApplyStream(e.ctx, e.Pool, plan))
	plan, err = pgstream.PlanStream(e.ctx, e.Pool, plan.Spec)
	must(t, err)
	if len(plan.Steps) > 0 {
		t.Errorf("applied, and there is more to do: %+v", plan.Steps)
	}
	e.group(pgstream.GroupSpec{Stream: "accounts", Name: "all", Mode: pgstream.ModeOrdered})
	e.group(pgstream.GroupSpec{Stream: "accounts", Name: "shared"})
	e.group(pgstream.GroupSpec{Stream: "accounts", Name: "acme", Mode: pgstream.ModeOrdered, Filter: pgstream.Filter{KeyPrefix: "acme/"}})
	e.run("select millrace.create_projection('accounts', 'by-key', 'sums', 'public.by_key')")
	e.run("select millrace.create_projection('accounts', 'by-of', 'sums', 'public.by_of', array['of'])")
	var want, acme []int64
	for i := range 30 {
		for _, key := range []string{"acme/a", "globex/a", "a"} {
			a, err := pgstream.Append(e.ctx, e.Pool, "accounts", key, int64(i), []pgstream.NewMessage{{Payload: fmt.Appendf(nil, `{"n": %d, "of": "x"}`, i%12)}})
			must(t, err)
			want = append(want, a.Position)
			if strings.HasPrefix(key, "acme/") {
				acme = append(acme, a.Position)
			}
		}
	}
	for table, n := range map[string]int{`"accounts.acme"`: 30, `"accounts.globex"`: 30, "accounts": 90} {
		if got := one[int](e, "select count(*) from millrace."+table); got != n {
			t.Errorf("millrace.%s has %d messages, not %d", table, got, n)
		}
	}
	for _, key := range []string{"acme/a", "globex/a", "a"} {
		if h, err := pgstream.ReadEntity(e.ctx, e.Pool, "accounts", key, 1, 0, 100); err != nil || len(h) != 30 {
			t.Errorf("%s has %d messages; %v", key, len(h), err)
		}
	}
	if got := one[string](e, "select string_agg(tenant || ' ' || entities, ', ') from millrace.tenants('accounts') where bytes > 0"); got != "acme 1, globex 1" {
		t.Errorf("tenants: %s", got)
	}
	for group, positions := range map[string][]int64{"all": want, "acme": acme} {
		got := drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "accounts", Group: group, MaxMessages: 7}))
		slices.Sort(got)
		if !slices.Equal(got, positions) {
			t.Errorf("group %s got %d messages, not %d", group, len(got), len(positions))
		}
	}
	e.sameAsFold("by_key", "key")
	e.sameAsFold("by_of", "payload ->> 'of'")

	// A tenant leaves while a group has its messages ahead.
	for name, sql := range map[string]string{
		"an unknown tenant":      "select millrace.append('accounts', 'initech/a', array['{}'::jsonb])",
		"a limit":                "select millrace.create_stream('accounts', p_max_messages => 5)",
		"a trim":                 "select millrace.trim('accounts', 5)",
		"no name":                "select millrace.add_tenant('accounts', 'Acme')",
		"a stream without them":  "select millrace.add_tenant('plain', 'acme')",
		"a tenant with a slash":  "select millrace.add_tenant('accounts', 'a/b')",
		"a name that is no name": "select millrace.add_tenant('accounts', null)",
	} {
		e.stream("plain")
		if _, err := e.Exec(e.ctx, sql); sqlState(err) != "MR004" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := pgstream.RebuildStep(e.ctx, e.Pool, "accounts", "by-key", 7); err != nil { // of which acme is a part
		t.Fatal(err)
	}
	if !one[bool](e, "select millrace.drop_tenant('accounts', 'acme')") || one[bool](e, "select millrace.drop_tenant('accounts', 'acme')") {
		t.Error("dropped once and no more")
	}
	if one[int](e, "select count(*) from millrace.accounts where key like 'acme/%'") > 0 || one[int](e, "select count(*) from public.by_key where key like 'acme/%'") > 0 {
		t.Error("something of acme is left")
	}
	e.finish("by-of")
	e.finish("by-key")
	e.sameAsFold("by_key", "key")
	e.sameAsFold("by_of", "payload ->> 'of'")
	if got := drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "accounts", Group: "shared", MaxMessages: 7})); len(got) != 60 {
		t.Errorf("the group got %d messages of the others, not 60", len(got))
	}
	if _, err := pgstream.Append(e.ctx, e.Pool, "accounts", "acme/a", pgstream.AnyVersion, events(1)); sqlState(err) != "" && !strings.Contains(err.Error(), `has no tenant "acme"`) {
		t.Errorf("%v", err)
	}
	// And comes back, as another.
	e.run("select millrace.add_tenant('accounts', 'acme')")
	a, err := pgstream.Append(e.ctx, e.Pool, "accounts", "acme/a", pgstream.NoVersion, events(1))
	must(t, err)
	if a.Version != 1 {
		t.Errorf("it begins with version %d", a.Version)
	}
}
