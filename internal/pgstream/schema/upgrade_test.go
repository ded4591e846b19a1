package schema_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// oldRelease makes a database as version 1 of the schema left it.
func oldRelease(t *testing.T) (dsn string, conn *pgx.Conn) {
	t.Helper()
	dsn = postgres.NewDatabase(t)
	conn = connect(t, dsn)
	sql, err := os.ReadFile("testdata/v1.sql")
	if err != nil {
		t.Fatal(err)
	}
	run(t, conn, string(sql))
	return dsn, conn
}

// oldClient is what the Go client of version 1 sent to the server, word for word.
type oldClient struct {
	t      *testing.T
	conn   *pgx.Conn
	stream string
	id     int32
	group  string
	member string
}

func newOldClient(t *testing.T, conn *pgx.Conn, stream, group, member string) *oldClient {
	t.Helper()
	c := &oldClient{t: t, conn: conn, stream: stream, group: group, member: member}
	var payloadType string
	err := conn.QueryRow(t.Context(), `select s.id, s.payload_type from millrace_engine.stream s
		join millrace_engine.consumer_group g on g.stream_id = s.id where s.name = $1 and g.name = $2`, stream, group).Scan(&c.id, &payloadType)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// receive settles ack, when it is not empty, and returns the next claim and its positions.
func (c *oldClient) receive(limit int, ack string) (token string, positions []int64) {
	c.t.Helper()
	var settled *string
	if ack != "" {
		settled = &ack
	}
	batch := &pgx.Batch{}
	batch.Queue("begin isolation level read committed")
	batch.Queue("set local synchronous_commit = off")
	batch.Queue(fmt.Sprintf(`select claim, "position", key, headers, payload, created_at, attempt, expires_at
		from millrace_engine.receive_%d($1, $2, $3, $4, $5)`, c.id), c.group, c.member, limit, (*int64)(nil), settled).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var p int64
			if err := rows.Scan(&token, &p, nil, nil, nil, nil, nil, nil); err != nil {
				return err
			}
			positions = append(positions, p)
		}
		return rows.Err()
	})
	batch.Queue("commit")
	if err := c.conn.SendBatch(c.t.Context(), batch).Close(); err != nil {
		c.t.Fatalf("the old client receives: %v", err)
	}
	return token, positions
}

// publishesInEveryWay appends five messages and returns their positions.
func (c *oldClient) publishesInEveryWay() []int64 {
	c.t.Helper()
	var positions []int64
	positions = append(positions, one[int64](c.t, c.conn, "insert into "+pgx.Identifier{"millrace", c.stream}.Sanitize()+
		` (key, headers, payload) values ($1, $2, $3) returning "position"`, "k", []byte(`{"h": "1"}`), []byte(`{"n": 1}`)))
	rows, err := c.conn.Query(c.t.Context(), "select * from millrace.publish_batch($1, $2, $3, $4)", c.stream,
		[][]byte{[]byte("1"), []byte("2")}, []*string{nil, nil}, [][]byte{nil, nil})
	if err != nil {
		c.t.Fatal(err)
	}
	batch, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		c.t.Fatalf("the old client publishes a batch: %v", err)
	}
	positions = append(positions, batch...)
	positions = append(positions, one[int64](c.t, c.conn, "select millrace.publish($1, $2::jsonb, 'k', null)", c.stream, "{}"))
	if _, err := c.conn.CopyFrom(c.t.Context(), pgx.Identifier{"millrace", c.stream}, []string{"key", "headers", "payload"},
		pgx.CopyFromRows([][]any{{"k", nil, []byte("{}")}})); err != nil {
		c.t.Fatalf("the old client copies: %v", err)
	}
	return append(positions, positions[3]+1)
}

// doesEverything sends every statement of the old client once. Nothing may fail.
func (c *oldClient) doesEverything() {
	c.t.Helper()
	t, conn := c.t, c.conn
	published := c.publishesInEveryWay()
	var got []int64
	token, first := c.receive(2, "")
	got = append(got, first...)
	token, more := c.receive(3, token)
	got = append(got, more...)
	if !slices.Equal(got, published) {
		t.Fatalf("the old client of %s received %v, published were %v", c.group, got, published)
	}
	run(t, conn, "select millrace.extend($1, $2)", token, 60.0)
	run(t, conn, "select millrace.ack_messages($1, $2)", token, more[:1])
	run(t, conn, "select millrace.dead_letter($1, $2, $3)", token, more[1:2], "bad")
	run(t, conn, "select millrace.nack($1, $2, $3, $4)", token, more[2:], 0.0, "again")
	token, again := c.receive(10, "")
	if !slices.Equal(again, more[2:]) {
		t.Fatalf("after a nack of %v the old client of %s received %v", more[2:], c.group, again)
	}
	run(t, conn, "select millrace.release($1)", token)
	if token, again = c.receive(10, ""); !slices.Equal(again, more[2:]) {
		t.Fatalf("after a release of %v the old client of %s received %v", more[2:], c.group, again)
	}
	tx, err := conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), "select millrace.ack($1)", token); err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	run(t, conn, "select millrace_engine.wait_for(array[$1::integer])", c.id)
	run(t, conn, "select millrace.leave($1, $2, $3)", c.stream, c.group, c.member)
	c.reads()
	c.maintains()
}

func (c *oldClient) reads() {
	c.t.Helper()
	for _, sql := range []string{
		`select stream, "group", mode, lag, in_flight, retrying, dead_letters,
			coalesce(extract(epoch from oldest_age), 0)::float8, ack_floor, members from millrace.stats()`,
		"select summary, statement from millrace_engine.stream_repairs(1)",
		"select millrace_engine.horizon(1), millrace_engine.horizon_holder(1)",
		`select s.partitions, s.payload_type, s.segments, s.retention_policy, s.max_age_seconds, s.max_bytes, s.max_messages, s.max_message_bytes, s.owner,
			s.first_position from millrace_engine.stream s`,
		`select g.mode, g.start, g.ack_wait_ms, g.max_attempts, g.backoff_initial_ms, g.backoff_max_ms, g.failure_policy, g.paused, g.owner
			from millrace_engine.consumer_group g`,
	} {
		run(c.t, c.conn, sql)
	}
}

func (c *oldClient) maintains() {
	c.t.Helper()
	run(c.t, c.conn, "select millrace_engine.maintain_stream($1)", c.id)
	for range 4 {
		run(c.t, c.conn, "select millrace_engine.carry_over(id) from (select id from millrace_engine.consumer_group order by id) g")
		run(c.t, c.conn, "select millrace_engine.truncate_ledger()")
		run(c.t, c.conn, "select millrace_engine.rotate_ledger($1)", int64(1))
	}
}

func TestTheClientOfThePreviousReleaseGoesOnWhileTheDatabaseIsUpgraded(t *testing.T) {
	t.Parallel()
	dsn, conn := oldRelease(t)
	run(t, conn, "select millrace.create_stream('orders')")
	run(t, conn, "select millrace.create_group('orders', 'shared', 'Shared')")
	var clients []*oldClient
	for _, mode := range []string{"Shared", "Ordered"} {
		stream := strings.ToLower(mode) + "_stream"
		run(t, conn, "select millrace_engine.apply_stream($1)", fmt.Sprintf(`{"name": %q, "partitions": 8}`, stream))
		run(t, conn, "select millrace_engine.apply_group($1)", fmt.Sprintf(`{"stream": %q, "name": "g", "mode": %q, "start": {"from": "Earliest"}}`, stream, mode))
		// The statements are prepared on this connection before the upgrade, as a pool's are.
		c := newOldClient(t, connect(t, dsn), stream, "g", "m")
		c.doesEverything()
		clients = append(clients, c)
	}
	migrate(t, conn, schema.Options{})
	for _, c := range clients {
		c.doesEverything()
		newOldClient(t, connect(t, dsn), c.stream, "g", "m").doesEverything()
	}
	// The previous manager goes on reconciling until it is replaced.
	run(t, conn, "select millrace_engine.apply_stream($1)", `{"name": "orders", "partitions": 16, "payload_type": "JSON", "segments": 4,
		"retention_policy": "Limits", "max_age_seconds": 60, "max_bytes": 0, "max_messages": 0, "max_message_bytes": 1048576}`)
	run(t, conn, "select millrace_engine.apply_group($1)", `{"stream": "orders", "name": "shared", "mode": "Shared", "start": {"from": "Earliest"},
		"ack_wait_ms": 10000, "max_attempts": 3, "backoff_initial_ms": 1000, "backoff_max_ms": 2000, "failure_policy": "Block", "paused": false}`)
	run(t, conn, "select millrace_engine.drop_group($1, $2)", "orders", "shared")
	run(t, conn, "select millrace_engine.drop_stream($1, $2)", "orders", true)
}

func TestADatabaseOfThePreviousReleaseLosesNothingInTheUpgrade(t *testing.T) {
	t.Parallel()
	dsn, conn := oldRelease(t)
	type side struct {
		stream, group            string
		old                      *oldClient
		token, retried, other    string
		held, heldRetry, retries []int64
		published                []int64
	}
	var sides []*side
	for _, mode := range []string{"Shared", "Ordered"} {
		s := &side{stream: strings.ToLower(mode) + "_stream", group: "g"}
		run(t, conn, "select millrace_engine.apply_stream($1)", fmt.Sprintf(`{"name": %q, "partitions": 8}`, s.stream))
		run(t, conn, "select millrace_engine.apply_group($1)", fmt.Sprintf(`{"stream": %q, "name": "g", "mode": %q, "start": {"from": "Earliest"}, "ack_wait_ms": 3600000}`, s.stream, mode))
		s.old = newOldClient(t, conn, s.stream, "g", "m")
		for range 10 {
			s.published = append(s.published, s.old.publishesInEveryWay()...)
		}
		// Settled in a ring that is not the current one any more, a dead letter, messages that wait for a retry, and a claim of a retry.
		s.other, _ = s.old.receive(10, "")
		run(t, conn, "select millrace.ack_messages($1, $2)", s.other, s.published[:7])
		run(t, conn, "select millrace.dead_letter($1, $2, 'bad')", s.other, s.published[7:8])
		if mode == "Shared" {
			run(t, conn, "select millrace.nack($1, $2, 0, 'again')", s.other, s.published[8:9])
			s.retried, s.heldRetry = s.old.receive(1, "")
			run(t, conn, "select millrace.nack($1, $2, 0, 'again')", s.other, s.published[9:10])
			s.retries = s.published[9:10]
		} else {
			run(t, conn, "select millrace.ack_messages($1, $2)", s.other, s.published[8:10])
		}
		s.old.maintains()
		sides = append(sides, s)
	}
	for _, s := range sides {
		s.token, s.held = s.old.receive(10, "")
		if s.group == "g" && s.stream == "shared_stream" {
			// Retries come before the log.
			if !slices.Equal(s.held, s.retries) {
				t.Fatalf("held %v, want the retry of %v", s.held, s.retries)
			}
			run(t, conn, "select millrace.nack($1, $2, 0, 'again')", s.token, s.held)
			// A range of the log, held over the upgrade; the retry waits in the delivery table.
			run(t, conn, "update millrace_engine.delivery set visible_at = now() + interval '1 hour' where nonce is null")
			s.token, s.held = s.old.receive(10, "")
		}
		if !slices.Equal(s.held, s.published[10:20]) {
			t.Fatalf("%s: held %v, want %v", s.stream, s.held, s.published[10:20])
		}
		run(t, conn, "select millrace.ack_messages($1, $2)", s.token, s.held[:2])
	}

	if applied := migrate(t, conn, schema.Options{}); len(applied) != schema.Version()-1 {
		t.Fatalf("applied %v", applied)
	}
	run(t, conn, "update millrace_engine.delivery set visible_at = now() where nonce is null")

	pool := pools(t, dsn)
	for _, s := range sides {
		c, err := pgstream.NewConsumer(t.Context(), pool, pgstream.ConsumerConfig{Stream: s.stream, Group: s.group, Member: "m", MaxMessages: 10})
		if err != nil {
			t.Fatal(err)
		}
		// Tokens from before still settle exactly what they held, once.
		if err := c.AckMessages(t.Context(), s.token, s.held[2:3]); err != nil {
			t.Errorf("%s: ack of one message with an old token: %v", s.stream, err)
		}
		if err := c.Ack(t.Context(), s.token); err != nil {
			t.Errorf("%s: ack with an old token: %v", s.stream, err)
		}
		if err := c.Ack(t.Context(), s.token); !errors.Is(err, pgstream.ErrFenced) {
			t.Errorf("%s: a second ack with an old token: %v", s.stream, err)
		}
		if err := c.Ack(t.Context(), s.other); !errors.Is(err, pgstream.ErrFenced) {
			t.Errorf("%s: ack of a claim that had been settled: %v", s.stream, err)
		}
		if s.retried != "" {
			if err := c.Ack(t.Context(), s.retried); err != nil {
				t.Errorf("%s: ack of a retry with an old token: %v", s.stream, err)
			}
		}
		later, err := pgstream.PublishBatch(t.Context(), pool, s.stream, []pgstream.NewMessage{{Payload: []byte("{}")}, {Payload: []byte("{}")}})
		if err != nil {
			t.Fatal(err)
		}
		if want := s.published[len(s.published)-1] + 1; later[0] != want {
			t.Errorf("%s: positions go on with %d, want %d", s.stream, later[0], want)
		}
		want := append(slices.Clone(s.retries), s.published[20:]...)
		want = append(want, later...)
		var got []int64
		token := ""
		for {
			claim, err := c.AckAndTryReceive(t.Context(), token)
			if err != nil {
				t.Fatal(err)
			}
			if claim == nil {
				break
			}
			token = claim.Token
			for _, m := range claim.Messages {
				got = append(got, m.Position)
			}
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s: after the upgrade %v were delivered, want %v", s.stream, got, want)
		}
	}
	all, err := pgstream.Stats(t.Context(), pool)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range all {
		if g.DeadLetters != 1 || g.InFlight != 0 || g.Retrying != 0 || g.Lag != 0 {
			t.Errorf("at the end: %+v", g)
		}
	}
}

func TestAnUpgradeCommitsWholeOrNotAtAll(t *testing.T) {
	t.Parallel()
	dsn, conn := oldRelease(t)
	run(t, conn, "select millrace.create_stream('orders')")
	run(t, conn, "select millrace.create_group('orders', 'g')")
	// The last thing that an upgrade does fails.
	run(t, conn, "create function public.no() returns trigger language plpgsql as $$ begin raise exception 'no'; end $$")
	run(t, conn, "create trigger no before update on millrace_engine.schema_version for each row execute function public.no()")
	if _, err := schema.Migrate(t.Context(), conn, schema.Options{}); err == nil {
		t.Fatal("it did not fail")
	}
	if v := one[int](t, conn, "select max(version) from millrace_engine.schema_version"); v != 1 {
		t.Errorf("version %d", v)
	}
	newOldClient(t, connect(t, dsn), "orders", "g", "m").doesEverything()
	run(t, conn, "drop trigger no on millrace_engine.schema_version")
	migrate(t, conn, schema.Options{})
}

func TestCheckTellsWhoHasToBeUpgraded(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		prepare func(t *testing.T, conn *pgx.Conn)
		want    error
		says    []string
	}{
		{"this release", func(t *testing.T, conn *pgx.Conn) { t.Helper(); migrate(t, conn, schema.Options{}) }, nil, nil},
		{"an empty database", func(*testing.T, *pgx.Conn) {}, schema.ErrOlder, []string{"no Millrace schema"}},
		{"one that is too old", func(t *testing.T, conn *pgx.Conn) {
			t.Helper()
			migrate(t, conn, schema.Options{})
			run(t, conn, "update millrace_engine.schema_version set version = version - 1000")
		}, schema.ErrOlder, []string{"needs 1 or more", "manager"}},
		{"a newer one", func(t *testing.T, conn *pgx.Conn) {
			t.Helper()
			migrate(t, conn, schema.Options{})
			run(t, conn, "insert into millrace_engine.schema_version (version) values (9999)")
		}, schema.ErrNewer, []string{"9999", fmt.Sprintf("up to %d", schema.Version()), "newer Millrace"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			conn := connect(t, postgres.NewDatabase(t))
			c.prepare(t, conn)
			err := schema.Check(t.Context(), conn)
			if !errors.Is(err, c.want) {
				t.Fatalf("%v; want %v", err, c.want)
			}
			for _, words := range c.says {
				if !strings.Contains(err.Error(), words) {
					t.Errorf("the error %q does not say %q", err, words)
				}
			}
		})
	}
	t.Run("the previous release", func(t *testing.T) {
		t.Parallel()
		dsn, conn := oldRelease(t)
		if err := schema.Check(t.Context(), conn); err != nil {
			t.Fatal(err)
		}
		// And it works: this release's publisher and consumer on the previous release's functions. Figures wait for the upgrade.
		run(t, conn, "select millrace.create_stream('orders')")
		for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
			group := strings.ToLower(string(mode))
			run(t, conn, "select millrace.create_group('orders', $1, $2)", group, string(mode))
			pool := pools(t, dsn)
			if _, err := pgstream.PublishBatch(t.Context(), pool, "orders", []pgstream.NewMessage{{Payload: []byte("{}")}}); err != nil {
				t.Error(err)
			}
			c, err := pgstream.NewConsumer(t.Context(), pool, pgstream.ConsumerConfig{Stream: "orders", Group: group})
			if err != nil {
				t.Fatal(err)
			}
			claim, err := c.TryReceive(t.Context())
			if err != nil || claim == nil {
				t.Fatalf("receive: %v, %v", claim, err)
			}
			if err := c.Ack(t.Context(), claim.Token); err != nil {
				t.Error(err)
			}
			if err := c.Leave(t.Context()); err != nil {
				t.Error(err)
			}
		}
	})
}

// A release that changes a function must have a version of its own, or two binaries of one version would replace each other's functions.
func TestAReleasedVersionKeepsItsFunctions(t *testing.T) {
	t.Parallel()
	released, err := os.ReadFile("testdata/v1.sql")
	if err != nil {
		t.Fatal(err)
	}
	if schema.Version() == 1 && !strings.HasSuffix(string(released), schema.SQL()) {
		t.Error("the SQL of version 1 was released and has changed since: add a migration, even an empty one")
	}
	// Migrations are frozen.
	first, err := os.ReadFile("migrations/0001_init.sql")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(released), string(first)) {
		t.Error("migrations/0001_init.sql was released and has changed since")
	}
}

// catalogue describes every object of the two schemas in words that do not depend on the database.
func catalogue(t *testing.T, conn *pgx.Conn) []string {
	t.Helper()
	rows, err := conn.Query(t.Context(), `
		with ours as (select oid from pg_namespace where nspname in ('millrace', 'millrace_engine'))
		select format('column %s.%s %s %s %s %s', a.attrelid::regclass, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
				pg_get_expr(d.adbin, d.adrelid), a.attidentity)
			from pg_attribute a join pg_class c on c.oid = a.attrelid left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
			where c.relnamespace in (table ours) and a.attnum > 0 and not a.attisdropped
		union all select format('relation %s %s %s %s', c.oid::regclass, c.relkind, c.reloptions, obj_description(c.oid, 'pg_class')) from pg_class c
			where c.relnamespace in (table ours)
		union all select format('constraint %s %s %s', x.conrelid::regclass, x.conname, pg_get_constraintdef(x.oid)) from pg_constraint x
			where x.connamespace in (table ours)
		union all select 'index ' || pg_get_indexdef(i.indexrelid) from pg_index i join pg_class c on c.oid = i.indexrelid where c.relnamespace in (table ours)
		union all select format('function %s %s %s', p.oid::regprocedure, pg_get_functiondef(p.oid), obj_description(p.oid, 'pg_proc')) from pg_proc p
			where p.pronamespace in (table ours)
		union all select format('trigger %s %s %s', t.tgrelid::regclass, t.tgenabled, pg_get_triggerdef(t.oid)) from pg_trigger t
			join pg_class c on c.oid = t.tgrelid where c.relnamespace in (table ours) and not t.tgisinternal
		union all select format('sequence %s %s %s %s %s', s.seqrelid::regclass, s.seqmin, s.seqmax, s.seqcache, pg_sequence_last_value(s.seqrelid))
			from pg_sequence s join pg_class c on c.oid = s.seqrelid where c.relnamespace in (table ours)
		union all select format('schema %s %s', n.nspname, obj_description(n.oid, 'pg_namespace')) from pg_namespace n where n.oid in (table ours)
		union all select format('version %s %s', version, case when version = (select max(version) from millrace_engine.schema_version) then functions end)
			from millrace_engine.schema_version`)
	if err != nil {
		t.Fatal(err)
	}
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(all)
	return all
}

func TestSQLAppliedByPsqlBuildsWhatMigrateBuilds(t *testing.T) {
	t.Parallel()
	psql, err := exec.LookPath("psql")
	if err != nil {
		t.Skip("there is no psql on the path")
	}
	byHand, byMigrate := postgres.NewDatabase(t), connect(t, postgres.NewDatabase(t))
	command := exec.CommandContext(t.Context(), psql, "--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1", "--single-transaction", byHand)
	command.Stdin = strings.NewReader(schema.SQL())
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("psql: %v\n%s", err, out)
	}
	migrate(t, byMigrate, schema.Options{})
	mustBeTheSame(t, catalogue(t, connect(t, byHand)), catalogue(t, byMigrate))
}

func TestAnUpgradedDatabaseIsLikeANewOne(t *testing.T) {
	t.Parallel()
	_, old := oldRelease(t)
	fresh := connect(t, postgres.NewDatabase(t))
	// Streams have objects of their own, and their own copies of functions.
	const raw = `select millrace_engine.apply_stream('{"name": "raw", "payload_type": "Bytes"}')`
	run(t, old, "select millrace.create_stream('orders'), millrace.create_group('orders', 'g')")
	run(t, old, raw)
	migrate(t, old, schema.Options{})
	migrate(t, fresh, schema.Options{})
	run(t, fresh, "select millrace.create_stream('orders'), millrace.create_group('orders', 'g')")
	run(t, fresh, raw)
	mustBeTheSame(t, catalogue(t, old), catalogue(t, fresh))
	if repairs := one[int](t, old, "select count(*) from millrace_engine.stream s, millrace_engine.stream_repairs(s.id)"); repairs != 0 {
		t.Errorf("%d things of the streams are to be mended after an upgrade", repairs)
	}
}

func mustBeTheSame(t *testing.T, got, want []string) {
	t.Helper()
	for _, x := range got {
		if !slices.Contains(want, x) {
			t.Errorf("only in the first: %.300s", x)
		}
	}
	for _, x := range want {
		if !slices.Contains(got, x) {
			t.Errorf("only in the second: %.300s", x)
		}
	}
}

func TestAManagerThatDoesNotKnowTheRuntimeRoleGrantsItWhatIsNew(t *testing.T) {
	t.Parallel()
	_, conn := oldRelease(t)
	role := "kept_" + one[string](t, conn, "select substr(md5(random()::text), 1, 8)")
	run(t, conn, "create role "+role+" nologin")
	t.Cleanup(func() { dropRole(t, conn.Config().ConnString(), role) })
	run(t, conn, "insert into millrace_engine.setting (name, value) values ('runtime_role', $1)", role)
	migrate(t, conn, schema.Options{})
	if applied := migrate(t, conn, schema.Options{RuntimeRole: role}); len(applied) != 0 {
		t.Errorf("applied %v", applied)
	}
	rows, err := conn.Query(t.Context(), `select c.oid::regclass::text from pg_class c
		where c.relnamespace = 'millrace_engine'::regnamespace and c.relkind in ('r', 'p') and not has_table_privilege($1, c.oid, 'select')`, role)
	if err != nil {
		t.Fatal(err)
	}
	if hidden, err := pgx.CollectRows(rows, pgx.RowTo[string]); err != nil || len(hidden) > 0 {
		t.Errorf("the runtime role cannot read %v, %v", hidden, err)
	}
	run(t, conn, "set role "+role)
	_, err = conn.Exec(t.Context(), "create table millrace_engine.mine (n int)")
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || pg.Code != "42501" {
		t.Errorf("the runtime role creates a table: %v", err)
	}
}

// Clients of the previous release publish, receive and ack all the time while the database is upgraded. A call that is under way at that moment may fail,
// as at a failover; nothing is lost, and every client goes on.
func TestAnUpgradeUnderLoadLosesNothing(t *testing.T) {
	t.Parallel()
	dsn, conn := oldRelease(t)
	run(t, conn, "select millrace.create_stream('orders')")
	run(t, conn, "select millrace.create_group('orders', 'shared', 'Shared'), millrace.create_group('orders', 'ordered', 'Ordered')")
	run(t, conn, "create table public.sink (grp text, position bigint)")
	var mu sync.Mutex
	published := map[int64]bool{}
	failures := map[string]int{}
	stop := make(chan struct{})
	var sent, handled atomic.Int64
	var load sync.WaitGroup
	loop := func(do func(conn *pgx.Conn) error) {
		own := connect(t, dsn)
		load.Go(func() {
			for row := 0; row < 20; {
				select {
				case <-stop:
					return
				default:
				}
				err := do(own)
				var pg *pgconn.PgError
				switch {
				case err == nil:
					row = 0
				case errors.As(err, &pg):
					row++
					mu.Lock()
					failures[pg.Code+" "+pg.Message]++
					mu.Unlock()
				default:
					t.Error(err)
					return
				}
			}
			t.Error("a client does not go on")
		})
	}
	for range 2 {
		loop(func(own *pgx.Conn) error {
			var p int64
			if err := own.QueryRow(t.Context(), "select millrace.publish('orders', '{}', $1, null)", "k").Scan(&p); err != nil {
				return err
			}
			sent.Add(1)
			mu.Lock()
			defer mu.Unlock()
			published[p] = true
			return nil
		})
	}
	for _, group := range []string{"shared", "shared", "ordered"} {
		member := fmt.Sprintf("%s%d", group, len(failures))
		loop(func(own *pgx.Conn) error {
			rows, _ := own.Query(t.Context(), `select claim, "position" from millrace_engine.receive_1($1, $2, 10, null, null)`, group, member)
			var token string
			var position int64
			var all []int64
			if _, err := pgx.ForEachRow(rows, []any{&token, &position}, func() error { all = append(all, position); return nil }); err != nil || len(all) == 0 {
				return err
			}
			return pgx.BeginFunc(t.Context(), own, func(tx pgx.Tx) error {
				if _, err := tx.Exec(t.Context(), "insert into public.sink select $1, unnest($2::bigint[])", group, all); err != nil {
					return err
				}
				_, err := tx.Exec(t.Context(), "select millrace.ack($1)", token)
				handled.Add(int64(len(all)))
				return err
			})
		})
	}
	until := func(n int64) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); sent.Load() < n || handled.Load() < n; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) || t.Failed() {
				t.Fatalf("%d published, %d handled, failures %v", sent.Load(), handled.Load(), failures)
			}
		}
	}
	until(50)
	migrate(t, conn, schema.Options{})
	until(sent.Load() + 50)
	close(stop)
	load.Wait()
	t.Logf("%d published, failures during the upgrade: %v", len(published), failures)
	for what := range failures {
		// The old function goes on where it waited, and finds the new tables.
		if !strings.HasPrefix(what, "42") && !strings.HasPrefix(what, "MR001") {
			t.Errorf("a client was told: %s", what)
		}
	}
	for _, group := range []string{"shared", "ordered"} {
		pool := pools(t, dsn)
		c, err := pgstream.NewConsumer(t.Context(), pool, pgstream.ConsumerConfig{Stream: "orders", Group: group, Member: "last"})
		if err != nil {
			t.Fatal(err)
		}
		run(t, conn, "select millrace.leave('orders', $1, 'shared0'), millrace.leave('orders', $1, 'ordered0')", group)
		for {
			claim, err := c.TryReceive(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if claim == nil {
				break
			}
			for _, m := range claim.Messages {
				run(t, conn, "insert into public.sink values ($1, $2)", group, m.Position)
			}
			if err := c.Ack(t.Context(), claim.Token); err != nil {
				t.Fatal(err)
			}
		}
		rows, _ := conn.Query(t.Context(), "select position from public.sink where grp = $1 order by 1", group)
		got, err := pgx.CollectRows(rows, pgx.RowTo[int64])
		if err != nil {
			t.Fatal(err)
		}
		if want := slices.Sorted(maps.Keys(published)); !slices.Equal(got, want) {
			t.Errorf("group %s handled %d messages, published were %d", group, len(got), len(want))
		}
	}
}
