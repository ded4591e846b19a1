package phase

import (
	"math/rand/v2"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
)

// Schedule remembers when each resource was last compared with its database, so that a wake-up for another cause, such as
// new lag figures, costs no query. What it has forgotten is due, so losing it costs a repeat and no mistake.
type Schedule struct {
	clock    clock.PassiveClock
	interval time.Duration

	mu   sync.Mutex
	next map[types.UID]verified
}

type verified struct {
	generation int64
	next       time.Time
}

// perInterval is how many resources of a kind are verified in one interval. Where there are more, each waits longer, so that databases at rest are not asked
// more and more: with the usual five minutes, once a second.
const perInterval = 300

// NewSchedule returns a schedule that verifies every interval, or less often when there are many resources (perInterval), and up to a tenth later each time:
// resources that were made together would otherwise reach the database together for ever.
func NewSchedule(c clock.PassiveClock, interval time.Duration) *Schedule {
	return &Schedule{clock: c, interval: interval, next: map[types.UID]verified{}}
}

// Due says whether a resource has to be verified now.
func (s *Schedule) Due(uid types.UID, generation int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.next[uid]
	return !ok || v.generation != generation || !s.clock.Now().Before(v.next)
}

// Done records a verification and returns the time until the next.
func (s *Schedule) Done(uid types.UID, generation int64) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	wait := max(s.interval, s.interval/perInterval*time.Duration(len(s.next)))
	wait += rand.N(wait/10 + 1)
	s.next[uid] = verified{generation: generation, next: s.clock.Now().Add(wait)}
	return wait
}

// Until returns the time until the next verification of a resource that is not due.
func (s *Schedule) Until(uid types.UID) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(s.next[uid].next.Sub(s.clock.Now()), time.Millisecond)
}

// Forget makes a resource due: something that it refers to has changed, or it is gone.
func (s *Schedule) Forget(uid types.UID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.next, uid)
}
