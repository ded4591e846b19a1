package pgstream_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// accounts makes a stream with versions, named accounts.
func (e *engine) accounts() {
	e.t.Helper()
	plan, err := pgstream.PlanStream(e.ctx, e.Pool, pgstream.StreamSpec{Name: "accounts", Versions: true})
	must(e.t, err)
	must(e.t, pgstream.ApplyStream(e.ctx, e.Pool, plan))
}

func events(numbers ...int) (ms []pgstream.NewMessage) {
	for _, n := range numbers {
		ms = append(ms, pgstream.NewMessage{Payload: fmt.Appendf(nil, `{"n": %d}`, n), Headers: []byte(`{"type": "Added"}`)})
	}
	return ms
}

func TestAppendComparesTheVersion(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	appendTo := func(key string, expected int64, n ...int) (pgstream.Appended, error) {
		return pgstream.Append(e.ctx, e.Pool, "accounts", key, expected, events(n...))
	}
	must1 := func(a pgstream.Appended, err error) pgstream.Appended {
		t.Helper()
		must(t, err)
		return a
	}
	refused := func(present int64, _ pgstream.Appended, err error) {
		t.Helper()
		if got, ok := pgstream.IsVersionError(err); !ok || got != present {
			t.Errorf("present version %d, %v; error %v", got, ok, err)
		}
	}
	if a := must1(appendTo("a", pgstream.NoVersion, 1, 2)); a.Version != 2 || a.Position != 2 {
		t.Errorf("the first append ended at %+v", a)
	}
	a, err := appendTo("a", pgstream.NoVersion, 3)
	refused(2, a, err)
	a, err = appendTo("a", 1, 3)
	refused(2, a, err)
	a, err = appendTo("b", pgstream.ExistingVersion, 3)
	refused(0, a, err)
	a, err = appendTo("b", 4, 3)
	refused(0, a, err)
	if a := must1(appendTo("a", 2, 3)); a.Version != 3 {
		t.Errorf("the next append ended at %+v", a)
	}
	must1(appendTo("a", pgstream.ExistingVersion, 4))
	must1(appendTo("a", pgstream.AnyVersion, 5))
	must1(appendTo("b", pgstream.AnyVersion, 1))
	// Refused appends have left nothing behind: the log has no more, and versions have no gaps.
	history, err := pgstream.ReadEntity(e.ctx, e.Pool, "accounts", "a", 1, 0, 100)
	must(t, err)
	if len(history) != 5 {
		t.Fatalf("%d messages", len(history))
	}
	for i, m := range history {
		if m.Version != int64(i+1) || string(m.Payload) != fmt.Sprintf(`{"n": %d}`, i+1) || string(m.Headers) != `{"type": "Added"}` || m.CreatedAt.IsZero() {
			t.Errorf("message %d is %+v", i, m)
		}
	}
	if !slices.IsSortedFunc(history, func(a, b pgstream.EntityMessage) int { return int(a.Position - b.Position) }) {
		t.Error("positions and versions are in different orders")
	}
	if n := one[int](e, "select count(*) from millrace.accounts"); n != 6 {
		t.Errorf("%d messages in the log", n)
	}
	// From, to and limit; a key that is unknown is an empty history.
	for _, c := range []struct {
		from, to int64
		limit    int
		want     []int64
	}{{2, 0, 100, []int64{2, 3, 4, 5}}, {2, 4, 100, []int64{2, 3, 4}}, {1, 0, 2, []int64{1, 2}}, {6, 0, 10, nil}, {4, 2, 10, nil}} {
		ms, err := pgstream.ReadEntity(e.ctx, e.Pool, "accounts", "a", c.from, c.to, c.limit)
		must(t, err)
		var got []int64
		for _, m := range ms {
			got = append(got, m.Version)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("from %d to %d, at most %d: %v, not %v", c.from, c.to, c.limit, got, c.want)
		}
	}
	if ms, err := pgstream.ReadEntity(e.ctx, e.Pool, "accounts", "nobody", 1, 0, 10); err != nil || len(ms) > 0 {
		t.Errorf("an unknown key has %v, error %v", ms, err)
	}
}

// A stream with versions has its indexes from the beginning, and a history is read by them, whatever else is in the log.
func TestHistoriesAreReadByTheirIndex(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	if n := one[int](e, "select count(*) from millrace_engine.stream_repairs((select id from millrace_engine.stream where name = 'accounts'))"); n != 0 {
		t.Errorf("a new stream lacks %d things", n)
	}
	for _, key := range []string{"a", "b"} {
		_, err := pgstream.Append(e.ctx, e.Pool, "accounts", key, pgstream.NoVersion, events(1, 2, 3))
		must(t, err)
	}
	tx, err := e.Pool.Begin(e.ctx)
	must(t, err)
	defer tx.Rollback(e.ctx)
	scans := func() (whole, index int) {
		must(t, tx.QueryRow(e.ctx, "select sum(seq_scan), sum(idx_scan) from pg_stat_xact_user_tables where relname like 'segment\\_%'").Scan(&whole, &index))
		return whole, index
	}
	wholeBefore, indexBefore := scans()
	history, err := pgstream.ReadEntity(e.ctx, tx, "accounts", "b", 2, 0, 100)
	must(t, err)
	if whole, index := scans(); len(history) != 2 || whole != wholeBefore || index == indexBefore {
		t.Errorf("%d messages, %d scans of a whole segment, %d of indexes", len(history), whole-wholeBefore, index-indexBefore)
	}
}

// A session that has planned while there were few entities finds each by its index all the same.
func TestAppendsFindTheirEntityByItsIndex(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	_, err := pgstream.Append(e.ctx, e.Pool, "accounts", "a", pgstream.NoVersion, events(1))
	must(t, err)
	e.run("vacuum analyze millrace_engine.entity")
	conn := e.connect()
	scans := func(db pgstream.DB) (whole, index int) {
		must(t, db.QueryRow(e.ctx, "select seq_scan, idx_scan from pg_stat_xact_user_tables where relname = 'entity'").Scan(&whole, &index))
		return whole, index
	}
	for name, do := range map[string]func(db pgstream.DB) error{
		"append to a version": func(db pgstream.DB) error {
			_, err := pgstream.Append(e.ctx, db, "accounts", "a", 1, events(2))
			return err
		},
		"append to a new key": func(db pgstream.DB) error {
			_, err := pgstream.Append(e.ctx, db, "accounts", "b", pgstream.NoVersion, events(1, 2))
			return err
		},
		"append to any version": func(db pgstream.DB) error {
			_, err := pgstream.Append(e.ctx, db, "accounts", "a", pgstream.AnyVersion, events(2))
			return err
		},
		"read": func(db pgstream.DB) error {
			_, err := pgstream.ReadEntity(e.ctx, db, "accounts", "a", 1, 0, 10)
			return err
		},
		"a refused append": func(db pgstream.DB) error {
			_, err := db.Exec(e.ctx, `do $$ begin perform millrace.append('accounts', 'a', array['{}'::jsonb], 7); raise exception 'appended'; exception when sqlstate 'MR011' then null; end $$`)
			return err
		},
	} {
		tx, err := conn.Begin(e.ctx)
		must(t, err)
		wholeBefore, indexBefore := scans(tx)
		must(t, do(tx))
		if whole, index := scans(tx); whole != wholeBefore || index == indexBefore {
			t.Errorf("%s: %d scans of all entities, %d of their index", name, whole-wholeBefore, index-indexBefore)
		}
		rollback(e, tx)
	}
}

// Of writers that decide upon the same version one wins. Each that loses reads again, so that no increment is lost.
func TestConcurrentAppendsLoseNoUpdate(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	e.group(pgstream.GroupSpec{Stream: "accounts", Name: "g", Mode: pgstream.ModeOrdered})
	const writers, times = 6, 20
	var working sync.WaitGroup
	for range writers {
		working.Go(func() {
			for range times {
				for {
					history, err := pgstream.ReadEntity(e.ctx, e.Pool, "accounts", "a", 1, 0, 1000)
					if err != nil {
						t.Error(err)
						return
					}
					_, err = pgstream.Append(e.ctx, e.Pool, "accounts", "a", int64(len(history)), events(len(history)))
					if _, lost := pgstream.IsVersionError(err); lost {
						continue
					}
					if err != nil {
						t.Error(err)
					}
					break
				}
			}
		})
	}
	working.Wait()
	history, err := pgstream.ReadEntity(e.ctx, e.Pool, "accounts", "a", 1, 0, 1000)
	must(t, err)
	if len(history) != writers*times {
		t.Fatalf("%d messages, not %d", len(history), writers*times)
	}
	for i, m := range history {
		if string(m.Payload) != fmt.Sprintf(`{"n": %d}`, i) {
			t.Errorf("version %d was decided upon another history: %s", m.Version, m.Payload)
		}
	}
	// A group gets them in the order of their versions.
	var got []int64
	c := e.consumer(pgstream.ConsumerConfig{Stream: "accounts", Group: "g"})
	for _, p := range drain(e, c) {
		got = append(got, one[int64](e, "select version from millrace.accounts where position = $1", p))
	}
	if !slices.IsSorted(got) || len(got) != writers*times {
		t.Errorf("delivered in the order of versions %v", got)
	}
}

func TestAppendIsSeenBrokenWithoutTheVersion(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.mutate("millrace.append", "or e.version = p_expected_version", "or true")
	e.accounts()
	for range 2 {
		if _, err := pgstream.Append(e.ctx, e.Pool, "accounts", "a", 1, events(1)); err == nil {
			t.Fatal("a new key had the version 1")
		}
		if _, err := pgstream.Append(e.ctx, e.Pool, "accounts", "b", 0, events(1)); err != nil {
			t.Log(err)
		}
	}
	if n := one[int](e, "select count(*) from millrace.accounts"); n != 2 {
		t.Errorf("nothing was seen without it: %d messages", n)
	}
}

// Several appends of one transaction are there together or not at all, and a conflict of one undoes the other.
func TestAppendsOfOneTransaction(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	transfer := func(expected int64) error {
		return pgx.BeginFunc(e.ctx, e.Pool, func(tx pgx.Tx) error {
			if _, err := pgstream.Append(e.ctx, tx, "accounts", "a", expected, events(1)); err != nil {
				return err
			}
			_, err := pgstream.Append(e.ctx, tx, "accounts", "b", 0, events(2))
			return err
		})
	}
	must(t, transfer(0))
	if present, ok := pgstream.IsVersionError(transfer(1)); !ok || present != 1 {
		t.Errorf("present %d, conflict %v", present, ok)
	}
	if n := one[string](e, "select string_agg(key || version, ',' order by key) from millrace.accounts"); n != "a1,b1" {
		t.Errorf("there are %s", n)
	}
}

// Projections write in the append's transaction, and their errors refuse it.
func TestProjectionsRunWithTheAppend(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	e.run(`create table public.seen (stream text, key text, version bigint, position bigint, n int, type text)`)
	e.run(`create function public.note(stream text, key text, version bigint, pos bigint, payload jsonb, headers jsonb) returns void language sql
		as $$ insert into public.seen values (stream, key, version, pos, (payload ->> 'n')::int, headers ->> 'type') $$`)
	e.run(`create function public.total(document jsonb, payload jsonb, headers jsonb) returns jsonb language plpgsql as $$ begin
		if (payload ->> 'n')::int < 0 then raise exception 'negative'; end if;
		if (payload ->> 'n')::int = 0 then return null; end if;
		return jsonb_build_object('total', coalesce((document ->> 'total')::int, 0) + (payload ->> 'n')::int); end $$`)
	e.run("select millrace.create_projection('accounts', 'log', 'public.note')")
	e.run("select millrace.create_projection('accounts', 'by-account', 'public.total', 'public.by_account')")
	e.run("select millrace.create_projection('accounts', 'by-owner', 'public.total', 'public.by_owner', '{owner,id}')")
	owned := func(n int, owner string) []pgstream.NewMessage {
		return []pgstream.NewMessage{{Payload: fmt.Appendf(nil, `{"n": %d, "owner": {"id": %q}}`, n, owner)}}
	}
	for i, m := range [][]pgstream.NewMessage{owned(1, "x"), owned(2, "y"), append(owned(4, "x"), events(8)...)} {
		_, err := pgstream.Append(e.ctx, e.Pool, "accounts", []string{"a", "a", "b"}[i], pgstream.AnyVersion, m)
		must(t, err)
	}
	if _, err := pgstream.Append(e.ctx, e.Pool, "accounts", "a", pgstream.AnyVersion, append(owned(16, "x"), events(-1)...)); err == nil {
		t.Error("a projection's error did not refuse the append")
	}
	for what, want := range map[string]string{
		"select string_agg(key || ':' || (document ->> 'total') || '/' || version, ' ' order by key) from public.by_account": "a:3/2 b:12/2",
		"select string_agg(key || ':' || (document ->> 'total') || '/' || version, ' ' order by key) from public.by_owner":   "x:5/2 y:2/1",
		"select string_agg(stream || key || version || '@' || position || '=' || n, ' ' order by position) from public.seen": "accountsa1@1=1 accountsa2@2=2 accountsb1@3=4 accountsb2@4=8",
	} {
		if got := one[string](e, what); got != want {
			t.Errorf("%s: %s, not %s", what, got, want)
		}
	}
	// A result of null deletes the document, and the next message makes it anew.
	_, err := pgstream.Append(e.ctx, e.Pool, "accounts", "a", pgstream.AnyVersion, events(0, 5))
	must(t, err)
	if got := one[string](e, "select (document ->> 'total') || '/' || version from public.by_account where key = 'a'"); got != "5/1" {
		t.Errorf("after it was deleted: %s", got)
	}
	if !one[bool](e, "select millrace.drop_projection('accounts', 'log')") || one[bool](e, "select millrace.drop_projection('accounts', 'log')") {
		t.Error("dropping says something else than what it did")
	}
	_, err = pgstream.Append(e.ctx, e.Pool, "accounts", "c", pgstream.AnyVersion, events(1))
	must(t, err)
	if n := one[int](e, "select count(*) from public.seen where key = 'c'"); n != 0 {
		t.Error("a projection that was dropped went on")
	}
}

// Documents of many entities are made by appends that do not know of each other.
func TestAProjectionOfManyEntitiesLosesNothing(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	e.run(`create function public.total(document jsonb, payload jsonb, headers jsonb) returns jsonb language sql
		as $$ select jsonb_build_object('total', coalesce((document ->> 'total')::int, 0) + (payload ->> 'n')::int) $$`)
	e.run("select millrace.create_projection('accounts', 'all', 'public.total', 'public.everything', '{all}')")
	var working sync.WaitGroup
	for w := range 5 {
		working.Go(func() {
			for i := range 20 {
				m := []pgstream.NewMessage{{Payload: []byte(`{"n": 1, "all": "everything"}`)}}
				if _, err := pgstream.Append(e.ctx, e.Pool, "accounts", fmt.Sprintf("k%d-%d", w, i), 0, m); err != nil {
					t.Error(err)
				}
			}
		})
	}
	working.Wait()
	if got := one[string](e, "select (document ->> 'total') || '/' || version from public.everything"); got != "100/100" {
		t.Errorf("the document is at %s, not 100/100", got)
	}
}

// A projection is made from messages that were there before it, beside the live one, while appends go on.
func TestAProjectionIsRebuiltBesideTheLiveOne(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	const total = `create or replace function public.total(document jsonb, payload jsonb, headers jsonb) returns jsonb language sql
		as $$ select jsonb_build_object('total', coalesce((document ->> 'total')::int, 0) + %d * (payload ->> 'n')::int) $$`
	e.run(fmt.Sprintf(total, 1))
	var ones []pgstream.NewMessage
	for range 500 {
		ones = append(ones, events(1)...)
	}
	_, err := pgstream.Append(e.ctx, e.Pool, "accounts", "a", 0, ones)
	must(t, err)
	e.run("select millrace.create_projection('accounts', 'totals', 'public.total', 'public.totals')")
	e.run(`create view public.seen_totals as select * from public.totals`)
	_, err = pgstream.Append(e.ctx, e.Pool, "accounts", "a", 500, ones[:1])
	must(t, err)
	const document = "select (document ->> 'total') || '/' || version from public.seen_totals where key = 'a'"
	if got := one[string](e, document); got != "1/1" {
		t.Errorf("before: %s", got)
	}
	if n := one[int](e, "select millrace.rebuild_projection('accounts', 'totals')"); n != 501 {
		t.Errorf("%d messages were projected", n)
	}
	if got := one[string](e, document); got != "501/501" {
		t.Errorf("rebuilt: %s", got)
	}
	// The function changes; whoever appends meanwhile is waited for, and waits.
	e.run(fmt.Sprintf(total, 2))
	var working sync.WaitGroup
	for w := range 4 {
		working.Go(func() {
			for range 25 {
				if _, err := pgstream.Append(e.ctx, e.Pool, "accounts", fmt.Sprintf("k%d", w), pgstream.AnyVersion, ones[:1]); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 3 {
		e.run("select millrace.rebuild_projection('accounts', 'totals')")
	}
	working.Wait()
	if got := one[string](e, "select sum((document ->> 'total')::int) || '/' || sum(version) from public.totals"); got != "1202/601" {
		t.Errorf("all documents together: %s", got)
	}
	// A projection that is replaced forgets what a rebuild has made of it.
	e.run("select millrace.rebuild_step('accounts', 'totals', 10)")
	e.run("select millrace.create_projection('accounts', 'totals', 'public.total', 'public.totals')")
	if n := one[int](e, "select count(*) from millrace_engine.building"); n != 0 {
		t.Errorf("%d documents are left of a rebuild that was given up", n)
	}
	for _, sql := range []string{"select millrace.rebuild_projection('accounts', 'none')", "select millrace.rebuild_projection('accounts', null)"} {
		if _, err := e.Exec(e.ctx, sql); sqlState(err) != "MR004" {
			t.Errorf("%s: %v", sql, err)
		}
	}
}

func TestAggregate(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	e.run(`create function public.evolve(state jsonb, payload jsonb, headers jsonb) returns jsonb language sql
		as $$ select jsonb_build_object('sum', (state ->> 'sum')::int + (payload ->> 'n')::int, 'last', headers ->> 'type') $$`)
	for range 3 { // more than one page of the history
		var ms []pgstream.NewMessage
		for range 700 {
			ms = append(ms, events(1)...)
		}
		_, err := pgstream.Append(e.ctx, e.Pool, "accounts", "a", pgstream.AnyVersion, ms)
		must(t, err)
	}
	const call = `select (state ->> 'sum') || ' ' || coalesce(state ->> 'last', '-') || ' ' || version from millrace.aggregate('accounts', $1, 'public.evolve', '{"sum": 10}', $2)`
	for _, c := range []struct {
		key  string
		to   *int64
		want string
	}{{"a", nil, "2110 Added 2100"}, {"a", new(int64), "10 - 0"}, {"nobody", nil, "10 - 0"}} {
		if got := one[string](e, call, c.key, c.to); got != c.want {
			t.Errorf("key %s up to %v: %s, not %s", c.key, c.to, got, c.want)
		}
	}
	third := int64(3)
	if got := one[string](e, call, "a", &third); got != "13 Added 3" {
		t.Errorf("up to version 3: %s", got)
	}
}

// What retention has taken is missed and not passed over.
func TestAHistoryWithoutItsBeginningIsAnError(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	for range 3 {
		_, err := pgstream.Append(e.ctx, e.Pool, "accounts", "a", pgstream.AnyVersion, events(1))
		must(t, err)
	}
	e.run("delete from millrace.accounts where version < 3")
	if _, err := pgstream.ReadEntity(e.ctx, e.Pool, "accounts", "a", 1, 0, 10); !errors.Is(err, pgstream.ErrOutOfRange) {
		t.Errorf("error %v", err)
	}
	ms, err := pgstream.ReadEntity(e.ctx, e.Pool, "accounts", "a", 3, 0, 10)
	must(t, err)
	if len(ms) != 1 {
		t.Errorf("%d messages", len(ms))
	}
	e.run("delete from millrace.accounts")
	if _, err := pgstream.ReadEntity(e.ctx, e.Pool, "accounts", "a", 3, 0, 10); !errors.Is(err, pgstream.ErrOutOfRange) {
		t.Errorf("with nothing left: error %v", err)
	}
}

func TestAppendRefusesWhatCannotBe(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	e.stream("orders")
	for sql, hint := range map[string]string{
		"select millrace.append('orders', 'a', array['{}'::jsonb])":                             "Declare them",
		"select millrace.append('nothing', 'a', array['{}'::jsonb])":                            "Create it",
		"select millrace.append('accounts', '', array['{}'::jsonb])":                            "Pass the id",
		"select millrace.append('accounts', null, array['{}'::jsonb])":                          "Pass the id",
		"select millrace.append('accounts', 'a', '{}')":                                         "Append 1 to 10000",
		"select millrace.append('accounts', 'a', null)":                                         "Append 1 to 10000",
		"select millrace.append('accounts', 'a', array[null::jsonb])":                           "",
		"select millrace.append('accounts', 'a', array['{}'::jsonb], -2)":                       "Pass the version",
		"select millrace.append('accounts', 'a', array['{}'::jsonb], 0, array['[]'::jsonb])":    "Pass an object",
		"select millrace.append('accounts', 'a', array['{}'::jsonb], 0, '{}')":                  "Put null",
		"select millrace.read_entity('orders', 'a')":                                            "Read it by position",
		"select millrace.read_entity('accounts', 'a', 1, null, 0)":                              "1 to 10000",
		"select millrace.aggregate('accounts', 'a', 'nothing')":                                 "Create evolve",
		"select millrace.create_projection('accounts', 'p', 'nothing')":                         "Create it first",
		"select millrace.create_projection('accounts', 'P', 'nothing')":                         "lower case",
		"select millrace.create_projection('orders', 'p', 'nothing')":                           "Declare them",
		"select millrace.create_stream('accounts', p_versions => false)":                        "Keep them",
		"select millrace.create_stream('bytes', p_versions => true, p_payload_type => 'Bytes')": "Leave",
		"select millrace.create_stream('prior', p_versions => true, p_priorities => 2)":         "Leave",
	} {
		_, err := e.Exec(e.ctx, sql)
		var p *pgconn.PgError
		if !errors.As(err, &p) || p.Code != "MR004" && p.Code != "MR002" || !strings.Contains(p.Hint, hint) {
			t.Errorf("%s: %#v", sql, err)
		}
	}
}
