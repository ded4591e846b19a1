package pgstream_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func TestABatchIsStoredInTheOrderOfTheArray(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	const n = 2000
	var ms []pgstream.NewMessage
	for i := range n {
		m := pgstream.NewMessage{Payload: fmt.Appendf(nil, `{"n": %d}`, i)}
		if i%3 == 0 {
			key := fmt.Sprintf("k%d", n-i) // not in the order of the array
			m.Key = &key
		}
		if i%5 == 0 {
			m.Headers = fmt.Appendf(nil, `{"h": %d}`, i)
		}
		ms = append(ms, m)
	}
	first, err := pgstream.PublishBatch(e.ctx, e, "orders", ms)
	must(t, err)
	for i, p := range first {
		if p != int64(i+1) {
			t.Fatalf("message %d has position %d", i, p)
		}
	}
	if wrong := one[int](e, `select count(*) from millrace.orders where (payload ->> 'n')::int <> position - 1
			or key is distinct from case when (position - 1) % 3 = 0 then 'k' || 2000 - (position - 1) end
			or headers is distinct from case when (position - 1) % 5 = 0 then jsonb_build_object('h', position - 1) end`); wrong != 0 {
		t.Errorf("%d messages have another message's place, key or headers", wrong)
	}
	must(t, pgstream.PublishCopy(e.ctx, e, "orders", ms))
	if wrong := one[int](e, `select count(*) from millrace.orders where position > 2000 and (payload ->> 'n')::int <> position - 2001`); wrong != 0 {
		t.Errorf("COPY: %d messages have another message's place", wrong)
	}
	if none, err := pgstream.PublishBatch(e.ctx, e, "orders", nil); err != nil || none != nil {
		t.Errorf("an empty batch: %v, %v", none, err)
	}
}

func TestPublishingIsPartOfTheCallersTransaction(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})

	tx := e.begin()
	gone := publishIn(e, tx, "orders")
	rollback(e, tx)
	kept := publishIn(e, e, "orders")
	if kept <= gone {
		t.Fatalf("position %d follows %d", kept, gone)
	}
	same(t, "after a rollback", drain(e, c), []int64{kept})

	tx = e.begin()
	before := publishIn(e, tx, "orders")
	exec(e, tx, "savepoint s")
	publishIn(e, tx, "orders")
	exec(e, tx, "rollback to s")
	after := publishIn(e, tx, "orders")
	same(t, "while the transaction is open", drain(e, c), nil)
	commit(e, tx)
	same(t, "after a savepoint was rolled back", drain(e, c), []int64{before, after})
}

func TestTheFunctionKeepsKeyAndHeaders(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "raw", PayloadType: pgstream.PayloadBytes}}))
	e.run(`select millrace.publish('orders', '{"n": 1}', 'k', '{"h": 1}')`)
	e.run(`select millrace.publish_bytes('raw', '{"n": 1}', 'k', '{"h": 1}')`)
	for _, stored := range []string{"payload from millrace.orders", "convert_from(payload, 'UTF8')::jsonb from millrace.raw"} {
		if got := one[string](e, "select key || ' ' || headers || ' ' || "+stored); got != `k {"h": 1} {"n": 1}` {
			t.Errorf("%s: %s", stored, got)
		}
	}
}

func TestAStreamOfBytesKeepsBytes(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	spec := pgstream.StreamSpec{Name: "raw", PayloadType: pgstream.PayloadBytes}
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: spec}))
	e.group(pgstream.GroupSpec{Stream: "raw", Name: "g"})
	e.group(pgstream.GroupSpec{Stream: "raw", Name: "o", Mode: pgstream.ModeOrdered})
	payload := []byte{0, 1, 0xff, '{', '\n', 0}
	key := "k"
	_, err := pgstream.Publish(e.ctx, e, "raw", pgstream.NewMessage{Key: &key, Payload: payload, Headers: []byte(`{"a": 1}`)})
	must(t, err)
	_, err = pgstream.PublishBatch(e.ctx, e, "raw", []pgstream.NewMessage{{Payload: payload}, {Key: &key, Payload: []byte{}}})
	must(t, err)
	must(t, pgstream.PublishCopy(e.ctx, e, "raw", []pgstream.NewMessage{{Payload: payload}}))
	e.run(`select millrace.publish_bytes('raw', $1, 'k', '{"b": 2}')`, payload)
	for _, group := range []string{"g", "o"} {
		c := e.consumer(pgstream.ConsumerConfig{Stream: "raw", Group: group, MaxMessages: 10})
		claim := mustReceive(e, c)
		if len(claim.Messages) != 5 {
			t.Fatalf("group %s: %d messages, want 5", group, len(claim.Messages))
		}
		for i, m := range claim.Messages {
			want := string(payload)
			if i == 2 {
				want = ""
			}
			if string(m.Payload) != want {
				t.Errorf("group %s, message %d: payload %x, want %x", group, i, m.Payload, want)
			}
		}
		if h := string(claim.Messages[0].Headers); h != `{"a": 1}` || *claim.Messages[0].Key != "k" {
			t.Errorf("headers %s, key %v", h, claim.Messages[0].Key)
		}
		// The copies of an exception keep them too.
		if group == "g" {
			must(t, c.Nack(e.ctx, claim.Token, positions(claim)[:1], 0, "again"))
			if again := mustReceive(e, c); string(again.Messages[0].Payload) != string(payload) {
				t.Errorf("payload after a nack: %x", again.Messages[0].Payload)
			}
		}
		must(t, c.DeadLetter(e.ctx, claim.Token, positions(claim)[1:2], "bad"))
	}
	if n := one[int](e, "select count(*) from millrace_engine.dead_letter where payload is null and payload_bytes = $1", payload); n != 2 {
		t.Errorf("%d dead letters kept their bytes, want 2", n)
	}
}

func TestWhatCannotBePublishedIsRefusedWithAnAnswer(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", MaxMessageBytes: 1000}}))
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "raw", PayloadType: pgstream.PayloadBytes, MaxMessageBytes: 1000}}))
	large := strings.Repeat("x", 2000)
	for _, c := range []struct {
		name, sql string
		code      string
		hint      string // a word of it
	}{
		{"a null payload", `select millrace.publish('orders', null)`, "MR004", "'null'::jsonb"},
		{"a null payload of bytes", `select millrace.publish_bytes('raw', null)`, "MR004", ""},
		{"headers that are an array", `select millrace.publish('orders', '{}', null, '[1]')`, "MR004", ""},
		{"headers that are a string", `select millrace.publish('orders', '{}', null, '"x"')`, "MR004", ""},
		{"JSON in a stream of bytes", `select millrace.publish('raw', '{}'::jsonb)`, "MR004", "publish_bytes"},
		{"bytes in a stream of JSON", `select millrace.publish_bytes('orders', 'x'::bytea)`, "MR004", "millrace.publish or publish_batch."},
		{"an unknown stream", `select millrace.publish('nothing', '{}')`, "MR002", "create_stream"},
		{"an unknown stream of bytes", `select millrace.publish_bytes('nothing', 'x'::bytea)`, "MR002", "create_stream"},
		{"a batch for an unknown stream", `select millrace.publish_batch('nothing', array['{}']::jsonb[])`, "MR002", "create_stream"},
		{"a payload that is too large", fmt.Sprintf(`select millrace.publish('orders', '"%s"')`, large), "MR004", "maxMessageBytes"},
		{"bytes that are too large", fmt.Sprintf(`select millrace.publish_bytes('raw', '%s'::bytea)`, large), "MR004", "maxMessageBytes"},
		{"a batch with one payload that is too large", fmt.Sprintf(`select millrace.publish_batch('orders', array['{}', '"%s"']::jsonb[])`, large), "MR004", "maxMessageBytes"},
		{"a batch with a null payload", `select millrace.publish_batch('orders', array['{}', null]::jsonb[])`, "MR004", "'null'::jsonb"},
		{"a batch with too few keys", `select millrace.publish_batch('orders', array['{}', '{}']::jsonb[], array['k'])`, "MR004", ""},
		{"a batch with too few dedupe keys", `select millrace.publish_batch('orders', array['{}', '{}']::jsonb[], p_dedupe_keys => array['k'])`, "MR004", "null"},
		{"a dedupe key that is too long", fmt.Sprintf(`select millrace.publish('orders', '{}', p_dedupe_key => '%s')`, large), "MR004", "hash"},
		{"serialize without a key", `select millrace.publish('orders', '{}', p_serialize => true)`, "MR004", "key"},
		{"serialize of a batch without a key", `select millrace.publish_batch('orders', array['{}', '{}']::jsonb[], array['k', null], p_serialize => true)`, "MR004", "key"},
		{"serialize of too many keys", `select millrace.publish_batch('orders', array_fill('{}'::jsonb, array[1001]),
			array(select i::text from generate_series(1, 1001) i), p_serialize => true)`, "MR004", "several transactions"},
		{"a priority that the stream has not", `select millrace.publish('orders', '{}', p_priority => 1)`, "MR004", "only priority 0"},
		{"a negative priority", `select millrace.publish('orders', '{}', p_priority => -1)`, "MR004", "only priority 0"},
		{"a priority of a batch", `select millrace.publish_batch('orders', array['{}']::jsonb[], p_priority => 9)`, "MR004", "only priority 0"},
		{"a batch with bad headers", `select millrace.publish_batch('orders', array['{}']::jsonb[], null, array['[]']::jsonb[])`, "MR004", ""},
		{"a batch that is too long", `select millrace.publish_batch('orders', array_fill('{}'::jsonb, array[100001]))`, "MR004", "Split"},
		{"a plain INSERT of null", `insert into millrace.orders (payload) values (null)`, "23502", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := e.Exec(e.ctx, c.sql)
			if sqlState(err) != c.code || !strings.Contains(hint(err), c.hint) {
				t.Errorf("error %v (hint %q); want SQLSTATE %s and %q in the hint", err, hint(err), c.code, c.hint)
			}
		})
	}
	if n := one[int](e, "select count(*) from millrace.orders") + one[int](e, "select count(*) from millrace.raw"); n != 0 {
		t.Errorf("%d messages were stored all the same", n)
	}
	e.run(`select millrace.publish('orders', 'null'::jsonb)`)
	e.run(`select millrace.publish_batch('orders', '{}'::jsonb[])`)
	for _, sql := range []string{
		fmt.Sprintf(`select millrace.publish_bytes('raw', '%s'::bytea)`, large[:1000]),
		fmt.Sprintf(`select millrace.publish_batch_bytes('raw', array['%s']::bytea[])`, large[:1000]),
		`select millrace.publish('orders', x) from (select to_jsonb(repeat('x', 1000 - pg_column_size(to_jsonb(''::text)))) as x) as y where pg_column_size(x) = 1000`,
	} {
		if tag, err := e.Exec(e.ctx, sql); err != nil || tag.RowsAffected() != 1 {
			t.Errorf("a message as large as the limit: %v rows, %v", tag.RowsAffected(), err)
		}
	}

	t.Run("the Go client says which kind of error it is", func(t *testing.T) {
		m := pgstream.NewMessage{Payload: []byte(`{}`)}
		_, err := pgstream.Publish(e.ctx, e, "nothing", m)
		if !errors.Is(err, pgstream.ErrNotFound) {
			t.Errorf("Publish to an unknown stream: %v", err)
		}
		if _, err := pgstream.PublishBatch(e.ctx, e, "nothing", []pgstream.NewMessage{m}); !errors.Is(err, pgstream.ErrNotFound) {
			t.Errorf("PublishBatch to an unknown stream: %v", err)
		}
		if err := pgstream.PublishCopy(e.ctx, e, "nothing", []pgstream.NewMessage{m}); !errors.Is(err, pgstream.ErrNotFound) {
			t.Errorf("PublishCopy to an unknown stream: %v", err)
		}
		if _, err := pgstream.Publish(e.ctx, e, "orders", pgstream.NewMessage{Payload: []byte(`{`)}); !errors.Is(err, pgstream.ErrRefused) {
			t.Errorf("Publish of broken JSON: %v", err)
		}
		if _, err := pgstream.Publish(e.ctx, e, "orders", pgstream.NewMessage{}); !errors.Is(err, pgstream.ErrRefused) {
			t.Errorf("Publish of no payload: %v", err)
		}
		_, err = pgstream.PublishBatch(e.ctx, e, "orders", []pgstream.NewMessage{{Payload: []byte(`"` + large + `"`)}})
		if !errors.Is(err, pgstream.ErrRefused) {
			t.Errorf("PublishBatch of a large payload: %v", err)
		}
	})
}

// Each way of publishing must hold the horizon from before its position is allocated until its transaction ends.
func TestEveryWayOfPublishingHoldsTheHorizonUntilItsCommit(t *testing.T) {
	t.Parallel()
	plain := func(sql string) func(*engine, pgx.Tx) {
		return func(e *engine, tx pgx.Tx) { e.t.Helper(); exec(e, tx, sql) }
	}
	for _, c := range []struct {
		name    string
		publish func(*engine, pgx.Tx)
	}{
		{"millrace.publish", plain(`select millrace.publish('orders', '{}')`)},
		{"millrace.publish with a dedupe key", plain(`select millrace.publish('orders', '{}', p_dedupe_key => 'a')`)},
		{"millrace.publish, serialized", plain(`select millrace.publish('orders', '{}', 'k', p_serialize => true)`)},
		{"millrace.publish_batch with dedupe keys", plain(`select millrace.publish_batch('orders', array['{}']::jsonb[], p_dedupe_keys => array['a'])`)},
		{"millrace_engine.move_due", func(e *engine, tx pgx.Tx) {
			e.run(`select millrace.publish('orders', '{}', p_delay_seconds => 0.0001)`)
			e.stopClock()
			e.jump(time.Second)
			e.moveDue(tx, 1)
		}},
		{"millrace.publish_batch", plain(`select millrace.publish_batch('orders', array['{}']::jsonb[])`)},
		{"INSERT", plain(`insert into millrace.orders (payload) values ('{}')`)},
		{"INSERT of a SELECT", plain(`insert into millrace.orders (payload) select '{}' from generate_series(1, 1)`)},
		{"INSERT in a CTE", plain(`with x as (insert into millrace.orders (payload) values ('{}') returning 1) select * from x`)},
		{"MERGE", plain(`merge into millrace.orders o using (values (1)) v on false when not matched then insert (payload) values ('{}')`)},
		{"INSERT into a segment", plain(`insert into millrace_engine.segment_1_2 (payload) values ('{}')`)},
		{"INSERT in an exception block", plain(`do $$ begin
			begin insert into millrace.orders (payload) values (null); exception when not_null_violation then null; end;
			insert into millrace.orders (payload) values ('{}'); end $$`)},
		{"INSERT with session_replication_role replica", func(e *engine, tx pgx.Tx) {
			exec(e, tx, "set local session_replication_role = replica")
			exec(e, tx, "insert into millrace.orders (payload) values ('{}')")
		}},
		{"INSERT into a segment with session_replication_role replica", func(e *engine, tx pgx.Tx) {
			exec(e, tx, "set local session_replication_role = replica")
			exec(e, tx, "insert into millrace_engine.segment_1_3 (payload) values ('{}')")
		}},
		{"INSERT after a savepoint with the first INSERT was rolled back", func(e *engine, tx pgx.Tx) {
			exec(e, tx, "savepoint s")
			exec(e, tx, "insert into millrace.orders (payload) values ('{}')")
			exec(e, tx, "rollback to s")
			if n := one[int](e, "select count(*) from pg_locks where pid = $1 and locktype = 'advisory'", pid(tx)); n != 0 {
				e.t.Errorf("the savepoint left %d locks", n)
			}
			exec(e, tx, "insert into millrace.orders (payload) values ('{}')")
		}},
		{"INSERT within a function that sets a setting of its own", func(e *engine, tx pgx.Tx) {
			exec(e, tx, `create function f() returns void language sql set work_mem = '1MB' as 'insert into millrace.orders (payload) values (''{}'')'`)
			exec(e, tx, "select f()")
		}},
		{"INSERT behind settings that a pooler leaked from an earlier transaction", func(e *engine, tx pgx.Tx) {
			// As if they had been set for the session, in the transaction before this one.
			exec(e, tx, "insert into millrace.orders (payload) values ('{}')")
			exec(e, tx, "select set_config('millrace.guard_1', 'd' || substr(current_setting('millrace.guard_1'), 2), false)")
			exec(e, tx, "commit")
			exec(e, tx, "begin")
			exec(e, tx, "insert into millrace.orders (payload) values ('{}')")
		}},
		{"COPY", func(e *engine, tx pgx.Tx) {
			must(e.t, pgstream.PublishCopy(e.ctx, tx, "orders", []pgstream.NewMessage{{Payload: []byte(`{}`)}}))
		}},
		{"Publish", func(e *engine, tx pgx.Tx) { publishIn(e, tx, "orders") }},
		{"PublishBatch", func(e *engine, tx pgx.Tx) {
			_, err := pgstream.PublishBatch(e.ctx, tx, "orders", []pgstream.NewMessage{{Payload: []byte(`{}`)}})
			must(e.t, err)
		}},
		{"INSERT in REPEATABLE READ", func(e *engine, tx pgx.Tx) {
			exec(e, tx, "set transaction isolation level repeatable read")
			exec(e, tx, "insert into millrace.orders (payload) values ('{}')")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stream("orders")
			e.group(pgstream.GroupSpec{Stream: "orders", Name: "shared"})
			e.group(pgstream.GroupSpec{Stream: "orders", Name: "ordered", Mode: pgstream.ModeOrdered})
			shared := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "shared"})
			ordered := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "ordered"})

			tx := e.begin()
			c.publish(e, tx)
			drain(e, shared) // what the way itself has committed before
			drain(e, ordered)
			seen := one[int64](e, "select last_value from millrace_engine.position_1")
			last := publishIn(e, e, "orders") // commits first, above the open one
			if got := append(drain(e, shared), drain(e, ordered)...); len(got) != 0 {
				t.Fatalf("delivered %v while a publisher with position %d was open", got, seen)
			}
			exec(e, tx, "commit")
			for _, consumer := range []*pgstream.Consumer{shared, ordered} {
				same(t, "after its commit", drain(e, consumer), []int64{seen, last})
			}
		})
	}
}

func TestAPreparedTransactionHoldsTheHorizonUntilItIsCommitted(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	tx := e.begin()
	first := publishIn(e, tx, "orders")
	name := fmt.Sprintf("prepared_%d", pid(tx))
	exec(e, tx, "prepare transaction '"+name+"'")
	prepared := true
	t.Cleanup(func() { // a prepared transaction would keep the test's database from being dropped
		if prepared {
			_, _ = e.Exec(e.ctx, "rollback prepared '"+name+"'")
		}
	})
	second := publishIn(e, e, "orders")
	same(t, "while it is prepared", drain(e, c), nil)
	e.run("commit prepared '" + name + "'")
	prepared = false
	same(t, "after its commit", drain(e, c), []int64{first, second})
}

func TestAThousandPublishesInOneTransactionTakeOneLock(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	tx := e.begin()
	for range 100 {
		publishIn(e, tx, "orders")
	}
	if n := one[int](e, "select count(*) from pg_locks where pid = $1 and locktype = 'advisory'", pid(tx)); n != 1 {
		t.Errorf("%d advisory locks, want 1", n)
	}
}

func TestATransactionCanBePreparedWhileSomebodyWaits(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.run("select millrace_engine.wait_for(array[1])")
	tx := e.begin()
	exec(e, tx, "set local millrace.notify = off")
	publishIn(e, tx, "orders")
	name := fmt.Sprintf("'waited_%d'", pid(tx))
	exec(e, tx, "prepare transaction "+name)
	e.run("rollback prepared " + name)
}

// Without serialize, two transactions can commit messages of one key in another order than that of their positions.
func TestSerializedMessagesOfAKeyHavePositionsInTheOrderOfCommits(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	if first, second, waited := twoOfOneKey(e, "false"); waited || second < first {
		t.Errorf("without serialize: positions %d and %d, waited: %t; nothing shows the need of it", first, second, waited)
	}
	drain(e, c)
	for _, end := range []func(*engine, pgx.Tx){commit, rollback} {
		tx := e.begin()
		var first int64
		must(t, tx.QueryRow(e.ctx, "select millrace.publish('orders', '{}', 'k', p_serialize => true)").Scan(&first))
		exec(e, tx, "select millrace.publish('orders', '{}', 'k', p_serialize => true)") // its own lock is no hindrance
		// Another key, another stream, and a message of the key that is not serialized need not wait.
		e.run("select millrace.publish('orders', '{}', 'other', p_serialize => true)")
		e.run("select millrace.publish('orders', '{}', 'k')")
		single, batch := e.connect(), e.connect()
		done := make(chan error, 2)
		go func() {
			_, err := single.Exec(e.ctx, "select millrace.publish('orders', '{}', 'k', p_serialize => true)")
			done <- err
		}()
		go func() {
			_, err := batch.Exec(e.ctx, "select millrace.publish_batch('orders', array['{}', '{}']::jsonb[], array['a', 'k'], p_serialize => true)")
			done <- err
		}()
		e.waitsForLock(single.PgConn().PID())
		e.waitsForLock(batch.PgConn().PID())
		allocated := one[int64](e, "select last_value from millrace_engine.position_1")
		if allocated != first+3 {
			t.Errorf("%d positions were allocated beside the first, want those of whoever need not wait", allocated-first)
		}
		end(e, tx)
		must(t, <-done)
		must(t, <-done)
		drain(e, c)
	}

	t.Run("and that is seen when the lock is missing", func(t *testing.T) {
		e.mutate("millrace_engine.serialize", "pg_advisory_xact_lock(-p_stream, hashes[i])", "1")
		if _, _, waited := twoOfOneKey(e, "true"); waited {
			t.Error("the second still waited")
		}
	})
}

// twoOfOneKey has a transaction publish a key, and a second one publish it and commit before the first has. waited says that it could not.
func twoOfOneKey(e *engine, serialize string) (first, second int64, waited bool) {
	e.t.Helper()
	sql := "select millrace.publish('orders', '{}', 'k', p_serialize => " + serialize + ")"
	tx, other := e.begin(), e.begin()
	must(e.t, tx.QueryRow(e.ctx, sql).Scan(&first))
	exec(e, other, "set local lock_timeout = '1s'")
	err := other.QueryRow(e.ctx, sql).Scan(&second)
	if err == nil {
		commit(e, other)
	} else if waited = sqlState(err) == "55P03"; !waited {
		e.t.Fatal(err)
	}
	commit(e, tx)
	return first, second, waited
}

func TestAPriorityIsALaneOfItsOwn(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.run("select millrace.create_stream('orders', p_priorities => 3)")
	e.run("select millrace.publish('orders', '0')")
	e.run("select millrace.publish('orders', '1', 'k', '{\"h\": 1}', p_priority => 1)")
	e.run("select millrace.publish('orders', '2', p_priority => 2, p_delay_seconds => 2)")
	e.run("select millrace.publish('orders', '1', p_priority => 1, p_deliver_at => millrace_engine.clock() + interval '1 second')")
	e.run("select millrace.publish_batch('orders', array['1', '2']::jsonb[], p_priority => 1)")
	e.run("select millrace.publish_batch('orders', array['1', '2']::jsonb[], p_priority => 2, p_delay_seconds => 1)")
	first := one[int64](e, "select millrace.publish('orders', '5', p_priority => 2, p_dedupe_key => 'a')")
	for _, sql := range []string{"select millrace.publish('orders', '6', p_dedupe_key => 'a')",
		"select millrace.publish_batch('orders', array['6']::jsonb[], p_priority => 1, p_dedupe_keys => array['a'])"} {
		if again := one[int64](e, sql); again != first {
			t.Errorf("%s: position %d, want the first one's, %d: a key is the whole stream's", sql, again, first)
		}
	}
	e.jump(time.Minute)
	same(t, "streams that got messages", e.moveDue(e, 100), []int32{1})
	same(t, "priority 0", e.numbers("orders"), []int64{0})
	same(t, "priority 1", e.numbers("orders.p1"), []int64{1, 1, 2, 1})
	same(t, "priority 2", e.numbers("orders.p2"), []int64{5, 1, 2, 2})
	for _, p := range []int{-1, 3} {
		if _, err := e.Exec(e.ctx, "select millrace.publish('orders', '0', p_priority => $1)", p); sqlState(err) != "MR004" || !strings.Contains(hint(err), "0 to 2") {
			t.Errorf("priority %d: %v (hint %q)", p, err, hint(err))
		}
	}
	if _, err := e.Exec(e.ctx, "select millrace.publish('orders.p1', '0')"); sqlState(err) != "MR004" || !strings.Contains(hint(err), "p_priority => 1") {
		t.Errorf("publishing to the lane: %v (hint %q)", err, hint(err))
	}
}

func TestALostFunctionOfAPublisherIsMadeAgain(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.run("drop function millrace_engine.publish_1")
	e.stream("orders")
	e.run("select millrace.publish('orders', '{}')")
	e.run("drop function millrace_engine.publish_batch_1")
	e.stream("orders")
	e.run("select millrace.publish_batch('orders', array['{}']::jsonb[])")
}
