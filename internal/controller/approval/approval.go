package approval

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Bounds of what status shows. Plans of wide streams have hundreds of steps, and status is for a person.
const (
	maxItems     = 20
	maxText      = 300
	maxStatement = 1000
	maxMessage   = 300 // of each part of a condition's message, so that an event has room for all of it
)

// Plan is what would be done to a database.
type Plan struct {
	// Database is where.
	Database string
	// Spec is what is asked for and Live what is there, in the engine's terms; Live is nil when nothing is.
	Spec, Live any
	// Steps in the order in which they are made.
	Steps []pgstream.Step
	// Losses are what cannot be brought back.
	Losses []pgstream.Loss
	// Previous is the hash of the plan that was carried out before, if any (A2).
	Previous string
}

// Hash names the plan (A1).
func (p Plan) Hash() (string, error) {
	kinds := make([]string, 0, len(p.Losses))
	for _, l := range p.Losses {
		kinds = append(kinds, l.Kind)
	}
	text, err := json.Marshal([]any{p.Database, p.Spec, p.Live, p.Steps, kinds, p.Previous})
	if err != nil {
		return "", fmt.Errorf("name the plan: %w", err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:8]), nil
}

// Confirm makes sure that a plan, made again behind the lock of the change, is the one with the approved hash. Otherwise the error asks for another try.
func (p Plan) Confirm(approved string) error {
	hash, err := p.Hash()
	if err != nil {
		return err
	}
	if hash != approved {
		return phase.Again(time.Second, fmt.Errorf("plan %s became %s while it was carried out; nothing was changed", approved, hash))
	}
	return nil
}

// Show returns the plan for status, under its hash.
func (p Plan) Show(hash string) *v1alpha1.PlannedChange {
	shown := &v1alpha1.PlannedChange{Hash: hash}
	for i, s := range p.Steps {
		if i == maxItems {
			shown.Omitted = int32(len(p.Steps) - maxItems)
			break
		}
		shown.Steps = append(shown.Steps, short(s.Summary, maxText))
	}
	for i, l := range p.Losses {
		if i == maxItems {
			break
		}
		shown.Destroys = append(shown.Destroys, short(l.Summary, maxText))
	}
	last := ""
	for _, s := range p.Steps {
		if s.SQL == last { // one call makes several steps
			continue
		}
		if len(shown.Statements) == maxItems {
			break
		}
		last = s.SQL
		shown.Statements = append(shown.Statements, short(s.SQL, maxStatement))
	}
	return shown
}

// short makes one line of a text, and no more than limit bytes and a mark of it.
func short(text string, limit int) string {
	text = strings.Join(strings.Fields(text), " ")
	if len(text) > limit {
		text = strings.ToValidUTF8(text[:limit], "") + "…"
	}
	return text
}

// Decide says whether a plan of a resource may be carried out: nil when it may. kind is the resource's as kubectl takes it, previous the hash
// of the plan that was carried out last. The error waits, and is no stall: nothing is wrong, and what reacts to a stall by taking the change
// back would do so before anybody could approve it.
func Decide(o client.Object, kind string, shown *v1alpha1.PlannedChange, previous string) error {
	approved := o.GetAnnotations()[v1alpha1.AnnotationApprovePlan]
	if approved == shown.Hash {
		return nil
	}
	reason, text := v1alpha1.ReasonApprovalPending, "Plan "+shown.Hash+" waits for approval: "
	if approved != "" && approved != previous {
		reason = v1alpha1.ReasonApprovalOutdated
		text = fmt.Sprintf("Annotation %s approves %s, and now another plan, %s, waits for approval: ", v1alpha1.AnnotationApprovePlan, short(approved, 40), shown.Hash)
	}
	text += short(strings.Join(shown.Steps, "; "), maxMessage)
	if shown.Omitted > 0 {
		text += fmt.Sprintf("; and %d steps more", shown.Omitted)
	}
	if len(shown.Destroys) > 0 {
		text += ". It destroys " + short(strings.Join(shown.Destroys, "; "), maxMessage)
	}
	return phase.Waitf(reason, 0, "%s. See status.plan. To approve it: kubectl -n %s annotate %s %s %s=%s --overwrite",
		text, o.GetNamespace(), kind, o.GetName(), v1alpha1.AnnotationApprovePlan, shown.Hash)
}
