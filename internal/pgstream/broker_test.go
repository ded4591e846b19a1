package pgstream_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// send publishes a message to a destination and returns its position.
func (e *engine) send(to, key string) int64 {
	e.t.Helper()
	return one[int64](e, `select millrace.publish('orders', '{}', $2, jsonb_build_object('to', $1::text))`, to, key)
}

// take receives as one member and returns the claim and the positions.
func (e *engine) take(group string, n int) (claim string, positions []int64) {
	e.t.Helper()
	rows, err := e.Query(e.ctx, "select claim, position from millrace.receive('orders', $1, 'm', $2) order by position", group, n)
	if err != nil {
		e.t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var p int64
		if err := rows.Scan(&claim, &p); err != nil {
			e.t.Fatal(err)
		}
		positions = append(positions, p)
	}
	if err := rows.Err(); err != nil {
		e.t.Fatal(err)
	}
	return claim, positions
}

// takeAll receives and acks until nothing comes.
func (e *engine) takeAll(group string) (positions []int64) {
	e.t.Helper()
	for {
		claim, got := e.take(group, 100)
		if len(got) == 0 {
			return positions
		}
		e.run("select millrace.ack($1)", claim)
		positions = append(positions, got...)
	}
}

func route(name string, values ...any) pgstream.GroupSpec {
	var to any = values
	if len(values) == 1 {
		to = values[0]
	}
	return pgstream.GroupSpec{Stream: "orders", Name: name, AckWait: time.Minute, Filter: pgstream.Filter{Headers: map[string]any{"to": to}}}
}

var unrouted = pgstream.GroupSpec{Stream: "orders", Name: "unrouted", AckWait: time.Minute, Filter: pgstream.Filter{Unrouted: true}}

func TestAFilterKnowsListsAndWhatMustBeAbsent(t *testing.T) {
	e := newEngine(t)
	e.stream("orders")
	for i, h := range []string{`{"to": "a"}`, `{"to": "b", "domain": "human"}`, `{"to": "c"}`, `{"to": ["a"]}`, `{"to": 1}`, `{}`, `null`} {
		e.run(`insert into millrace.orders (key, headers, payload) values ('k', nullif($2::jsonb, 'null'), $1)`, fmt.Sprint(i+1), h)
	}
	for name, c := range map[string]struct {
		filter string
		want   []int64
	}{
		"one of":             {`{"headers": {"to": ["a", "b"]}}`, []int64{1, 2}},
		"one of any type":    {`{"headers": {"to": ["c", 1]}}`, []int64{3, 5}},
		"absent":             {`{"without_headers": ["domain"]}`, []int64{1, 3, 4, 5, 6, 7}},
		"both":               {`{"headers": {"to": ["a", "b"]}, "without_headers": ["domain", "other"]}`, []int64{1}},
		"a value and one of": {`{"headers": {"to": ["a", "b"], "domain": "human"}}`, []int64{2}},
	} {
		t.Run(name, func(t *testing.T) {
			same(t, "read", e.positions(`select position from millrace.read('orders', 1, 100, p_filter => $1) order by 1`, c.filter), c.want)
		})
	}
	for _, bad := range []string{`{"headers": {"to": []}}`, `{"headers": {"to": [{}]}}`, `{"headers": {"to": {}}}`, `{"without_headers": []}`,
		`{"without_headers": [1]}`, `{"one_of": []}`, `{"unrouted": 1}`} {
		if _, err := e.Exec(e.ctx, "select millrace.create_group('orders', 'bad', p_filter => $1)", bad); sqlState(err) != "MR004" {
			t.Errorf("filter %s: %v", bad, err)
		}
	}
	spec := route("g", "a", "b")
	spec.Filter.WithoutHeaders = []string{"domain"}
	spec.Filter.Headers["n"] = 2
	e.group(spec)
	steps, err := pgstream.PlanGroup(e.ctx, e.Pool, spec)
	if err != nil || len(steps) > 0 {
		t.Errorf("the filter is read otherwise than it was written: %v %v", steps, err)
	}
}

func TestUnroutedMessagesAreWhatNoFilterTakes(t *testing.T) {
	e := newEngine(t)
	e.stream("orders")
	e.group(route("a", "a"))
	e.group(route("b", "b"))
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "audit"}) // takes everything and is no route
	e.group(unrouted)
	e.send("a", "k")
	lost := e.send("x", "k")
	e.send("b", "k")
	none := one[int64](e, `select millrace.publish('orders', '{}')`)

	// Maintenance finds them, so that they are counted without anybody who receives.
	if _, err := pgstream.Maintain(e.ctx, e.Pool); err != nil {
		t.Fatal(err)
	}
	if lag, queued := one[int64](e, `select lag from millrace.stats('orders') where "group" = 'unrouted'`),
		one[int64](e, `select queued from millrace.stats('orders') where "group" = 'unrouted'`); lag != 2 || queued != 2 {
		t.Errorf("lag %d, queued %d of two unrouted messages", lag, queued)
	}
	same(t, "unrouted", e.takeAll("unrouted"), []int64{lost, none})
	same(t, "audit", e.takeAll("audit"), []int64{1, 2, 3, 4})
	// And whoever receives needs no maintenance.
	lost = e.send("x", "k")
	same(t, "unrouted", e.takeAll("unrouted"), []int64{lost})
	same(t, "nothing more", e.takeAll("unrouted"), nil)
}

func TestWhatAFilterLeavesBehindIsUnrouted(t *testing.T) {
	e := newEngine(t)
	e.stream("orders")
	e.group(route("a", "a", "x"))
	e.group(route("b", "b"))
	e.group(unrouted)
	e.send("a", "k")
	first := e.send("x", "k")
	same(t, "handled", e.takeAll("a"), []int64{1, first})
	held := e.send("x", "k")
	done := e.send("x", "k")
	partly, got := e.take("a", 2)
	same(t, "held", got, []int64{held, done})
	e.run("select millrace.ack_messages($1, array[$2::bigint])", partly, done) // of a claim that is still open
	waiting := e.send("x", "k")
	e.send("b", "k")
	e.send("a", "k")
	same(t, "nothing yet", e.takeAll("unrouted"), nil)

	// a takes no more x: what it handled stays handled, what it holds and what waits for it is unrouted.
	e.group(route("a", "a"))
	same(t, "narrowed", e.takeAll("unrouted"), []int64{held, waiting})
	x := e.send("x", "k")
	// A route for it that begins now comes too late for x, and one that begins at the beginning gets all of them again.
	late := route("late", "x")
	late.StartFrom = pgstream.StartLatest
	e.group(late)
	y := e.send("x", "k")
	same(t, "before the route", e.takeAll("unrouted"), []int64{x})
	same(t, "late", e.takeAll("late"), []int64{y})
	e.group(route("early", "x"))
	same(t, "early", e.takeAll("early"), []int64{first, held, done, waiting, x, y})

	// b goes with a message that waits and one that is to be delivered again; early and late still take x.
	z := e.send("b", "k")
	claim, got := e.take("b", 1)
	e.run("select millrace.nack($1, $2, 3600, 'no')", claim, got)
	e.run("select millrace_engine.drop_group('orders', 'b')")
	same(t, "dropped", e.takeAll("unrouted"), []int64{6, z})
	same(t, "nothing more", e.takeAll("unrouted"), nil)
}

func TestAFilterThatGoesLeavesNothingBehind(t *testing.T) {
	e := newEngine(t)
	e.stream("orders")
	e.group(route("a", "a"))
	e.group(unrouted)
	p := e.send("a", "k")
	same(t, "routed", e.takeAll("unrouted"), nil)
	spec := route("a", "a")
	spec.Filter = pgstream.Filter{}
	e.group(spec) // takes everything now
	same(t, "unrouted", e.takeAll("unrouted"), nil)
	same(t, "a", e.takeAll("a"), []int64{p})
}

func TestWhatARouteLeavesBehindIsNotWhatWasTrimmed(t *testing.T) {
	e := newEngine(t)
	e.stream("orders")
	e.group(route("a", "a"))
	e.group(unrouted)
	for range 3 {
		e.send("a", "k")
	}
	e.run("select millrace.trim('orders', 3)") // the segment stays, for its last message
	e.run("select millrace_engine.drop_group('orders', 'a')")
	same(t, "dropped", e.takeAll("unrouted"), []int64{3})
}

func TestUnroutedMessagesOfEveryPriority(t *testing.T) {
	e := newEngine(t)
	e.run("select millrace.create_stream('orders', p_priorities => 2)")
	e.group(route("a", "a"))
	e.group(unrouted)
	for _, priority := range []int{0, 1} {
		for _, to := range []string{"a", "x"} {
			e.run(`select millrace.publish('orders', '{}', 'k', jsonb_build_object('to', $1::text), p_priority => $2)`, to, priority)
		}
	}
	if _, err := pgstream.Maintain(e.ctx, e.Pool); err != nil {
		t.Fatal(err)
	}
	same(t, "unrouted", e.takeAll("unrouted"), []int64{2, 2})
	e.run("select millrace_engine.drop_group('orders', 'a')")
	same(t, "dropped", e.takeAll("unrouted"), []int64{1, 1})
}

// The publishers, the handlers that come and go and the one for unrouted messages work at once, and every message reaches somebody.
func TestNoMessageFallsBetweenRoutesThatComeAndGo(t *testing.T) {
	if lost := comeAndGo(t, newEngine(t)); len(lost) > 0 {
		t.Errorf("positions %v reached nobody", lost)
	}
}

func TestMessagesThatFallBetweenRoutesAreSeen(t *testing.T) {
	e := newEngine(t)
	e.run(`create or replace function millrace_engine.hand_over(p_group integer, p_filter jsonb, p_dropped boolean) returns void language sql as ''`)
	if lost := comeAndGo(t, e); len(lost) == 0 {
		t.Error("without hand_over every message reached somebody")
	}
}

func comeAndGo(t *testing.T, e *engine) (lost []int64) {
	t.Helper()
	e.stream("orders")
	e.group(unrouted)
	e.group(route("a", "a"))
	const rounds, each = 15, 20
	var group sync.WaitGroup
	publishers := make(chan error, 4)
	for p := range 4 {
		group.Go(func() {
			for i := range rounds * each {
				if _, err := e.Exec(e.ctx, `select millrace.publish('orders', '{}', null, jsonb_build_object('to', $1::text))`, []string{"a", "b", "c"}[(i+p)%3]); err != nil {
					publishers <- err
					return
				}
			}
		})
	}
	seen := map[int64]int{}
	for range rounds {
		b := route("b", "b")
		b.StartFrom = pgstream.StartLatest
		e.group(b)
		for _, g := range []string{"a", "b", "unrouted"} {
			claim, got := e.take(g, each)
			if len(got) > 0 {
				e.run("select millrace.ack($1)", claim)
			}
			for _, p := range got {
				seen[p]++
			}
		}
		e.group(route("a", "a", "c"))
		e.run("select millrace_engine.drop_group('orders', 'b')")
		e.group(route("a", "a"))
	}
	group.Wait()
	select {
	case err := <-publishers:
		t.Fatal(err)
	default:
	}
	for _, g := range []string{"a", "unrouted"} {
		for _, p := range e.takeAll(g) {
			seen[p]++
		}
	}
	for p := int64(1); p <= 4*rounds*each; p++ {
		if seen[p] == 0 {
			lost = append(lost, p)
		}
	}
	return lost
}

func policy(p pgstream.QueuePolicy) pgstream.GroupSpec {
	return pgstream.GroupSpec{Stream: "orders", Name: "jobs", QueuePolicy: p, AckWait: time.Minute, MaxAttempts: 3, BackoffInitial: time.Millisecond}
}

// job publishes a job with a key and returns its position.
func (e *engine) job(key string) int64 {
	e.t.Helper()
	return one[int64](e, `select millrace.publish('orders', '{}', nullif($1, ''))`, key)
}

func TestAShortQueueHasOneMessageOfAKeyQueued(t *testing.T) {
	e := newEngine(t)
	e.stream("orders")
	e.group(policy(pgstream.QueueShort))
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "audit"})
	a := e.job("a")
	e.job("a")
	b := e.job("b")
	none := e.job("")
	e.job("")
	first, got := e.take("jobs", 10)
	same(t, "queued", got, []int64{a, b, none})
	// Any number is active: while a is, one more can be queued, and one only.
	again := e.job("a")
	e.job("a")
	second, got := e.take("jobs", 10)
	same(t, "beside the active", got, []int64{again})
	// Given back, it is queued again, and the one that was queued meanwhile is passed over.
	e.job("a")
	e.run("select millrace_engine.enqueue_group(id) from millrace_engine.consumer_group where name = 'jobs'")
	e.run("select millrace.release($1)", second)
	_, got = e.take("jobs", 10)
	same(t, "given back", got, []int64{again})
	e.run("select millrace.ack($1)", first)
	same(t, "another group", e.takeAll("audit"), []int64{1, 2, 3, 4, 5, 6, 7, 8})
	s := one[string](e, `select row(queued, active)::text from millrace.stats('orders') where "group" = 'jobs'`)
	if s != "(0,1)" {
		t.Errorf("queued and active: %s", s)
	}
}

func TestManyPublishersOfAShortQueueLeaveOneQueued(t *testing.T) {
	e := newEngine(t)
	e.stream("orders")
	e.group(policy(pgstream.QueueShort))
	for range 5 {
		beside(t, 8, func(int) error {
			_, err := e.Exec(e.ctx, `select millrace.publish('orders', '{}', 'k') from generate_series(1, 10)`)
			return err
		})
		if _, err := pgstream.Maintain(e.ctx, e.Pool); err != nil {
			t.Fatal(err)
		}
		if n := one[int](e, `select queued from millrace.stats('orders')`); n != 1 {
			t.Fatalf("%d are queued", n)
		}
	}
	if got := e.takeAll("jobs"); len(got) != 1 {
		t.Errorf("handed out: %v", got)
	}
}

func TestASingletonQueueHasOneMessageOfAKeyActive(t *testing.T) {
	e := newEngine(t)
	e.stream("orders")
	e.group(policy(pgstream.QueueSingleton))
	a1, a2, b1, n1, n2 := e.job("a"), e.job("a"), e.job("b"), e.job(""), e.job("")
	first, got := e.take("jobs", 10)
	same(t, "one of a key", got, []int64{a1, b1, n1})
	_, got = e.take("jobs", 10)
	same(t, "while they are active", got, nil)
	e.run("select millrace.ack_messages($1, $2)", first, []int64{a1, n1})
	second, got := e.take("jobs", 10)
	same(t, "after the ack", got, []int64{a2, n2})
	// A message that failed makes way for the next of its key.
	b2 := e.job("b")
	e.run("select millrace.nack($1, $2, 3600, 'no')", first, []int64{b1})
	third, got := e.take("jobs", 10)
	same(t, "after the nack", got, []int64{b2})
	e.run("select millrace.ack($1), millrace.ack($2)", second, third)
	e.jump(2 * time.Hour)
	_, got = e.take("jobs", 10)
	same(t, "again", got, []int64{b1})
	// And an expired one, whoever takes it over.
	b3 := e.job("b")
	_, got = e.take("jobs", 10)
	same(t, "until it expires", got, nil)
	e.jump(2 * time.Minute)
	_, got = e.take("jobs", 10)
	same(t, "expired: the other has waited longer", got, []int64{b3})
	e.jump(2 * time.Minute)
	_, got = e.take("jobs", 10)
	same(t, "the last attempt", got, []int64{b1})
	e.jump(2 * time.Minute)
	_, got = e.take("jobs", 10)
	same(t, "worn out", got, []int64{b3})
	same(t, "dead", e.positions("select position from millrace.dead_letters('orders', 'jobs')"), []int64{b1})
}

func TestAStatelyQueueHasOneMessageOfAKeyInEachState(t *testing.T) {
	e := newEngine(t)
	e.stream("orders")
	e.group(policy(pgstream.QueueStately))
	a1 := e.job("a")
	e.job("a")
	claim, got := e.take("jobs", 10)
	same(t, "first", got, []int64{a1})
	a3 := e.job("a")
	e.job("a")
	_, got = e.take("jobs", 10)
	same(t, "one active", got, nil)
	e.run("select millrace.nack($1, $2, 3600, 'one')", claim, []int64{a1})
	claim, got = e.take("jobs", 10)
	same(t, "the queued one", got, []int64{a3})
	// The place of the one that waits for its retry is taken.
	e.run("select millrace.nack($1, $2, 3600, 'two')", claim, got)
	same(t, "dead", e.positions("select position from millrace.dead_letters('orders', 'jobs')"), []int64{a3})
	a5 := e.job("a")
	_, got = e.take("jobs", 10)
	same(t, "the next", got, []int64{a5})
	e.jump(2 * time.Minute) // it expires, and waits for nothing either
	same(t, "nothing", e.takeAll("jobs"), nil)
	same(t, "dead", e.positions("select position from millrace.dead_letters('orders', 'jobs')"), []int64{a3, a5})
	if n := one[int](e, "select millrace.redrive('orders', 'jobs')"); n != 1 {
		t.Errorf("%d are queued again", n)
	}
	same(t, "redriven", e.takeAll("jobs"), []int64{a3})
	e.jump(2 * time.Hour)
	same(t, "the first", e.takeAll("jobs"), []int64{a1})
}

func TestPoliciesThatCannotBeAreRefused(t *testing.T) {
	e := newEngine(t)
	e.stream("orders")
	e.run("select millrace.create_stream('urgent', p_priorities => 2)")
	e.group(policy(pgstream.QueueSingleton))
	e.group(unrouted)
	for sql, want := range map[string]string{
		`select millrace.create_group('orders', 'x', p_queue_policy => 'Long')`:                               "MR004",
		`select millrace.create_group('orders', 'x', 'Ordered', p_queue_policy => 'Short')`:                   "MR004",
		`select millrace.create_group('orders', 'x', 'Ordered', p_filter => '{"unrouted": true}')`:            "MR004",
		`select millrace.create_group('urgent', 'x', p_queue_policy => 'Short')`:                              "MR004",
		`select millrace.create_group('orders', 'jobs', p_queue_policy => 'Standard')`:                        "MR004",
		`select millrace.create_group('orders', 'unrouted', p_filter => '{"keys": ["a"]}')`:                   "MR004",
		`select millrace.create_stream('orders', p_priorities => 2)`:                                          "MR004",
		`select * from millrace.read('orders', 1, p_filter => '{"unrouted": true}')`:                          "MR004",
		`select millrace.create_group('orders', 'jobs', p_max_attempts => 4)`:                                 "",
		`select millrace.create_group('orders', 'unrouted', p_filter => '{"unrouted": true, "keys": ["a"]}')`: "",
	} {
		if _, err := e.Exec(e.ctx, sql); sqlState(err) != want {
			t.Errorf("%s: %v", sql, err)
		}
	}
	if _, err := pgstream.PlanGroup(e.ctx, e.Pool, policy(pgstream.QueueShort)); !errors.Is(err, pgstream.ErrRefused) {
		t.Errorf("another policy: %v", err)
	}
}

// beside runs n functions at once and fails the test with their first error.
func beside(t *testing.T, n int, f func(i int) error) {
	t.Helper()
	var g errgroup.Group
	for i := range n {
		g.Go(func() error { return f(i) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

// throttled publishes a message of a key, at most one in a minute, and returns its position, 0 for null.
func (e *engine) throttled(key string, next bool) int64 {
	e.t.Helper()
	return one[int64](e, `select coalesce(millrace.publish('orders', '{}', p_dedupe_key => $1, p_throttle_seconds => 60, p_next_slot => $2), 0)`, key, next)
}

// slots stops the clock at the beginning of a minute.
func (e *engine) slots() {
	e.t.Helper()
	e.stopClock()
	e.run(`update public.test_clock set now = to_timestamp(ceil(extract(epoch from now) / 60) * 60)`)
}

func TestAThrottledKeyIsPublishedOncePerSlot(t *testing.T) {
	e := newEngine(t)
	e.run("select millrace.create_stream('orders', p_dedupe_window_seconds => 0)") // slots need no window
	e.slots()
	same(t, "first slot", []int64{e.throttled("a", false), e.throttled("a", false), e.throttled("b", false)}, []int64{1, 1, 2})
	e.jump(59 * time.Second)
	same(t, "at its end", []int64{e.throttled("a", false)}, []int64{1})
	e.jump(time.Second)
	same(t, "second slot", []int64{e.throttled("a", false), e.throttled("a", false)}, []int64{3, 3})
	same(t, "a batch", e.positions(`select * from millrace.publish_batch('orders', array['{}', '{}', '{}']::jsonb[], p_dedupe_keys => array['a', 'c', 'c'],
		p_throttle_seconds => 60)`), []int64{3, 4, 4})
	// A plain dedupe key is another one, and so is a slot of another length.
	e.run("select millrace.create_stream('orders', p_dedupe_window_seconds => 60)")
	same(t, "others", []int64{one[int64](e, `select millrace.publish('orders', '{}', p_dedupe_key => 'a')`),
		one[int64](e, `select millrace.publish('orders', '{}', p_dedupe_key => 'a', p_throttle_seconds => 30)`)}, []int64{5, 6})
	// What was rolled back took no slot.
	e.run(`begin; select millrace.publish('orders', '{}', p_dedupe_key => 'z', p_throttle_seconds => 60); rollback`)
	if n := one[int](e, `select count(*) from millrace_engine.dedupe where key like 'z%'`); n != 0 {
		t.Errorf("%d keys are remembered of what was rolled back", n)
	}
	e.jump(time.Hour)
	if n := one[int](e, `select millrace_engine.purge_dedupe(100)`); n < 5 {
		t.Errorf("%d slots were purged", n)
	}
}

func TestAThrottledMessageWaitsForTheNextSlot(t *testing.T) {
	e := newEngine(t)
	e.stream("orders")
	e.slots()
	same(t, "first slot", []int64{e.throttled("a", true), e.throttled("a", true), e.throttled("a", true)}, []int64{1, 0, 0})
	if n := e.delayed(); n != 1 {
		t.Fatalf("%d wait for the next slot", n)
	}
	e.jump(59 * time.Second)
	e.moveDue(e.Pool, 10)
	if n := e.length("orders"); n != 1 {
		t.Fatalf("%d messages before the next slot", n)
	}
	e.jump(time.Second)
	e.moveDue(e.Pool, 10)
	if n := e.length("orders"); n != 2 {
		t.Fatalf("%d messages in the next slot", n)
	}
	// The one that waited has the slot, so the next waits for the one after it.
	same(t, "second slot", []int64{e.throttled("a", true), e.throttled("a", false)}, []int64{0, 0})
	if n := e.delayed(); n != 1 {
		t.Fatalf("%d wait for the third slot", n)
	}
	for _, sql := range []string{
		`select millrace.publish('orders', '{}', p_throttle_seconds => 60)`,
		`select millrace.publish('orders', '{}', p_dedupe_key => 'a', p_throttle_seconds => 0)`,
		`select millrace.publish('orders', '{}', p_dedupe_key => 'a', p_next_slot => true)`,
		`select millrace.publish('orders', '{}', 'k', p_dedupe_key => 'a', p_throttle_seconds => 60, p_next_slot => true, p_serialize => true)`,
		`select millrace.publish('orders', '{}', p_dedupe_key => 'a', p_throttle_seconds => 60, p_next_slot => true, p_delay_seconds => 1)`,
		`select millrace.publish_batch('orders', array['{}', '{}']::jsonb[], p_dedupe_keys => array['a', null], p_throttle_seconds => 60)`,
	} {
		if _, err := e.Exec(e.ctx, sql); sqlState(err) != "MR004" {
			t.Errorf("%s: %v", sql, err)
		}
	}
}

func TestManyThrottledPublishersStoreOnePerSlot(t *testing.T) {
	e := newEngine(t)
	e.stream("orders")
	e.slots()
	p, err := pgstream.NewPublisher(e.ctx, e.Pool, "orders")
	if err != nil {
		t.Fatal(err)
	}
	for round := range 5 {
		beside(t, 8, func(i int) error {
			m := pgstream.NewMessage{Payload: []byte(`{}`), DedupeKey: "a", Throttle: time.Minute, NextSlot: i%2 == 0}
			if i == 7 {
				m.NextSlot = false
				_, err := p.PublishBatch(e.ctx, e.Pool, []pgstream.NewMessage{m, m})
				return err
			}
			_, err := p.Publish(e.ctx, e.Pool, m)
			return err
		})
		if n, waiting := e.length("orders"), e.delayed(); n != round+1 || waiting != 1 {
			t.Fatalf("round %d: %d messages, %d wait", round, n, waiting)
		}
		e.jump(time.Minute)
		e.moveDue(e.Pool, 10)
		e.run("delete from millrace_engine.delayed")
	}
}

// Receivers that ack, give back, fail and forget, while publishers go on: of a key one message is active at any moment, and with Stately one is in each state.
func TestManyReceiversHaveOneMessageOfAKey(t *testing.T) {
	for _, p := range []pgstream.QueuePolicy{pgstream.QueueSingleton, pgstream.QueueStately} {
		t.Run(string(p), func(t *testing.T) {
			t.Parallel()
			if broken := receiveBeside(t, p, ""); broken != "" {
				t.Error(broken)
			}
		})
	}
}

func TestTwoActiveMessagesOfAKeyAreSeen(t *testing.T) {
	if receiveBeside(t, pgstream.QueueSingleton, "a.nonce is not null") == "" {
		t.Error("receive handed out two messages of a key, and nobody saw it")
	}
}

// receiveBeside lets many receive at once, without a text of is_active when there is one, and returns what was seen that must not be.
func receiveBeside(t *testing.T, p pgstream.QueuePolicy, without string) string {
	e := newEngine(t)
	e.stream("orders")
	spec := policy(p)
	spec.AckWait, spec.MaxAttempts = 2*time.Millisecond, 0
	e.group(spec)
	if p == pgstream.QueueSingleton { // so many that some are marked as blocked
		e.run(`select count(millrace.publish('orders', '{}', (n % 3)::text)) from generate_series(1, 200) n`)
	}
	if without != "" {
		def := one[string](e, `select pg_get_functiondef('millrace_engine.is_active'::regproc)`)
		if !strings.Contains(def, without) {
			t.Fatalf("is_active has no %q any more", without)
		}
		e.run(strings.Replace(def, without, "false", 1))
	}
	// The table itself says when there are two: at every change, seen by whoever makes it.
	e.run(`create function public.watch() returns trigger language plpgsql as $$
		begin
			if exists (select from millrace_engine.delivery d join millrace_engine.consumer_group g on g.id = d.group_id
					group by d.group_id, d.queue_key, g.queue_policy
					having count(d.nonce) > 1 or g.queue_policy = 'Stately' and (count(*) filter (where d.nonce is null and d.attempt = 0) > 1
						or count(*) filter (where d.nonce is null and d.attempt > 0) > 1)) then
				raise exception 'two of a key' using errcode = 'XX999';
			end if;
			return null;
		end $$`)
	e.run(`create constraint trigger watch after insert or update on millrace_engine.delivery deferrable initially deferred for each row execute function public.watch()`)
	var seen atomic.Bool
	note := func(err error) error {
		switch sqlState(err) {
		case "XX999":
			seen.Store(true)
		case "", "MR001", "40P01":
		default:
			return err
		}
		if sqlState(err) == "" {
			return err
		}
		return nil
	}
	beside(t, 8, func(i int) error {
		for n := range 60 {
			if _, err := e.Exec(e.ctx, `select millrace.publish('orders', '{}', $1)`, fmt.Sprint(n%3)); err != nil {
				return err
			}
			var claim *string
			var positions []int64
			err := note(e.QueryRow(e.ctx, `select min(claim), array_agg(position) from millrace.receive('orders', 'jobs', $1, 2)`, fmt.Sprint(i)).Scan(&claim, &positions))
			if err != nil {
				return err
			}
			if claim == nil || seen.Load() {
				continue
			}
			sql, args := "select millrace.ack($1)", []any{*claim}
			switch (i + n) % 4 {
			case 0:
				continue // it expires
			case 1:
				sql, args = "select millrace.nack($1, $2, 0, 'no')", append(args, positions)
			case 2:
				sql = "select millrace.release($1)"
			}
			_, err = e.Exec(e.ctx, sql, args...)
			if err := note(err); err != nil {
				return err
			}
		}
		return nil
	})
	if seen.Load() {
		return "two messages of a key were active, or in one state, at once"
	}
	return ""
}
