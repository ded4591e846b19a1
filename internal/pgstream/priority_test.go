package pgstream_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

// prioritized makes the stream "orders" with three priorities and the group "g".
func (e *engine) prioritized(mode pgstream.Mode) {
	e.t.Helper()
	must(e.t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", Priorities: 3}}))
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, AckWait: time.Second, MaxAttempts: 3})
}

// publishAt publishes messages with these numbers as payload, all with one key.
func (e *engine) publishAt(priority int, numbers ...int) {
	e.t.Helper()
	for _, n := range numbers {
		e.run("select millrace.publish('orders', to_jsonb($1::integer), 'k', p_priority => $2)", n, priority)
	}
}

// parcel is one claim of receive in SQL, with the numbers that were published.
type parcel struct {
	token     string
	positions []int64
	numbers   []int
}

// receiveSQL receives as SQL users do, on any stream. A parcel without a token means that there was nothing.
func (e *engine) receiveSQL(member string, most int, ack string) (parcel, error) {
	e.t.Helper()
	var p parcel
	rows, err := e.Query(e.ctx, `select claim, "position", payload::text::integer from millrace.receive('orders', 'g', $1, $2, p_ack => nullif($3, ''))`, member, most, ack)
	if err != nil {
		return p, err
	}
	var position int64
	var number int
	_, err = pgx.ForEachRow(rows, []any{&p.token, &position, &number}, func() error {
		p.positions = append(p.positions, position)
		p.numbers = append(p.numbers, number)
		return nil
	})
	return p, err
}

func (e *engine) mustReceiveSQL(member string, most int, ack string) parcel {
	e.t.Helper()
	p, err := e.receiveSQL(member, most, ack)
	must(e.t, err)
	return p
}

// drainSQL receives and acks in one round trip until nothing is left.
func (e *engine) drainSQL(member string, most int) (numbers []int) {
	e.t.Helper()
	for token := ""; ; {
		p := e.mustReceiveSQL(member, most, token)
		if p.token == "" {
			return numbers
		}
		token = p.token
		numbers = append(numbers, p.numbers...)
	}
}

// mixed publishes to all priorities, and receives while higher messages keep coming. It returns what was delivered.
func mixed(e *engine) []int {
	e.publishAt(0, 1, 2, 3)
	e.publishAt(2, 21, 22, 23)
	e.publishAt(1, 11, 12)
	first := e.mustReceiveSQL("m", 2, "")
	second := e.mustReceiveSQL("m", 2, first.token)
	third := e.mustReceiveSQL("m", 1, second.token)
	e.publishAt(2, 24)
	return slices.Concat(first.numbers, second.numbers, third.numbers, append(e.drainSQL("m", 2), e.drainSQL("n", 2)...))
}

func TestHigherPrioritiesAreDeliveredFirst(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.prioritized(mode)
		e.publishAt(0, 1, 2, 3)
		e.publishAt(2, 21, 22, 23)
		e.publishAt(1, 11, 12)
		first := e.mustReceiveSQL("m", 2, "")
		same(t, "first", first.numbers, []int{21, 22})
		second := e.mustReceiveSQL("m", 2, first.token)
		same(t, "second", second.numbers, []int{23})
		third := e.mustReceiveSQL("m", 1, second.token)
		same(t, "third", third.numbers, []int{11})
		e.publishAt(2, 24)
		fourth := e.mustReceiveSQL("m", 2, third.token)
		same(t, "what came later with a higher priority", fourth.numbers, []int{24})
		rest := e.mustReceiveSQL("m", 2, fourth.token)
		same(t, "then", rest.numbers, []int{12})
		must(t, verbs[0].use(e, e, rest.token))
		same(t, "the lowest", e.drainSQL("m", 2), []int{1, 2, 3})
		e.publishAt(1, 13)
		if n := one[int](e, "select count(*) from millrace.receive('orders', 'g', 'm', p_auto_ack => true)"); n != 1 {
			t.Errorf("%d messages were received and settled at once", n)
		}
		if s := e.stats("orders", "g"); s.InFlight != 0 || s.Lag != 0 {
			t.Errorf("settled as it was received: %+v", s)
		}
	})
}

func TestThePrioritiesAreSeenBrokenWithoutTheirOrder(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.prioritized(pgstream.ModeShared)
	e.mutate("millrace_engine.receive_priorities", "order by x.priority desc", "order by x.priority")
	if got := mixed(e); got[0] != 1 {
		t.Errorf("%v were delivered in the order of their priorities without that mechanism", got)
	}
}

func TestEveryVerbWorksInEveryPriority(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		for priority := range 3 {
			t.Run(fmt.Sprint(priority), func(t *testing.T) {
				t.Parallel()
				e := newEngine(t)
				e.stopClock()
				e.prioritized(mode)
				e.publishAt(priority, 1, 2, 3, 4)
				p := e.mustReceiveSQL("m", 10, "")
				e.run("select millrace.ack_messages($1, array[$2::bigint])", p.token, p.positions[0])
				e.run("select millrace.dead_letter($1, array[$2::bigint], 'bad')", p.token, p.positions[1])
				e.run("select millrace.extend($1, 60)", p.token)
				e.jump(30 * time.Second)
				e.run("select millrace.nack($1, array[$2::bigint], 1, 'later')", p.token, p.positions[2])
				if mode == pgstream.ModeShared {
					e.run("select millrace.release($1)", p.token)
					p = e.mustReceiveSQL("m", 10, "")
					same(t, "released", p.numbers, []int{4})
				}
				e.jump(2 * time.Second)
				ack := ""
				if mode == pgstream.ModeShared {
					ack = p.token
				}
				p = e.mustReceiveSQL("m", 10, ack)
				if mode == pgstream.ModeShared {
					same(t, "nacked", p.numbers, []int{3})
				} else {
					same(t, "nacked", p.numbers, []int{3, 4})
				}
				if s := e.stats("orders", "g"); s.InFlight+s.Retrying == 0 || s.DeadLetters != 1 {
					t.Errorf("statistics of the whole: %+v", s)
				}
				e.run("select millrace.leave('orders', 'g', 'm')")
				p = e.mustReceiveSQL("n", 10, "")
				if len(p.numbers) == 0 || p.numbers[0] != 3 {
					t.Errorf("after leave: %v", p.numbers)
				}
				e.jump(time.Minute)
				again := e.mustReceiveSQL("n", 10, "")
				same(t, "expired", again.numbers, p.numbers[:1])
				mustRefuseAll(e, p.token)
				must(t, verbs[0].use(e, e, again.token))
				same(t, "left", e.drainSQL("n", 10), p.numbers[1:])
				all, err := pgstream.Stats(e.ctx, e)
				must(t, err)
				if len(all) != 1 || all[0].Stream != "orders" || all[0].Lag != 0 || all[0].InFlight != 0 {
					t.Errorf("statistics: %+v", all)
				}
			})
		}
	})
}

// The order of a key holds within a priority, with several members that come and go.
func TestAKeyKeepsItsOrderWithinAPriority(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.prioritized(pgstream.ModeOrdered)
	for n := range 60 {
		e.run("select millrace.publish('orders', to_jsonb($1::integer), $2, p_priority => $3)", n, fmt.Sprintf("k%d", n%5), n%3)
	}
	last := map[string]int{}
	members, got := []string{"a", "b", "c"}, 0
	for round := 0; got < 60; round++ {
		if round > 500 {
			t.Fatalf("only %d messages came", got)
		}
		member := members[round%len(members)]
		p := e.mustReceiveSQL(member, 2, "")
		if p.token == "" {
			e.jump(time.Second)
			continue
		}
		for _, n := range p.numbers {
			lane := fmt.Sprintf("k%d priority %d", n%5, n%3)
			if before, seen := last[lane]; seen && n <= before {
				t.Errorf("%s: %d came after %d", lane, n, before)
			}
			last[lane] = n
			got++
		}
		must(t, verbs[0].use(e, e, p.token))
		if round == 10 {
			e.run("select millrace.leave('orders', 'g', 'b')")
			members = []string{"a", "c"}
		}
	}
}

func TestPublishersOfAPriorityWakeThoseWhoWaitForTheStream(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.prioritized(pgstream.ModeShared)
	conn := e.connect()
	exec(e, conn, "listen millrace")
	id := one[int32](e, "select millrace_engine.stream_id('orders')")
	e.publishAt(2, 1) // nobody waits
	e.run("select millrace_engine.wait_for(array[$1::integer])", id)
	ctx, cancel := context.WithTimeout(e.ctx, patience)
	defer cancel()
	e.publishAt(2, 2)
	n, err := conn.WaitForNotification(ctx)
	must(t, err)
	if n.Payload != fmt.Sprint(id) {
		t.Errorf("notified %q, want the stream %d", n.Payload, id)
	}
	same(t, "delivered", e.drainSQL("m", 10), []int{1, 2})
}

func TestPrioritiesFollowTheirStream(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	spec := pgstream.StreamSpec{Name: "orders"}
	apply := func() {
		t.Helper()
		plan, err := pgstream.PlanStream(e.ctx, e, spec)
		must(t, err)
		must(t, pgstream.ApplyStream(e.ctx, e, plan))
		if plan, err = pgstream.PlanStream(e.ctx, e, spec); err != nil || len(plan.Steps) != 0 || plan.Drift {
			t.Fatalf("plan afterwards: %+v, %v", plan, err)
		}
	}
	apply()
	group := pgstream.GroupSpec{Stream: "orders", Name: "g", StartFrom: pgstream.StartLatest}
	e.group(group)
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "h", Mode: pgstream.ModeOrdered})
	e.publishAt(0, 1)

	// Raised later: the groups that are there get the new priorities.
	spec.Priorities, spec.Segments, spec.DedupeWindow, spec.Partitions = 3, 5, time.Hour, 16
	apply()
	e.publishAt(2, 21)
	e.publishAt(0, 2)
	same(t, "after raising the priorities", e.drainSQL("m", 10), []int{21, 1, 2})
	same(t, "settings of the lanes", one[[]string](e, `select array_agg(name || ' ' || partitions || ' ' || segments || ' ' || dedupe_window_seconds order by id)
		from millrace_engine.stream where parent_id is not null`), []string{"orders.p1 16 5 3600", "orders.p2 16 5 3600"})
	if n := one[int](e, "select count(*) from millrace_engine.consumer_group"); n != 6 {
		t.Errorf("%d groups and mirrors, want six", n)
	}

	// Settings reach every priority.
	group.Paused, group.MaxAttempts = true, 7
	e.group(group)
	e.publishAt(2, 22)
	same(t, "while the group is paused", e.drainSQL("m", 10), nil)
	group.Paused = false
	e.group(group)
	same(t, "afterwards", e.drainSQL("m", 10), []int{22})
	if n := one[int](e, "select count(*) from millrace_engine.consumer_group where name = 'g' and max_attempts = 7"); n != 3 {
		t.Errorf("the setting reached %d priorities, want 3", n)
	}

	// What somebody broke is found and mended.
	for what, break_ := range map[string]string{
		"a dropped guard":  `drop trigger publish_guard on millrace."orders.p1"`,
		"a changed lane":   `update millrace_engine.stream set max_messages = 5 where name = 'orders.p2'`,
		"a missing mirror": `delete from millrace_engine.consumer_group where name = 'h' and parent_id is not null`,
	} {
		e.run(break_)
		plan, err := pgstream.PlanStream(e.ctx, e, spec)
		must(t, err)
		if len(plan.Steps) == 0 || !plan.Drift || !strings.Contains(plan.Steps[0].Summary, "priority") {
			t.Errorf("plan after %s: %+v", what, plan)
		}
		apply()
	}

	// Priorities are never lowered, and zero leaves them alone.
	for _, fewer := range []int{1, 2} {
		bad := spec
		bad.Priorities = fewer
		if _, err := pgstream.PlanStream(e.ctx, e, bad); !errors.Is(err, pgstream.ErrRefused) {
			t.Errorf("plan of %d priorities: %v", fewer, err)
		}
		if err := pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: bad}); !errors.Is(err, pgstream.ErrRefused) {
			t.Errorf("%d priorities: %v", fewer, err)
		}
	}
	spec.Priorities = 0
	apply()

	must(t, pgstream.DropGroup(e.ctx, e, "orders", "h", pgstream.Owner{}))
	if n := one[int](e, "select count(*) from millrace_engine.lane"); n != 3 {
		t.Errorf("%d lanes are left, want three", n)
	}
	e.publishAt(1, 11)
	if err := pgstream.DropStream(e.ctx, e, "orders", pgstream.Owner{}, true); err != nil && !errors.Is(err, pgstream.ErrNotEmpty) {
		t.Errorf("drop of what is not empty: %v", err)
	}
	must(t, pgstream.DropStream(e.ctx, e, "orders", pgstream.Owner{}, false))
	rest := one[[]string](e, `select coalesce(array_agg(x), '{}') from (
		select relname::text as x from pg_class where relname ~ '^(segment_[0-9]+_|(position|state|notified)_[0-9]+$|orders)'
		union all select proname::text from pg_proc where proname ~ '_[0-9]+$' and pronamespace = 'millrace_engine'::regnamespace
		union all select name from millrace_engine.stream union all select name from millrace_engine.consumer_group) r`)
	same(t, "left behind", rest, []string{})
}

// Whatever a stream and its groups are told, before there were priorities and afterwards, holds in each of them.
func TestEverySettingHoldsInEveryPriority(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	spec := pgstream.StreamSpec{Name: "orders", Segments: 3, Partitions: 4, MaxMessageBytes: 1000, DedupeWindow: time.Minute,
		Retention: pgstream.Retention{Policy: pgstream.RetentionInterest, MaxAge: time.Hour, MaxBytes: 1 << 30, MaxMessages: 1000}}
	group := pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered, AckWait: time.Second, MaxAttempts: 3, BackoffInitial: time.Second, BackoffMax: time.Minute,
		FailurePolicy: pgstream.FailurePark, Paused: true, Filter: pgstream.Filter{KeyPrefix: "a"}, LapseAfter: time.Hour, LapseLag: 1000}
	apply := func() {
		t.Helper()
		must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: spec}))
		e.group(group)
	}
	compare := func(when string) {
		t.Helper()
		for table, own := range map[string]string{
			"stream":         "id, name, created_at, owner, priorities, parent_id, priority, first_position, segment_started_at, fresh_locks, suspects",
			"consumer_group": "id, stream_id, parent_id, created_at, owner, lane_id, recheck_at, first_position",
		} {
			settings := one[[]string](e, "select array_agg((to_jsonb(x) - $1::text[])::text order by x.id) from millrace_engine."+table+" x", strings.Split(own, ", "))
			if len(settings) != spec.Priorities {
				t.Fatalf("%s: %d rows of %d priorities", table, len(settings), spec.Priorities)
			}
			for _, s := range settings[1:] {
				if s != settings[0] {
					t.Errorf("%s: the %s has\n%s and in a priority\n%s", when, table, settings[0], s)
				}
			}
		}
	}
	apply()
	e.run("update millrace_engine.consumer_group set lapsed_at = now(), lapse_reason = 'it was slow'")
	spec.Priorities = 2
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: spec}))
	compare("a new priority")
	spec.Segments, spec.Partitions, spec.MaxMessageBytes, spec.DedupeWindow = 4, 8, 2000, time.Hour
	spec.Retention = pgstream.Retention{Policy: pgstream.RetentionWorkQueue, MaxAge: 2 * time.Hour, MaxBytes: 2 << 30, MaxMessages: 2000}
	group.AckWait, group.MaxAttempts, group.BackoffInitial, group.BackoffMax, group.FailurePolicy = time.Minute, 5, time.Minute, time.Hour, pgstream.FailureSkip
	group.Paused, group.Filter, group.LapseAfter, group.LapseLag = false, pgstream.Filter{KeyPrefix: "b"}, 2*time.Hour, 2000
	apply()
	compare("changed")

	// A queue policy would hold in each priority by itself.
	e.run("select millrace.create_stream('queue'), millrace.create_group('queue', 'q', p_queue_policy => 'Short')")
	if _, err := e.Exec(e.ctx, "select millrace.create_stream('queue', p_priorities => 2)"); sqlState(err) != "MR004" {
		t.Errorf("priorities of a stream with a queue: %v", err)
	}
}

// Whoever receives has not committed yet, in any priority, and is waited for: what it claims is ended with all other claims.
func TestAResetWaitsForReceivesOfEveryPriority(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.prioritized(pgstream.ModeShared)
	e.publishAt(2, 1)
	tx, resetting := e.begin(), e.connect()
	claim := ""
	must(t, tx.QueryRow(e.ctx, "select claim from millrace.receive('orders', 'g', 'm')").Scan(&claim))
	done := e.waits(resetting, "select millrace.reset_group('orders', 'g', 'Earliest')")
	commit(e, tx)
	must(t, <-done)
	mustRefuseAll(e, claim)
	same(t, "after the reset", e.drainSQL("n", 10), []int{1})
}

// A receive holds the receive locks of the lanes that it has looked into while it waits for the next one's, from the highest priority down. Whoever needs all of them takes
// them in the same order, or each would wait for the other.
func TestAResetTakesReceiveLocksInTheOrderOfReceives(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.prioritized(mode)
		held, receiver, operator := e.begin(), e.connect(), e.connect()
		exec(e, held, `select pg_advisory_xact_lock(536870912 + g.id, 0) from millrace_engine.consumer_group g
			join millrace_engine.stream s on s.id = g.stream_id where s.priority = 1`)
		received := e.waits(receiver, "select millrace.receive('orders', 'g', 'm')")
		reset := e.waits(operator, "select millrace.reset_group('orders', 'g', 'Earliest')")
		rollback(e, held)
		must(t, <-received)
		must(t, <-reset)
	})
}

func TestNobodyUsesALaneAsAStream(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.prioritized(pgstream.ModeShared)
	for _, sql := range []string{
		"select millrace.create_stream('orders.p1')",
		"select millrace.create_group('orders.p1', 'x')",
		"select millrace_engine.drop_group('orders.p1', 'g')",
		"select millrace_engine.drop_stream('orders.p1')",
		"select millrace.reset_group('orders.p1', 'g', 'Latest')",
		"select millrace.publish('orders.p1', '{}')",
	} {
		_, err := e.Exec(e.ctx, sql)
		if sqlState(err) != "MR004" || !strings.Contains(hint(err), `"orders"`) {
			t.Errorf("%s: %v, hint %q; want MR004 and the stream's name", sql, err, hint(err))
		}
	}
	for _, n := range []int{0, 9} {
		if _, err := e.Exec(e.ctx, "select millrace.create_stream('x', p_priorities => $1)", n); sqlState(err) != "MR004" {
			t.Errorf("%d priorities: %v", n, err)
		}
	}
	// A name with a dot belongs to lanes.
	if _, err := e.Exec(e.ctx, "select millrace.create_stream('x.p1')"); sqlState(err) != "MR004" {
		t.Errorf("a dot in a name: %v", err)
	}
}

func TestAGroupBeginsInEveryPriorityWhereItIsTold(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", Priorities: 2}}))
	e.publishAt(0, 1, 2)
	e.publishAt(1, 11, 12)
	e.run(`update millrace.orders set created_at = '2020-01-01' where position = 1`)
	e.run(`update millrace."orders.p1" set created_at = '2020-01-01' where position = 1`)
	for _, c := range []struct {
		spec pgstream.GroupSpec
		want []int
	}{
		{pgstream.GroupSpec{StartFrom: pgstream.StartEarliest}, []int{11, 12, 13, 1, 2, 3}},
		{pgstream.GroupSpec{StartFrom: pgstream.StartLatest}, []int{13, 3}},
		{pgstream.GroupSpec{StartFrom: pgstream.StartTime, StartTime: time.Date(2021, 1, 1, 0, 0, 0, 0, time.UTC)}, []int{12, 13, 2, 3}},
		{pgstream.GroupSpec{StartFrom: pgstream.StartPosition, StartPosition: 2}, []int{11, 12, 13, 2, 3}},
	} {
		c.spec.Stream, c.spec.Name = "orders", "g"
		e.group(c.spec)
		e.publishAt(0, 3)
		e.publishAt(1, 13)
		same(t, string(c.spec.StartFrom), e.drainSQL("m", 10), c.want)
		must(t, pgstream.DropGroup(e.ctx, e, "orders", "g", pgstream.Owner{}))
		e.run(`delete from millrace.orders where payload = '3'`)
		e.run(`delete from millrace."orders.p1" where payload = '13'`)
	}
}

// Under Interest every priority keeps what the group has not settled there.
func TestAPriorityKeepsWhatTheGroupNeeds(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", Priorities: 2,
		Retention: pgstream.Retention{Policy: pgstream.RetentionInterest}}}))
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	for n := range 4 {
		e.publishAt(1, n)
		e.publishAt(0, 10+n)
		e.run(`select millrace_engine.set_state(id, $1, null) from millrace_engine.stream`, n)
		e.maintain(2)
	}
	same(t, "kept", e.drainSQL("m", 10), []int{0, 1, 2, 3, 10, 11, 12, 13})
	e.maintain(4)
	if n := one[int](e, `select (select count(*) from millrace.orders) + (select count(*) from millrace."orders.p1")`); n > 4 {
		t.Errorf("%d messages of eight are kept after all were settled", n)
	}
}

func TestTheRuntimeRoleUsesPriorities(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	role := "runtime_" + one[string](e, "select current_database()")
	e.run("create role " + pgx.Identifier{role}.Sanitize())
	t.Cleanup(func() {
		conn, err := pgx.Connect(context.Background(), e.dsn)
		if err != nil {
			return
		}
		_, _ = conn.Exec(context.Background(), "drop owned by "+pgx.Identifier{role}.Sanitize())
		_, _ = conn.Exec(context.Background(), "drop role "+pgx.Identifier{role}.Sanitize())
		_ = conn.Close(context.Background())
	})
	_, err := schema.Migrate(e.ctx, e.connect(), schema.Options{RuntimeRole: role})
	must(t, err)
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		e.prioritized(mode)
		conn := e.connect()
		exec(e, conn, "set role "+pgx.Identifier{role}.Sanitize())
		exec(e, conn, "select millrace.publish('orders', '2', 'k', p_priority => 2), millrace.publish('orders', '0', 'k')")
		exec(e, conn, "select millrace_engine.wait_for(array[millrace_engine.stream_id('orders')])")
		exec(e, conn, "select millrace.publish('orders', '1', 'k', p_priority => 1)")
		var got []int
		for token := ""; ; {
			var n int
			err := conn.QueryRow(e.ctx, `select claim, payload::text::integer from millrace.receive('orders', 'g', 'm', 1, p_ack => nullif($1, ''))`, token).Scan(&token, &n)
			if errors.Is(err, pgx.ErrNoRows) {
				break
			}
			must(t, err)
			got = append(got, n)
		}
		same(t, string(mode), got, []int{2, 1, 0})
		must(t, pgstream.DropStream(e.ctx, e, "orders", pgstream.Owner{}, false))
	}
}
