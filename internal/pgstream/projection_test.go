package pgstream_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// sums has documents whose result depends on the order of messages, and which some messages delete.
func (e *engine) sums() {
	e.t.Helper()
	e.run(`create function public.sums(document jsonb, payload jsonb, headers jsonb) returns jsonb language sql as
		$$ select case when payload ->> 'n' = '13' then null else jsonb_build_object('list', coalesce(document -> 'list', '[]') || (payload -> 'n')) end $$`)
}

// fold is what the documents of sums have to be.
const fold = `with recursive h as (
		select key, payload, row_number() over (partition by key order by position) n from (
			select %[1]s as key, payload, position from millrace.accounts where version is not null and %[1]s is not null) m),
	f as (select key, n, public.sums(null, payload, null) document, case when public.sums(null, payload, null) is null then 0 else 1 end::bigint version from h where n = 1
		union all
		select h.key, h.n, public.sums(f.document, h.payload, null), case when public.sums(f.document, h.payload, null) is null then 0 else f.version + 1 end
		from f join h on h.key = f.key and h.n = f.n + 1)
	select coalesce(string_agg(key || document || version, ';' order by key collate "C"), '') from (select distinct on (key) * from f order by key, n desc) x where document is not null`

const documents = `select coalesce(string_agg(key || document || version, ';' order by key collate "C"), '') from public.%s`

// sameAsFold compares a table of documents with the log.
func (e *engine) sameAsFold(table, id string) {
	e.t.Helper()
	want, got := one[string](e, fmt.Sprintf(fold, id)), one[string](e, fmt.Sprintf(documents, table))
	if got != want || want == "" {
		e.t.Errorf("%s has\n%s\nand the log makes\n%s", table, got, want)
	}
}

func (e *engine) declare(wanted ...pgstream.ProjectionSpec) (steps []pgstream.Step, problems []pgstream.ProjectionProblem) {
	e.t.Helper()
	steps, problems, err := pgstream.PlanProjections(e.ctx, e.Pool, "accounts", wanted)
	must(e.t, err)
	must(e.t, pgstream.ApplyProjections(e.ctx, e.Pool, "accounts", steps))
	return steps, problems
}

// finish runs a rebuild to its end, in small steps, and returns how many they were.
func (e *engine) finish(projection string) int {
	e.t.Helper()
	for n := 1; ; n++ {
		finished, err := pgstream.RebuildStep(e.ctx, e.Pool, "accounts", projection, 7)
		must(e.t, err)
		if finished {
			return n
		}
	}
}

func appendSome(e *engine, times int) {
	e.t.Helper()
	for i := range times {
		key := string(rune('a' + i%5))
		ms := events(i, i+1)
		for j := range ms {
			ms[j].Payload = fmt.Appendf(nil, `{"n": %d, "of": "%d"}`, (i*7+j)%17, i%3)
		}
		_, err := pgstream.Append(e.ctx, e.Pool, "accounts", key, pgstream.AnyVersion, ms)
		must(e.t, err)
	}
}

func TestDeclaredProjectionsComeChangeAndGo(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	spec := pgstream.ProjectionSpec{Name: "sums", Function: "sums", Documents: "public.sums_docs"}
	steps, problems := e.declare(spec)
	if len(steps) != 0 || len(problems) != 1 || problems[0].Missing || !strings.Contains(problems[0].Text, "there is no function sums(jsonb,jsonb,jsonb)") {
		t.Fatalf("a function that does not exist: %+v, %+v", steps, problems)
	}
	e.sums()
	appendSome(e, 20)
	e.run(`select millrace.publish('accounts', '{"n": 3}', 'a')`) // no append: it has no version, and an inline projection does not see it
	steps, problems = e.declare(spec)
	if len(steps) != 1 || steps[0].Summary != "create projection sums" || len(problems) > 0 {
		t.Fatalf("%+v, %+v", steps, problems)
	}
	// Nothing is half built: the documents come when all of them are there, and appends go on meanwhile.
	if _, err := pgstream.RebuildStep(e.ctx, e.Pool, "accounts", "sums", 7); err != nil {
		t.Fatal(err)
	}
	appendSome(e, 3)
	if n := one[int](e, "select count(*) from public.sums_docs"); n != 0 {
		t.Errorf("%d documents before the rebuild has finished", n)
	}
	if n := e.finish("sums"); n < 4 {
		t.Errorf("%d steps of 7 for 46 messages", n)
	}
	e.sameAsFold("sums_docs", "key")
	appendSome(e, 10)
	e.sameAsFold("sums_docs", "key")
	if steps, _ := e.declare(spec); len(steps) != 0 {
		t.Errorf("again: %+v", steps)
	}

	// Another function: the old documents stay until the new ones are there.
	e.run(`create function public.counts(document jsonb, payload jsonb, headers jsonb) returns jsonb language sql as
		$$ select to_jsonb(coalesce(document::text::int, 0) + 1) $$`)
	changed := spec
	changed.Function = "counts"
	if steps, _ := e.declare(changed); len(steps) != 1 || steps[0].Summary != "change projection sums" {
		t.Fatalf("%+v", steps)
	}
	if steps, _ := e.declare(changed); len(steps) != 0 {
		t.Errorf("a rebuild that is under way begins anew: %+v", steps)
	}
	early, err := pgstream.RebuildStep(e.ctx, e.Pool, "accounts", "sums", 7)
	must(t, err)
	if early {
		t.Fatal("finished after seven messages")
	}
	appendSome(e, 1)
	e.sameAsFold("sums_docs", "key") // the live ones go on with the old function
	e.finish("sums")
	if bad := one[int](e, "select count(*) from public.sums_docs d where document <> to_jsonb((select count(*) from millrace.accounts m where m.key = d.key and m.version is not null))"); bad != 0 {
		t.Errorf("%d documents are not those of the new function", bad)
	}
	// Back, and back again before it has finished. What was made until then is forgotten, also when something else is wanted instead.
	step := func() {
		t.Helper()
		if finished, err := pgstream.RebuildStep(e.ctx, e.Pool, "accounts", "sums", 7); finished || err != nil {
			t.Fatal(finished, err)
		}
	}
	e.declare(spec)
	step()
	e.declare(changed)
	if n := one[int](e, "select count(*) from millrace.projections('accounts') where rebuilt is null and function = 'public.counts'"); n != 1 {
		t.Error("what is live was wanted, and a rebuild went on")
	}
	if n := one[int](e, "select count(*) from millrace_engine.building"); n != 0 {
		t.Errorf("%d documents are left of a rebuild that was given up", n)
	}
	other := changed
	other.Revision = "other"
	e.declare(other)
	step()
	e.declare(spec)
	e.finish("sums")
	e.sameAsFold("sums_docs", "key")

	// A revision makes the same function's documents anew; a document id makes them of several entities.
	e.run("update public.sums_docs set document = '{}'")
	again := spec
	again.Revision = "2"
	e.declare(again)
	e.finish("sums")
	e.sameAsFold("sums_docs", "key")
	again.DocumentID = []string{"of"}
	e.declare(again)
	e.finish("sums")
	e.sameAsFold("sums_docs", "payload ->> 'of'")
	appendSome(e, 5)
	e.sameAsFold("sums_docs", "payload ->> 'of'")

	// What a resource declares is not changed by others, and what others have made is left alone.
	e.run(`update millrace_engine.stream set owner = '{"name": "accounts"}'`)
	if _, err := e.Exec(e.ctx, "select millrace.drop_projection('accounts', 'sums')"); sqlState(err) != "MR007" {
		t.Errorf("a declared projection was dropped: %v", err)
	}
	e.run("select millrace.create_projection('accounts', 'mine', 'counts', 'public.mine')")
	if steps, _ := e.declare(again); len(steps) != 0 {
		t.Errorf("%+v", steps)
	}
	steps, _ = e.declare()
	if len(steps) != 1 || steps[0].Summary != "drop projection sums; its documents in public.sums_docs stay" {
		t.Errorf("%+v", steps)
	}
	if got := one[string](e, "select string_agg(name, ',') from millrace.projections('accounts')"); got != "mine" {
		t.Errorf("left is %s", got)
	}
}

// runGroup is a member of the group sums: it projects and acks in one transaction, and now and then it dies in between.
func (e *engine) runGroup(group, member string, stop <-chan struct{}, idle func()) {
	c := e.consumer(pgstream.ConsumerConfig{Stream: "accounts", Group: group, Member: member, MaxMessages: 3})
	for {
		select {
		case <-stop:
			return
		default:
		}
		claim, err := c.TryReceive(e.ctx)
		if err != nil {
			if e.ctx.Err() != nil {
				return
			}
			continue
		}
		if claim == nil {
			idle()
			continue
		}
		positions := make([]int64, 0, len(claim.Messages))
		for _, m := range claim.Messages {
			positions = append(positions, m.Position)
		}
		err = pgx.BeginFunc(e.ctx, e.Pool, func(tx pgx.Tx) error {
			if _, err := tx.Exec(e.ctx, "select millrace.project('accounts', $1, $2)", group, positions); err != nil {
				return err
			}
			if rand.IntN(5) == 0 {
				return fmt.Errorf("died")
			}
			return c.AckTx(e.ctx, tx, claim.Token)
		})
		if err != nil {
			_ = c.Release(e.ctx, claim.Token)
		}
	}
}

// A group's projection is exact whoever dies, and a rebuild that goes on beside it replaces the documents without losing or doubling a message.
func TestAGroupsProjectionIsExactAcrossRebuilds(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	e.sums()
	e.group(pgstream.GroupSpec{Stream: "accounts", Name: "sums", Mode: pgstream.ModeOrdered})
	appendSome(e, 20)
	spec := pgstream.ProjectionSpec{Name: "sums", Function: "sums", Documents: "public.sums_docs", Group: "sums"}
	if steps, problems := e.declare(spec); len(steps) != 1 || len(problems) > 0 {
		t.Fatalf("%+v, %+v", steps, problems)
	}
	stop := make(chan struct{})
	var working sync.WaitGroup
	for _, member := range []string{"one", "two"} {
		working.Go(func() { e.runGroup("sums", member, stop, func() {}) })
	}
	for round := range 6 {
		spec.Revision = fmt.Sprint(round)
		if round > 0 {
			e.declare(spec)
		}
		appendSome(e, 15)
		for {
			finished, err := pgstream.RebuildStep(e.ctx, e.Pool, "accounts", "sums", 20)
			if err != nil && sqlState(err) != "55P03" && sqlState(err) != "40P01" {
				t.Fatal(err)
			}
			if finished {
				break
			}
			appendSome(e, 1)
		}
	}
	appendSome(e, 15)
	e.eventually("the group has projected everything", func() bool {
		return one[bool](e, `select lag = 0 and in_flight = 0 from millrace.stats('accounts') where "group" = 'sums'`)
	})
	close(stop)
	working.Wait()
	e.sameAsFold("sums_docs", "key")
}

// projectAll is a member of a group that projects until nothing is left.
func (e *engine) projectAll(group string) {
	e.t.Helper()
	c := e.consumer(pgstream.ConsumerConfig{Stream: "accounts", Group: group})
	for {
		claim, err := c.TryReceive(e.ctx)
		must(e.t, err)
		if claim == nil {
			return
		}
		must(e.t, pgx.BeginFunc(e.ctx, e.Pool, func(tx pgx.Tx) error {
			exec(e, tx, "select millrace.project('accounts', $1, $2)", group, positions(claim))
			return c.AckTx(e.ctx, tx, claim.Token)
		}))
	}
}

// A publisher may carry a position that is older than what others have published since: then readers are held back to a place that a rebuild has passed. Nothing is lost, and
// nothing is projected twice.
func TestARebuildIsExactWhenTheHorizonStepsBack(t *testing.T) {
	t.Parallel()
	for name, group := range map[string]string{"inline": "", "group": "sums"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.accounts()
			e.sums()
			e.group(pgstream.GroupSpec{Stream: "accounts", Name: "sums", Mode: pgstream.ModeOrdered})
			appendSome(e, 5) // ten messages
			e.declare(pgstream.ProjectionSpec{Name: "sums", Function: "sums", Documents: "public.sums_docs", Group: group})
			if finished, err := pgstream.RebuildStep(e.ctx, e.Pool, "accounts", "sums", 10); finished || err != nil {
				t.Fatal(finished, err)
			}
			appendSome(e, 1)
			tx := e.begin()
			// As publish_guard_template does it.
			exec(e, tx, "select pg_current_xact_id(), pg_advisory_xact_lock_shared((millrace_engine.stream_id('accounts')::bigint << 40) | 5)")
			if h := one[int](e, "select millrace_engine.horizon(millrace_engine.stream_id('accounts'))"); h != 5 {
				t.Fatalf("readers are held back to %d", h)
			}
			if finished, err := pgstream.RebuildStep(e.ctx, e.Pool, "accounts", "sums", 10); !finished || err != nil {
				t.Fatal(finished, err)
			}
			rollback(e, tx)
			appendSome(e, 2)
			if group != "" {
				e.projectAll(group)
			}
			e.sameAsFold("sums_docs", "key")
		})
	}
}

// Whoever projects holds the projection until it has acked: a rebuild that ended the claim in between would meet it at the documents, and one of the two would be a deadlock's victim.
func TestARebuildWaitsForWhoeverProjects(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	e.sums()
	e.group(pgstream.GroupSpec{Stream: "accounts", Name: "sums", Mode: pgstream.ModeOrdered})
	spec := pgstream.ProjectionSpec{Name: "sums", Function: "sums", Documents: "public.sums_docs", Group: "sums"}
	appendSome(e, 5)
	e.declare(spec)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "accounts", Group: "sums"})
	project := func(db pgstream.DB, claim *pgstream.Claim) {
		t.Helper()
		exec(e, db, "select millrace.project('accounts', 'sums', $1)", positions(claim))
	}
	// While the documents are made for the first time, nobody sees some of them.
	claim := mustReceive(e, c)
	project(e, claim)
	if n := one[int](e, "select count(*) from public.sums_docs"); n != 0 {
		t.Errorf("%d documents before the first rebuild has finished", n)
	}
	e.finish("sums")
	e.projectAll("sums")
	e.sameAsFold("sums_docs", "key")

	spec.Revision = "2"
	e.declare(spec)
	appendSome(e, 5)
	claim = mustReceive(e, c)
	tx := e.begin()
	project(tx, claim)
	rebuilding := e.connect()
	done := e.blocked(rebuilding.PgConn().PID(), func() error {
		_, err := pgstream.RebuildStep(e.ctx, rebuilding, "accounts", "sums", 100)
		return err
	})
	must(t, c.AckTx(e.ctx, tx, claim.Token))
	commit(e, tx)
	must(t, <-done)
	e.projectAll("sums")
	e.sameAsFold("sums_docs", "key")
}

// From the moment at which a rebuild looks at the end of the stream until what it has made is live, nobody appends: a message of that time would be projected both inline and in the
// group, or in neither.
func TestAppendsWaitWhileARebuildReplacesDocuments(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ first, then string }{
		"made anew": {"", ""}, "inline to a group": {"", "sums"}, "a group to inline": {"sums", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.accounts()
			e.sums()
			e.group(pgstream.GroupSpec{Stream: "accounts", Name: "sums", Mode: pgstream.ModeOrdered})
			appendSome(e, 5)
			spec := pgstream.ProjectionSpec{Name: "sums", Function: "sums", Documents: "public.sums_docs", Group: c.first}
			e.declare(spec)
			if c.first != c.then {
				e.finish("sums")
				appendSome(e, 5)
				spec.Group = c.then
				e.declare(spec)
			}
			tx, appending := e.begin(), e.connect()
			if finished, err := pgstream.RebuildStep(e.ctx, tx, "accounts", "sums", 100); !finished || err != nil {
				t.Fatal(finished, err)
			}
			done := e.blocked(appending.PgConn().PID(), func() error {
				_, err := pgstream.Append(e.ctx, appending, "accounts", "a", pgstream.AnyVersion, events(5))
				return err
			})
			commit(e, tx)
			must(t, <-done)
			if c.then != "" {
				e.projectAll(c.then)
			}
			e.sameAsFold("sums_docs", "key")
		})
	}
}

// Two who change several documents each lock them in one order.
func TestDocumentsAreLockedInTheOrderOfTheirKeys(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	e.run(`create table public.calls (n serial, id text);
		create function public.called(document jsonb, payload jsonb, headers jsonb) returns jsonb language sql as
		$$ insert into public.calls (id) values (payload ->> 'id' || coalesce((document ->> 'n'), '')); select payload $$;
		select millrace.create_projection('accounts', 'called', 'called', 'public.called_docs', '{id}')`)
	e.run(`select millrace.append('accounts', 'a', array['{"id": "m", "n": 1}', '{"id": "Z", "n": 1}', '{"id": "ä"}', '{"id": "m", "n": 2}', '{"id": "a"}', '{}', '{"id": "m", "n": 3}']::jsonb[])`)
	if got := one[string](e, "select string_agg(id, ' ' order by n) from public.calls"); got != "Z a m m1 m2 ä" {
		t.Errorf("the documents were changed in the order %s", got)
	}
}

// The documents of a group are made of what the group is given, also when they are made anew.
func TestARebuildKeepsToTheFilterOfItsGroup(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	e.sums()
	e.group(pgstream.GroupSpec{Stream: "accounts", Name: "sums", Mode: pgstream.ModeOrdered, Filter: pgstream.Filter{Headers: map[string]any{"type": "Added"}}})
	e.run(`select millrace.append('accounts', 'a', array['{"n": 1}', '{"n": 2}', '{"n": 3}']::jsonb[], null, array['{"type": "Added"}', '{"type": "Removed"}', '{"type": "Added"}']::jsonb[])`)
	e.declare(pgstream.ProjectionSpec{Name: "sums", Function: "sums", Documents: "public.sums_docs", Group: "sums"})
	e.finish("sums")
	if got := one[string](e, "select document::text || version from public.sums_docs"); got != `{"list": [1, 3]}2` {
		t.Errorf("the document is %s", got)
	}
}

// A step reads in parts of ten thousand, and knows the end of the stream from the end of what it may do.
func TestALargeStepOfARebuildLeavesNothingOut(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	e.run(`create function public.counts(document jsonb, payload jsonb, headers jsonb) returns jsonb language sql as
		$$ select to_jsonb(coalesce(document::text::int, 0) + 1) $$`)
	for _, n := range []int{10000, 3} {
		e.run("select millrace.append('accounts', 'a', array_fill('{}'::jsonb, array[$1::integer]))", n)
	}
	e.declare(pgstream.ProjectionSpec{Name: "counts", Function: "counts", Documents: "public.counts_docs"})
	for finished := false; !finished; {
		var err error
		finished, err = pgstream.RebuildStep(e.ctx, e.Pool, "accounts", "counts", 10001)
		must(t, err)
	}
	if got := one[string](e, "select document::text || '/' || version from public.counts_docs"); got != "10003/10003" {
		t.Errorf("of 10003 messages the document counts %s", got)
	}
}

func TestProjectionsAreRefused(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	e.sums()
	e.stream("plain")
	e.run("select millrace.create_stream('urgent', p_priorities => 2)")
	for _, g := range [][3]string{{"accounts", "shared", "Shared"}, {"accounts", "one", "Ordered"}, {"urgent", "g", "Ordered"}} {
		e.run("select millrace.create_group($1, $2, $3)", g[0], g[1], g[2])
	}
	e.run("select millrace.create_projection('accounts', 'first', 'sums', 'public.first', p_group => 'one')")
	for sql, want := range map[string]string{
		"select millrace.create_projection('accounts', 'p', 'sums', 'public.p', p_group => 'nobody')": "MR002",
		"select millrace.create_projection('accounts', 'p', 'sums', 'public.p', p_group => 'shared')": "MR004",
		"select millrace.create_projection('accounts', 'p', 'sums', 'public.p', p_group => 'one')":    "MR004",
		"select millrace.create_projection('urgent', 'p', 'sums', 'public.p', p_group => 'g')":        "MR004",
		"select millrace.create_projection('plain', 'p', 'sums', 'public.p')":                         "MR004",
		"select millrace.project('accounts', 'shared', '{1}')":                                        "MR002",
		"select millrace.rebuild_step('accounts', 'nobody')":                                          "MR004",
		"select millrace.rebuild_step('accounts', 'first', 0)":                                        "MR004",
	} {
		if _, err := e.Exec(e.ctx, sql); sqlState(err) != want {
			t.Errorf("%s: %v, not %s", sql, err, want)
		}
	}
	e.run("select millrace.create_projection('accounts', 'inline', 'sums', 'public.inline')")
	for _, level := range []pgx.TxIsoLevel{pgx.RepeatableRead, pgx.Serializable} {
		tx := e.beginAs(pgx.TxOptions{IsoLevel: level})
		if _, err := tx.Exec(e.ctx, "select millrace.rebuild_step('accounts', 'inline')"); sqlState(err) != "MR003" {
			t.Errorf("%s: %v", level, err)
		}
		rollback(e, tx)
	}
	// A function that fails leaves the rebuild where it was.
	e.run(`create function public.fails(document jsonb, payload jsonb, headers jsonb) returns jsonb language plpgsql as
		$$ begin if payload ->> 'n' = '8' then raise 'eight'; end if; return '1'; end $$`)
	appendSome(e, 5)
	e.declare(pgstream.ProjectionSpec{Name: "fails", Function: "fails", Documents: "public.fails_docs"})
	for range 20 {
		finished, err := pgstream.RebuildStep(e.ctx, e.Pool, "accounts", "fails", 1)
		if said, ok := pgstream.IsFunctionError(err); ok {
			if said != "eight" {
				t.Errorf("it said %q", said)
			}
			// What is gone cannot be projected.
			e.run("select millrace.trim('accounts', 5)")
			if _, err := e.Exec(e.ctx, "select millrace.rebuild_projection('accounts', 'first')"); sqlState(err) != "MR004" {
				t.Errorf("rebuilt without its beginning: %v", err)
			}
			return
		}
		if finished {
			break
		}
		must(t, err)
	}
	t.Error("the failing function was never heard of")
}

// An append that is open while an inline projection is rebuilt is waited for, and is in the new documents.
func TestARebuildWaitsForOpenAppends(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	e.sums()
	appendSome(e, 5)
	e.run("select millrace.create_projection('accounts', 'sums', 'sums', 'public.sums_docs')")
	e.finish("sums")
	tx := e.begin()
	_, err := pgstream.Append(e.ctx, tx, "accounts", "a", pgstream.AnyVersion, events(1))
	must(t, err)
	done := make(chan error, 1)
	go func() {
		_, err := pgstream.RebuildStep(e.ctx, e.Pool, "accounts", "sums", 100)
		done <- err
	}()
	e.eventually("the rebuild waits", func() bool {
		return one[bool](e, "select exists (select from pg_locks l where not l.granted and l.database = (select oid from pg_database where datname = current_database()))")
	})
	commit(e, tx)
	must(t, <-done)
	e.sameAsFold("sums_docs", "key")
}
