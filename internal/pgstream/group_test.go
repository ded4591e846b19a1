package pgstream_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func TestAGroupBeginsWhereItIsTold(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.publish("orders", 5)
	e.run("update millrace.orders set created_at = '2020-01-01' where position <= 3")
	for _, c := range []struct {
		name string
		spec pgstream.GroupSpec
		want []int64
	}{
		{"earliest", pgstream.GroupSpec{StartFrom: pgstream.StartEarliest}, []int64{1, 2, 3, 4, 5, 6}},
		{"by_default", pgstream.GroupSpec{}, []int64{1, 2, 3, 4, 5, 6}},
		{"latest", pgstream.GroupSpec{StartFrom: pgstream.StartLatest}, []int64{6}},
		{"position", pgstream.GroupSpec{StartFrom: pgstream.StartPosition, StartPosition: 3}, []int64{3, 4, 5, 6}},
		{"ahead", pgstream.GroupSpec{StartFrom: pgstream.StartPosition, StartPosition: 6}, []int64{6}},
		{"far_ahead", pgstream.GroupSpec{StartFrom: pgstream.StartPosition, StartPosition: 100}, nil},
		{"time", pgstream.GroupSpec{StartFrom: pgstream.StartTime, StartTime: time.Date(2021, 1, 1, 0, 0, 0, 0, time.UTC)}, []int64{4, 5, 6}},
		{"early", pgstream.GroupSpec{StartFrom: pgstream.StartTime, StartTime: time.Date(2019, 1, 1, 0, 0, 0, 0, time.UTC)}, []int64{1, 2, 3, 4, 5, 6}},
		{"future", pgstream.GroupSpec{StartFrom: pgstream.StartTime, StartTime: time.Now().Add(time.Hour)}, []int64{6}},
	} {
		for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
			c.spec.Stream, c.spec.Name, c.spec.Mode = "orders", c.name+"_"+strings.ToLower(string(mode)), mode
			e.group(c.spec)
			defer func() {
				same(t, c.spec.Name, drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: c.name + "_" + strings.ToLower(string(mode))})), c.want)
			}()
		}
	}
	e.publish("orders", 1)
}

// Messages whose transaction is open when the group begins are not visible, and still the group's own.
func TestAGroupThatBeginsNowGetsWhatIsCommittedLater(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.publish("orders", 2)
	start := one[time.Time](e, "select clock_timestamp()")
	late := e.begin()
	publishIn(e, late, "orders")
	publishIn(e, e, "orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "latest", StartFrom: pgstream.StartLatest})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "time", StartFrom: pgstream.StartTime, StartTime: start})
	commit(e, late)
	for _, group := range []string{"latest", "time"} {
		same(t, group, drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: group})), []int64{3, 4})
	}
}

func TestAGroupsSettingsChangeButNotItsNature(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	spec := pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered, AckWait: time.Minute, MaxAttempts: 5}
	steps, err := pgstream.PlanGroup(e.ctx, e, spec)
	must(t, err)
	if len(steps) != 1 || !strings.Contains(steps[0].Summary, "create Ordered consumer group") {
		t.Fatalf("plan of a new group: %+v", steps)
	}
	e.group(spec)
	if steps, err = pgstream.PlanGroup(e.ctx, e, spec); err != nil || len(steps) != 0 {
		t.Fatalf("plan of what is there: %+v, %v", steps, err)
	}
	e.group(spec) // repeating it is harmless
	spec.AckWait, spec.FailurePolicy, spec.Paused = 2*time.Minute, pgstream.FailureSkip, true
	if steps, err = pgstream.PlanGroup(e.ctx, e, spec); err != nil || len(steps) != 3 {
		t.Fatalf("plan of three changes: %+v, %v", steps, err)
	}
	e.group(spec)
	if steps, err = pgstream.PlanGroup(e.ctx, e, spec); err != nil || len(steps) != 0 {
		t.Fatalf("plan after the changes: %+v, %v", steps, err)
	}
	e.publish("orders", 1)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	same(t, "while the group is paused", positions(receive(e, c)), nil)
	spec.Paused = false
	e.group(spec)
	same(t, "afterwards", positions(receive(e, c)), []int64{1})

	for what, bad := range map[string]pgstream.GroupSpec{
		"another mode":          {Stream: "orders", Name: "g", Mode: pgstream.ModeShared},
		"another start":         {Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered, StartFrom: pgstream.StartLatest},
		"a bad name":            {Stream: "orders", Name: "G-1"},
		"an unknown mode":       {Stream: "orders", Name: "h", Mode: "Sideways"},
		"an unknown start":      {Stream: "orders", Name: "h", StartFrom: "Never"},
		"a start before 1":      {Stream: "orders", Name: "h", StartFrom: pgstream.StartPosition, StartPosition: -1},
		"a negative ack wait":   {Stream: "orders", Name: "h", AckWait: -time.Second},
		"an impossible attempt": {Stream: "orders", Name: "h", MaxAttempts: -1},
	} {
		if err := pgstream.ApplyGroup(e.ctx, e, bad); !errors.Is(err, pgstream.ErrRefused) {
			t.Errorf("%s: %v; want ErrRefused", what, err)
		}
	}
	if _, err := pgstream.PlanGroup(e.ctx, e, pgstream.GroupSpec{Stream: "nothing", Name: "g"}); !errors.Is(err, pgstream.ErrNotFound) {
		t.Errorf("plan for an unknown stream: %v", err)
	}
	if err := pgstream.ApplyGroup(e.ctx, e, pgstream.GroupSpec{Stream: "nothing", Name: "g"}); !errors.Is(err, pgstream.ErrNotFound) {
		t.Errorf("apply to an unknown stream: %v", err)
	}
}

func TestAWorkQueueHasOneGroup(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", Retention: pgstream.Retention{Policy: pgstream.RetentionWorkQueue}}}))
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	if err := pgstream.ApplyGroup(e.ctx, e, pgstream.GroupSpec{Stream: "orders", Name: "h"}); !errors.Is(err, pgstream.ErrRefused) {
		t.Errorf("a second group: %v", err)
	}
}

func TestAGroupThatIsDroppedTakesItsClaimsAlong(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, _ := twoMembers(t, mode)
		claim := mustReceive(e, old)
		must(t, old.DeadLetter(e.ctx, claim.Token, []int64{1}, "no"))
		must(t, pgstream.DropGroup(e.ctx, e, "orders", "g", pgstream.Owner{}))
		must(t, pgstream.DropGroup(e.ctx, e, "orders", "g", pgstream.Owner{})) // harmless
		must(t, pgstream.DropGroup(e.ctx, e, "nothing", "g", pgstream.Owner{}))
		_, err := old.TryReceive(e.ctx)
		if !errors.Is(err, pgstream.ErrNotFound) {
			t.Errorf("receive: %v; want ErrNotFound", err)
		}
		for _, v := range verbs[1:] {
			if err := v.use(e, e, claim.Token); err != nil && sqlState(err) != "MR001" {
				t.Errorf("%s: %v; want MR001, if anything", v.name, err)
			}
		}
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
		if s := e.stats("orders", "g"); s.DeadLetters != 0 || s.Retrying != 0 || s.InFlight != 0 || s.Lag != 10 {
			t.Errorf("the new group: %+v", s)
		}
		got := drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"}))
		if len(got) != 10 {
			t.Errorf("the new group got %v", got)
		}
		e.turnLedger()
		e.turnLedger()
		e.turnLedger()
	})
}

func TestGroupsBelongToTheirOwner(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	mine := pgstream.Owner{Cluster: "c", Namespace: "n", Name: "mine", UID: "1"}
	theirs := pgstream.Owner{Cluster: "c", Namespace: "n", Name: "theirs", UID: "2"}
	spec := pgstream.GroupSpec{Stream: "orders", Name: "g", Owner: mine}
	must(t, pgstream.ApplyGroup(e.ctx, e, spec))
	for _, owner := range []pgstream.Owner{theirs, {}} {
		other := spec
		other.Owner = owner
		if _, err := pgstream.PlanGroup(e.ctx, e, other); !errors.Is(err, pgstream.ErrOwned) {
			t.Errorf("plan by %q: %v", owner.Name, err)
		}
		if err := pgstream.ApplyGroup(e.ctx, e, other); !errors.Is(err, pgstream.ErrOwned) {
			t.Errorf("apply by %q: %v", owner.Name, err)
		}
		if err := pgstream.DropGroup(e.ctx, e, "orders", "g", owner); !errors.Is(err, pgstream.ErrOwned) {
			t.Errorf("drop by %q: %v", owner.Name, err)
		}
		must(t, pgstream.ReleaseGroup(e.ctx, e, "orders", "g", owner)) // does nothing
	}
	must(t, pgstream.ReleaseGroup(e.ctx, e, "orders", "g", mine))
	spec.Owner = theirs
	steps, err := pgstream.PlanGroup(e.ctx, e, spec)
	must(t, err)
	if len(steps) != 1 || steps[0].Summary != "become the owner" {
		t.Errorf("plan of an adoption: %+v", steps)
	}
	must(t, pgstream.ApplyGroup(e.ctx, e, spec))
	must(t, pgstream.DropGroup(e.ctx, e, "orders", "g", theirs))
}

// Two managers that create at once must not both believe that they are the owner.
func TestTheFirstOfTwoOwnersWins(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	first, second := pgstream.Owner{Name: "first", UID: "1"}, pgstream.Owner{Name: "second", UID: "2"}
	for what, apply := range map[string]func(db pgstream.DB, owner pgstream.Owner) error{
		"stream": func(db pgstream.DB, owner pgstream.Owner) error {
			return pgstream.ApplyStream(e.ctx, db, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "new", Owner: owner}})
		},
		"group": func(db pgstream.DB, owner pgstream.Owner) error {
			return pgstream.ApplyGroup(e.ctx, db, pgstream.GroupSpec{Stream: "orders", Name: "new", Owner: owner})
		},
	} {
		a, b := e.begin(), e.begin()
		must(t, apply(a, first))
		done := e.blocked(pid(b), func() error { return apply(b, second) })
		commit(e, a)
		if err := <-done; !errors.Is(err, pgstream.ErrOwned) {
			t.Errorf("%s: the second owner's apply: %v; want ErrOwned", what, err)
		}
		rollback(e, b)
	}
}

func TestLeavingIsHarmlessForWhoIsNoMember(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		group := strings.ToLower(string(mode))
		e.group(pgstream.GroupSpec{Stream: "orders", Name: group, Mode: mode})
		e.publish("orders", 3)
		held := mustReceive(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: group, Member: "m"}))
		e.run("select millrace.leave('orders', $1, 'somebody'), millrace.leave('orders', $1, null)", group)
		e.run("select millrace.extend($1, 60)", held.Token) // nothing of others has ended
		leaving := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: group, Member: "m"})
		must(t, leaving.Leave(e.ctx))
		must(t, leaving.Leave(e.ctx))
		if _, err := e.Exec(e.ctx, "select millrace.extend($1, 60)", held.Token); sqlState(err) != "MR001" {
			t.Errorf("%s: a claim of the member that has left: %v; want MR001", mode, err)
		}
		must(t, pgstream.DropGroup(e.ctx, e, "orders", group, pgstream.Owner{}))
		must(t, leaving.Leave(e.ctx)) // there is nothing to leave
		if _, err := e.Exec(e.ctx, "select millrace.leave('orders', $1, 'm')", group); sqlState(err) != "MR002" || hint(err) == "" {
			t.Errorf("%s: leaving an unknown group: %v; want MR002 and a hint", mode, err)
		}
	}
}

// A poll of a paused group is over before anybody asks how far reading is safe, which may take milliseconds.
func TestAPausedGroupsPollDoesNotLookForTheHorizon(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	modes := map[string]pgstream.Mode{"shared": pgstream.ModeShared, "ordered": pgstream.ModeOrdered}
	for group, mode := range modes {
		e.group(pgstream.GroupSpec{Stream: "orders", Name: group, Mode: mode})
		e.publish("orders", 3)
		e.run("select millrace.ack(claim) from (select distinct claim from millrace.receive('orders', $1, 'm')) x", group)
	}
	e.run("select millrace.create_group('orders', g, p_paused => true) from unnest(array['shared', 'ordered']) g")
	e.publish("orders", 3)
	for _, function := range []string{"horizon", "horizon_from"} {
		e.run(`do $$ begin execute replace(pg_get_functiondef('millrace_engine.` + function + `'::regproc), 'begin', 'begin raise exception ''looked for the horizon'';'); end $$`)
	}
	for group := range modes {
		if n := one[int](e, "select count(*) from millrace.receive('orders', $1, 'm')", group); n != 0 {
			t.Errorf("the paused group %s got %d messages", group, n)
		}
		e.run("select millrace.create_group('orders', $1, p_paused => false)", group)
		if _, err := e.Exec(e.ctx, "select millrace.receive('orders', $1, 'm')", group); err == nil || !strings.Contains(err.Error(), "looked for the horizon") {
			t.Errorf("%s: %v; this test does not see who looks for the horizon", group, err)
		}
	}
}
