package phase

import (
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
)

// Changed passes updates of one of our kinds that change its generation, or the status or generation of one of the named
// conditions: what those who refer to it have to know. Figures in its status wake nobody.
func Changed(conditions ...string) predicate.Predicate {
	return predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
		before, ok := e.ObjectOld.(Object)
		after, ok2 := e.ObjectNew.(Object)
		if !ok || !ok2 || before.GetGeneration() != after.GetGeneration() {
			return true
		}
		for _, kind := range conditions {
			if verdict(before, kind) != verdict(after, kind) {
				return true
			}
		}
		return false
	}}
}

type verdictOf struct {
	status     metav1.ConditionStatus
	generation int64
}

func verdict(o Object, kind string) verdictOf {
	c := meta.FindStatusCondition(o.GetConditions(), kind)
	if c == nil {
		return verdictOf{}
	}
	return verdictOf{c.Status, c.ObservedGeneration}
}
