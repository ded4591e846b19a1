package pgstream_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// TestWhateverIsPassedIsAnsweredInWords calls every function of the SQL API with arguments that work but for one, which is null, empty, unknown, out of range or
// of the wrong shape. It does something sensible with it, or it is refused in the API's own words, with what to write instead.
func TestWhateverIsPassedIsAnsweredInWords(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.run("select millrace.create_stream('carts', p_versions => true), millrace.create_stream('runs', p_frames => '{}'), millrace.create_stream('raw', p_payload_type => 'Bytes')")
	e.run("select millrace.create_memory('flows'), millrace.write_memory('flows', 's', '{}')")
	e.run("create function evolve(jsonb, jsonb, jsonb) returns jsonb language sql return $2")
	e.run("create function evolve(text, text, bigint, bigint, jsonb, jsonb) returns void language sql as ''")
	e.run("select millrace.append('carts', 'k', array['{}']::jsonb[]), millrace.create_projection('carts', 'folded', 'evolve', 'folded')")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.publish("orders", 5)
	held := mustReceive(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "m", MaxMessages: 3}))

	works := map[string]string{
		"p_stream": "'orders'", "p_group": "'g'", "p_member": "'m'", "p_claim": "'" + held.Token + "'", "p_positions": "array[2]", "p_reason": "'broken'",
		"p_payload": "'{}'", "p_payloads": "array['{}']::jsonb[]", "p_key": "'k'", "p_seconds": "60", "p_from": "1", "p_time": "now()", "p_name": "'orders'",
		"p_memory": "'flows'", "p_subject": "'s'", "p_state": "'{}'", "p_token": "1", "p_function": "'evolve'", "p_evolve": "'evolve'",
		"p_tenant": "'t'", "p_max": "10", "p_document": "'{}'", "p_patch": "'{}'", "p_after": "'-'",
	}
	// What differs for single functions.
	of := map[string]map[string]string{
		"reset_group": {"p_from": "'Latest'"}, "read_frames": {"p_from": "'-'"}, "trim": {"p_before": "1"},
		"publish_bytes": {"p_stream": "'raw'"}, "publish_batch_bytes": {"p_stream": "'raw'", "p_payloads": "array['a']::bytea[]"},
		"create_memory": {"p_name": "'flows'"}, "drop_memory": {"p_name": "'flows'"}, "check_memory": {"p_name": "'flows'"},
	}
	for _, name := range []string{"append", "read_entity", "aggregate", "create_projection", "drop_projection", "rebuild_projection", "rebuild_step", "project", "projections",
		"add_tenant", "drop_tenant", "tenants"} {
		of[name] = map[string]string{"p_stream": "'carts'", "p_name": "'folded'"}
	}
	for _, name := range []string{"append_frame", "append_frame_bytes", "read_frames", "tail_frames", "wait_for_frames", "read_summary"} {
		of[name] = map[string]string{"p_stream": "'runs'", "p_from": "'-'"}
	}
	strange := map[string][]string{
		"text":                     {"null", "''", "'nope'", "(select string_agg(md5(n::text), '') from generate_series(1, 300) n)"},
		"integer":                  {"null", "-1", "0", "2147483647"},
		"bigint":                   {"null", "-1", "0", "9223372036854775807"},
		"double precision":         {"null", "-1", "'NaN'", "1e300", "'-Infinity'"},
		"jsonb":                    {"null", "'null'", "'5'", "'[]'", `'{"nope": 1}'`},
		"bytea":                    {"null", "''"},
		"boolean":                  {"null", "true"},
		"timestamp with time zone": {"null", "'infinity'", "'-infinity'"},
		"bigint[]":                 {"null", "'{}'", "'{null}'", "'{-1}'", "'{{1,2},{3,4}}'"},
		"text[]":                   {"null", "'{}'", "'{null}'", "'{{a,b},{c,d}}'", "array[(select string_agg(md5(n::text), '') from generate_series(1, 300) n)]"},
		"jsonb[]":                  {"null", "'{}'", "'{null}'", "'{{1,2},{3,4}}'"},
		"bytea[]":                  {"null", "'{}'", "'{null}'", "'{{a,b},{c,d}}'"},
	}

	rows, err := e.Query(e.ctx, `select p.proname, array(select unnest(p.proargnames[:p.pronargs])), array(select format_type(a, null) from unnest(p.proargtypes::oid[]) a),
		p.pronargs - p.pronargdefaults from pg_proc p where p.pronamespace = 'millrace'::regnamespace order by 1`)
	must(t, err)
	type function struct {
		name         string
		names, types []string
		required     int
	}
	var functions []function
	for rows.Next() {
		var f function
		must(t, rows.Scan(&f.name, &f.names, &f.types, &f.required))
		functions = append(functions, f)
	}
	must(t, rows.Err())
	conn := e.connect()
	calls, refused := 0, 0
	for _, f := range functions {
		value := func(parameter string) string {
			if v, ok := of[f.name][parameter]; ok {
				return v
			}
			return works[parameter]
		}
		for odd := range f.names {
			values := strange[f.types[odd]]
			if values == nil {
				t.Fatalf("%s takes a %s, of which this test knows no strange values", f.name, f.types[odd])
			}
			for _, v := range values {
				var arguments []string
				for i, parameter := range f.names {
					switch {
					case i == odd:
						arguments = append(arguments, fmt.Sprintf("%s => %s::%s", parameter, v, f.types[i]))
					case value(parameter) != "" && (i < f.required || of[f.name][parameter] != ""):
						arguments = append(arguments, fmt.Sprintf("%s => %s", parameter, value(parameter)))
					case i < f.required:
						t.Fatalf("this test knows no value for %s of %s", parameter, f.name)
					}
				}
				sql := fmt.Sprintf("select * from millrace.%s(%s)", f.name, strings.Join(arguments, ", "))
				tx, err := conn.Begin(e.ctx)
				must(t, err)
				_, err = tx.Exec(e.ctx, sql)
				must(t, tx.Rollback(e.ctx))
				calls++
				if err == nil {
					continue
				}
				refused++
				var pg *pgconn.PgError
				if !errors.As(err, &pg) || !strings.HasPrefix(pg.Code, "MR") || pg.Code == "MR009" || pg.Hint == "" || strings.Contains(pg.Message+pg.Hint, "<NULL>") {
					t.Errorf("%s\n\t%v (hint %q)", sql, err, hint(err))
				}
			}
		}
	}
	if !slices.ContainsFunc(functions, func(f function) bool { return f.name == "receive" }) || refused < 200 || refused > calls-200 {
		t.Errorf("of %d calls %d were refused", calls, refused)
	}
}

func TestAKeyThatIsTooLongToParkIsRefusedInWords(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.run("select millrace.create_group('orders', 'g', 'Ordered', p_failure_policy => 'Park')")
	e.run("select millrace.publish('orders', '{}', (select string_agg(md5(n::text), '') from generate_series(1, 300) n))")
	token := one[string](e, "select claim from millrace.receive('orders', 'g', 'm')")
	_, err := e.Exec(e.ctx, "select millrace.nack($1, array[1])", token)
	if sqlState(err) != "MR004" || !strings.Contains(hint(err), "dead_letter") {
		t.Errorf("%v (hint %q); want MR004, and what to do with the message", err, hint(err))
	}
	// What the hint says is possible; its redrive into the group would park it.
	e.run("select millrace.dead_letter($1, array[1], 'the key is too long')", token)
	if _, err := e.Exec(e.ctx, "select millrace.redrive('orders', 'g')"); sqlState(err) != "MR004" {
		t.Errorf("redrive: %v; want MR004", err)
	}
	e.stream("others")
	if n := one[int](e, "select millrace.redrive('orders', 'g', p_to => 'others')"); n != 1 {
		t.Errorf("%d messages were redriven to another stream, want 1", n)
	}
}

func TestALongKeyDoesNotKeepAQueueFromReceiving(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.run("select millrace.create_group('orders', 'jobs', p_queue_policy => 'Stately'), millrace.create_group('orders', 'nobody', p_filter => '{\"unrouted\": true}')")
	for range 2 { // Stately: of those that wait, one of a key
		e.run("insert into millrace.orders (key, payload) select string_agg(md5(n::text), ''), '{}' from generate_series(1, 300) n")
	}
	e.run("insert into millrace.orders (key, payload) values ('short', '{}')")
	for group, want := range map[string]int{"jobs": 2, "nobody": 3} {
		if n := one[int](e, "select count(*) from millrace.receive('orders', $1, 'm')", group); n != want {
			t.Errorf("%s got %d messages, want %d", group, n, want)
		}
	}
	if n := one[int](e, "select max(length(key)) from millrace_engine.delivery"); n != 9600 {
		t.Errorf("the longest key that was kept has %d characters, want 9600", n)
	}
}

// Whatever is put into an index has a limit, which is told in words. A plain INSERT into an event store is answered in PostgreSQL's.
func TestTextsThatAreTooLongForAnIndexAreRefusedInWords(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.run("select millrace.create_stream('carts', p_versions => true), millrace.create_stream('runs', p_frames => '{}'), millrace.create_stream('orders')")
	e.run("create function evolve(jsonb, jsonb, jsonb) returns jsonb language sql return $2")
	e.run("create function longest(n integer) returns text language sql return left((select string_agg(md5(n::text), '') from generate_series(1, 300) n), n)")
	e.run(`select millrace.create_group('carts', 'documents', 'Ordered'), millrace.create_group('orders', 'lanes', 'Ordered'), millrace.create_group('orders', 'all'),
		millrace.create_projection('carts', 'by_name', 'evolve', 'by_name', array['name'], 'documents')`)
	e.run("select millrace.publish('orders', '{}', longest(3000))")
	e.run("select millrace.dead_letter(claim, array[position], 'unwanted') from millrace.receive('orders', 'all', 'm')")
	e.run("insert into millrace.carts (key, payload, version) values ('k', jsonb_build_object('name', longest(3000)), 1)")
	conn := e.connect()
	for _, call := range []string{
		"millrace.append('carts', %s, array['{}']::jsonb[])",
		"millrace.publish('carts', '{}', %s)",
		"millrace.publish('carts', '{}', %s, p_delay_seconds => 60)",
		"millrace.publish('carts', '{}', %s, p_dedupe_key => 'd')",
		"millrace.publish_batch('carts', array['{}', '{}']::jsonb[], array['k', %s])",
		"millrace.publish_batch('carts', array['{}']::jsonb[], array[%s], p_delay_seconds => 60)",
		"millrace.receive('orders', 'lanes', %s)",
		"millrace.append_frame('runs', left(%s, 1025), '{}')",
		"millrace.wait_for_frames('runs', left(%s, 1025))",
	} {
		for length, want := range map[int]string{2048: "", 2049: "MR004"} {
			if strings.Contains(call, "1025") {
				want = "MR004"
			}
			tx, err := conn.Begin(e.ctx)
			must(t, err)
			_, err = tx.Exec(e.ctx, "select "+fmt.Sprintf(call, fmt.Sprintf("longest(%d)", length)))
			if sqlState(err) != want || want != "" && hint(err) == "" {
				t.Errorf("%s with %d bytes: %v, hint %q; want %q", call, length, err, hint(err), want)
			}
			must(t, tx.Rollback(e.ctx))
		}
	}
	for _, call := range []string{"millrace.redrive('orders', 'all', p_to => 'carts')", "millrace.project('carts', 'documents', array[1])", "millrace.rebuild_projection('carts', 'by_name')"} {
		if _, err := e.Exec(e.ctx, "select "+call); sqlState(err) != "MR004" || hint(err) == "" {
			t.Errorf("%s: %v, hint %q; want MR004 and a hint", call, err, hint(err))
		}
	}
	key := one[string](e, "select longest(3000)")
	if _, err := pgstream.Publish(e.ctx, e, "carts", pgstream.NewMessage{Key: &key, Payload: []byte("{}")}); !errors.Is(err, pgstream.ErrRefused) {
		t.Errorf("a plain INSERT: %v; want ErrRefused", err)
	}
}
