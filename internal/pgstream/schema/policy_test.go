package schema_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

func apply(t *testing.T, conn *pgx.Conn, p schema.Policy, confirm string) (schema.State, error) {
	t.Helper()
	before, _, err := schema.Apply(t.Context(), conn, p, confirm, schema.Options{})
	return before, err
}

func compare(t *testing.T, conn *pgx.Conn) schema.State {
	t.Helper()
	s, err := schema.Compare(t.Context(), conn, schema.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// firstVersion is oldRelease with a stream in it.
func firstVersion(t *testing.T) *pgx.Conn {
	t.Helper()
	_, conn := oldRelease(t)
	run(t, conn, "select millrace.create_stream('orders')")
	return conn
}

func TestPoliciesDoWhatTheyMayAndNoMore(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		policy      schema.Policy
		empty, old  int // the version afterwards, of a database without a schema and of one of version 1
		saysOfEmpty string
		saysOfOld   string
	}{
		{schema.CreateOrUpdate, schema.Version(), schema.Version(), "now", "now"},
		{schema.Create, schema.Version(), 1, "now", "it is left as it is"},
		{schema.None, 0, 1, "there is no Millrace schema", "lacks 0002_ledger_ring, "},
	} {
		t.Run(string(c.policy), func(t *testing.T) {
			t.Parallel()
			for _, d := range []struct {
				conn *pgx.Conn
				want int
				says string
			}{{connect(t, postgres.NewDatabase(t)), c.empty, c.saysOfEmpty}, {firstVersion(t), c.old, c.saysOfOld}} {
				before, err := apply(t, d.conn, c.policy, "")
				if err != nil {
					t.Fatal(err)
				}
				if got := compare(t, d.conn).Version; got != d.want {
					t.Errorf("from version %d to %d, want %d", before.Version, got, d.want)
				}
				if says := schema.Report(before, c.policy); !strings.Contains(says, d.says) {
					t.Errorf("it reports %q, want %q", says, d.says)
				}
			}
		})
	}
}

func TestWhatIsPrintedForADatabaseBringsItToThisVersion(t *testing.T) {
	t.Parallel()
	for _, conn := range []*pgx.Conn{connect(t, postgres.NewDatabase(t)), firstVersion(t)} {
		role := "printed_" + strings.ToLower(strings.ReplaceAll(one[string](t, conn, "select gen_random_uuid()::text"), "-", "_"))
		run(t, conn, "create role "+role)
		t.Cleanup(func() { dropRole(t, conn.Config().ConnString(), role) })
		state, err := schema.Compare(t.Context(), conn, schema.Options{RuntimeRole: role})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(state.Missing, "0010_versions") {
			t.Errorf("missing are %v", state.Missing)
		}
		run(t, conn, state.SQL())
		after, err := schema.Compare(t.Context(), conn, schema.Options{RuntimeRole: role})
		if err != nil || !after.Current() {
			t.Fatalf("after the printed SQL: %s, %v", after, err)
		}
		if after.SQL() != "" {
			t.Error("there is SQL for a database that lacks nothing")
		}
		run(t, conn, "select millrace.create_stream('orders', p_versions => true)")
		run(t, conn, "set role "+role)
		run(t, conn, "select millrace.publish('orders', '{}')")
		run(t, conn, "reset role")
	}
}

func TestRecreateIsGuarded(t *testing.T) {
	t.Parallel()
	conn := connect(t, postgres.NewDatabase(t))
	name := one[string](t, conn, "select current_database()")
	migrate(t, conn, schema.Options{})
	run(t, conn, "select millrace.create_stream('orders'), millrace.publish('orders', '{}')")
	for _, confirm := range []string{"", "other"} {
		if _, err := apply(t, conn, schema.Recreate, confirm); !errors.Is(err, schema.ErrGuarded) || !strings.Contains(err.Error(), name) {
			t.Errorf("confirmed with %q: %v", confirm, err)
		}
	}
	run(t, conn, `update millrace_engine.stream set owner = '{"cluster": "c", "namespace": "shop", "name": "orders", "uid": "u"}'`)
	if _, err := apply(t, conn, schema.Recreate, name); !errors.Is(err, schema.ErrGuarded) || !strings.Contains(err.Error(), "orders") {
		t.Errorf("a stream of a Kubernetes resource: %v", err)
	}
	if n := one[int](t, conn, "select count(*) from millrace.orders"); n != 1 {
		t.Errorf("%d messages are left", n)
	}
	run(t, conn, "update millrace_engine.stream set owner = null")
	if _, err := apply(t, conn, schema.Recreate, name); err != nil {
		t.Fatal(err)
	}
	if n := one[int](t, conn, "select count(*) from millrace_engine.stream"); n != 0 || !compare(t, conn).Current() {
		t.Errorf("%d streams are left; %s", n, compare(t, conn))
	}
}

func TestADatabaseOfANewerReleaseIsLeftAlone(t *testing.T) {
	t.Parallel()
	conn := connect(t, postgres.NewDatabase(t))
	migrate(t, conn, schema.Options{})
	run(t, conn, "insert into millrace_engine.schema_version (version) values ($1)", schema.Version()+1)
	for _, policy := range []schema.Policy{schema.CreateOrUpdate, schema.Create, schema.None, schema.Recreate} {
		if _, err := apply(t, conn, policy, one[string](t, conn, "select current_database()")); !errors.Is(err, schema.ErrNewer) {
			t.Errorf("%s: %v", policy, err)
		}
	}
}
