package controller_test

import (
	"testing"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// kubectl delete -f, Flux and Helm delete a Stream and its groups in any order. The group's policy holds even when its Stream went first.
func TestAGroupGoesAsItsPolicySaysAfterItsStream(t *testing.T) {
	for _, c := range []struct {
		name    string
		stream  v1alpha1.DeletionPolicy
		group   v1alpha1.DeletionPolicy
		remains int
		event   string
	}{
		{"Delete, of a stream that stays", v1alpha1.DeletionRetain, v1alpha1.DeletionDelete, 0, v1alpha1.EventDropped},
		{"DeleteIfEmpty, of a stream that stays", v1alpha1.DeletionRetain, v1alpha1.DeletionDeleteIfEmpty, 0, v1alpha1.EventDropped},
		{"Delete, of a stream that is dropped", v1alpha1.DeletionDelete, v1alpha1.DeletionDelete, 0, v1alpha1.EventDropped},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			dsn := postgres.NewDatabase(t)
			w.secret(appDB.Name, appDB.Key, dsn)
			s, g := newStream("orders"), newGroup("sink", "orders", groupDeletion(c.group))
			s.Spec.DeletionPolicy = c.stream
			w.create(s)
			w.create(g)
			w.wantReady(g)
			if err := suite.client.Delete(t.Context(), s); err != nil {
				t.Fatal(err)
			}
			w.wantGone(s)
			w.wantNotReady(g, v1alpha1.ReasonStreamMissing)
			if err := suite.client.Delete(t.Context(), g); err != nil {
				t.Fatal(err)
			}
			w.wantGone(g)
			w.wantEvent(g, c.event)
			if n := scalar[int](w, w.sql(dsn), "select count(*) from millrace_engine.consumer_group"); n != c.remains {
				t.Errorf("there are %d groups", n)
			}
		})
	}
}
