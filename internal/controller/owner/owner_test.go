package owner

import (
	"testing"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

func TestDecide(t *testing.T) {
	self := pgstream.Owner{Cluster: "c1", Namespace: "n", Name: "a", UID: "1"}
	other := pgstream.Owner{Cluster: "c1", Namespace: "n", Name: "b", UID: "2"}
	abroad := pgstream.Owner{Cluster: "c2", Namespace: "n", Name: "a", UID: "3"}
	for _, c := range []struct {
		name    string
		claim   Claim
		verdict Verdict
		reason  string
	}{
		{"its own", Claim{Present: self, Policy: v1alpha1.AdoptionNever}, Mine, ""},
		{"nobody's", Claim{Policy: v1alpha1.AdoptionIfUnowned}, Adopt, ""},
		{"nobody's, and adoption is off", Claim{Policy: v1alpha1.AdoptionNever}, 0, v1alpha1.ReasonAdoptionRefused},
		{"of a living resource", Claim{Present: other, Policy: v1alpha1.AdoptionIfUnowned, Alive: true}, 0, v1alpha1.ReasonConflict},
		{"of one that is gone", Claim{Present: other, Policy: v1alpha1.AdoptionIfUnowned}, Succeed, ""},
		{"of one that is gone, and adoption is off", Claim{Present: other, Policy: v1alpha1.AdoptionNever}, 0, v1alpha1.ReasonAdoptionRefused},
		{"of its namesake before it was made again", Claim{Present: pgstream.Owner{Cluster: "c1", Namespace: "n", Name: "a", UID: "0"}}, Succeed, ""},
		{"of another cluster, which nobody here can see", Claim{Present: abroad, Policy: v1alpha1.AdoptionIfUnowned}, 0, v1alpha1.ReasonConflict},
		{"of another cluster, given up by annotation", Claim{Present: abroad, AdoptFrom: "c2"}, Succeed, ""},
		{"of another cluster than the annotation names", Claim{Present: abroad, AdoptFrom: "c3"}, 0, v1alpha1.ReasonConflict},
		{"an annotation does not help against a living resource here", Claim{Present: other, AdoptFrom: "c1", Alive: true}, 0, v1alpha1.ReasonConflict},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.claim.Self = self
			verdict, err := Decide(c.claim)
			if c.reason == "" {
				if err != nil || verdict != c.verdict {
					t.Errorf("%d, %v", verdict, err)
				}
				return
			}
			if !phase.IsStalled(err) || phase.Reason(err, "") != c.reason {
				t.Errorf("%d, %v", verdict, err)
			}
		})
	}
}
