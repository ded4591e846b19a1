package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ChangePolicy says whether a change of the database waits for a person.
//
// +kubebuilder:validation:Enum=Apply;Plan
type ChangePolicy string

// Change policies.
const (
	// ChangeApply changes the database as soon as spec asks for it.
	ChangeApply ChangePolicy = "Apply"
	// ChangePlan shows in status what would be done, and does it once the annotation millrace.dev/approve-plan approves exactly that.
	ChangePlan ChangePolicy = "Plan"
)

// PlannedChange is what a change will do to the database. It is computed against the database as it is, and again before it is carried out.
type PlannedChange struct {
	// hash names this plan: spec, the database's settings and structure, and every statement. A plan that is another one by now has
	// another hash. How much would be removed, which moves with the traffic, is not part of it; whether something would be, is.
	Hash string `json:"hash"`

	// steps in words, the first 20 of them.
	//
	// +kubebuilder:validation:MaxItems=20
	// +listType=atomic
	// +optional
	Steps []string `json:"steps,omitempty"`

	// destroys is what cannot be brought back: messages that a lower limit lets go, for example. Empty when nothing is lost.
	//
	// +kubebuilder:validation:MaxItems=20
	// +listType=atomic
	// +optional
	Destroys []string `json:"destroys,omitempty"`

	// statements that would be run, the first 20 of them, each cut after 1000 characters.
	//
	// +kubebuilder:validation:MaxItems=20
	// +listType=atomic
	// +optional
	Statements []string `json:"statements,omitempty"`

	// omitted is the number of steps that are not shown.
	//
	// +optional
	Omitted int32 `json:"omitted,omitempty"`
}

// inDatabase reads from conditions whether an object of this name is in the database and can be worked with.
func inDatabase(conditions []metav1.Condition, name string) bool {
	c := meta.FindStatusCondition(conditions, ConditionSchemaApplied)
	switch {
	case c == nil:
		return false
	case c.Status == metav1.ConditionTrue:
		return true
	}
	return name != "" && (c.Reason == ReasonApprovalPending || c.Reason == ReasonApprovalOutdated)
}
