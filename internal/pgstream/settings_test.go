package pgstream_test

import (
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func TestAFilterLetsPassWhatHasEverything(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	const null = ""
	for _, c := range []struct {
		filter, key, headers string
		want                 bool
	}{
		{null, null, null, true},
		{null, "a", `{"type": "paid"}`, true},
		{`{"headers": {"type": "paid"}}`, null, `{"type": "paid", "more": [1]}`, true},
		{`{"headers": {"type": "paid"}}`, null, `{"type": "open"}`, false},
		{`{"headers": {"type": "paid"}}`, null, `{"type": ["paid"]}`, false},
		{`{"headers": {"type": "paid"}}`, null, null, false},
		{`{"headers": {"type": null}}`, null, `{"type": null}`, true},
		{`{"headers": {"type": null}}`, null, `{}`, false},
		{`{"headers": {"n": 1, "yes": true}}`, null, `{"n": 1.0, "yes": true}`, true},
		{`{"headers": {"n": 1}}`, null, `{"n": "1"}`, false},
		{`{"keys": ["a", "b"]}`, "b", null, true},
		{`{"keys": ["a", "b"]}`, "c", null, false},
		{`{"keys": ["a", "b"]}`, null, null, false},
		{`{"key_prefix": "eu-"}`, "eu-1", null, true},
		{`{"key_prefix": "eu-"}`, "us-1", null, false},
		{`{"key_prefix": "eu-"}`, null, null, false},
		{`{"key_prefix": "%"}`, "eu", null, false},
		{`{"keys": ["eu-1"], "key_prefix": "eu-", "headers": {"a": 1}}`, "eu-1", `{"a": 1}`, true},
		{`{"keys": ["eu-1"], "key_prefix": "eu-", "headers": {"a": 1}}`, "eu-2", `{"a": 1}`, false},
		{`{"keys": ["eu-1"], "key_prefix": "eu-", "headers": {"a": 1}}`, "eu-1", `{"a": 2}`, false},
	} {
		got := one[*bool](e, "select millrace_engine.matches(nullif($1, '')::jsonb, nullif($2, ''), nullif($3, '')::jsonb)", c.filter, c.key, c.headers)
		if got == nil || *got != c.want {
			t.Errorf("filter %s, key %q, headers %s: not %v", c.filter, c.key, c.headers, c.want)
		}
	}
}

func TestAFilterThatIsNoneIsRefused(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	for _, filter := range []string{`[]`, `"x"`, `{"header": {"a": 1}}`, `{"headers": ["a"]}`, `{"headers": {"a": {"b": 1}}}`, `{"headers": {"a": [[1]]}}`,
		`{"keys": "a"}`, `{"keys": []}`, `{"keys": [1]}`, `{"key_prefix": 1}`, `{"key_prefix": "a", "x": 1}`} {
		_, err := e.Exec(e.ctx, "select millrace.create_group('orders', 'g', p_filter => $1)", filter)
		if sqlState(err) != "MR004" || !strings.Contains(hint(err), "key_prefix") {
			t.Errorf("%s: %v, hint %q; want MR004 and what is allowed", filter, err, hint(err))
		}
	}
	for _, filter := range []string{`null`, `{}`, `{"headers": {}}`, `{"key_prefix": "", "keys": null}`} {
		e.run("select millrace.create_group('orders', 'g', p_filter => $1)", filter)
		if kept := one[*string](e, "select filter::text from millrace_engine.consumer_group"); kept != nil {
			t.Errorf("%s is kept as %s, and lets everything pass", filter, *kept)
		}
	}
}

func TestAFilterCanChange(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	spec := pgstream.GroupSpec{Stream: "orders", Name: "g", Filter: pgstream.Filter{Headers: map[string]any{"type": "paid", "n": 1, "gone": nil}}}
	e.group(spec)
	if steps, err := pgstream.PlanGroup(e.ctx, e, spec); err != nil || len(steps) != 0 {
		t.Fatalf("plan of what is there: %+v, %v", steps, err)
	}
	publish := func(headers string) {
		e.run("select millrace.publish('orders', '{}', 'k', $1)", headers)
	}
	publish(`{"type": "paid", "n": 1, "gone": null}`)
	publish(`{"type": "open"}`)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	held := mustReceive(e, c)
	same(t, "what passes", positions(held), []int64{1})

	must(t, c.Nack(e.ctx, held.Token, []int64{1}, 0, "no"))
	spec.Filter = pgstream.Filter{Keys: []string{"k"}, Headers: map[string]any{"type": "open"}}
	steps, err := pgstream.PlanGroup(e.ctx, e, spec)
	must(t, err)
	if len(steps) != 1 || !strings.Contains(steps[0].Summary, "change filter") {
		t.Errorf("plan: %+v", steps)
	}
	e.group(spec)
	publish(`{"type": "open"}`)
	same(t, "what was set aside, which no filter concerns, and what passes now", sorted(drain(e, c)), []int64{1, 3})
	spec.Filter = pgstream.Filter{}
	e.group(spec)
	publish(`{}`)
	same(t, "without a filter", drain(e, c), []int64{4})
}

func TestAGroupIsWhatItsSpecificationSays(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	if _, err := pgstream.DescribeGroup(e.ctx, e, "orders", "g"); !errors.Is(err, pgstream.ErrNotFound) {
		t.Errorf("an unknown group: %v", err)
	}
	if _, err := pgstream.DescribeGroup(e.ctx, e, "nothing", "g"); !errors.Is(err, pgstream.ErrNotFound) {
		t.Errorf("an unknown stream: %v", err)
	}
	for _, spec := range []pgstream.GroupSpec{
		{Stream: "orders", Name: "full", Mode: pgstream.ModeOrdered, StartFrom: pgstream.StartPosition, StartPosition: 7, AckWait: time.Minute, MaxAttempts: 4,
			BackoffInitial: time.Second, BackoffMax: time.Hour, FailurePolicy: pgstream.FailurePark, QueuePolicy: pgstream.QueueStandard, Paused: true,
			Filter:     pgstream.Filter{Headers: map[string]any{"a": "b"}, Keys: []string{"c"}, KeyPrefix: "d"},
			LapseAfter: time.Hour, LapseLag: 1000, Owner: pgstream.Owner{Cluster: "c", Namespace: "n", Name: "o", UID: "1"}},
		{Stream: "orders", Name: "timed", Mode: pgstream.ModeShared, StartFrom: pgstream.StartTime, StartTime: time.Date(2020, 1, 2, 3, 4, 5, 6000, time.UTC),
			AckWait: time.Second, BackoffInitial: time.Millisecond, BackoffMax: time.Minute, FailurePolicy: pgstream.FailureBlock, QueuePolicy: pgstream.QueueStately,
			Filter: pgstream.Filter{Headers: map[string]any{"a": "b", "to": []any{"x", "y"}}, WithoutHeaders: []string{"z"}, Unrouted: true}},
	} {
		e.group(spec)
		info, err := pgstream.DescribeGroup(e.ctx, e, "orders", spec.Name)
		must(t, err)
		if !reflect.DeepEqual(info.Spec, spec) {
			t.Errorf("described as %+v, want %+v", info.Spec, spec)
		}
		if steps, err := pgstream.PlanGroup(e.ctx, e, spec); err != nil || len(steps) != 0 {
			t.Errorf("plan of what is there: %+v, %v", steps, err)
		}
	}
	for what, bad := range map[string]pgstream.GroupSpec{
		"parking without an order":  {FailurePolicy: pgstream.FailurePark},
		"an unknown failure policy": {Mode: pgstream.ModeOrdered, FailurePolicy: "Hope"},
		"a negative lapse":          {LapseAfter: -time.Second},
		"a negative lag":            {LapseLag: -1},
	} {
		bad.Stream, bad.Name = "orders", "bad"
		if err := pgstream.ApplyGroup(e.ctx, e, bad); !errors.Is(err, pgstream.ErrRefused) {
			t.Errorf("%s: %v; want ErrRefused", what, err)
		}
	}
}

func TestASettingThatIsLeftOutStaysAsItIs(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.run(`select millrace.create_stream('orders', 16, 'Bytes', 5, p_priorities => 2, p_dedupe_window_seconds => 60, p_max_age_seconds => 3600,
		p_max_bytes => 1000000, p_max_messages => 1000, p_retention => 'Interest')`)
	want := pgstream.StreamSpec{Name: "orders", Partitions: 16, PayloadType: pgstream.PayloadBytes, Segments: 5, MaxMessageBytes: 1 << 20, Priorities: 2,
		DedupeWindow: time.Minute, Retention: pgstream.Retention{Policy: pgstream.RetentionInterest, MaxAge: time.Hour, MaxBytes: 1000000, MaxMessages: 1000}}
	described := func(what string) {
		t.Helper()
		info, err := pgstream.DescribeStream(e.ctx, e, "orders")
		must(t, err)
		if !reflect.DeepEqual(info.Spec, want) {
			t.Errorf("%s: described as %+v, want %+v", what, info.Spec, want)
		}
	}
	described("at first")
	e.run("select millrace.create_stream('orders')")
	described("after nothing was asked for")
	e.run("select millrace.create_stream('orders', p_max_bytes => 5)")
	want.Retention.MaxBytes = 5
	described("after a change")

	// In Go, what cannot change or only grows; the rest of a specification is the whole truth.
	change := pgstream.StreamSpec{Name: "orders", DedupeWindow: pgstream.NoDedupe, Retention: want.Retention}
	plan, err := pgstream.PlanStream(e.ctx, e, change)
	must(t, err)
	if len(plan.Steps) != 1 || plan.Steps[0].Summary != "change dedupe window seconds from 60 to 0" {
		t.Errorf("plan: %+v", plan)
	}
	must(t, pgstream.ApplyStream(e.ctx, e, plan))
	want.DedupeWindow = pgstream.NoDedupe
	described("without a window")
	if plan, err = pgstream.PlanStream(e.ctx, e, change); err != nil || len(plan.Steps) != 0 {
		t.Errorf("plan of what is there: %+v, %v", plan, err)
	}

	e.run(`select millrace.create_group('orders', 'g', 'Ordered', 'Time', p_filter => '{"keys": ["a"]}', p_failure_policy => 'Park', p_max_attempts => 3,
		p_ack_wait_seconds => 1.5, p_time => '2020-01-01 00:00:00+02')`)
	group := pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered, StartFrom: pgstream.StartTime,
		StartTime: time.Date(2019, 12, 31, 22, 0, 0, 0, time.UTC), AckWait: 1500 * time.Millisecond, MaxAttempts: 3, BackoffInitial: time.Second,
		BackoffMax: 5 * time.Minute, FailurePolicy: pgstream.FailurePark, QueuePolicy: pgstream.QueueStandard, Filter: pgstream.Filter{Keys: []string{"a"}}}
	for range 2 {
		info, err := pgstream.DescribeGroup(e.ctx, e, "orders", "g")
		must(t, err)
		if !reflect.DeepEqual(info.Spec, group) {
			t.Errorf("described as %+v, want %+v", info.Spec, group)
		}
		if steps, err := pgstream.PlanGroup(e.ctx, e, group); err != nil || len(steps) != 0 {
			t.Errorf("plan of what is there: %+v, %v", steps, err)
		}
		e.group(group)
		e.run("select millrace.create_group('orders', 'g', 'Ordered', 'Time', p_time => '2020-01-01 00:00:00+02')")
	}
}

func TestAFractionOfASecondIsNotForEver(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	plan, err := pgstream.PlanStream(e.ctx, e, pgstream.StreamSpec{Name: "orders", Retention: pgstream.Retention{MaxAge: time.Millisecond}, DedupeWindow: time.Millisecond})
	must(t, err)
	must(t, pgstream.ApplyStream(e.ctx, e, plan))
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", LapseAfter: time.Millisecond})
	stream, err := pgstream.DescribeStream(e.ctx, e, "orders")
	must(t, err)
	group, err := pgstream.DescribeGroup(e.ctx, e, "orders", "g")
	must(t, err)
	if stream.Spec.Retention.MaxAge != time.Second || stream.Spec.DedupeWindow != time.Second || group.Spec.LapseAfter != time.Second {
		t.Errorf("a millisecond became %s, %s and %s; want a second", stream.Spec.Retention.MaxAge, stream.Spec.DedupeWindow, group.Spec.LapseAfter)
	}
}

// Whatever a resource can declare, SQL can: no setting of a specification is left at its zero value by these two calls.
func TestEverySettingIsAParameterInSQL(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.run(`select millrace.create_stream('orders', 16, 'Bytes', 5, p_priorities => 2, p_dedupe_window_seconds => 60, p_max_age_seconds => 3600, p_max_bytes => 1000000,
		p_max_messages => 1000, p_retention => 'Interest', p_max_message_bytes => 4096)`)
	e.run("select millrace.create_stream('carts', p_versions => true), millrace.create_stream('runs', p_frames => '{}')")
	orders, err := pgstream.DescribeStream(e.ctx, e, "orders")
	must(t, err)
	if orders.Spec.MaxMessageBytes != 4096 {
		t.Errorf("messages may have %d bytes, want 4096", orders.Spec.MaxMessageBytes)
	}
	// A stream with versions or frames has no priorities; tenants, projections and owners have functions of their own, or none.
	zero(t, orders.Spec, "Versions", "Frames", "Tenants", "Projections", "Owner")

	e.run(`select millrace.create_group('orders', 'g', 'Ordered', 'Position', '{"keys": ["a"]}', 'Park', 3, 1.5, 7, p_paused => true, p_backoff_initial_seconds => 0.5,
		p_backoff_max_seconds => 60, p_lapse_after_seconds => 3600, p_lapse_lag => 1000)`)
	want := pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered, StartFrom: pgstream.StartPosition, StartPosition: 7, AckWait: 1500 * time.Millisecond,
		MaxAttempts: 3, BackoffInitial: 500 * time.Millisecond, BackoffMax: time.Minute, FailurePolicy: pgstream.FailurePark, QueuePolicy: pgstream.QueueStandard, Paused: true,
		Filter: pgstream.Filter{Keys: []string{"a"}}, LapseAfter: time.Hour, LapseLag: 1000}
	described := func() {
		t.Helper()
		info, err := pgstream.DescribeGroup(e.ctx, e, "orders", "g")
		must(t, err)
		if !reflect.DeepEqual(info.Spec, want) {
			t.Errorf("described as %+v, want %+v", info.Spec, want)
		}
	}
	described()
	zero(t, want, "StartTime", "Owner")
	e.run("select millrace.create_group('orders', 'g')")
	described()
	want.Paused = false
	e.run("select millrace.create_group('orders', 'g', p_paused => false)")
	described()
	for _, bad := range []string{"p_mode => 'Shared'", "p_start => 'Latest'", "p_position => 7", "p_position => 8"} {
		if _, err := e.Exec(e.ctx, "select millrace.create_group('orders', 'g', "+bad+")"); sqlState(err) != "MR004" {
			t.Errorf("%s: %v; want MR004", bad, err)
		}
	}
}

// zero reports fields that are zero, but for those that have to be.
func zero(t *testing.T, spec any, but ...string) {
	t.Helper()
	v := reflect.ValueOf(spec)
	for i := range v.NumField() {
		if name := v.Type().Field(i).Name; v.Field(i).IsZero() != slices.Contains(but, name) {
			t.Errorf("%s is %v", name, v.Field(i))
		}
	}
}

func TestSQLUsersDoNotChangeWhatAResourceOwns(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	owner := pgstream.Owner{Name: "somebody"}
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", Owner: owner}}))
	must(t, pgstream.ApplyGroup(e.ctx, e, pgstream.GroupSpec{Stream: "orders", Name: "g", Owner: owner, MaxAttempts: 10}))
	e.run("select millrace.create_stream('orders')") // harmless
	e.run("select millrace.create_group('orders', 'g')")
	for _, sql := range []string{
		"select millrace.create_stream('orders', p_max_messages => 1)",
		"select millrace.create_group('orders', 'g', p_max_attempts => 1)",
	} {
		if _, err := e.Exec(e.ctx, sql); sqlState(err) != "MR007" {
			t.Errorf("%s: %v; want MR007", sql, err)
		}
	}
}

func TestAStreamWithSeveralGroupsCannotBecomeAWorkQueue(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "a"})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "b"})
	spec := pgstream.StreamSpec{Name: "orders", Retention: pgstream.Retention{Policy: pgstream.RetentionWorkQueue}}
	if err := pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: spec}); !errors.Is(err, pgstream.ErrRefused) {
		t.Errorf("with two groups: %v", err)
	}
	must(t, pgstream.DropGroup(e.ctx, e, "orders", "b", pgstream.Owner{}))
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: spec}))
}

// Changing a setting must not make publishers or members wait for whoever changes it.
func TestNobodyWaitsForAChangeOfSettings(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	spec := pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered}
	e.group(spec)
	changing, resetting := e.begin(), e.begin()
	exec(e, changing, "select millrace.create_stream('orders', p_max_messages => 1000000)")
	exec(e, changing, "select millrace.create_group('orders', 'g', 'Ordered', p_max_attempts => 2)")
	e.run("set lock_timeout = '5s'")
	e.run("select millrace.publish('orders', '{}', 'k', p_dedupe_key => 'once')")
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	same(t, "received meanwhile", positions(mustReceive(e, c)), []int64{1})
	rollback(e, changing)
	exec(e, resetting, "select millrace.reset_group('orders', 'g', 'Earliest')")
	e.run("select millrace.publish('orders', '{}', 'k', p_dedupe_key => 'twice')")
	rollback(e, resetting)
}

// A group that begins before the trim mark gets nothing from below it, in no priority, although the messages may still be on the disk.
func TestAGroupThatBeginsBelowTheTrimMark(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", Priorities: 2}}))
		e.publishAt(0, 1, 2, 3)
		e.publishAt(1, 11, 12, 13)
		e.run("select millrace.trim('orders', p_max_messages => 1)")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, StartFrom: pgstream.StartPosition, StartPosition: 1})
		same(t, "delivered", e.drainSQL("m", 10), []int{13, 3})
		e.reset(pgstream.Place{})
		same(t, "again", e.drainSQL("m", 10), []int{13, 3})
	})
}

func TestASettingThatIsNotPossibleIsExplained(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	for _, bad := range []string{"p_partitions => 0", "p_partitions => 1025", "p_payload_type => 'XML'", "p_segments => 1", "p_segments => 17", "p_priorities => 0",
		"p_priorities => 9", "p_dedupe_window_seconds => -1", "p_dedupe_window_seconds => 99999999", "p_max_age_seconds => -1", "p_max_age_seconds => 9223372036854775807", "p_max_message_bytes => 0", "p_max_bytes => -1",
		"p_max_messages => -1", "p_retention => 'Forever'"} {
		if _, err := e.Exec(e.ctx, "select millrace.create_stream('x', "+bad+")"); sqlState(err) != "MR004" || hint(err) == "" {
			t.Errorf("%s: %v, hint %q; want MR004 and a hint", bad, err, hint(err))
		}
	}
	for _, bad := range []string{"p_mode => 'Sideways'", "p_start => 'Never'", "p_start => 'Position'", "p_start => 'Position', p_position => 0", "p_start => 'Time'",
		"p_failure_policy => 'Hope'", "p_failure_policy => 'Park'", "p_max_attempts => -1", "p_ack_wait_seconds => 0", "p_ack_wait_seconds => -1",
		"p_position => 5", "p_backoff_initial_seconds => -1", "p_backoff_initial_seconds => 400", "p_backoff_max_seconds => 'NaN'", "p_backoff_max_seconds => 1e12",
		"p_lapse_after_seconds => -1", "p_lapse_after_seconds => 9223372036854775807", "p_lapse_lag => -1"} {
		if _, err := e.Exec(e.ctx, "select millrace.create_group('orders', 'g', "+bad+")"); sqlState(err) != "MR004" || hint(err) == "" {
			t.Errorf("%s: %v, hint %q; want MR004 and a hint", bad, err, hint(err))
		}
	}
}
