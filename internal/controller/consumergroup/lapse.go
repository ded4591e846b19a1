package consumergroup

import (
	"context"
	"fmt"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
)

// lapse says so when the group has lapsed: only a person can tell where it is to go on. The poller makes the group due when
// it lapses and when it was reset.
func (r *Reconciler) lapse(_ context.Context, sc *scope) error {
	g := sc.group
	if sc.info == nil || sc.info.LapsedAt.IsZero() {
		phase.Set(&g.Status.Conditions, g.Generation, v1alpha1.ConditionLapsed, metav1.ConditionFalse, v1alpha1.ReasonActive, "")
		return nil
	}
	message := lapsedMessage(sc)
	phase.Set(&g.Status.Conditions, g.Generation, v1alpha1.ConditionLapsed, metav1.ConditionTrue, v1alpha1.ReasonLapsed, message)
	return phase.Stallf(v1alpha1.ReasonLapsed, "%s", message)
}

func lapsedMessage(sc *scope) string {
	why := sc.info.LapseReason
	if why == "" {
		why = "it was left behind"
	}
	return fmt.Sprintf("consumer group %q has lapsed since %s: %s. It receives nothing and keeps no message from being removed. To go on, run in %s: "+
		"select millrace.reset_group('%s', '%s', 'Earliest'), which delivers what is still there again from the beginning, or with 'Latest', which leaves it out",
		sc.group.DatabaseName(), sc.info.LapsedAt.UTC().Format(time.RFC3339), why, sc.db, sc.stream.DatabaseName(), sc.group.DatabaseName())
}
