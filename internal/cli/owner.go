package cli

import (
	"fmt"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func ownerText(o pgstream.Owner) string {
	return fmt.Sprintf("%s/%s in Kubernetes, cluster %s", o.Namespace, o.Name, o.Cluster)
}

// noteOwner says, before something is changed, that it belongs to a Kubernetes resource of this kind, and what that means for the change. It is no question: the
// change is an operation, which a resource does not describe.
func (a *app) noteOwner(kind string, o pgstream.Owner, means string) {
	if o != (pgstream.Owner{}) {
		a.note("note: this belongs to %s %s. %s", kind, ownerText(o), means)
	}
}
