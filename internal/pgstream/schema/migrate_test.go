package schema_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

func TestMain(m *testing.M) { os.Exit(postgres.Main(m, postgres.Options{})) }

func connect(t *testing.T, dsn string) *pgx.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func run(t *testing.T, conn *pgx.Conn, sql string, args ...any) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func one[T any](t *testing.T, conn *pgx.Conn, sql string, args ...any) T {
	t.Helper()
	var v T
	if err := conn.QueryRow(t.Context(), sql, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

func migrate(t *testing.T, conn *pgx.Conn, o schema.Options) []int {
	t.Helper()
	applied, err := schema.Migrate(t.Context(), conn, o)
	if err != nil {
		t.Fatal(err)
	}
	return applied
}

func TestTwentyProcessesApplyEachVersionOnce(t *testing.T) {
	t.Parallel()
	for _, level := range []string{"read committed", "repeatable read", "serializable"} {
		t.Run("where the default isolation level is "+level, func(t *testing.T) {
			t.Parallel()
			dsn := postgres.NewDatabase(t)
			first := connect(t, dsn)
			run(t, first, fmt.Sprintf("do $$ begin execute format('alter database %%I set default_transaction_isolation = %%L', current_database(), '%s'); end $$", level))
			conns := make([]*pgx.Conn, 20)
			for i := range conns {
				conns[i] = connect(t, dsn)
			}
			var mu sync.Mutex
			var all sync.WaitGroup
			times := map[int]int{}
			start := make(chan struct{})
			for _, conn := range conns {
				all.Go(func() {
					<-start
					applied, err := schema.Migrate(t.Context(), conn, schema.Options{})
					mu.Lock()
					defer mu.Unlock()
					if err != nil {
						t.Error(err)
					}
					for _, v := range applied {
						times[v]++
					}
				})
			}
			close(start)
			all.Wait()
			for v := 1; v <= schema.Version(); v++ {
				if times[v] != 1 {
					t.Errorf("version %d was applied %d times", v, times[v])
				}
			}
			if len(times) != schema.Version() {
				t.Errorf("applied %v, want each version up to %d", times, schema.Version())
			}
			if n := one[int](t, first, "select count(*) from millrace_engine.schema_version"); n != schema.Version() {
				t.Errorf("%d versions are recorded", n)
			}
			run(t, first, "select millrace.create_stream('orders')")
		})
	}
}

func TestMigratingAgainChangesNothing(t *testing.T) {
	t.Parallel()
	conn := connect(t, postgres.NewDatabase(t))
	migrate(t, conn, schema.Options{})
	// Anything that is written anew has a new row version.
	state := func() string {
		return one[string](t, conn, `select string_agg(oid || ':' || xmin, ',' order by oid) from (
			select oid, xmin::text from pg_proc where pronamespace in ('millrace'::regnamespace, 'millrace_engine'::regnamespace)
			union all select oid, xmin::text from pg_class where relnamespace in ('millrace'::regnamespace, 'millrace_engine'::regnamespace)
			union all select version::oid, xmin::text from millrace_engine.schema_version) x`)
	}
	run(t, conn, "select millrace.create_stream('orders')")
	before := state()
	if applied := migrate(t, conn, schema.Options{}); len(applied) != 0 {
		t.Errorf("applied %v again", applied)
	}
	if state() != before {
		t.Error("migrating again wrote something")
	}
}

func TestANewerDatabaseIsLeftAlone(t *testing.T) {
	t.Parallel()
	conn := connect(t, postgres.NewDatabase(t))
	migrate(t, conn, schema.Options{})
	run(t, conn, "insert into millrace_engine.schema_version (version) values (9999)")
	run(t, conn, "drop function millrace.stats")
	_, err := schema.Migrate(t.Context(), conn, schema.Options{})
	if !errors.Is(err, schema.ErrNewer) {
		t.Fatalf("%v; want ErrNewer", err)
	}
	for _, word := range []string{"9999", fmt.Sprintf("up to %d", schema.Version()), "newer Millrace"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("the error %q does not say %q", err, word)
		}
	}
	if one[bool](t, conn, "select to_regproc('millrace.stats') is not null") {
		t.Error("a function of the newer database was replaced")
	}
}

func TestFunctionsAreReplacedWhenTheirTextChanges(t *testing.T) {
	t.Parallel()
	conn := connect(t, postgres.NewDatabase(t))
	migrate(t, conn, schema.Options{})
	run(t, conn, "select millrace.create_stream('orders')")
	run(t, conn, "select millrace.create_group('orders', 'g')")
	// As an older binary left them: another text, and its hash.
	run(t, conn, "create or replace function millrace.publish(p_stream text, p_payload jsonb, p_key text default null, p_headers jsonb default null) returns bigint language sql as 'select 0::bigint'")
	run(t, conn, "create or replace function millrace_engine.receive_1(p_group text, p_member text, p_max integer, p_lease_ms bigint, p_ack text) "+
		`returns table (claim text, "position" bigint, key text, headers jsonb, payload jsonb, payload_bytes bytea, created_at timestamptz, attempt integer, expires_at timestamptz)`+
		" language plpgsql as 'begin end'")
	run(t, conn, "update millrace_engine.schema_version set functions = 'old'")
	if applied := migrate(t, conn, schema.Options{}); len(applied) != 0 {
		t.Errorf("applied %v", applied)
	}
	if p := one[int64](t, conn, "select millrace.publish('orders', '{}')"); p != 1 {
		t.Errorf("publish returned %d: it was not replaced", p)
	}
	if n := one[int](t, conn, "select count(*) from millrace.receive('orders', 'g', 'm')"); n != 1 {
		t.Errorf("%d messages received: the stream's copy was not replaced", n)
	}
}

func TestAMigrationThatFailsLeavesNothing(t *testing.T) {
	t.Parallel()
	conn := connect(t, postgres.NewDatabase(t))
	run(t, conn, "create schema millrace_engine; create view millrace_engine.consumer_group as select 1")
	if _, err := schema.Migrate(t.Context(), conn, schema.Options{}); err == nil {
		t.Fatal("it did not fail")
	}
	if one[bool](t, conn, "select to_regclass('millrace_engine.stream') is not null or to_regclass('millrace_engine.schema_version') is not null") {
		t.Error("half a version was left behind")
	}
	run(t, conn, "drop view millrace_engine.consumer_group")
	if applied := migrate(t, conn, schema.Options{}); len(applied) != schema.Version() {
		t.Errorf("applied %v", applied)
	}
}

func TestSQLBuildsTheSameDatabase(t *testing.T) {
	t.Parallel()
	conn := connect(t, postgres.NewDatabase(t))
	run(t, conn, schema.SQL())
	run(t, conn, "select millrace.create_stream('orders')")
	run(t, conn, "select millrace.publish('orders', '{}')")
	if applied := migrate(t, conn, schema.Options{}); len(applied) != 0 {
		t.Errorf("applied %v to what SQL built", applied)
	}
}

func TestEveryFunctionOfThePublicSchemaIsDescribed(t *testing.T) {
	t.Parallel()
	conn := connect(t, postgres.NewDatabase(t))
	migrate(t, conn, schema.Options{})
	rows, err := conn.Query(t.Context(), `select p.oid::regprocedure::text from pg_proc p
		where p.pronamespace = 'millrace'::regnamespace and coalesce(length(obj_description(p.oid, 'pg_proc')), 0) < 20`)
	if err != nil {
		t.Fatal(err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		t.Errorf("%s has no comment", n)
	}
	if n := one[int](t, conn, "select count(*) from pg_proc where pronamespace = 'millrace'::regnamespace"); n < 10 {
		t.Errorf("only %d functions were looked at", n)
	}
}

// Before PostgreSQL 18 a plan with a forbidden scan is so dear that it is compiled first. Receiving, settling and publishing find everything by an index, and are spared
// another setting.
func TestForbiddenScansAreNotCompiled(t *testing.T) {
	t.Parallel()
	conn := connect(t, postgres.NewDatabase(t))
	migrate(t, conn, schema.Options{})
	rows, err := conn.Query(t.Context(), `select p.proname from pg_proc p
		where p.pronamespace in ('millrace'::regnamespace, 'millrace_engine'::regnamespace)
		  and 'enable_seqscan=off' = any (p.proconfig) and not 'jit=off' = any (p.proconfig)`)
	if err != nil {
		t.Fatal(err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	byIndex := regexp.MustCompile(`^(ack|ack_messages|nack|dead_letter|release_deliveries|settle_messages|set_aside|held_positions|open_claims|is_settled|take_over|raise_floor|receive_(parked|template|.*_template)|claim_.*|divert_.*|park|unpark.*|end_expired|` +
		`read|position_at|remember.*|purge_.*|move_due.*|settled_assignment|assign.*|hold_claim|lane_progress|append|entity_version|nobody_writes|next_parked|note_.*|read_template|position_at_template|append_frame_template|read_frames_template)$`)
	for _, n := range names {
		if !byIndex.MatchString(n) {
			t.Errorf("%s forbids sequential scans; set jit = off, too", n)
		}
	}
}

// dropRole drops roles, and first what the first of them was granted in this database.
func dropRole(t *testing.T, dsn, granted string, others ...string) {
	t.Helper()
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		t.Error(err)
		return
	}
	defer func() { _ = conn.Close(ctx) }()
	statements := []string{"drop owned by " + granted + " cascade"}
	for _, r := range others {
		statements = append(statements, "drop role "+r)
	}
	for _, sql := range append(statements, "drop role "+granted) {
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Errorf("%s: %v", sql, err)
		}
	}
}

// pools returns a pool of connections.
func pools(t *testing.T, dsn string) *pgxpool.Pool {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

// as returns a connection of a login role that was granted the runtime role, and of no other power.
func as(t *testing.T, dsn, user string) *pgx.Conn {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(user, "secret")
	return connect(t, u.String())
}

func TestTheRuntimeRoleCanPublishAndConsumeAndNothingElse(t *testing.T) {
	t.Parallel()
	dsn := postgres.NewDatabase(t)
	owner := connect(t, dsn)
	// Roles belong to the server, so their names are this test's own.
	suffix := one[string](t, owner, "select substr(md5(random()::text), 1, 8)")
	role, user, stranger := "runtime_"+suffix, "app_"+suffix, "stranger_"+suffix
	run(t, owner, fmt.Sprintf("create role %s nologin; create role %s login password 'secret' in role %s; create role %s login password 'secret'", role, user, role, stranger))
	t.Cleanup(func() {
		dropRole(t, dsn, role, user, stranger)
	})
	migrate(t, owner, schema.Options{})
	run(t, owner, "select millrace.create_stream('before')")
	migrate(t, owner, schema.Options{RuntimeRole: role})
	if applied := migrate(t, owner, schema.Options{RuntimeRole: role}); len(applied) != 0 {
		t.Errorf("applied %v", applied)
	}
	run(t, owner, "select millrace.create_stream('orders')")
	run(t, owner, "select millrace.create_stream('before')") // mends what the role may not do there yet
	run(t, owner, "select millrace_engine.apply_stream('{\"name\": \"raw\", \"payload_type\": \"Bytes\"}')")
	for _, stream := range []string{"before", "orders", "raw"} {
		run(t, owner, "select millrace.create_group($1, 's', 'Shared'), millrace.create_group($1, 'o', 'Ordered')", stream)
	}

	app := as(t, dsn, user)
	for _, stream := range []string{"before", "orders"} {
		run(t, app, "select millrace.publish($1, '{}', 'k', '{}')", stream)
		run(t, app, "select millrace.publish_batch($1, array['{}', '{}']::jsonb[])", stream)
		run(t, app, "insert into millrace."+stream+" (key, payload) values ('k', '{}')")
		if _, err := app.CopyFrom(t.Context(), pgx.Identifier{"millrace", stream}, []string{"payload"}, pgx.CopyFromRows([][]any{{"{}"}})); err != nil {
			t.Errorf("COPY into %s: %v", stream, err)
		}
	}
	for range 5 {
		run(t, app, "select millrace.publish_bytes('raw', 'x')")
	}
	for _, stream := range []string{"before", "orders", "raw"} {
		for _, group := range []string{"s", "o"} {
			var token string
			var n int
			if err := app.QueryRow(t.Context(), "select min(claim), count(*) from millrace.receive($1, $2, 'm')", stream, group).Scan(&token, &n); err != nil || n != 5 {
				t.Fatalf("receive from %s.%s: %d messages, %v", stream, group, n, err)
			}
			run(t, app, "select millrace.extend($1, 60)", token)
			run(t, app, "select millrace.ack_messages($1, array[1]::bigint[])", token)
			run(t, app, "select millrace.dead_letter($1, array[2]::bigint[], 'bad')", token)
			run(t, app, "select millrace.nack($1, array[3]::bigint[], 0, 'again')", token)
			if group == "s" {
				run(t, app, "select millrace.release($1)", token)
			}
			if err := app.QueryRow(t.Context(), "select min(claim), count(*) from millrace.receive($1, $2, 'm', 100, null, null)", stream, group).Scan(&token, &n); err != nil || n == 0 {
				t.Fatalf("receive from %s.%s again: %d messages, %v", stream, group, n, err)
			}
			run(t, app, "select millrace.ack($1)", token)
			run(t, app, "select millrace.leave($1, $2, 'm')", stream, group)
		}
	}
	run(t, app, "select * from millrace.stats()")
	run(t, app, "select millrace_engine.wait_for(array[1, 2, 3])")
	run(t, app, "select millrace.publish('orders', '{}')") // now that somebody waits
	run(t, app, "listen millrace")
	// What was lost is granted again with what is made anew.
	run(t, owner, "drop sequence millrace_engine.state_1, millrace_engine.notified_1")
	run(t, owner, "select millrace.create_stream('before')")
	run(t, app, "select millrace.publish('before', '{}')")

	for _, sql := range []string{
		"create table millrace.mine (n int)",
		"create table millrace_engine.mine (n int)",
		"create function millrace_engine.clock() returns timestamptz language sql as 'select now()'",
		"create or replace function millrace_engine.clock() returns timestamptz language sql as 'select now()'",
		"drop table millrace.orders",
		"truncate millrace.orders",
		"truncate millrace_engine.claim_0",
		"select nextval('millrace_engine.ring')",
		"select nextval('millrace_engine.live_frame_ring')",
		"alter table millrace.orders add column x int",
		"alter table millrace.orders disable trigger publish_guard",
		"alter sequence millrace_engine.position_1 cache 20",
		"select setval('millrace_engine.position_1', 1)",
		"update millrace.orders set payload = '{}'",
		"delete from millrace.orders",
		`insert into millrace.orders ("position", payload) values (1, '{}')`,
		"insert into millrace_engine.segment_2_0 (payload) values ('{}')",
		"update millrace_engine.claim set nonce = 1",
		"delete from millrace_engine.settlement",
		"update millrace_engine.stream set max_bytes = 1",
		"update millrace_engine.consumer_group set paused = true",
		"delete from millrace_engine.consumer_group",
		"select setval('millrace_engine.ring', 1)",
		"insert into millrace_engine.schema_version (version) values (99)",
		"select millrace.create_stream('mine')",
		"select millrace.create_group('orders', 'mine')",
		"select millrace_engine.drop_stream('orders')",
		"select millrace_engine.drop_group('orders', 's')",
		"select millrace_engine.maintain_stream(1)",
		"select millrace_engine.rotate_ledger(0)",
		"select pg_read_file('postgresql.conf')",
		"create role other",
	} {
		_, err := app.Exec(t.Context(), sql)
		var pg *pgconn.PgError
		if !errors.As(err, &pg) || pg.Code != "42501" {
			t.Errorf("%s: %v; want insufficient privilege", sql, err)
		}
	}

	for _, sql := range []string{
		"select millrace.create_stream('mine')",
		"select millrace.create_stream('orders')",
		"select millrace.create_group('orders', 'mine')",
		"select millrace.trim('orders', 2)",
		"select millrace.reset_group('orders', 's', 'Latest')",
		"select millrace.drop_stream('orders')",
		"select millrace.drop_group('orders', 's')",
		"select millrace.add_tenant('orders', 'a')",
		"select millrace.drop_tenant('orders', 'a')",
		"select millrace.create_projection('orders', 'p', 'millrace.merge_patch')",
		"select millrace.drop_projection('orders', 'p')",
		"select millrace.create_memory('mine')",
		"select millrace.drop_memory('mine')",
	} {
		_, err := app.Exec(t.Context(), sql)
		var pg *pgconn.PgError
		if !errors.As(err, &pg) || pg.Code != "42501" || !strings.Contains(pg.Message, "may publish and consume") || !strings.Contains(pg.Hint, "postgres") {
			t.Errorf("%s: %v; want to be told that it takes the owner", sql, err)
		}
	}

	other := as(t, dsn, stranger)
	for _, sql := range []string{
		"select * from millrace.orders",
		"select millrace.publish('orders', '{}')",
		"select * from millrace.receive('orders', 's', 'm')",
		"select * from millrace_engine.delivery",
		"select * from millrace_engine.claim",
		"select * from millrace.stats()",
	} {
		_, err := other.Exec(t.Context(), sql)
		var pg *pgconn.PgError
		if !errors.As(err, &pg) || pg.Code != "42501" {
			t.Errorf("as a stranger: %s: %v; want insufficient privilege", sql, err)
		}
	}
}
