package processor

import (
	"fmt"
	"math"
	"slices"
	"time"

	"k8s.io/utils/ptr"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// tolerance is how far a figure may lie from its target, as a part of it, before the number of pods follows.
const tolerance = 0.1

// reading is what is known of the source at one moment.
type reading struct {
	unknown string // why the figures are not known; empty when they are
	paused  bool   // the group hands out nothing

	lag, inFlight, retrying int64
	age                     time.Duration // of the oldest message that is not processed; 0 when there is none
	rate                    float64       // messages published per second
	idle                    time.Duration // for how long nothing has been waiting, in flight or due for a retry
}

// waiting says whether there is a message that is not settled.
func (r reading) waiting() bool { return r.lag+r.inFlight+r.retrying > 0 }

// workload is what is known of the pods.
type workload struct {
	replicas int32 // that the Deployment asks for
	rolling  bool  // some pods do not have the newest template
	starting bool  // some pods are not available
}

// limit is an upper bound on the number of pods.
type limit struct {
	replicas int32
	reason   string // of ScalingLimited
	message  string
	// soft keeps pods from being added and takes none away.
	soft bool
}

// recommendation is a number of pods that was enough until a moment.
type recommendation struct {
	replicas int32
	until    time.Time
}

// history is what the autoscaler remembers of one Processor. The zero value is a beginning: it delays, and mistakes nothing.
type history struct {
	// recommendations within the stabilisation window, the oldest first, each lower than the one before it.
	recommendations []recommendation
	scaled          time.Time // when the number of pods changed last
}

// decision is what becomes of the number of pods, and why.
type decision struct {
	replicas int32
	active   bool   // of AutoscalingActive
	reason   string // of AutoscalingActive
	message  string
	limited  *limit // what keeps replicas below what is asked for
	// after is when another decision may come out although nothing else changes; 0 when there is no such time.
	after   time.Duration
	history history
}

// decide says how many pods there should be. It is pure. What it guarantees:
//
//   - replicas is within minReplicas and maxReplicas.
//   - It goes up at once, and only to what a target asks for within the limits.
//   - It goes down only to what has been enough for the whole stabilisation window, or to zero when nothing has been waiting
//     for the whole cooldown; to zero only with minReplicas 0 and never while something waits.
//   - While figures are unknown, pods roll or the group is paused it stays, and it does not go up while pods start.
func decide(now time.Time, spec *v1alpha1.Autoscaling, r reading, w workload, limits []limit, h history) decision {
	least, most := minReplicas(spec), spec.MaxReplicas
	current := min(max(w.replicas, least), most)
	d := decision{replicas: current, active: true}
	switch {
	case r.unknown != "":
		d.active, d.reason = false, v1alpha1.ReasonLagUnknown
		d.message = fmt.Sprintf("%s stay until the lag is known: %s", pods(current), r.unknown)
	case w.rolling:
		d.reason = v1alpha1.ReasonHeldByRollout
		d.message = fmt.Sprintf("%s stay until all of them have the newest configuration", pods(current))
	case r.paused:
		d.reason, d.message = v1alpha1.ReasonGroupPaused, fmt.Sprintf("%s stay, because the ConsumerGroup is paused", pods(current))
	default:
		d.choose(now, spec, r, w, limits, h)
		return d
	}
	d.history = h.remember(now, spec, current, current)
	if d.replicas != w.replicas {
		d.history.scaled = now
	}
	return d
}

// choose fills the decision when nothing holds it.
func (d *decision) choose(now time.Time, spec *v1alpha1.Autoscaling, r reading, w workload, limits []limit, h history) {
	least, current := minReplicas(spec), d.replicas
	var asked int32
	asked, d.reason, d.message, d.after = ask(now, spec, r, current, h)
	wanted := asked
	limits = append(slices.Clone(limits), limit{replicas: spec.MaxReplicas, reason: v1alpha1.ReasonMaxReplicas,
		message: fmt.Sprintf("maxReplicas is %d", spec.MaxReplicas)})
	for i, l := range limits {
		l.replicas = max(l.replicas, 1) // with one pod what waits is processed in the end
		if l.soft {
			l.replicas = max(l.replicas, current)
		}
		if l.replicas < wanted {
			wanted = l.replicas
			d.limited = &limits[i]
		}
	}
	wanted = max(wanted, least)
	d.history = h.remember(now, spec, current, wanted)

	switch {
	case wanted > current && current > 0 && w.starting:
		d.reason = v1alpha1.ReasonHeldByRollout
		d.message = fmt.Sprintf("%s stay until all of them are available, then there will be %d: %s", pods(current), wanted, d.message)
	case wanted > current:
		d.replicas = wanted
	case wanted == 0:
		d.replicas = 0
	case wanted < current:
		enough := d.history.recommendations[0]
		d.replicas = min(current, enough.replicas)
		if d.replicas > wanted {
			d.after = sooner(d.after, enough.until.Add(window(spec)).Sub(now))
			d.reason = v1alpha1.ReasonStabilizing
			d.message = fmt.Sprintf("fewer than %s have not been enough for %s yet: %s", pods(d.replicas), window(spec), d.message)
		}
	}
	if d.replicas != w.replicas {
		d.history.scaled = now
	}
}

// ask returns how many pods the targets ask for, regardless of limits, why, and when the answer may change although the figures do not.
func ask(now time.Time, spec *v1alpha1.Autoscaling, r reading, current int32, h history) (asked int32, reason, message string, again time.Duration) {
	reason, message = v1alpha1.ReasonIdle, "nothing waits"
	toZero := minReplicas(spec) == 0
	switch {
	case r.waiting():
		asked, message = 1, "something waits"
	case toZero && current == 0:
		return 0, reason, message, 0
	case toZero && r.idle >= cooldown(spec):
		return 0, reason, fmt.Sprintf("nothing has been waiting for %s", cooldown(spec)), 0
	case toZero:
		asked, message = 1, fmt.Sprintf("nothing waits; the last pod goes once that has lasted for %s", cooldown(spec))
		again = cooldown(spec) - r.idle
	}
	more := func(n int32, why, format string, args ...any) {
		if n > asked || n == asked && n > 0 && reason == v1alpha1.ReasonIdle && r.waiting() {
			asked, reason, message = n, why, fmt.Sprintf(format, args...)
		}
	}
	if t := spec.BacklogPerReplica; t != nil {
		backlog := r.lag + r.inFlight
		more(quotient(float64(backlog), float64(*t), current), v1alpha1.ReasonBacklog,
			"%d messages wait or are in flight, and a pod is enough for %d", backlog, *t)
	}
	if t := spec.RatePerReplica; t != nil {
		more(quotient(r.rate, float64(*t), current), v1alpha1.ReasonRate,
			"%.0f messages are published a second, and a pod is enough for %d", r.rate, *t)
	}
	switch t := spec.MaxAge; {
	case t != nil && r.lag > 0:
		n, next := byAge(now, t.Duration, r.age, current, h.scaled)
		again = sooner(again, next)
		more(n, v1alpha1.ReasonAge, "messages wait, and the oldest may be %s old", t.Duration)
	case t != nil && r.idle < window(spec) && current > 1:
		// All is claimed as it comes, and nobody knows with how few pods it still would be.
		again = sooner(again, window(spec)-r.idle)
		more((current+1)/2, v1alpha1.ReasonAge, "no message waits, and the oldest may be %s old", t.Duration)
	}
	return asked, reason, message, again
}

// quotient is how many pods a figure needs. Within the tolerance of what the current pods are enough for they stay.
func quotient(figure, perReplica float64, current int32) int32 {
	if current > 0 && math.Abs(figure-perReplica*float64(current)) <= tolerance*perReplica*float64(current) {
		return current
	}
	return int32(min(math.Ceil(figure/perReplica), math.MaxInt32))
}

// byAge is how many pods the age of the oldest message asks for, and when that may change although the figures do not. Age says how wrong
// the number of pods is only after what they do has shown, so it asks for twice as many at most, not again before another target has
// passed, and gives back half at most.
func byAge(now time.Time, target, age time.Duration, current int32, scaled time.Time) (asked int32, again time.Duration) {
	if current == 0 {
		return 1, 0
	}
	ratio := float64(age) / float64(target)
	n := math.Ceil(ratio * float64(current))
	switch {
	case ratio > 1+tolerance:
		if left := scaled.Add(target).Sub(now); left > 0 {
			return current, left
		}
		return int32(min(n, 2*float64(current))), 0
	default:
		again = time.Duration(float64(target)*(1+tolerance)) - age + time.Millisecond
		if ratio >= 1-tolerance {
			return current, again
		}
		return max(int32(n), (current+1)/2), again
	}
}

// remember returns the history with a recommendation of now. The one before it was in force until now; the first of all stands for the
// pods that were found.
func (h history) remember(now time.Time, spec *v1alpha1.Autoscaling, current, replicas int32) history {
	list := slices.Clone(h.recommendations)
	if len(list) == 0 {
		list = append(list, recommendation{replicas: current})
	}
	list[len(list)-1].until = now
	for len(list) > 0 && list[len(list)-1].replicas <= replicas {
		list = list[:len(list)-1]
	}
	list = append(list, recommendation{replicas, now})
	old := now.Add(-window(spec))
	for len(list) > 1 && !list[0].until.After(old) {
		list = list[1:]
	}
	h.recommendations = list
	return h
}

// sooner is the earlier of two times from now, of which 0 means never.
func sooner(a, b time.Duration) time.Duration {
	if a == 0 || b > 0 && b < a {
		return b
	}
	return a
}

// Defaults of spec.autoscaling, for resources that the API server has not defaulted.
const (
	defaultWindow   = 5 * time.Minute
	defaultCooldown = 5 * time.Minute
)

func minReplicas(spec *v1alpha1.Autoscaling) int32 {
	return min(ptr.Deref(spec.MinReplicas, 1), spec.MaxReplicas)
}

func window(spec *v1alpha1.Autoscaling) time.Duration {
	if spec.StabilizationWindow == nil {
		return defaultWindow
	}
	return spec.StabilizationWindow.Duration
}

func cooldown(spec *v1alpha1.Autoscaling) time.Duration {
	if spec.Cooldown == nil {
		return defaultCooldown
	}
	return spec.Cooldown.Duration
}

func pods(n int32) string {
	if n == 1 {
		return "1 pod"
	}
	return fmt.Sprintf("%d pods", n)
}
