package processor

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

var midday = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func autoscaling(least, most int32, options ...func(*v1alpha1.Autoscaling)) *v1alpha1.Autoscaling {
	a := &v1alpha1.Autoscaling{MinReplicas: &least, MaxReplicas: most,
		StabilizationWindow: &metav1.Duration{Duration: time.Minute}, Cooldown: &metav1.Duration{Duration: 2 * time.Minute}}
	for _, o := range options {
		o(a)
	}
	return a
}

func backlog(n int64) func(*v1alpha1.Autoscaling) {
	return func(a *v1alpha1.Autoscaling) { a.BacklogPerReplica = &n }
}

func rate(n int64) func(*v1alpha1.Autoscaling) {
	return func(a *v1alpha1.Autoscaling) { a.RatePerReplica = &n }
}

func maxAge(d time.Duration) func(*v1alpha1.Autoscaling) {
	return func(a *v1alpha1.Autoscaling) { a.MaxAge = &metav1.Duration{Duration: d} }
}

// steady is a history in which that many pods have been enough for long.
func steady(n int32) history {
	return history{recommendations: []recommendation{{n, midday.Add(-time.Hour)}}, scaled: midday.Add(-time.Hour)}
}

// one decision each, from a state that has lasted.
func TestDecide(t *testing.T) {
	partitions := limit{replicas: 4, reason: v1alpha1.ReasonPartitions}
	connections := func(n int32) limit { return limit{replicas: n, reason: v1alpha1.ReasonConnections, soft: true} }
	thousand := autoscaling(1, 10, backlog(1000))
	toZero := autoscaling(0, 10, backlog(1000))
	young := autoscaling(1, 10, maxAge(10*time.Second))
	for _, c := range []struct {
		name    string
		spec    *v1alpha1.Autoscaling
		reading reading
		pods    workload
		limits  []limit
		history *history
		want    int32
		reason  string
		limited string
		after   time.Duration
	}{
		{name: "nothing waits", spec: thousand, pods: workload{replicas: 1}, want: 1, reason: v1alpha1.ReasonIdle},
		{name: "a backlog asks for pods", spec: thousand, reading: reading{lag: 3200}, pods: workload{replicas: 1}, want: 4, reason: v1alpha1.ReasonBacklog},
		{name: "what is in flight counts", spec: thousand, reading: reading{lag: 1200, inFlight: 2000}, pods: workload{replicas: 1}, want: 4, reason: v1alpha1.ReasonBacklog},
		{name: "retries wait for their time and ask for nothing more", spec: thousand, reading: reading{retrying: 5000}, pods: workload{replicas: 1}, want: 1, reason: v1alpha1.ReasonIdle},
		{name: "within the tolerance above", spec: thousand, reading: reading{lag: 4400}, pods: workload{replicas: 4}, want: 4, reason: v1alpha1.ReasonBacklog},
		{name: "beyond the tolerance above", spec: thousand, reading: reading{lag: 4401}, pods: workload{replicas: 4}, want: 5, reason: v1alpha1.ReasonBacklog},
		{name: "within the tolerance below", spec: thousand, reading: reading{lag: 9000}, pods: workload{replicas: 10}, want: 10, reason: v1alpha1.ReasonBacklog},
		{name: "maxReplicas", spec: thousand, reading: reading{lag: 1e9}, pods: workload{replicas: 2}, want: 10, reason: v1alpha1.ReasonBacklog, limited: v1alpha1.ReasonMaxReplicas},
		{name: "a backlog beyond all numbers", spec: autoscaling(1, 10, backlog(1)), reading: reading{lag: 1 << 62}, pods: workload{replicas: 2}, want: 10, reason: v1alpha1.ReasonBacklog, limited: v1alpha1.ReasonMaxReplicas},
		{name: "minReplicas raised", spec: autoscaling(3, 10, backlog(1000)), pods: workload{replicas: 1}, want: 3, reason: v1alpha1.ReasonIdle},
		{name: "maxReplicas lowered", spec: thousand, reading: reading{lag: 1e6}, pods: workload{replicas: 50}, want: 10, reason: v1alpha1.ReasonBacklog, limited: v1alpha1.ReasonMaxReplicas},

		{name: "partitions", spec: thousand, reading: reading{lag: 8000}, pods: workload{replicas: 1}, limits: []limit{partitions}, want: 4, reason: v1alpha1.ReasonBacklog, limited: v1alpha1.ReasonPartitions},
		{name: "minReplicas is obeyed above the partitions", spec: autoscaling(6, 10, backlog(1000)), reading: reading{lag: 8000}, pods: workload{replicas: 1}, limits: []limit{partitions}, want: 6, reason: v1alpha1.ReasonBacklog, limited: v1alpha1.ReasonPartitions},
		{name: "connections", spec: thousand, reading: reading{lag: 8000}, pods: workload{replicas: 1}, limits: []limit{connections(3)}, want: 3, reason: v1alpha1.ReasonBacklog, limited: v1alpha1.ReasonConnections},
		{name: "no connections take no pod away", spec: thousand, reading: reading{lag: 8000}, pods: workload{replicas: 5}, limits: []limit{connections(3)}, want: 5, reason: v1alpha1.ReasonBacklog, limited: v1alpha1.ReasonConnections},
		{name: "without any connection one pod comes back from zero", spec: toZero, reading: reading{lag: 8000}, limits: []limit{connections(0)}, want: 1, reason: v1alpha1.ReasonBacklog, limited: v1alpha1.ReasonConnections},
		{name: "the lowest limit counts", spec: thousand, reading: reading{lag: 8000}, pods: workload{replicas: 1}, limits: []limit{partitions, connections(2)}, want: 2, reason: v1alpha1.ReasonBacklog, limited: v1alpha1.ReasonConnections},

		{name: "unknown", spec: thousand, reading: reading{unknown: "gone", lag: 1e6}, pods: workload{replicas: 3}, want: 3, reason: v1alpha1.ReasonLagUnknown},
		{name: "unknown at zero", spec: toZero, reading: reading{unknown: "gone", lag: 1e6}, want: 0, reason: v1alpha1.ReasonLagUnknown},
		{name: "unknown and above a lowered maximum", spec: thousand, reading: reading{unknown: "gone"}, pods: workload{replicas: 30}, want: 10, reason: v1alpha1.ReasonLagUnknown},
		{name: "rolling", spec: thousand, reading: reading{lag: 1e6}, pods: workload{replicas: 3, rolling: true}, want: 3, reason: v1alpha1.ReasonHeldByRollout},
		{name: "starting keeps from more", spec: thousand, reading: reading{lag: 8000}, pods: workload{replicas: 3, starting: true}, want: 3, reason: v1alpha1.ReasonHeldByRollout},
		{name: "starting does not keep from fewer", spec: thousand, reading: reading{lag: 1000}, pods: workload{replicas: 3, starting: true}, want: 1, reason: v1alpha1.ReasonBacklog, history: ptr.To(steady(1))},
		{name: "paused", spec: thousand, reading: reading{lag: 1e6, paused: true}, pods: workload{replicas: 3}, want: 3, reason: v1alpha1.ReasonGroupPaused},

		{name: "down waits for the window", spec: thousand, reading: reading{lag: 900}, pods: workload{replicas: 5}, want: 5, reason: v1alpha1.ReasonStabilizing, after: time.Minute},
		{name: "a beginning waits for the window", spec: thousand, reading: reading{lag: 900}, pods: workload{replicas: 5}, history: &history{}, want: 5, reason: v1alpha1.ReasonStabilizing, after: time.Minute},
		{name: "down to what was enough for the whole window", spec: thousand, reading: reading{lag: 900}, pods: workload{replicas: 5}, want: 3, reason: v1alpha1.ReasonStabilizing, after: 30 * time.Second,
			history: &history{recommendations: []recommendation{{5, midday.Add(-70 * time.Second)}, {3, midday.Add(-30 * time.Second)}, {1, midday.Add(-20 * time.Second)}}}},
		{name: "no window", spec: autoscaling(1, 10, backlog(1000), func(a *v1alpha1.Autoscaling) { a.StabilizationWindow.Duration = 0 }), reading: reading{lag: 900}, pods: workload{replicas: 5}, want: 1, reason: v1alpha1.ReasonBacklog},

		{name: "the last pod stays for the cooldown", spec: toZero, reading: reading{idle: 90 * time.Second}, pods: workload{replicas: 1}, want: 1, reason: v1alpha1.ReasonIdle, after: 30 * time.Second},
		{name: "the last pod goes", spec: toZero, reading: reading{idle: 2 * time.Minute}, pods: workload{replicas: 1}, want: 0, reason: v1alpha1.ReasonIdle},
		{name: "all pods go when nothing waited for the cooldown", spec: toZero, reading: reading{idle: 2 * time.Minute}, pods: workload{replicas: 5}, want: 0, reason: v1alpha1.ReasonIdle},
		{name: "a retry keeps the last pod", spec: toZero, reading: reading{idle: time.Hour, retrying: 1}, pods: workload{replicas: 1}, want: 1, reason: v1alpha1.ReasonIdle},
		{name: "at zero nothing is due", spec: toZero, reading: reading{idle: time.Second}, want: 0, reason: v1alpha1.ReasonIdle},
		{name: "the first message brings a pod", spec: toZero, reading: reading{lag: 1}, want: 1, reason: v1alpha1.ReasonBacklog},
		{name: "and many bring many", spec: toZero, reading: reading{lag: 6500}, want: 7, reason: v1alpha1.ReasonBacklog},
		{name: "a retry that is due brings one", spec: toZero, reading: reading{retrying: 1}, want: 1, reason: v1alpha1.ReasonIdle},

		{name: "young", spec: young, reading: reading{lag: 5, age: time.Second}, pods: workload{replicas: 1}, want: 1, reason: v1alpha1.ReasonAge, after: 10*time.Second + time.Millisecond},
		{name: "old", spec: young, reading: reading{lag: 5, age: 15 * time.Second}, pods: workload{replicas: 4}, want: 6, reason: v1alpha1.ReasonAge},
		{name: "very old doubles", spec: young, reading: reading{lag: 5, age: time.Hour}, pods: workload{replicas: 2}, want: 4, reason: v1alpha1.ReasonAge},
		{name: "not twice within the target", spec: young, reading: reading{lag: 5, age: time.Hour}, pods: workload{replicas: 2}, history: &history{scaled: midday.Add(-4 * time.Second)}, want: 2, reason: v1alpha1.ReasonAge, after: 6 * time.Second},
		{name: "age of what is in flight is not helped by pods", spec: young, reading: reading{inFlight: 5, age: time.Hour}, pods: workload{replicas: 2}, want: 2, reason: v1alpha1.ReasonStabilizing, after: time.Minute},
		{name: "age gives half back", spec: young, reading: reading{lag: 5, age: time.Millisecond}, pods: workload{replicas: 7}, history: ptr.To(steady(2)), want: 4, reason: v1alpha1.ReasonAge, after: 11 * time.Second},
		{name: "and the rest when all has been claimed for long", spec: young, reading: reading{idle: time.Minute}, pods: workload{replicas: 7}, history: ptr.To(steady(1)), want: 1, reason: v1alpha1.ReasonIdle},
		{name: "old at zero", spec: autoscaling(0, 10, maxAge(10*time.Second)), reading: reading{lag: 5, age: time.Hour}, want: 1, reason: v1alpha1.ReasonAge},

		{name: "rate", spec: autoscaling(1, 10, rate(100)), reading: reading{lag: 1, rate: 450}, pods: workload{replicas: 1}, want: 5, reason: v1alpha1.ReasonRate},
		{name: "rate without a backlog", spec: autoscaling(1, 10, rate(100)), reading: reading{rate: 450}, pods: workload{replicas: 1}, want: 5, reason: v1alpha1.ReasonRate},
		{name: "rate of what the group does not want", spec: autoscaling(0, 10, rate(100)), reading: reading{rate: 450, idle: time.Hour}, pods: workload{replicas: 3}, want: 0, reason: v1alpha1.ReasonIdle},
		{name: "the target that asks for most counts", spec: autoscaling(1, 10, rate(100), backlog(10)), reading: reading{lag: 80, rate: 450}, pods: workload{replicas: 1}, want: 8, reason: v1alpha1.ReasonBacklog},
	} {
		h := steady(c.pods.replicas)
		if c.history != nil {
			h = *c.history
		}
		d := decide(midday, c.spec, c.reading, c.pods, c.limits, h)
		limited := ""
		if d.limited != nil {
			limited = d.limited.reason
		}
		if d.replicas != c.want || d.reason != c.reason || limited != c.limited || d.message == "" {
			t.Errorf("%s: %d pods by %s (%s), limited by %q; want %d by %s, limited by %q", c.name, d.replicas, d.reason, d.message, limited, c.want, c.reason, c.limited)
		}
		if d.after != c.after {
			t.Errorf("%s: again after %s, want %s", c.name, d.after, c.after)
		}
		if d.active == (c.reason == v1alpha1.ReasonLagUnknown) {
			t.Errorf("%s: active is %t", c.name, d.active)
		}
		if moved := d.history.scaled.Equal(midday); moved != (d.replicas != c.pods.replicas) {
			t.Errorf("%s: the time of the last change moved: %t", c.name, moved)
		}
	}
}

// What decide promises, for whatever it is asked, one decision after the other as they happen.
func TestDecideKeepsItsPromises(t *testing.T) {
	for seed := range uint64(2000) {
		random := rand.New(rand.NewPCG(seed, 1))
		least := random.Int32N(4)
		spec := autoscaling(least, least+1+random.Int32N(20))
		for spec.BacklogPerReplica == nil && spec.MaxAge == nil && spec.RatePerReplica == nil {
			for _, o := range []func(*v1alpha1.Autoscaling){backlog(1 + random.Int64N(1000)), rate(1 + random.Int64N(100)), maxAge(time.Second + time.Duration(random.Int64N(int64(time.Minute))))} {
				if random.IntN(2) == 0 {
					o(spec)
				}
			}
		}
		var h history
		now, replicas := midday, random.Int32N(30)
		var enough []recommendation // what a person would write down: until when how many were asked for
		for range 100 {
			step := time.Duration(random.Int64N(int64(20 * time.Second)))
			now = now.Add(step)
			r := reading{lag: random.Int64N(4000) * random.Int64N(2), inFlight: random.Int64N(100) * random.Int64N(2), age: time.Duration(random.Int64N(int64(2 * time.Minute))), rate: float64(random.IntN(500))}
			if !r.waiting() {
				r.age, r.idle = 0, time.Duration(random.Int64N(int64(4*time.Minute)))
			}
			if random.IntN(8) == 0 {
				r.unknown = "lost"
			}
			w := workload{replicas: replicas, rolling: random.IntN(8) == 0, starting: random.IntN(4) == 0}
			limits := []limit{{replicas: random.Int32N(20), reason: "x", soft: true}, {replicas: 1 + random.Int32N(20), reason: "y"}}
			d := decide(now, spec, r, w, limits, h)
			if again := decide(now, spec, r, w, limits, h); again.replicas != d.replicas || again.message != d.message || !slices.Equal(again.history.recommendations, d.history.recommendations) {
				t.Fatalf("seed %d: the same question has two answers: %+v and %+v", seed, d, again)
			}
			from := min(max(replicas, least), spec.MaxReplicas)
			held := r.unknown != "" || w.rolling
			lowest := spec.MaxReplicas
			for _, l := range limits {
				lowest = min(lowest, max(l.replicas, 1))
			}
			top := max(lowest, from)
			switch {
			case d.replicas < least || d.replicas > spec.MaxReplicas:
				t.Fatalf("seed %d: %d is not within %d and %d", seed, d.replicas, least, spec.MaxReplicas)
			case held && d.replicas != from:
				t.Fatalf("seed %d: held, and from %d to %d", seed, from, d.replicas)
			case d.replicas == 0 && r.waiting() && !held:
				t.Fatalf("seed %d: zero pods for %+v", seed, r)
			case d.replicas == 0 && from > 0 && r.idle < cooldown(spec):
				t.Fatalf("seed %d: zero pods after %s", seed, r.idle)
			case d.replicas > from && from > 0 && w.starting:
				t.Fatalf("seed %d: from %d to %d while pods start", seed, from, d.replicas)
			case d.replicas > max(top, least):
				t.Fatalf("seed %d: %d pods with limits %+v", seed, d.replicas, limits)
			case d.after < 0:
				t.Fatalf("seed %d: again in the past, %s", seed, d.after)
			}
			if d.replicas < from && d.replicas > 0 {
				for _, e := range enough {
					if e.replicas > d.replicas && e.until.After(now.Add(-window(spec))) {
						t.Fatalf("seed %d: down to %d, and %d were needed %s ago", seed, d.replicas, e.replicas, now.Sub(e.until))
					}
				}
			}
			if len(d.history.recommendations) > int(spec.MaxReplicas)+1 {
				t.Fatalf("seed %d: the history has %d entries", seed, len(d.history.recommendations))
			}
			last := d.history.recommendations[len(d.history.recommendations)-1]
			if len(enough) > 0 {
				enough[len(enough)-1].until = now
			}
			enough = append(enough, recommendation{last.replicas, now})
			h, replicas = d.history, d.replicas
		}
	}
}

// Figures that do not change lead to a number of pods that does not change: nothing swings.
func TestDecideComesToRest(t *testing.T) {
	for seed := range uint64(500) {
		random := rand.New(rand.NewPCG(seed, 2))
		spec := autoscaling(random.Int32N(2), 2+random.Int32N(30), backlog(1+random.Int64N(1000)), rate(1+random.Int64N(100)))
		r := reading{lag: random.Int64N(5000), inFlight: random.Int64N(100), rate: float64(random.IntN(1000)), idle: time.Hour}
		now, replicas, h := midday, random.Int32N(40), history{}
		for range 50 {
			d := decide(now, spec, r, workload{replicas: replicas}, nil, h)
			if d.after > 0 {
				now = now.Add(d.after)
			} else {
				now = now.Add(time.Second)
			}
			h, replicas = d.history, d.replicas
		}
		end := decide(now, spec, r, workload{replicas: replicas}, nil, h)
		if end.replicas != replicas || end.after != 0 {
			t.Fatalf("seed %d: after 50 decisions still %d to %d, again after %s", seed, replicas, end.replicas, end.after)
		}
	}
}

// A load that rises and falls, with pods that work as fast as they can: the backlog is worked off, and the pods go.
func TestDecideFollowsALoad(t *testing.T) {
	const perPod = 50.0 // messages a second
	for _, spec := range []*v1alpha1.Autoscaling{
		autoscaling(0, 20, backlog(500)), autoscaling(0, 20, maxAge(10*time.Second)), autoscaling(0, 20, rate(40)), autoscaling(0, 20, backlog(500), maxAge(10*time.Second), rate(40)),
	} {
		var h history
		var replicas, most, changes int32
		waiting, recent, idle := 0.0, 0.0, time.Duration(0)
		for second := range 3600 {
			load := 0.0
			if second > 60 && second < 1200 {
				load = 400
			}
			recent += (load - recent) / 30
			waiting = max(0, waiting+load-perPod*float64(replicas))
			r := reading{lag: int64(waiting), rate: recent, idle: idle}
			if idle += time.Second; waiting > 0 || load > 0 {
				idle, r.idle = 0, 0
			}
			if waiting > 0 {
				r.age = time.Duration(waiting / max(load, perPod) * float64(time.Second))
			}
			if second%10 != 0 {
				continue
			}
			d := decide(midday.Add(time.Duration(second)*time.Second), spec, r, workload{replicas: replicas}, nil, h)
			if d.replicas != replicas {
				changes++
			}
			h, replicas = d.history, d.replicas
			most = max(most, replicas)
		}
		t.Logf("%+v: at most %d pods, %d changes", spec, most, changes)
		if most < 8 || replicas != 0 || waiting > 0 || changes > 60 {
			t.Errorf("%+v: at most %d pods, %d at the end, %d changes, %.0f messages left", spec, most, replicas, changes, waiting)
		}
	}
}
