package pgstream_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
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
	for _, expected := range []int64{pgstream.NoVersion, 29, 31} {
		var another *pgstream.VersionError
		if _, err := pgstream.Append(e.ctx, e.Pool, "accounts", "acme/a", expected, events(1)); !errors.As(err, &another) || another.Present != 30 {
			t.Errorf("an append that expected version %d: %v", expected, err)
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
	if !one[bool](e, "select coalesce(rebuilt = 0, false) from millrace.projections('accounts') where name = 'by-of'") {
		t.Error("documents that are made of all tenants are not made anew")
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

// An open append of one tenant holds back what others append behind it, for everybody who reads the stream: one horizon, whatever table a message is in.
func TestAnOpenAppendOfATenantHoldsReadersBack(t *testing.T) {
	t.Parallel()
	same(t, "while it was open, and afterwards", openAppendOfATenant(newEngine(t), func(*engine) {}), []int64{0, 1, 2})
}

func TestReadersAreSeenToPassATenantWithoutTheGuard(t *testing.T) {
	t.Parallel()
	got := openAppendOfATenant(newEngine(t), func(e *engine) { e.run(`alter table millrace."accounts.acme" disable trigger publish_guard`) })
	if slices.Equal(got, []int64{0, 1, 2}) {
		t.Errorf("got %v: the check is blind", got)
	}
}

// openAppendOfATenant returns how many messages a group was given while the append of position 1 was open, and then the positions that it was given in all.
func openAppendOfATenant(e *engine, prepare func(e *engine)) []int64 {
	e.t.Helper()
	e.accounts()
	e.run("select millrace.add_tenant('accounts', 'acme'), millrace.add_tenant('accounts', 'globex')")
	prepare(e)
	e.group(pgstream.GroupSpec{Stream: "accounts", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "accounts", Group: "g"})
	late := e.begin()
	_, err := pgstream.Append(e.ctx, late, "accounts", "acme/a", pgstream.NoVersion, events(1))
	must(e.t, err)
	_, err = pgstream.Append(e.ctx, e.Pool, "accounts", "globex/a", pgstream.NoVersion, events(1))
	must(e.t, err)
	early := drain(e, c)
	commit(e, late)
	return append([]int64{int64(len(early))}, append(early, drain(e, c)...)...)
}

// Whoever leaves takes its own messages, retries, dead letters, entities and documents along, and nothing of tenants whose names begin alike.
func TestATenantThatLeavesTakesOnlyWhatIsItsOwn(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.sums()
	e.accounts()
	e.run("select millrace.create_projection('accounts', 'by-key', 'sums', 'public.by_key')")
	e.group(pgstream.GroupSpec{Stream: "accounts", Name: "g"})
	tenants := []string{"acm", "acme", "acme-x", "acme.x", "acme0", "acme_x"}
	for _, tenant := range tenants {
		e.run("select millrace.add_tenant('accounts', $1)", tenant)
		for range 3 {
			_, err := pgstream.Append(e.ctx, e.Pool, "accounts", tenant+"/a", pgstream.AnyVersion, events(1))
			must(t, err)
		}
	}
	_, err := pgstream.Append(e.ctx, e.Pool, "accounts", "acme", pgstream.NoVersion, events(1)) // of no tenant
	must(t, err)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "accounts", Group: "g"})
	claim := mustReceive(e, c)
	for i, m := range claim.Messages {
		switch {
		case i%3 == 0:
			must(t, c.Nack(e.ctx, claim.Token, []int64{m.Position}, time.Hour, "later"))
		case i%3 == 1:
			must(t, c.DeadLetter(e.ctx, claim.Token, []int64{m.Position}, "never"))
		}
	}
	must(t, c.Ack(e.ctx, claim.Token))
	const things = `select string_agg(thing || ' ' || key, ', ' order by thing, key collate "C") from (
		select 'message' as thing, key from millrace.accounts union all select 'version', key from millrace_engine.entity
		union all select 'retry', key from millrace_engine.delivery union all select 'dead letter', key from millrace_engine.dead_letter
		union all select 'document', key from public.by_key) x where key <> 'acme/a'`
	others := one[string](e, things)
	if !one[bool](e, "select millrace.drop_tenant('accounts', 'acme')") {
		t.Fatal("there was no tenant")
	}
	if left := one[string](e, strings.Replace(things, "where key <> 'acme/a'", "", 1)); left != others {
		t.Errorf("left are\n%s, not\n%s", left, others)
	}
}

// A tenant that comes when the runtime role is known is as good for it as one that came before.
func TestTheRuntimeRoleUsesTenants(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	role := pgx.Identifier{"tenants_of_" + one[string](e, "select current_database()")}.Sanitize()
	e.run("create role " + role)
	t.Cleanup(func() {
		for _, sql := range []string{"drop owned by ", "drop role "} {
			if _, err := e.Exec(context.Background(), sql+role); err != nil {
				t.Error(err)
			}
		}
	})
	e.accounts()
	e.run("select millrace.add_tenant('accounts', 'before')")
	_, err := schema.Migrate(e.ctx, e.connect(), schema.Options{RuntimeRole: strings.Trim(role, `"`)})
	must(t, err)
	e.run("select millrace.add_tenant('accounts', 'after')")
	tx := e.begin()
	exec(e, tx, "set local role "+role)
	for _, key := range []string{"before/a", "after/a"} {
		_, err := pgstream.Append(e.ctx, tx, "accounts", key, pgstream.NoVersion, events(1))
		must(t, err)
		h, err := pgstream.ReadEntity(e.ctx, tx, "accounts", key, 1, 0, 10)
		must(t, err)
		if len(h) != 1 {
			t.Errorf("%s has %d messages", key, len(h))
		}
	}
	commit(e, tx)
}
