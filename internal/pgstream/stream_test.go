package pgstream_test

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// whole is a specification without defaults.
func whole() pgstream.StreamSpec {
	return pgstream.StreamSpec{Name: "orders", Partitions: 6, PayloadType: pgstream.PayloadJSON, Segments: 3,
		Retention:       pgstream.Retention{Policy: pgstream.RetentionInterest, MaxAge: time.Hour, MaxBytes: 1 << 30, MaxMessages: 1000},
		MaxMessageBytes: 1000, DedupeWindow: time.Minute, Priorities: 1, Owner: pgstream.Owner{Cluster: "c", Namespace: "n", Name: "orders", UID: "1"}}
}

func TestAStreamIsWhatItsSpecificationSays(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	spec := whole()
	plan, err := pgstream.PlanStream(e.ctx, e, spec)
	must(t, err)
	if len(plan.Steps) != 1 || plan.Drift || !strings.Contains(plan.Steps[0].Summary, `create stream "orders" with 6 partitions and 3 segments`) {
		t.Fatalf("plan of a new stream: %+v", plan)
	}
	if n := one[int](e, "select count(*) from millrace_engine.stream"); n != 0 {
		t.Fatal("the plan wrote something")
	}
	for range 2 {
		must(t, pgstream.ApplyStream(e.ctx, e, plan))
		info, err := pgstream.DescribeStream(e.ctx, e, "orders")
		must(t, err)
		if !reflect.DeepEqual(info.Spec, spec) || info.FirstPosition != 1 || info.LastPosition != 0 || info.Horizon != 0 || info.Bytes == 0 {
			t.Fatalf("described as %+v, want %+v", info, spec)
		}
		plan, err = pgstream.PlanStream(e.ctx, e, spec)
		must(t, err)
		if len(plan.Steps) != 0 || plan.Drift {
			t.Fatalf("plan of what is there: %+v", plan)
		}
	}

	spec.Partitions, spec.Segments, spec.Retention.MaxBytes = 8, 5, 0
	plan, err = pgstream.PlanStream(e.ctx, e, spec)
	must(t, err)
	if len(plan.Steps) != 3 || plan.Drift {
		t.Fatalf("plan of three changes: %+v", plan)
	}
	must(t, pgstream.ApplyStream(e.ctx, e, plan))
	if info, err := pgstream.DescribeStream(e.ctx, e, "orders"); err != nil || !reflect.DeepEqual(info.Spec, spec) {
		t.Fatalf("described as %+v, want %+v: %v", info.Spec, spec, err)
	}
	if plan, err = pgstream.PlanStream(e.ctx, e, spec); err != nil || len(plan.Steps) != 0 {
		t.Fatalf("plan after the changes: %+v, %v", plan, err)
	}
	e.fillRing() // into the new segments as well
	if n := one[int](e, "select count(distinct segment) from millrace.orders"); n != 4 {
		t.Errorf("%d segments were written", n)
	}
}

func TestWhatCanNeverBeDoneIsRefused(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: whole()}))
	for _, c := range []struct {
		name   string
		change func(*pgstream.StreamSpec)
		words  string
	}{
		{"fewer partitions", func(s *pgstream.StreamSpec) { s.Partitions = 5 }, "Keep 6 or more"},
		{"fewer segments", func(s *pgstream.StreamSpec) { s.Segments = 2 }, "Keep 3 or more"},
		{"another payload type", func(s *pgstream.StreamSpec) { s.PayloadType = pgstream.PayloadBytes }, "Create another stream"},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := whole()
			c.change(&spec)
			_, planned := pgstream.PlanStream(e.ctx, e, spec)
			applied := pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: spec})
			for what, err := range map[string]error{"plan": planned, "apply": applied} {
				if !errors.Is(err, pgstream.ErrRefused) || !strings.Contains(err.Error(), c.words) {
					t.Errorf("%s: %v; want ErrRefused and %q", what, err, c.words)
				}
			}
		})
	}
	for what, spec := range map[string]pgstream.StreamSpec{
		"a name with a dash":         {Name: "a-b"},
		"a name that is too long":    {Name: "a" + strings.Repeat("b", 48)},
		"no name":                    {},
		"SQL for a name":             {Name: `x"; drop table y; --`},
		"too many partitions":        {Name: "x", Partitions: 1025},
		"too many segments":          {Name: "x", Segments: 17},
		"one segment":                {Name: "x", Segments: 1},
		"an unknown payload type":    {Name: "x", PayloadType: "XML"},
		"an unknown retention":       {Name: "x", Retention: pgstream.Retention{Policy: "Forever"}},
		"a negative limit":           {Name: "x", Retention: pgstream.Retention{MaxBytes: -1}},
		"a negative size of message": {Name: "x", MaxMessageBytes: -1},
	} {
		if err := pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: spec}); !errors.Is(err, pgstream.ErrRefused) {
			t.Errorf("%s: %v; want ErrRefused", what, err)
		}
	}
	if n := one[int](e, "select count(*) from millrace_engine.stream"); n != 1 {
		t.Errorf("%d streams", n)
	}
}

func TestDriftIsSeenAndRepaired(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.publish("orders", 10)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	for _, damage := range []string{
		"drop trigger publish_guard on millrace.orders",
		"alter table millrace.orders disable trigger publish_guard",
		"alter table millrace_engine.segment_1_2 enable trigger publish_guard",
		"drop trigger publish_guard on millrace_engine.segment_1_2",
		"drop index millrace_engine.segment_1_1_position_idx",
		"drop table millrace_engine.segment_1_3",
		"drop function millrace_engine.receive_1",
		"alter sequence millrace_engine.position_1 cache 5",
		"alter table millrace_engine.segment_1_1 alter position drop default",
	} {
		t.Run(damage, func(t *testing.T) {
			e.run(damage)
			e.repaired(t, pgstream.StreamSpec{Name: "orders"})
			tx := e.begin()
			publishIn(e, tx, "orders")
			if one[int](e, "select count(*) from pg_locks where pid = $1 and locktype = 'advisory'", pid(tx)) != 1 {
				t.Error("a publisher is not guarded")
			}
			rollback(e, tx)
		})
	}
	if got := drain(e, c); len(got) != 10 {
		t.Errorf("%d messages are left of ten", len(got))
	}
}

// A sequence that somebody dropped must not hand out positions again that readers have passed, whichever way and into whichever table a message comes.
func TestALostSequenceGoesOnAboveWhatWasDelivered(t *testing.T) {
	t.Parallel()
	lose := func(e *engine, stream string) {
		e.t.Helper()
		e.run(fmt.Sprintf("drop sequence millrace_engine.position_%d cascade", one[int32](e, "select id from millrace_engine.stream where name = $1", stream)))
	}
	t.Run("of a stream", func(t *testing.T) {
		t.Parallel()
		e := newEngine(t)
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
		e.publish("orders", 10)
		drain(e, c)
		e.publish("orders", 5) // nobody has read these
		lose(e, "orders")
		e.repaired(t, pgstream.StreamSpec{Name: "orders"})
		e.fillRing() // every segment
		for k := range 4 {
			e.run(fmt.Sprintf("insert into millrace_engine.segment_1_%d (payload) values ('{}')", k))
		}
		got := drain(e, c)
		if len(got) != 409 || slices.Min(got) != 11 || len(slices.Compact(slices.Sorted(slices.Values(got)))) != 409 {
			t.Errorf("got %d messages, want those from 11 to 419", len(got))
		}
	})
	t.Run("of a priority", func(t *testing.T) {
		t.Parallel()
		e := newEngine(t)
		e.prioritized(pgstream.ModeShared)
		e.publishAt(2, 1, 2, 3)
		lose(e, "orders.p2")
		e.repaired(t, pgstream.StreamSpec{Name: "orders", Priorities: 3})
		e.publishAt(2, 4)
		same(t, "delivered", e.drainSQL("m", 10), []int{1, 2, 3, 4})
	})
	t.Run("of tenants", func(t *testing.T) {
		t.Parallel()
		e := newEngine(t)
		spec := pgstream.StreamSpec{Name: "accounts", Versions: true, Tenants: []string{"acme"}}
		plan, err := pgstream.PlanStream(e.ctx, e.Pool, spec)
		must(t, err)
		must(t, pgstream.ApplyStream(e.ctx, e.Pool, plan))
		lose(e, "accounts")
		e.repaired(t, spec)
		for i, key := range []string{"acme/a", "a"} {
			a, err := pgstream.Append(e.ctx, e.Pool, "accounts", key, pgstream.NoVersion, events(1))
			must(t, err)
			if a.Position != int64(i+1) {
				t.Errorf("the append to %s has position %d", key, a.Position)
			}
		}
	})
}

// repaired applies the stream's settings again, and expects that something was damaged and is not any more.
func (e *engine) repaired(t *testing.T, spec pgstream.StreamSpec) {
	t.Helper()
	plan, err := pgstream.PlanStream(e.ctx, e, spec)
	must(t, err)
	if !plan.Drift || len(plan.Steps) == 0 {
		t.Fatalf("nobody saw it: %+v", plan)
	}
	must(t, pgstream.ApplyStream(e.ctx, e, plan))
	plan, err = pgstream.PlanStream(e.ctx, e, spec)
	must(t, err)
	if plan.Drift || len(plan.Steps) != 0 {
		t.Errorf("it was not repaired: %+v", plan)
	}
}

func TestManyApplyAtOnce(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	var all sync.WaitGroup
	failed := make(chan error, 100)
	for i := range 8 {
		all.Go(func() {
			for _, name := range []string{"a", "b", "c"} {
				spec := pgstream.StreamSpec{Name: name, Partitions: 8 + i}
				if err := pgstream.ApplyStream(e.ctx, e.Pool, pgstream.Plan{Spec: spec}); err != nil && !errors.Is(err, pgstream.ErrRefused) {
					failed <- fmt.Errorf("stream: %w", err)
				}
				if err := pgstream.ApplyGroup(e.ctx, e.Pool, pgstream.GroupSpec{Stream: name, Name: "g"}); err != nil {
					failed <- fmt.Errorf("group: %w", err)
				}
			}
		})
	}
	all.Wait()
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	if n := one[int](e, "select count(*) from millrace_engine.lane"); n != 3 {
		t.Errorf("%d lanes, want 3", n)
	}
	if low := one[int](e, "select min(partitions) from millrace_engine.stream"); low != 15 {
		t.Errorf("%d partitions, want 15", low)
	}
}

func TestDroppingAStream(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	owner := pgstream.Owner{Name: "me"}
	for _, name := range []string{"orders", "others"} {
		must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: name, Owner: owner}}))
		e.group(pgstream.GroupSpec{Stream: name, Name: "g"})
		e.publish(name, 10)
	}
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	claim := mustReceive(e, c)
	must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 0, "no"))

	if err := pgstream.DropStream(e.ctx, e, "orders", pgstream.Owner{Name: "other"}, false); !errors.Is(err, pgstream.ErrOwned) {
		t.Errorf("drop by another owner: %v", err)
	}
	if err := pgstream.DropStream(e.ctx, e, "orders", owner, true); !errors.Is(err, pgstream.ErrNotEmpty) {
		t.Errorf("drop of what is not empty: %v", err)
	}
	if n := e.kept(); n != 10 {
		t.Fatalf("%d messages are left", n)
	}
	must(t, pgstream.DropStream(e.ctx, e, "orders", owner, false))
	must(t, pgstream.DropStream(e.ctx, e, "orders", owner, false)) // harmless
	rest := one[[]string](e, `select coalesce(array_agg(x), '{}') from (
		select relname::text as x from pg_class where relname ~ '^(segment_1_|(position|state|notified)_1$)' and relnamespace = 'millrace_engine'::regnamespace
		union all select proname::text from pg_proc where proname ~ '_1$' and pronamespace = 'millrace_engine'::regnamespace
		union all select 'delivery' from millrace_engine.delivery union all select 'lane' from millrace_engine.lane where group_id = 1) r`)
	if len(rest) != 0 {
		t.Errorf("left behind: %v", rest)
	}
	if _, err := pgstream.Publish(e.ctx, e, "orders", pgstream.NewMessage{Payload: []byte(`{}`)}); !errors.Is(err, pgstream.ErrNotFound) {
		t.Errorf("publish: %v", err)
	}
	if _, err := pgstream.DescribeStream(e.ctx, e, "orders"); !errors.Is(err, pgstream.ErrNotFound) {
		t.Errorf("describe: %v", err)
	}
	if got := drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "others", Group: "g"})); len(got) != 10 {
		t.Errorf("the other stream delivered %v", got)
	}
	// A stream of the same name is another stream.
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.publish("orders", 3)
	same(t, "of the new one", drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})), []int64{1, 2, 3})

	must(t, pgstream.ReleaseStream(e.ctx, e, "others", owner))
	must(t, pgstream.DropStream(e.ctx, e, "others", pgstream.Owner{Name: "other"}, false))
}

func TestTransientErrorsAreKnown(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	raise := func(code string) error {
		_, err := e.Exec(e.ctx, fmt.Sprintf("do $$ begin raise exception 'x' using errcode = '%s'; end $$", code))
		return err
	}
	var wrong []string
	for _, code := range []string{"40001", "40P01", "55P03", "57014", "57P01", "57P03", "08006", "53300", "53100", "58030"} {
		if !pgstream.IsTransient(raise(code)) {
			wrong = append(wrong, code)
		}
	}
	for _, code := range []string{"MR001", "MR002", "MR004", "23505", "42501", "42P01", "22P02"} {
		if pgstream.IsTransient(raise(code)) {
			wrong = append(wrong, code)
		}
	}
	if slices.Sort(wrong); len(wrong) > 0 {
		t.Errorf("wrong: %v", wrong)
	}
	if pgstream.IsTransient(nil) || pgstream.IsTransient(errors.New("x")) || pgstream.IsTransient(pgstream.ErrFenced) {
		t.Error("not every error is transient")
	}
	closed := e.connect()
	must(t, closed.Close(e.ctx))
	if _, err := closed.Exec(e.ctx, "select 1"); !pgstream.IsTransient(err) {
		t.Errorf("a closed connection: %v", err)
	}
}
