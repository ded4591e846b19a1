package seeds

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// newAccounts is a database with an event store.
func newAccounts(t *testing.T) *database {
	t.Helper()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('accounts', p_versions => true)")
	return d
}

// An append names the version that it expects: a number, any that exists, none, or no matter which. A conflict is an error of a type of its own that says the present
// version, and appends nothing. What comes back is the version to expect next and the position among all.
func TestSeed_E01_AppendWithExpectedVersion(t *testing.T) {
	t.Parallel()
	d := newAccounts(t)
	const exists, none = -1, 0
	appended := func(want, key string, expected any, payloads ...string) {
		t.Helper()
		d.same(fmt.Sprintf("append to %s at %v", key, expected), []string{want},
			"select version, position from millrace.append('accounts', $1, $2::text[]::jsonb[], $3)", key, payloads, expected)
	}
	conflict := func(present, key string, expected any) {
		t.Helper()
		_, err := query(d.ctx, d.app, `select millrace.append('accounts', $1, array['{"lost": true}']::jsonb[], $2)`, key, expected)
		var pg *pgconn.PgError
		if !errors.As(err, &pg) || pg.Code != "MR011" || pg.Detail != present {
			t.Errorf("%s at %v: %#v; want MR011 with the present version %s", key, expected, err, present)
		}
	}
	appended("2|2", "alice", none, `{"n": 1}`, `{"n": 2}`)
	conflict("2", "alice", none)
	conflict("2", "alice", 1)
	conflict("2", "alice", 3)
	conflict("0", "bob", exists)
	conflict("0", "bob", 1)
	appended("3|3", "alice", 2, `{"n": 3}`)
	appended("4|4", "alice", exists, `{"n": 4}`)
	appended("1|5", "bob", nil, `{"n": 5}`)
	appended("5|6", "alice", nil, `{"n": 6}`)
	d.same("nothing of a conflict is left", []string{"6|0"}, "select count(*), count(*) filter (where payload ? 'lost') from millrace.accounts")

	// Of many that decide upon one version, one wins.
	won := make(chan bool, 10)
	var deciders sync.WaitGroup
	for range cap(won) {
		deciders.Go(func() {
			_, err := query(d.ctx, d.app, "select millrace.append('accounts', 'alice', array['1']::jsonb[], 5)")
			if err != nil && sqlState(err) != "MR011" {
				t.Error(err)
			}
			won <- err == nil
		})
	}
	deciders.Wait()
	close(won)
	n := 0
	for w := range won {
		if w {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d of them won", n)
	}
}

// The history of an entity from a version, to one, and so many; its state by a function from a first state.
func TestSeed_E02_ReadAndAggregate(t *testing.T) {
	t.Parallel()
	d := newAccounts(t)
	d.rows(`select millrace.append('accounts', 'alice', array['{"n": 1}', '{"n": 20}', '{"n": 300}', '{"n": 4000}']::jsonb[])`)
	d.rows(`select millrace.append('accounts', 'bob', array['{"n": 7}']::jsonb[])`)
	for arguments, want := range map[string][]string{
		"'alice'":                    {"1", "2", "3", "4"},
		"'alice', 3":                 {"3", "4"},
		"'alice', 2, 3":              {"2", "3"},
		"'alice', 1, null, 2":        {"1", "2"},
		"'alice', 2, p_max => 1":     {"2"},
		"'nobody'":                   {},
		"'alice', 5":                 {},
		"'alice', p_to_version => 1": {"1"},
	} {
		d.same("read "+arguments, want, "select version from millrace.read_entity('accounts', "+arguments+")")
	}
	d.admin(`create function public.evolve(state jsonb, payload jsonb, headers jsonb) returns jsonb language sql
		as $$ select jsonb_build_object('sum', (state ->> 'sum')::int + (payload ->> 'n')::int, 'events', (state ->> 'events')::int + 1) $$`)
	const first = `'{"sum": 0, "events": 0}'`
	for key, want := range map[string]string{
		"'alice', 'public.evolve', " + first:                      "4321|4|4",
		"'alice', 'public.evolve', " + first + ", 2":              "21|2|2",
		"'alice', 'public.evolve', '{\"sum\": 5, \"events\": 9}'": "4326|13|4",
		"'nobody', 'public.evolve', " + first:                     "0|0|0",
	} {
		d.same("state of "+key, []string{want}, "select state ->> 'sum', state ->> 'events', version from millrace.aggregate('accounts', "+key+")")
	}
}

// One order over all entities. A reader never passes over what commits late, whatever the order of commits: it waits below it.
func TestSeed_E03_GlobalOrder(t *testing.T) {
	t.Parallel()
	d := newAccounts(t)
	d.admin("select millrace.create_group('accounts', 'g', 'Ordered')")
	slow := d.connect(d.appDSN)
	d.rowsOf(slow, "begin")
	first := valueOf[int64](d, slow, "select position from millrace.append('accounts', 'alice', array['1']::jsonb[])")
	second := value[int64](d, "select position from millrace.append('accounts', 'bob', array['2']::jsonb[])")
	if first >= second {
		t.Errorf("positions %d and %d", first, second)
	}
	d.same("nobody reads beyond what is open", []string{}, "select position from millrace.read('accounts', 1)")
	d.rowsOf(slow, "commit")
	const all = "select key, version, payload from millrace.read('accounts', 1) r join millrace.accounts a using (position, key, payload) order by position"
	d.same("all in one order", []string{"alice|1|1", "bob|1|2"}, all)

	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			for range 25 {
				if _, err := query(d.ctx, d.app, "select millrace.append('accounts', $1, array['0']::jsonb[])", fmt.Sprintf("k%d", w)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	// Read along: positions grow, and the versions of each entity follow each other.
	last, next, read := int64(0), map[string]int64{}, 0
	d.eventually("everything is read", func() (bool, string) {
		rows, err := d.app.Query(d.ctx, `select r.position, r.key, a.version from millrace.read('accounts', $1, p_max => 7) r join millrace.accounts a on a.position = r.position order by 1`, last+1)
		if err != nil {
			t.Fatal(err)
		}
		var position, version int64
		var key string
		_, err = pgx.ForEachRow(rows, []any{&position, &key, &version}, func() error {
			if position <= last || version != next[key]+1 {
				return fmt.Errorf("position %d after %d, version %d of %s after %d", position, last, version, key, next[key])
			}
			last, next[key] = position, version
			read++
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return read == 102, fmt.Sprintf("%d read", read)
	})
	writers.Wait()
}

// Inline projections are written in the append's transaction: there with the events, gone with them, and what they raise refuses the append.
func TestSeed_E04_InlineProjections(t *testing.T) {
	t.Parallel()
	d := newAccounts(t)
	d.admin(`create function public.balance(document jsonb, payload jsonb, headers jsonb) returns jsonb language plpgsql as $$ begin
			if coalesce((document ->> 'total')::int, 0) + (payload ->> 'amount')::int < 0 then raise exception 'overdrawn' using errcode = 'P0777'; end if;
			return jsonb_build_object('total', coalesce((document ->> 'total')::int, 0) + (payload ->> 'amount')::int); end $$;
		create table public.journal (key text, version bigint, amount int);
		create function public.note(stream text, key text, version bigint, position_ bigint, payload jsonb, headers jsonb) returns void language sql
			as $$ insert into public.journal values (key, version, (payload ->> 'amount')::int) $$;
		select millrace.create_projection('accounts', 'balances', 'public.balance', 'public.balances');
		select millrace.create_projection('accounts', 'journal', 'public.note');
		grant select, insert, update, delete on public.balances, public.journal to ` + runtimeRole)
	pay := func(db querier, amount int) error {
		_, err := query(d.ctx, db, "select millrace.append('accounts', 'alice', array[jsonb_build_object('amount', $1::int)])", amount)
		return err
	}
	const state = `select (select document ->> 'total' from public.balances), (select count(*) from public.journal), (select count(*) from millrace.accounts)`
	for _, amount := range []int{100, -30} {
		if err := pay(d.app, amount); err != nil {
			t.Fatal(err)
		}
	}
	d.same("at once", []string{"70|2|2"}, state)
	if err := pay(d.app, -71); sqlState(err) != "P0777" {
		t.Errorf("error %v", err)
	}
	d.same("a refused append leaves nothing", []string{"70|2|2"}, state)
	conn := d.connect(d.appDSN)
	d.rowsOf(conn, "begin")
	if err := pay(conn, 5); err != nil {
		t.Fatal(err)
	}
	if seen := d.rowsOf(conn, state); !slices.Equal(seen, []string{"75|3|3"}) {
		t.Errorf("in its own transaction: %v", seen)
	}
	d.same("before the commit", []string{"70|2|2"}, state)
	d.rowsOf(conn, "rollback")
	d.same("rolled back together", []string{"70|2|2"}, state)
}

// Several appends of one session are there together or not at all.
func TestSeed_E06_SeveralAppendsInOneTransaction(t *testing.T) {
	t.Parallel()
	d := newAccounts(t)
	transfer := func(from, to int64) error {
		return pgx.BeginFunc(d.ctx, d.app, func(tx pgx.Tx) error {
			if _, err := query(d.ctx, tx, `select millrace.append('accounts', 'alice', array['{"amount": -5}']::jsonb[], $1)`, from); err != nil {
				return err
			}
			if _, err := query(d.ctx, tx, `select millrace.append('accounts', 'bob', array['{"amount": 5}']::jsonb[], $1)`, to); err != nil {
				return err
			}
			d.same("nobody sees half of it", []string{"0"}, "select count(*) % 2 from millrace.accounts")
			return nil
		})
	}
	if err := transfer(0, 0); err != nil {
		t.Error(err)
	}
	if err := transfer(1, 0); sqlState(err) != "MR011" {
		t.Errorf("a conflict of the second append: %v", err)
	}
	if err := transfer(1, 1); err != nil {
		t.Error(err)
	}
	d.same("versions without holes", []string{"alice|1", "alice|2", "bob|1", "bob|2"}, "select key, version from millrace.accounts order by key, version")
}

// Data and metadata of an event are jsonb: kept as they are, and asked for by what is in them.
func TestSeed_E10_DataAndMetadataAreJSONB(t *testing.T) {
	t.Parallel()
	d := newAccounts(t)
	d.same("types", []string{"headers|jsonb", "payload|jsonb"}, `select attname::text, atttypid::regtype::text from pg_attribute
		where attrelid = 'millrace.accounts'::regclass and attname in ('payload', 'headers') order by 1`)
	d.rows(`select millrace.append('accounts', 'alice', array['{"big": 9007199254740993, "deep": {"list": [1, null, "ü"]}}', '{"n": 2}']::jsonb[], 0,
		array['{"type": "Opened", "correlation": {"id": 7}}', '{"type": "Closed"}']::jsonb[])`)
	d.same("as it was", []string{`{"big": 9007199254740993, "deep": {"list": [1, null, "ü"]}}|7`},
		`select payload::text, headers -> 'correlation' ->> 'id' from millrace.read_entity('accounts', 'alice', 1, 1)`)
	d.same("by what is in it", []string{"2"}, `select version from millrace.accounts where headers @> '{"type": "Closed"}' and payload @? '$.n ? (@ > 1)'`)
	d.admin(`select millrace.create_group('accounts', 'closing', p_filter => '{"headers": {"type": "Closed"}}')`)
	d.same("for whom it is", []string{`{"n": 2}`}, "select payload::text from millrace.receive('accounts', 'closing', 'm')")
	d.fails("MR004", `select millrace.append('accounts', 'alice', array['1']::jsonb[], null, array['[]']::jsonb[])`)
}
