package phase

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// statuses shows conditions as type=status/reason, in order.
func statuses(conditions []metav1.Condition) string {
	var list []string
	for _, c := range conditions {
		list = append(list, c.Type+"="+string(c.Status)+"/"+c.Reason)
	}
	return strings.Join(list, " ")
}

func TestSummarizeSpeaksAsKstatusReads(t *testing.T) {
	boom := errors.New("boom")
	for _, c := range []struct {
		name    string
		outcome error
		want    string
	}{
		{"done is Ready and nothing else", nil, "Ready=True/Ready"},
		{"a stall is not Ready and Stalled", Stall("Conflict", boom), "Ready=False/Conflict Stalled=True/Conflict"},
		{"waiting is not Ready and Reconciling", Wait("SecretMissing", 0, boom), "Ready=False/SecretMissing Reconciling=True/SecretMissing"},
		{"an error without a class is tried again", boom, "Ready=False/Failed Reconciling=True/Failed"},
		{"a class survives wrapping", errors.Join(errors.New("outer"), Stall("Conflict", boom)), "Ready=False/Conflict Stalled=True/Conflict"},
	} {
		for _, before := range []error{nil, Stall("Other", boom), Wait("Other", 0, boom)} {
			t.Run(c.name, func(t *testing.T) {
				var conditions []metav1.Condition
				Summarize(&conditions, 1, before, Ready{})
				Summarize(&conditions, 2, c.outcome, Ready{})
				Sort(conditions)
				if got := statuses(conditions); got != c.want {
					t.Errorf("%s, not %s", got, c.want)
				}
				for _, x := range conditions {
					if x.ObservedGeneration != 2 {
						t.Errorf("%s speaks of generation %d", x.Type, x.ObservedGeneration)
					}
				}
			})
		}
	}
}

func TestRequeueObeysTheError(t *testing.T) {
	boom := errors.New("boom")
	const verify = time.Hour
	for _, c := range []struct {
		name      string
		outcome   error
		after     time.Duration
		transient bool
	}{
		{"done: at the next verification", nil, verify, false},
		{"stalled: at the next verification, for what a person repairs in the database", Stall("X", boom), verify, false},
		{"waiting for a watch: at the next verification", Wait("X", 0, boom), verify, false},
		{"waiting with a time: then", Wait("X", time.Second, boom), time.Second, false},
		{"again: then", Again(time.Second, boom), time.Second, false},
		{"anything else: by the work queue's backoff", boom, 0, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if after, transient := Requeue(c.outcome, verify); after != c.after || transient != c.transient {
				t.Errorf("%s, %t", after, transient)
			}
		})
	}
}

func TestSchemaKeepsWhatItCouldNotSee(t *testing.T) {
	boom := Wait("DatabaseUnreachable", 0, errors.New("boom"))
	for _, c := range []struct {
		name          string
		before, after SchemaFacts
		want          string
	}{
		{"applied", SchemaFacts{}, SchemaFacts{Planned: true, Applied: true}, "SchemaApplied=True/Applied Drifted=False/InSync"},
		{"repaired", SchemaFacts{}, SchemaFacts{Planned: true, Applied: true, Drift: true}, "SchemaApplied=True/Applied Drifted=False/Repaired"},
		{"a repair stays visible", SchemaFacts{Planned: true, Applied: true, Drift: true}, SchemaFacts{Planned: true, Applied: true}, "SchemaApplied=True/Applied Drifted=False/Repaired"},
		{"a repair that failed", SchemaFacts{Planned: true, Applied: true}, SchemaFacts{Planned: true, Drift: true, Outcome: boom}, "SchemaApplied=False/DatabaseUnreachable Drifted=True/DriftFound"},
		{"unreachable changes nothing", SchemaFacts{Planned: true, Applied: true}, SchemaFacts{Outcome: boom}, "SchemaApplied=True/Applied Drifted=False/InSync"},
		{"unreachable from the start is unknown", SchemaFacts{}, SchemaFacts{Outcome: boom}, "SchemaApplied=Unknown/DatabaseUnreachable"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var conditions []metav1.Condition
			Schema(&conditions, 1, c.before)
			Schema(&conditions, 1, c.after)
			Sort(conditions)
			if got := statuses(conditions); got != c.want {
				t.Errorf("%s, not %s", got, c.want)
			}
		})
	}
}

func TestSuspendedKeepsWhatWasKnown(t *testing.T) {
	var conditions []metav1.Condition
	Summarize(&conditions, 1, nil, Ready{})
	Suspended(&conditions, 2)
	if !meta.IsStatusConditionTrue(conditions, v1alpha1.ConditionReady) || !meta.IsStatusConditionTrue(conditions, v1alpha1.ConditionPaused) {
		t.Error(statuses(conditions))
	}
	conditions = nil
	Suspended(&conditions, 1)
	if c := meta.FindStatusCondition(conditions, v1alpha1.ConditionReady); c == nil || c.Status != metav1.ConditionUnknown {
		t.Error(statuses(conditions))
	}
}

func TestBlockedDeletionWaitsAndThenStalls(t *testing.T) {
	boom := errors.New("boom")
	start := time.Now()
	if err := Blocked(boom, start, start.Add(time.Second), time.Minute); IsStalled(err) || Reason(err, "") != v1alpha1.ReasonDeletionBlocked {
		t.Errorf("within patience: %v", err)
	}
	if err := Blocked(boom, start, start.Add(time.Minute), time.Minute); !IsStalled(err) || !strings.Contains(err.Error(), v1alpha1.AnnotationAbandon) {
		t.Errorf("after it: %v", err)
	}
	if err := Blocked(Again(time.Second, boom), start, start.Add(time.Hour), time.Minute); !IsAgain(err) {
		t.Errorf("waiting for a turn is no verdict: %v", err)
	}
}

func TestLongMessagesAreCut(t *testing.T) {
	var conditions []metav1.Condition
	Set(&conditions, 1, "Ready", metav1.ConditionTrue, "R", strings.Repeat("ä", messageMax))
	if m := conditions[0].Message; len(m) > messageMax+len("…") || strings.ContainsRune(m, '\uFFFD') {
		t.Errorf("%d bytes", len(m))
	}
}

func TestRunStopsAtTheFirstError(t *testing.T) {
	boom := errors.New("boom")
	var ran []int
	step := func(n int, err error) Func[int] {
		return func(context.Context, int) error { ran = append(ran, n); return err }
	}
	if err := Run(t.Context(), 0, []Func[int]{step(1, nil), step(2, boom), step(3, nil)}); !errors.Is(err, boom) || len(ran) != 2 {
		t.Errorf("%v, ran %v", err, ran)
	}
}
