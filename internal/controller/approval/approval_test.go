package approval

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

func plan() Plan {
	return Plan{
		Database: `database "app" at db:5432`, Spec: pgstream.StreamSpec{Name: "orders", Partitions: 8}, Live: pgstream.StreamSpec{Name: "orders", Partitions: 4},
		Steps:  []pgstream.Step{{Summary: "change partitions from 4 to 8", SQL: "select 1"}},
		Losses: []pgstream.Loss{{Kind: pgstream.LossMessages, Summary: "up to 5 messages"}}, Previous: "0a",
	}
}

func hash(t *testing.T, p Plan) string {
	t.Helper()
	h, err := p.Hash()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// A1, A2: everything but how much is destroyed makes it another plan.
func TestHashCoversWhatAPlanDependsOn(t *testing.T) {
	same := plan()
	same.Losses[0].Summary = "up to 7000 messages"
	if hash(t, same) != hash(t, plan()) {
		t.Error("on a busy stream no plan could be approved")
	}
	for name, change := range map[string]func(*Plan){
		"another database":     func(p *Plan) { p.Database = `database "app" at other:5432` },
		"another spec":         func(p *Plan) { p.Spec = pgstream.StreamSpec{Name: "orders", Partitions: 9} },
		"another state":        func(p *Plan) { p.Live = nil },
		"another statement":    func(p *Plan) { p.Steps[0].SQL = "select 2" },
		"a step more":          func(p *Plan) { p.Steps = append(p.Steps, pgstream.Step{Summary: "index"}) },
		"nothing is destroyed": func(p *Plan) { p.Losses = nil },
		"used before":          func(p *Plan) { p.Previous = "0b" },
	} {
		p := plan()
		change(&p)
		if hash(t, p) == hash(t, plan()) {
			t.Errorf("%s has the same hash", name)
		}
	}
}

// Status has room for 1.5 MiB with everything else in it, and a person for less.
func TestShowIsBounded(t *testing.T) {
	p := plan()
	for i := range 500 {
		p.Steps = append(p.Steps, pgstream.Step{Summary: strings.Repeat("ä", 5000), SQL: fmt.Sprint(i) + strings.Repeat("\nselect 1;", 5000)})
		p.Losses = append(p.Losses, pgstream.Loss{Summary: strings.Repeat("x", 5000)})
	}
	shown := p.Show("0c")
	text, err := json.Marshal(shown)
	if err != nil {
		t.Fatal(err)
	}
	if len(text) > 40<<10 || shown.Omitted != 481 || len(shown.Steps) != maxItems || len(shown.Statements) != maxItems || len(shown.Destroys) != maxItems {
		t.Errorf("%d bytes, %d steps, %d left out", len(text), len(shown.Steps), shown.Omitted)
	}
	o := &v1alpha1.Stream{ObjectMeta: metav1.ObjectMeta{Namespace: strings.Repeat("n", 63), Name: strings.Repeat("s", 63)}}
	if err := Decide(o, "stream", shown, ""); len(err.Error()) > 1024 || !strings.HasSuffix(err.Error(), "=0c --overwrite") {
		t.Errorf("an event has no room for the command: %d bytes, %s", len(err.Error()), err)
	}
}

func TestDecide(t *testing.T) {
	shown := plan().Show("0c")
	for _, c := range []struct{ name, annotation, reason string }{
		{"nobody has said anything", "", v1alpha1.ReasonApprovalPending},
		{"approved", "0c", ""},
		{"another was approved", "0d", v1alpha1.ReasonApprovalOutdated},
		{"the one before was approved, and carried out", "0a", v1alpha1.ReasonApprovalPending},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := &v1alpha1.Stream{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "orders", Annotations: map[string]string{v1alpha1.AnnotationApprovePlan: c.annotation}}}
			err := Decide(o, "stream", shown, "0a")
			if (err == nil) != (c.reason == "") || phase.Reason(err, "") != c.reason || phase.IsStalled(err) {
				t.Errorf("%v", err)
			}
		})
	}
}
