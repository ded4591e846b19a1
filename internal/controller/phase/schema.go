package phase

import (
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// SchemaFacts are what a reconcile found out about the database.
type SchemaFacts struct {
	Planned bool     // spec and database were compared
	Applied bool     // the database is as spec says
	Drift   bool     // what differed had been right before
	Steps   []string // what differed, for a person
	Outcome error
}

// Schema derives SchemaApplied and Drifted. When the database was not reached they stay as they are: not knowing is no
// reason to believe that it has changed.
func Schema(conditions *[]metav1.Condition, generation int64, f SchemaFacts) {
	set := func(kind string, status metav1.ConditionStatus, reason, message string) {
		Set(conditions, generation, kind, status, reason, message)
	}
	steps := strings.Join(f.Steps, "; ")
	switch {
	case f.Applied:
		set(v1alpha1.ConditionSchemaApplied, metav1.ConditionTrue, v1alpha1.ReasonApplied, "")
		switch {
		case f.Drift:
			set(v1alpha1.ConditionDrifted, metav1.ConditionFalse, v1alpha1.ReasonRepaired, "repaired: "+steps)
		case !meta.IsStatusConditionFalse(*conditions, v1alpha1.ConditionDrifted):
			set(v1alpha1.ConditionDrifted, metav1.ConditionFalse, v1alpha1.ReasonInSync, "")
		}
	case f.Planned && f.Outcome != nil:
		// Ready and Stalled have the message; a third copy would only make describe longer.
		set(v1alpha1.ConditionSchemaApplied, metav1.ConditionFalse, Reason(f.Outcome, v1alpha1.ReasonFailed), "")
		if f.Drift {
			set(v1alpha1.ConditionDrifted, metav1.ConditionTrue, v1alpha1.ReasonDriftFound, "to repair: "+steps)
		}
	case f.Outcome != nil && meta.FindStatusCondition(*conditions, v1alpha1.ConditionSchemaApplied) == nil:
		set(v1alpha1.ConditionSchemaApplied, metav1.ConditionUnknown, Reason(f.Outcome, v1alpha1.ReasonFailed), "")
	}
}

// Suspended says that spec asks for no work. Ready stays what it was; a resource that never was anything is unknown.
func Suspended(conditions *[]metav1.Condition, generation int64) {
	const message = "spec.suspend is true: nothing is looked at or changed"
	Set(conditions, generation, v1alpha1.ConditionPaused, metav1.ConditionTrue, v1alpha1.ReasonSuspended, message)
	meta.RemoveStatusCondition(conditions, v1alpha1.ConditionReconciling)
	if meta.FindStatusCondition(*conditions, v1alpha1.ConditionReady) == nil {
		Set(conditions, generation, v1alpha1.ConditionReady, metav1.ConditionUnknown, v1alpha1.ReasonSuspended, message)
	}
}
