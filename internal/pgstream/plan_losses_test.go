package pgstream_test

import (
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// spread puts a hundred messages into each of the first n segments of a lane of orders, and makes the last of them the one that is written to.
func (e *engine) spread(lane string, n int) {
	e.t.Helper()
	id := one[int](e, "select id from millrace_engine.stream where name = '"+lane+"'")
	priority := 0
	if lane != "orders" {
		priority = 1
	}
	for segment := range n {
		if _, err := e.Exec(e.ctx, "select millrace_engine.set_state($1, $2, null)", id, segment); err != nil {
			e.t.Fatal(err)
		}
		if _, err := e.Exec(e.ctx, "select millrace.publish('orders', to_jsonb(i), p_priority => $1) from generate_series(1, 100) i", priority); err != nil {
			e.t.Fatal(err)
		}
	}
}

// What a plan says is destroyed is what maintenance then removes.
func TestLossesAreWhatMaintenanceRemoves(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		groups bool // one group that has acked all
		want   pgstream.StreamSpec
		kept   int // of 300
	}{
		{"a limit of number", false, pgstream.StreamSpec{Retention: pgstream.Retention{MaxMessages: 150}}, 200},
		{"a limit that is kept", false, pgstream.StreamSpec{Retention: pgstream.Retention{MaxMessages: 300}}, 300},
		{"a limit of size", false, pgstream.StreamSpec{Retention: pgstream.Retention{MaxBytes: 1}}, 0},
		{"a limit of age", false, pgstream.StreamSpec{Retention: pgstream.Retention{MaxAge: time.Hour}}, 300},
		{"interest, and nobody has any", false, pgstream.StreamSpec{Retention: pgstream.Retention{Policy: pgstream.RetentionInterest}}, 100},
		{"a queue on which nobody has worked", false, pgstream.StreamSpec{Retention: pgstream.Retention{Policy: pgstream.RetentionWorkQueue}}, 300},
		{"interest, and all is acked", true, pgstream.StreamSpec{Retention: pgstream.Retention{Policy: pgstream.RetentionInterest}}, 100},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stream("orders")
			if c.groups {
				e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
			}
			e.spread("orders", 3)
			if c.groups {
				e.run("select millrace.reset_group('orders', 'g', 'Latest')")
			}
			c.want.Name = "orders"
			plan, err := pgstream.PlanStream(e.ctx, e, c.want)
			must(t, err)
			losses, err := pgstream.StreamLosses(e.ctx, e, plan)
			must(t, err)
			must(t, pgstream.ApplyStream(e.ctx, e, plan))
			e.maintain(8)
			kept := e.kept()
			if kept != c.kept {
				t.Errorf("%d messages are kept, want %d", kept, c.kept)
			}
			if lost := len(losses) > 0; lost != (kept < 300) {
				t.Errorf("%d messages are kept, and the plan said %+v", kept, losses)
			}
		})
	}
}

func TestLossesCountEveryPriority(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", Priorities: 2}}))
	e.spread("orders", 3)
	e.spread("orders.p1", 2)
	plan, err := pgstream.PlanStream(e.ctx, e, pgstream.StreamSpec{
		Name: "orders", Retention: pgstream.Retention{MaxMessages: 10},
	})
	must(t, err)
	losses, err := pgstream.StreamLosses(e.ctx, e, plan)
	must(t, err)
	if len(losses) != 1 || losses[0].Kind != pgstream.LossMessages || !strings.Contains(losses[0].Summary, "up to 300 messages") ||
		!strings.Contains(losses[0].Summary, "3 segments") {
		t.Errorf("%+v", losses)
	}
	// What goes anyway is no loss of the plan's.
	e.retained(pgstream.Retention{MaxMessages: 10})
	plan.Spec.Retention.MaxMessages = 9
	if losses, err = pgstream.StreamLosses(e.ctx, e, plan); err != nil || len(losses) > 0 {
		t.Errorf("%+v, %v", losses, err)
	}
}
