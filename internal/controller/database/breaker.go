package database

import (
	"math/rand/v2"
	"sync"
	"time"

	"k8s.io/utils/clock"
)

// Bounds of the breaker. The first retry comes soon, because most failures are a restart; the last keeps a database that stays away from
// costing the workers' time. That it is back is noticed sooner, by a scout.
const (
	breakerFirst = time.Second
	breakerMax   = 30 * time.Second
)

// breaker stops calls to a database that does not answer. After a failure it is open: calls are refused until a time that
// doubles with every failure in a row. Then one caller is let through as a probe; its success closes the breaker.
type breaker struct {
	clock clock.PassiveClock

	mu      sync.Mutex
	proven  bool // closed: the last call got an answer
	probing bool // one call is on its way and decides
	wait    time.Duration
	until   time.Time
	cause   error
}

// admit says whether a call may start. When it may not, after says when to ask again, and cause is the failure that opened
// the breaker; nil while the first call ever is on its way. The caller of an admitted call has to report.
func (b *breaker) admit() (ok bool, after time.Duration, cause error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.proven {
		return true, 0, nil
	}
	if left := b.until.Sub(b.clock.Now()); left > 0 {
		return false, left, b.cause
	}
	if b.probing {
		return false, breakerFirst, b.cause
	}
	b.probing = true
	return true, 0, nil
}

// probe is admit for who has nothing else to do than to find out whether a database that was lost is back: it waits for no time, and
// is not let through to a database that answers, or that another caller asks just now.
func (b *breaker) probe() (ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.proven || b.probing || b.cause == nil {
		return false
	}
	b.probing = true
	return true
}

// report tells how an admitted call ended: nil when the server answered, whatever it said. It returns whether the database was lost or
// found by that.
func (b *breaker) report(unreachable error) (changed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.probing = false
	changed = (b.cause == nil) != (unreachable == nil)
	if unreachable == nil {
		b.proven, b.wait, b.cause = true, 0, nil
		return changed
	}
	b.proven, b.cause = false, unreachable
	b.wait = min(max(b.wait*2, breakerFirst), breakerMax)
	// With jitter, so that many databases behind one failed host are not asked together.
	b.until = b.clock.Now().Add(b.wait + rand.N(b.wait/4+1))
	return changed
}

// abandon ends an admitted call that says nothing about the server, such as one whose caller went away.
func (b *breaker) abandon() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.probing = false
}

// closed says whether the last call got an answer.
func (b *breaker) closed() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.proven
}
