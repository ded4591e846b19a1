package consumergroup

import (
	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// scope holds the facts of one reconcile. Each field says which phase fills it; until then it is zero.
type scope struct {
	group  *v1alpha1.ConsumerGroup // what is worked on; report writes its status
	before *v1alpha1.ConsumerGroup // as it was read

	stream *v1alpha1.Stream   // connect
	db     *database.Database // connect

	info    *pgstream.GroupInfo // own: as the database has it, nil when it has none
	adopted string              // own: what happened to ownership, for an event; empty when nothing did

	planned bool            // plan: the comparison was made
	steps   []pgstream.Step // plan
	drift   bool            // plan: the steps repair what was changed or dropped behind our back
	applied bool            // apply: the database is as spec says

	figuresOnly bool // Reconcile: nothing but the figures is looked at
	gone        bool // remove: nothing holds the resource any more
}
