package pgstream

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// repollMin is the shortest pause between two looks. After a wake-up the pauses grow with the time since: not every publisher is announced
// (publish_guard_template.sql), and one that holds the horizon back may be about to finish. So whoever commits t after an announcement is found after
// 2t at the latest.
const repollMin = time.Millisecond

// waitRegistration is how long before publishers must be asked again to notify; the database keeps it for ten seconds.
const waitRegistration = 4 * time.Second

// topic is what a waiter waits for: the payload of its notifications, and the statement that asks publishers for them.
type topic struct {
	payload string
	ask     string
	args    []any
}

// messagesOf is the topic of a stream's messages.
func messagesOf(stream int32) topic {
	return topic{strconv.Itoa(int(stream)), "select millrace_engine.wait_for(array[$1::integer])", []any{stream}}
}

// waiter waits for messages or frames. No connection is held meanwhile. It may be used by several goroutines.
type waiter struct {
	pool     *pgxpool.Pool
	listener *Listener     // nil: polling only
	poll     time.Duration // the longest pause between two looks
	limit    time.Duration // of one round trip; 0: none

	mu         sync.Mutex
	registered time.Time // when publishers were last asked to notify
}

// until looks, and waits for a reason to look again, until look is done or fails, or ctx ends.
func (w *waiter) until(ctx context.Context, what func() topic, look func() (done bool, err error)) error {
	// When there was last a reason to look: now, because somebody may have published unannounced just before we subscribed, and each wake-up.
	reason := time.Now()
	for {
		if done, woken, err := w.once(ctx, what(), look, reason); done || err != nil {
			return err
		} else if woken {
			reason = time.Now()
		}
	}
}

// once looks and then waits until there is a reason to look again. woken says that it is a notification.
func (w *waiter) once(ctx context.Context, t topic, look func() (done bool, err error), reason time.Time) (done, woken bool, err error) {
	var wake <-chan struct{}
	if w.listener != nil {
		// Subscribe before looking, or what is published in between goes unnoticed.
		s := w.listener.subscribe(t.payload)
		defer w.listener.unsubscribe(t.payload, s)
		wake = s.wake
	}
	if done, err := look(); done || err != nil {
		return done, false, err
	}
	if fresh, err := w.register(ctx, t); fresh || err != nil {
		return false, false, err // fresh: look for what was published before publishers knew that somebody waits
	}
	timer := time.NewTimer(w.pause(time.Since(reason)))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false, false, ctx.Err()
	case <-wake:
		return false, true, nil
	case <-timer.C:
		return false, false, nil
	}
}

// pause is how long to wait for a notification before looking again. With a listener it is at most the time after which publishers must be
// asked again to notify.
func (w *waiter) pause(since time.Duration) time.Duration {
	pause := min(max(since, repollMin), w.poll)
	if w.listener != nil {
		pause = min(pause, waitRegistration)
	}
	return pause
}

// register asks publishers to notify, unless it did so lately. True when it asked: what was published just before may not have been announced.
func (w *waiter) register(ctx context.Context, t topic) (fresh bool, err error) {
	if w.listener == nil || !w.listener.Alive() {
		return false, nil // nobody would hear it; a listener that comes back wakes everybody
	}
	w.mu.Lock()
	since := time.Since(w.registered)
	w.mu.Unlock()
	if since < waitRegistration {
		return false, nil
	}
	ctx, cancel := limited(ctx, w.limit)
	defer cancel()
	if _, err := w.pool.Exec(ctx, t.ask, t.args...); err != nil {
		return false, fmt.Errorf("wait for messages: %w", translate(err))
	}
	w.mu.Lock()
	w.registered = time.Now()
	w.mu.Unlock()
	return true, nil
}

// limited is ctx that ends after limit at the latest; 0: ctx.
func limited(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	if limit <= 0 {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, limit)
}
