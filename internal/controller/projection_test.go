package controller_test

import (
	"fmt"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

const applyCart = `create function public.%s(document jsonb, payload jsonb, headers jsonb) returns jsonb language sql as
	$$ select jsonb_build_object('total', coalesce((document ->> 'total')::int, 0) + %s * (payload ->> 'n')::int) $$`

func eventStore(projections ...v1alpha1.Projection) func(*v1alpha1.StreamSpec) {
	return func(s *v1alpha1.StreamSpec) { s.Versions, s.Projections = true, projections }
}

func TestStreamHasItsProjections(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	conn := w.sql(dsn)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("carts", eventStore(v1alpha1.Projection{Name: "totals", Function: "public.apply_cart", Documents: "public.totals"}))
	w.create(s)

	// Its function does not exist: the stream works, and its status says what is missing.
	w.wantNotReady(s, v1alpha1.ReasonProjectionFailed, `projection "totals": there is no function public.apply_cart(jsonb,jsonb,jsonb)`, "Create it first")
	w.want(s, v1alpha1.ConditionSchemaApplied, metav1.ConditionTrue, v1alpha1.ReasonApplied)
	w.exec(conn, `select millrace.append('carts', 'a', array['{"n": 1}', '{"n": 2}']::jsonb[])`)
	w.exec(conn, fmt.Sprintf(applyCart, "apply_cart", "1"))
	nudge(w, s)
	w.wantReady(s)
	total := func(want int) {
		t.Helper()
		var got int
		if err := conn.QueryRow(t.Context(), "select (document ->> 'total')::int from public.totals where key = 'a'").Scan(&got); err != nil || got != want {
			t.Errorf("the total is %d, not %d; %v", got, want, err)
		}
	}
	total(3)
	w.exec(conn, `select millrace.append('carts', 'a', array['{"n": 4}']::jsonb[])`)
	total(7)
	if n := w.events(s, v1alpha1.EventDriftRepaired); len(n) > 0 {
		t.Errorf("a function that came is called drift: %v", n)
	}

	// Somebody deletes it, and it comes back, with what was appended meanwhile.
	w.exec(conn, "delete from millrace_engine.projection")
	w.exec(conn, `select millrace.append('carts', 'a', array['{"n": 8}']::jsonb[])`)
	nudge(w, s)
	w.wantEvent(s, v1alpha1.EventDriftRepaired, "create projection totals")
	w.wantReady(s)
	total(15)

	// Another function: made anew. One that fails: the old documents stay, and status says what it said.
	w.exec(conn, fmt.Sprintf(applyCart, "apply_cart_v2", "10"))
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.Projections[0].Function = "public.apply_cart_v2" })
	w.wantReady(s)
	total(150)
	w.exec(conn, `create function public.fails(document jsonb, payload jsonb, headers jsonb) returns jsonb language plpgsql as
		$$ begin raise 'no carts today'; end $$`)
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.Projections[0].Function = "public.fails" })
	w.wantNotReady(s, v1alpha1.ReasonProjectionFailed, `projection "totals": its function failed`, "no carts today")
	total(150)
	w.exec(conn, `select millrace.append('carts', 'a', array['{"n": 1}']::jsonb[])`)
	total(160)
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.Projections[0].Function = "public.apply_cart" })
	w.wantReady(s)
	total(16)

	// A group that does not exist yet; then it runs the projection instead of the append.
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.Projections[0].Group = "totals" })
	w.wantNotReady(s, v1alpha1.ReasonConsumerGroupMissing, `consumer group "totals" does not exist`)
	if err := pgstream.ApplyGroup(t.Context(), conn, pgstream.GroupSpec{Stream: "carts", Name: "totals", Mode: pgstream.ModeOrdered}); err != nil {
		t.Fatal(err)
	}
	nudge(w, s)
	w.wantReady(s)
	w.exec(conn, `select millrace.append('carts', 'a', array['{"n": 5}']::jsonb[])`)
	total(16)
	var positions []int64
	if err := conn.QueryRow(t.Context(), "select array_agg(position) from millrace.receive('carts', 'totals', 'me')").Scan(&positions); err != nil || len(positions) != 1 {
		t.Fatalf("the group got %v; %v", positions, err)
	}
	w.exec(conn, "select millrace.project('carts', 'totals', $1)", positions)
	total(21)

	// Not declared any more, it ends, and its documents stay.
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.Projections = nil })
	w.wantReady(s)
	total(21)
	var left int
	if err := conn.QueryRow(t.Context(), "select count(*) from millrace.projections()").Scan(&left); err != nil || left != 0 {
		t.Errorf("%d projections are left; %v", left, err)
	}
}

func TestProcessorRunsTheProjectionOfItsGroup(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("carts", eventStore(v1alpha1.Projection{Name: "totals", Function: "public.apply_cart", Documents: "public.totals", Group: "my_totals"}),
		func(s *v1alpha1.StreamSpec) { s.Tenants = []string{"acme"} })
	w.create(s)
	w.wantNotReady(s, v1alpha1.ReasonConsumerGroupMissing, `consumer group "my_totals" does not exist`)
	g := newGroup("my-totals", "carts", func(g *v1alpha1.ConsumerGroupSpec) { g.Mode = v1alpha1.ModeOrdered })
	w.create(g)
	w.wantReady(g)
	w.exec(w.sql(dsn), fmt.Sprintf(applyCart, "apply_cart", "1"))
	w.exec(w.sql(dsn), `select millrace.append('carts', 'acme/a', array['{"n": 1}']::jsonb[])`)
	nudge(w, s)
	w.wantReady(s)
	p := w.processor("totals", "  source: {consumerGroup: {name: my-totals}}\n  sink: {projection: {}}\n")
	c := w.file(p, anything)
	if want := "select millrace.project('carts', 'my_totals', array_agg(position)) from batch"; c.Sink.SQL == nil || c.Sink.SQL.Statement != want ||
		len(c.Mapping.Columns) != 1 || c.Mapping.Columns[0].Path != "@position" {
		t.Errorf("the file has %+v and %+v", c.Sink, c.Mapping)
	}
}

// nudge wakes the controller, which otherwise looks again when it is due.
func nudge(w *world, s *v1alpha1.Stream) {
	w.Helper()
	update(w, s, func(s *v1alpha1.Stream) {
		if s.Annotations == nil {
			s.Annotations = map[string]string{}
		}
		s.Annotations["test/nudge"] += "x"
	})
}
