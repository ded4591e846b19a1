package stream

import (
	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// scope holds the facts of one reconcile. Each field says which phase fills it; until then it is zero.
type scope struct {
	stream *v1alpha1.Stream // what is worked on; report writes its status
	before *v1alpha1.Stream // as it was read

	db   *database.Database   // connect
	info *pgstream.StreamInfo // own: as the database has it, nil when it has none; apply, observe: as it has it now

	noSchema    bool           // own: the engine is not installed in the database, and nobody has approved that yet
	predecessor pgstream.Owner // own: the owner to follow, which is gone; zero when there is none
	// own: what happens to ownership, for an event; empty when nothing does.
	adopted string

	planned  bool          // plan: the comparison was made
	plan     pgstream.Plan // plan
	drift    bool          // plan: the steps repair what was changed or dropped behind our back
	approved string        // approve: the hash of the plan that a person approved; empty where nobody has to
	applied  bool          // apply: the database is as the plan says

	gone bool // remove: nothing holds the resource any more
}
