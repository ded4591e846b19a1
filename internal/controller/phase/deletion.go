package phase

import (
	"fmt"
	"time"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// deletionRetry bounds the wait between two attempts to delete.
const deletionRetry = 10 * time.Second

// Blocked is the outcome of a deletion that its database holds up. Until patience has passed it waits; then it says that a
// person has to act, and goes on trying. Only the annotation lets the resource go without its database.
func Blocked(err error, since, now time.Time, patience time.Duration) error {
	if IsAgain(err) {
		return err
	}
	f := &failure{class: classWait, reason: v1alpha1.ReasonDeletionBlocked, after: deletionRetry}
	if now.Sub(since) >= patience {
		f.class = classStall
	}
	f.err = fmt.Errorf("%w. The deletion goes on when the database answers. To let the resource go and leave everything in the database, "+
		"annotate it: "+v1alpha1.AnnotationAbandon+"=true", err)
	return f
}
