package pgstream

import (
	"context"
	"time"
)

// MaintainWithRing is Maintain with ledgers that move on to the next ring at any size, for tests of what a rotation must keep.
var MaintainWithRing = maintain

// Fetches says whether the consumer's next claim will be made and read by two transactions.
func Fetches(c *Consumer) bool {
	return c.backlog.Load() && c.lane.Load() != 0 && c.facts.Load().claimSQL != ""
}

// WaitForMessages waits once as Receive does between two looks, whatever there is to receive, and says whether a notification ended that, and not a timer.
func WaitForMessages(ctx context.Context, c *Consumer) (woken bool, err error) {
	return c.waiter.waitOnce(ctx, messagesOf(c.facts.Load().stream))
}

// WaitForFrames is WaitForMessages for a tail.
func WaitForFrames(ctx context.Context, t *FrameTail) (woken bool, err error) {
	return t.waiter.waitOnce(ctx, t.topic)
}

// WaitWhileHeard is WaitForMessages when the listener hears of messages in the moment in which the consumer looks for them.
func WaitWhileHeard(ctx context.Context, c *Consumer) (woken bool, err error) {
	t := messagesOf(c.facts.Load().stream)
	_, woken, err = c.waiter.once(ctx, t, func() (bool, error) {
		c.waiter.listener.wake(t.payload)
		return false, nil
	}, time.Now().Add(-time.Hour))
	return woken, err
}

// Pause is how long a consumer waits before it looks again, when the last reason to look is so old. A nil listener: it polls.
func Pause(l *Listener, poll, since time.Duration) time.Duration {
	return (&waiter{listener: l, poll: poll}).pause(since)
}

// Waiting says for how many payloads somebody waits, and how many do.
func Waiting(l *Listener) (payloads, waiters int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.waiting {
		waiters += s.waiters
	}
	return len(l.waiting), waiters
}

// Hear does what the listener does with a notification.
func Hear(l *Listener, payload string) { l.wake(payload) }

func (w *waiter) waitOnce(ctx context.Context, t topic) (woken bool, err error) {
	nothing := func() (bool, error) { return false, nil }
	_, woken, err = w.once(ctx, t, nothing, time.Now().Add(-time.Hour)) // long ago: the pauses have grown
	return woken, err
}
