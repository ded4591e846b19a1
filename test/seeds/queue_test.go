package seeds

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
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

// One call makes everything that a stream needs. Names are safe: they cannot leave their place, and what belongs to the engine or to the application cannot be
// named. Databases are apart, and so are streams and the groups in them.
func TestSeed_H01_SchemaOnInit(t *testing.T) {
	t.Parallel()
	d, other := newDatabase(t), newDatabase(t)
	d.admin("create table public.orders (id int); insert into public.orders values (42)")
	for _, db := range []*database{d, other} {
		for range 2 { // again is harmless
			db.admin("select millrace.create_stream('orders', p_partitions => 16, p_segments => 4), millrace.create_group('orders', 'billing')")
		}
	}
	for what, want := range map[string]string{
		"select count(*) from pg_inherits where inhparent = 'millrace.orders'::regclass":                                                     "4",
		"select partstrat from pg_partitioned_table where partrelid = 'millrace.orders'::regclass":                                           "108", // by list
		"select count(*) from pg_inherits i join pg_index x on x.indrelid = i.inhrelid where i.inhparent = 'millrace.orders'::regclass":      "4",
		"select count(*) > 0 and bool_and(tgenabled = 'A') from pg_trigger where tgrelid = 'millrace.orders'::regclass and not tgisinternal": "true",
		"select count(*) > 30 from pg_proc where pronamespace = 'millrace'::regnamespace":                                                    "true",
		"select to_regclass('millrace_engine.claim') is not null":                                                                            "true",
	} {
		d.same(what, []string{want}, what)
	}
	// Apart: another database's stream, another stream's group of the same name, and the application's own table.
	d.admin("select millrace.create_stream('user'), millrace.create_group('user', 'billing')") // a word that SQL has for itself
	d.rows("select millrace.publish('orders', '1')")
	d.rows("select millrace.publish('user', '2')")
	d.same("in its own stream", []string{"2"}, "select payload::text from millrace.receive('user', 'billing', 'm')")
	d.same("in its own stream", []string{"1"}, "select payload::text from millrace.receive('orders', 'billing', 'm')")
	other.same("in its own database", []string{"0"}, "select count(*) from millrace.orders")
	if n := valueOf[int](d, d.owner, "select id from public.orders"); n != 42 {
		t.Errorf("the application's table has %d", n)
	}
	for _, name := range []string{"", "Orders", "orders;", `o"; drop table public.orders; --`, "millrace_engine.claim", "../x", "öl", strings.Repeat("x", 49), "_x", "1x"} {
		d.failsIn(d.owner, "MR004", "select millrace.create_stream($1)", name)
		d.failsIn(d.owner, "MR004", "select millrace.create_group('orders', $1)", name)
		d.fails("MR002", "select millrace.publish($1, '1'::jsonb)", name)
	}
	d.fails("42501", "select millrace.create_stream('mine')") // the application owns nothing
}

// A publish is part of the caller's transaction, with the caller's own SQL, and of its savepoints.
func TestSeed_H03_PublishInTheCallersTransaction(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('orders'), millrace.create_stream('audit'), millrace.create_group('orders', 'g')")
	d.admin("create table invoice (id int primary key); grant select, insert on invoice to " + runtimeRole)
	publish := func(id int, end string) {
		t.Helper()
		conn := d.connect(d.appDSN)
		d.rowsOf(conn, "begin")
		d.rowsOf(conn, "insert into invoice values ($1)", id)
		d.rowsOf(conn, "select millrace.publish('orders', to_jsonb($1::int))", id)
		d.rowsOf(conn, "savepoint before_the_audit")
		d.rowsOf(conn, "select millrace.publish('audit', to_jsonb($1::int))", id)
		if id%2 == 0 {
			d.rowsOf(conn, "rollback to before_the_audit")
		}
		d.same("nobody is given what is not committed", []string{}, "select position from millrace.receive('orders', 'g', 'm', p_auto_ack => true)")
		d.rowsOf(conn, end)
	}
	publish(1, "rollback")
	publish(2, "rollback")
	d.same("nothing is left", []string{"0|0|0"}, "select (select count(*) from invoice), (select count(*) from millrace.orders), (select count(*) from millrace.audit)")
	publish(3, "commit")
	d.same("its message", []string{"3"}, "select payload::text from millrace.receive('orders', 'g', 'm', p_auto_ack => true)")
	publish(4, "commit")
	d.same("both are there", []string{"3|4|3"}, `select (select min(id) from invoice), (select max(id) from invoice),
		(select string_agg(payload::text, ' ') from millrace.audit)`)
	d.same("its message", []string{"4"}, "select payload::text from millrace.receive('orders', 'g', 'm', p_auto_ack => true)")
}

// Streams and groups are made, and gone when they are dropped. A group is no no-op: each has all messages and a progress of its own, from where it was told to begin.
func TestSeed_H12_CreateAndDrop(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.fails("MR002", "select millrace.publish('orders', '1'::jsonb)")
	d.admin("select millrace.create_stream('orders')")
	d.fails("MR002", "select * from millrace.receive('orders', 'billing', 'm')")
	d.rows("select millrace.publish('orders', '1')")
	d.admin("select millrace.create_group('orders', 'billing'), millrace.create_group('orders', 'new', p_start => 'Latest')")
	d.rows("select millrace.publish('orders', '2')")
	const receive = "select payload::text from millrace.receive('orders', $1, 'm', p_auto_ack => true)"
	d.same("from the beginning", []string{"1", "2"}, receive, "billing")
	d.same("from now on", []string{"2"}, receive, "new")
	d.same("done with", []string{}, receive, "billing")

	d.rows("select millrace.publish('orders', '3')")
	held := value[string](d, "select claim from millrace.receive('orders', 'billing', 'm')")
	if dropped := valueOf[bool](d, d.owner, "select millrace.drop_group('orders', 'billing')"); !dropped {
		t.Error("there was no group")
	}
	if dropped := valueOf[bool](d, d.owner, "select millrace.drop_group('orders', 'billing')"); dropped {
		t.Error("it was dropped twice")
	}
	d.fails("MR002", receive, "billing")
	d.fails("MR001", "select millrace.delete_messages($1)", held)
	d.same("another group goes on", []string{"3"}, receive, "new")
	d.admin("select millrace.create_group('orders', 'billing')")
	d.same("made again, it begins again", []string{"1", "2", "3"}, receive, "billing")

	d.failsIn(d.owner, "MR005", "select millrace.drop_stream('orders', p_only_if_empty => true)")
	if dropped := valueOf[bool](d, d.owner, "select millrace.drop_stream('orders')"); !dropped {
		t.Error("there was no stream")
	}
	if dropped := valueOf[bool](d, d.owner, "select millrace.drop_stream('orders')"); dropped {
		t.Error("it was dropped twice")
	}
	d.fails("MR002", receive, "billing")
	d.fails("MR002", "select millrace.publish('orders', '1'::jsonb)")
	d.same("nothing of it is left", []string{"0|0"}, `select (select count(*) from pg_class where relnamespace = 'millrace'::regnamespace),
		(select count(*) from millrace_engine.consumer_group)`)
	// What a resource declares is removed with the resource.
	d.admin("select millrace.create_stream('declared'), millrace.create_group('declared', 'g')")
	d.admin(`update millrace_engine.consumer_group set owner = '{"name": "g"}'`)
	d.failsIn(d.owner, "MR007", "select millrace.drop_group('declared', 'g')")
	d.admin(`update millrace_engine.stream set owner = '{"name": "declared"}'`)
	d.failsIn(d.owner, "MR007", "select millrace.drop_stream('declared')")
}

// Ack, delete, and both at once. Each is refused to whoever has lost the messages to somebody else, and to whoever comes twice.
func TestSeed_H13_AckAndDeleteAreFenced(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"Shared", "Ordered"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			d := newDatabase(t)
			d.admin("select millrace.create_stream('orders'), millrace.create_group('orders', 'g', $1), millrace.create_group('orders', 'other')", mode)
			d.rows("select * from millrace.publish_batch('orders', array['1', '2', '3', '4', '5', '6']::jsonb[], array['a', 'a', 'a', 'a', 'a', 'a'])")
			const receive = "select claim from millrace.receive('orders', 'g', $1, p_max => $2, p_lease_seconds => $3) limit 1"

			// Lost: its lease ends, and another member has the messages.
			lost := value[string](d, receive, "slow", 6, 0.05)
			var claim string
			d.eventually("another member takes over", func() (bool, string) {
				rows := d.rows(receive, "quick", 6, 60)
				if len(rows) > 0 {
					claim = rows[0]
				}
				return len(rows) > 0, ""
			})
			for _, sql := range []string{
				"select millrace.ack($1)", "select millrace.ack_messages($1, '{1}')", "select millrace.delete_messages($1, '{2}')", "select millrace.delete_messages($1)",
			} {
				d.fails("MR001", sql, lost)
			}
			d.same("nothing was acked or removed", []string{"6|6"}, `select (select count(*) from millrace.orders), in_flight from millrace.stats('orders') where "group" = 'g'`)

			d.rows("select millrace.ack_messages($1, '{1}')", claim)                                                                      // ack
			d.fails("MR001", "select millrace.ack_messages($1, '{1}')", claim)                                                            // twice
			d.rows("select millrace.delete_messages($1, '{2, 3}')", claim)                                                                // ack and delete
			d.fails("MR001", "select millrace.delete_messages($1, '{2}')", claim)                                                         // twice
			d.fails("MR004", "select millrace.delete_messages($1, '{99}')", claim)                                                        // not its own
			d.same("what was acked is still in the log", []string{"1", "4", "5", "6"}, "select position from millrace.read('orders', 1)") // and what was deleted is not
			d.rows("select millrace.delete_messages($1)", claim)                                                                          // the rest of the claim
			d.fails("MR001", "select millrace.ack($1)", claim)
			d.same("nothing is left to do", []string{"0|0"}, `select lag, in_flight from millrace.stats('orders') where "group" = 'g'`)
			// In a transaction: a rollback undoes both.
			d.rows("select millrace.publish('orders', '7', 'a')")
			claim = value[string](d, receive, "quick", 6, 60)
			tx := d.connect(d.appDSN)
			d.rowsOf(tx, "begin")
			d.rowsOf(tx, "select millrace.delete_messages($1)", claim)
			d.rowsOf(tx, "rollback")
			d.rows("select millrace.ack($1)", claim)
			d.same("the other group's own", []string{"1", "7"}, "select payload::text from millrace.receive('orders', 'other', 'm', p_auto_ack => true)")
		})
	}
}

// Retry takes what is not settled back, by consumer, idle time, ids and limit; it is delivered again after the delay, or is a dead letter after the most attempts.
// What it took is returned, and its former holder is fenced.
func TestSeed_H14_Retry(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('orders'), millrace.create_group('orders', 'g')")
	d.rows("select * from millrace.publish_batch('orders', array['1', '2', '3', '4', '5', '6', '7', '8']::jsonb[])")
	receive := func(member string, most int) (claim string, payloads []string) {
		t.Helper()
		for _, row := range d.rows("select claim, payload::text || '#' || attempt from millrace.receive('orders', 'g', $1, p_max => $2) order by position", member, most) {
			var payload string
			claim, payload, _ = strings.Cut(row, "|")
			payloads = append(payloads, payload)
		}
		return claim, payloads
	}
	hung, _ := receive("hung", 4)
	busy, _ := receive("busy", 4)

	// Idle time: nobody has been so for an hour.
	d.same("by idle time", []string{}, "select position from millrace.retry('orders', 'g', p_min_idle_seconds => 3600)")
	// By consumer, limit and id. What the claim held besides is given back, too, and does not count.
	d.same("by consumer, ids and limit", []string{"2|1|hung|true|0"},
		"select position, attempts, member, due_at <= clock_timestamp(), priority from millrace.retry('orders', 'g', p_member => 'hung', p_positions => '{4, 2}', p_max => 1)")
	d.fails("MR001", "select millrace.ack($1)", hung)
	claim, got := receive("next", 10)
	if first, rest := got, []string{"1#1", "3#1", "4#1"}; !slices.Equal(first, []string{"2#2"}) {
		t.Errorf("delivered %v", got)
	} else {
		d.rows("select millrace.ack($1)", claim)
		if _, got = receive("next", 10); !slices.Equal(got, rest) {
			t.Errorf("then %v, want %v", got, rest)
		}
	}
	// The other member was left alone.
	d.rows("select millrace.ack_messages($1, '{5, 6}')", busy)

	// A delay; then the same without waiting for it.
	d.same("with a delay", []string{"1|1|true", "3|1|true", "4|1|true"},
		"select position, attempts, due_at > clock_timestamp() + interval '59 minutes' from millrace.retry('orders', 'g', p_member => 'next', p_delay_seconds => 3600)")
	if _, got = receive("next", 10); len(got) > 0 {
		t.Errorf("delivered before its delay: %v", got)
	}
	d.same("what waits is made due", []string{"1|null", "3|null", "4|null"}, "select position, member from millrace.retry('orders', 'g', p_positions => '{1, 3, 4}')")
	claim, got = receive("next", 2)
	other, last := receive("other", 1)
	if got = slices.Concat(got, last); !slices.Equal(got, []string{"1#2", "3#2", "4#2"}) {
		t.Errorf("delivered %v", got)
	}
	// Those that had all their attempts are dead letters; it is the holder's claim as a whole that ends.
	d.same("by most attempts", []string{"3|2|true"},
		"select position, attempts, due_at is null from millrace.retry('orders', 'g', 'next', p_positions => '{3, 4}', p_max_attempts => 2, p_reason => 'enough')")
	d.same("dead letters", []string{"3|2|enough"}, "select position, attempts, reason from millrace.dead_letters('orders', 'g')")
	d.fails("MR001", "select millrace.ack_messages($1, '{1}')", claim)
	if claim, got = receive("next", 10); !slices.Equal(got, []string{"1#2"}) {
		t.Errorf("delivered %v", got)
	}
	d.rows("select millrace.ack($1)", claim)
	d.rows("select millrace.ack($1)", other)
	d.rows("select millrace.ack($1)", busy)
	d.same("nothing is left to do", []string{"0|0|0|1"}, "select lag, in_flight, retrying, dead_letters from millrace.stats('orders')")

	// In order, where order matters: the claim as a whole.
	d.admin("select millrace.create_group('orders', 'o', 'Ordered')")
	old := value[string](d, "select claim from millrace.receive('orders', 'o', 'hung') limit 1")
	d.same("all of it", []string{"8"}, "select count(*) from millrace.retry('orders', 'o', p_positions => '{3}')")
	d.fails("MR001", "select millrace.ack($1)", old)
	d.rows("select millrace.leave('orders', 'o', 'hung')")
	d.same("in order", []string{"1#2", "2#2", "3#2", "4#2", "5#2", "6#2", "7#2", "8#2"}, "select payload::text || '#' || attempt from millrace.receive('orders', 'o', 'next')")
	d.fails("MR004", "select * from millrace.retry('orders', 'o', p_max_attempts => 1)")
	d.fails("MR004", "select * from millrace.retry('orders', 'g', p_max => 0)")
	d.fails("MR002", "select * from millrace.retry('orders', 'none')")
}

// Statistics and depths, of one stream or of many in one call, at a cost that does not depend on how many messages there are.
func TestSeed_H15_StatsAndDepths(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	for _, s := range []string{"orders", "parcels", "letters"} {
		d.admin("select millrace.create_stream($1), millrace.create_group($1, 'g')", s)
	}
	const many = 60_000
	d.rows("insert into millrace.orders (payload) select to_jsonb(n) from generate_series(1, $1) n", many)
	d.rows("insert into millrace.parcels (payload) values ('1'), ('2')")
	d.rows("select claim from millrace.receive('orders', 'g', 'm', p_max => 10)")
	d.rows("select millrace.publish('letters', '1', p_delay_seconds => 3600)")

	conn := d.connect(d.appDSN)
	d.rowsOf(conn, "begin") // counts what the transaction reads
	for what, c := range map[string]struct {
		sql  string
		want []string
	}{
		"depths of all":   {"select stream, messages from millrace.stream_stats() order by stream", []string{"letters|0", "orders|60000", "parcels|2"}},
		"depths of some":  {"select stream, messages from millrace.stream_stats() where stream = any ('{parcels,orders}') order by stream", []string{"orders|60000", "parcels|2"}},
		"one stream":      {"select messages, first_position, last_position, delayed, bytes > 0 from millrace.stream_stats('orders')", []string{"60000|1|60000|0|true"}},
		"what is delayed": {"select messages, delayed from millrace.stream_stats('letters')", []string{"0|1"}},
		"groups":          {`select stream, "group", lag, in_flight from millrace.stats() order by stream`, []string{"letters|g|0|0", "orders|g|59990|10", "parcels|g|2|0"}},
	} {
		if got := d.rowsOf(conn, c.sql); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", what, got, c.want)
		}
	}
	read := valueOf[int64](d, conn, `select coalesce(sum(pg_stat_get_xact_tuples_returned(c.oid) + pg_stat_get_xact_tuples_fetched(c.oid)), 0)::bigint
		from pg_class c where c.relnamespace = 'millrace_engine'::regnamespace and c.relname ~ '^segment_'`)
	if read > many/10 {
		t.Errorf("%d rows of the log were read", read)
	}
}

// Trim by length and by age; exactly, or only what frees whole segments.
func TestSeed_H16_Trim(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('orders')")
	d.rows("insert into millrace.orders (payload) select to_jsonb(n) from generate_series(1, 100) n")
	left := func(what, want string) {
		t.Helper()
		d.same(what, []string{want}, "select count(*) || ' from ' || min(position) from millrace.read('orders', (select first_position from millrace.stream_stats('orders')), p_max => 1000)")
	}
	trim := func(what, arguments string, want int64) {
		t.Helper()
		if first := valueOf[int64](d, d.owner, "select millrace.trim('orders', "+arguments+")"); first != want {
			t.Errorf("%s: %d is the first that is left, want %d", what, first, want)
		}
	}
	trim("approximately, within a segment", "p_max_messages => 10, p_exact => false", 1)
	left("a segment is left whole", "100 from 1")
	trim("exactly, by length", "p_max_messages => 10", 91)
	left("the newest ten", "10 from 91")
	d.fails("MR008", "select * from millrace.read('orders', 90)")
	d.rows("select pg_sleep(0.05)") // so that messages have ages
	d.rows("insert into millrace.orders (payload) values ('101')")
	age := value[float64](d, "select extract(epoch from clock_timestamp() - created_at)::float8 from millrace.orders where position = 101")
	trim("exactly, by age", fmt.Sprintf("p_max_age_seconds => %f", age+0.04), 101)
	left("the newest one", "1 from 101")
	trim("a longer age", "p_max_age_seconds => 3600", 101)
	d.fails("42501", "select millrace.trim('orders', p_max_messages => 0)") // for operators only
	d.failsIn(d.owner, "MR004", "select millrace.trim('orders')")
}

// Limits and features can be asked for, and they are true: what is at a limit is possible, and what is above it is not.
func TestSeed_H17_LimitsAndFeatures(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('orders'), millrace.create_stream('accounts', p_versions => true, p_dedupe_window_seconds => 0, p_partitions => 3), millrace.create_stream('tasks', p_priorities => 3), millrace.create_stream('runs', p_frames => '{}')")
	d.admin("select millrace.create_group('orders', 'g')")
	d.admin("update millrace_engine.stream set max_message_bytes = 1000 where name = 'tasks'")
	feature := func(name, stream string) string {
		t.Helper()
		return value[string](d, "select value::text from millrace.features(nullif($2, '')) where name = $1", name, stream)
	}
	for _, name := range []string{"batching", "dead_letters", "ordering", "trimming", "retry", "notifications", "delays", "dedupe", "priorities", "transactions", "versions", "frames"} {
		if feature(name, "") != "true" {
			t.Errorf("%s is %s", name, feature(name, ""))
		}
	}
	for _, c := range []struct{ name, stream, want string }{
		{"versions", "accounts", "true"}, {"versions", "orders", "false"}, {"frames", "runs", "true"}, {"frames", "orders", "false"}, {"dedupe", "accounts", "false"}, {"dedupe", "orders", "true"},
		{"priorities", "tasks", "true"}, {"priorities", "orders", "false"}, {"max_priorities", "tasks", "3"}, {"max_partitions", "accounts", "3"},
		{"max_message_bytes", "tasks", "1000"}, {"max_message_bytes", "orders", "1048576"},
	} {
		if got := feature(c.name, c.stream); got != c.want {
			t.Errorf("%s of %s is %s, want %s", c.name, c.stream, got, c.want)
		}
	}
	d.fails("MR002", "select * from millrace.features('none')")
	// At the limit, and one above it.
	for name, sql := range map[string]string{
		"max_batch_size":       "select * from millrace.publish_batch('orders', array_fill('1'::jsonb, array[$1::int])) limit 1",
		"max_receive_size":     "select position from millrace.receive('orders', 'g', 'm', p_max => $1::int) limit 1",
		"max_append_size":      "select version from millrace.append('accounts', 'key ' || $1::int, array_fill('1'::jsonb, array[$1::int]))",
		"max_dedupe_key_bytes": "select millrace.publish('orders', '1', p_dedupe_key => repeat('x', $1::int))",
		"max_serialized_keys":  "select * from millrace.publish_batch('orders', array_fill('1'::jsonb, array[$1::int]), (select array_agg('k' || n) from generate_series(1, $1::int) n), p_serialize => true)",
		"max_priorities":       "select millrace.create_stream('urgent' || $1::int, p_priorities => $1::int)",
		"max_partitions":       "select millrace.create_stream('wide' || $1::int, p_partitions => $1::int)",
	} {
		most, err := strconv.Atoi(feature(name, ""))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, err := query(d.ctx, d.owner, sql, most); err != nil {
			t.Errorf("%s: %d: %v", name, most, err)
		}
		d.failsIn(d.owner, "MR004", sql, most+1)
	}
	// A payload's size is that of the value in the database, with a few bytes around the text.
	d.rows("select millrace.publish('tasks', to_jsonb(repeat('x', 980)))")
	d.fails("MR004", "select millrace.publish('tasks', to_jsonb(repeat('x', 1001)))")
}
