package controller_test

import (
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
)

// A group becomes Ready, and its first figures come a moment later, when the cache still has the status from before. Writing
// figures on top of that one would take Ready back until the next verification.
func TestFiguresAreNotWrittenOverNewerStatus(t *testing.T) {
	w := newWorld(t)
	g := newGroup("orders-sink", "orders", func(g *v1alpha1.ConsumerGroupSpec) { g.Suspend = true }) // the manager keeps still
	w.create(g)
	w.want(g, v1alpha1.ConditionPaused, metav1.ConditionTrue, v1alpha1.ReasonSuspended)
	cached, ready := g.DeepCopy(), g.DeepCopy()
	phase.Summarize(&ready.Status.Conditions, g.Generation, nil, phase.Ready{Message: "done"})
	if err := phase.WriteStatus(t.Context(), suite.client, g, ready); err != nil {
		t.Fatal(err)
	}

	figures := cached.DeepCopy()
	figures.Status.Lag = ptr.To[int64](7)
	if err := phase.WriteFigures(t.Context(), suite.client, cached, figures); !apierrors.IsConflict(err) {
		t.Errorf("writing figures over newer status: %v, want a conflict", err)
	}
	w.want(g, v1alpha1.ConditionReady, metav1.ConditionTrue, v1alpha1.ReasonReady, "done")

	figures = g.DeepCopy()
	figures.Status.Lag = ptr.To[int64](7)
	if err := phase.WriteFigures(t.Context(), suite.client, g, figures); err != nil {
		t.Fatal(err)
	}
	w.want(g, v1alpha1.ConditionReady, metav1.ConditionTrue, v1alpha1.ReasonReady, "done")
	if g.Status.Lag == nil || *g.Status.Lag != 7 {
		t.Errorf("lag is %v, want 7", g.Status.Lag)
	}
}
