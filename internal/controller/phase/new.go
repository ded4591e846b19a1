package phase

import (
	"time"

	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// NewFor is how long a resource may have no status before those that refer to it say that they wait for it: as long as a thousand that are made at once may take.
const NewFor = time.Minute

// New says whether a resource was made a moment ago and nothing is known of it yet. When a thousand are made at once, those that refer to them would
// otherwise say each that they wait, and a moment later each that they do not.
func New(o Object, now time.Time) bool {
	return meta.FindStatusCondition(o.GetConditions(), v1alpha1.ConditionReady) == nil && now.Sub(o.GetCreationTimestamp().Time) < NewFor
}
