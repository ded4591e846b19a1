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

	info        *pgstream.GroupInfo // own: as the database has it, nil when it has none
	predecessor pgstream.Owner      // own: the owner to follow, which is gone; zero when there is none
	adopted     string              // own: what happens to ownership, for an event; empty when nothing does

	planned  bool            // plan: the comparison was made
	steps    []pgstream.Step // plan
	drift    bool            // plan: the steps repair what was changed or dropped behind our back
	approved string          // approve: the hash of the plan that a person approved; empty where nobody has to
	applied  bool            // apply: the database is as spec says

	figuresOnly bool // Reconcile: nothing but the figures is looked at
	gone        bool // remove: nothing holds the resource any more
}
