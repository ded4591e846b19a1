package phase

import (
	"strconv"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"
	clocktesting "k8s.io/utils/clock/testing"
)

func TestScheduleIsDueWhenItShouldBe(t *testing.T) {
	clock := clocktesting.NewFakePassiveClock(time.Unix(0, 0))
	s := NewSchedule(clock, time.Minute)
	if !s.Due("a", 1) {
		t.Error("what was never verified is not due")
	}
	wait := s.Done("a", 1)
	if wait < time.Minute || wait > time.Minute+6*time.Second {
		t.Errorf("the next verification is in %s", wait)
	}
	if s.Due("a", 1) || s.Until("a") != wait {
		t.Error("it is due right after it was done")
	}
	if !s.Due("a", 2) {
		t.Error("another generation is not due")
	}
	s.Forget("a")
	if !s.Due("a", 1) {
		t.Error("what was forgotten is not due")
	}
	s.Done("a", 1)
	clock.SetTime(time.Unix(70, 0))
	if !s.Due("a", 1) {
		t.Error("it is not due after the interval")
	}
}

func TestManyResourcesAreVerifiedLessOften(t *testing.T) {
	clock := clocktesting.NewFakePassiveClock(time.Unix(0, 0))
	s := NewSchedule(clock, 5*time.Minute)
	for i := range 1000 {
		s.Done(types.UID(strconv.Itoa(i)), 1)
	}
	// A thousand in about a thousand seconds, or a little more: one each second.
	if wait := s.Done("0", 1); wait < 1000*time.Second || wait > 1100*time.Second {
		t.Errorf("with a thousand resources the next verification is in %s", wait)
	}
}
