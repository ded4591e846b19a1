package database

import (
	"errors"
	"testing"
	"time"

	clocktesting "k8s.io/utils/clock/testing"
)

var errDown = errors.New("down")

// D2: whatever the number of callers, one of them meets the database that does not answer.
func TestBreakerLetsOneCallerProbe(t *testing.T) {
	b := &breaker{clock: clocktesting.NewFakePassiveClock(time.Unix(0, 0))}
	if ok, _, _ := b.admit(); !ok {
		t.Fatal("the first call is refused")
	}
	if ok, after, cause := b.admit(); ok || after <= 0 || cause != nil {
		t.Errorf("a second call beside the first: %t, %s, %v", ok, after, cause)
	}
	b.report(nil)
	for range 3 {
		if ok, _, _ := b.admit(); !ok {
			t.Error("a call to a database that answers is refused")
		}
	}
}

func TestBreakerWaitsLongerWithEveryFailure(t *testing.T) {
	clock := clocktesting.NewFakePassiveClock(time.Unix(0, 0))
	b := &breaker{clock: clock}
	last := time.Duration(0)
	for i := range 12 {
		if ok, _, _ := b.admit(); !ok {
			t.Fatalf("failure %d: the probe is refused", i)
		}
		b.report(errDown)
		ok, after, cause := b.admit()
		if ok || !errors.Is(cause, errDown) {
			t.Fatalf("failure %d: admitted %t, cause %v", i, ok, cause)
		}
		if after < last*3/4 || after > breakerMax*5/4+1 {
			t.Errorf("failure %d: wait of %s after one of %s", i, after, last)
		}
		last = after
		clock.SetTime(clock.Now().Add(after))
	}
	if last < breakerMax {
		t.Errorf("after many failures it waits %s", last)
	}
	if ok, _, _ := b.admit(); !ok {
		t.Fatal("the probe is refused")
	}
	b.report(nil)
	b.report(errDown)
	if _, after, _ := b.admit(); after > breakerFirst*5/4+1 {
		t.Errorf("a failure after a success waits %s", after)
	}
}

// A caller that goes away while it probes must not leave the breaker waiting for its report.
func TestBreakerForgetsAProbeThatWasAbandoned(t *testing.T) {
	b := &breaker{clock: clocktesting.NewFakePassiveClock(time.Unix(0, 0))}
	if ok, _, _ := b.admit(); !ok {
		t.Fatal("the first call is refused")
	}
	b.abandon()
	if ok, _, _ := b.admit(); !ok {
		t.Error("nobody may probe any more")
	}
}
