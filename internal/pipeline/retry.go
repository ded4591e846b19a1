package pipeline

import (
	"context"
	"math/rand/v2"
	"time"
)

// Bounds of waiting between attempts.
const (
	transientFirst = 50 * time.Millisecond
	transientMax   = 5 * time.Second
	// A configuration problem waits for a person, so that trying often only fills the logs.
	configurationFirst = time.Second
	configurationMax   = 30 * time.Second
)

// backoff is the wait before the given attempt, counted from 1: it doubles from first to longest, and the later half of it
// is random, so that many processors do not come back as one. r is in [0, 1).
func backoff(first, longest time.Duration, attempt int, r float64) time.Duration {
	d := longest
	if shift := attempt - 1; shift < 30 && first<<shift < longest {
		d = first << shift
	}
	return d/2 + time.Duration(r*float64(d/2))
}

// pause waits as long as an error of this class deserves. It reports false when ctx ended first.
func pause(ctx context.Context, class Class, attempt int) bool {
	first, longest := transientFirst, transientMax
	if class == ClassConfiguration {
		first, longest = configurationFirst, configurationMax
	}
	return sleep(ctx, backoff(first, longest, attempt, rand.Float64()))
}

// sleep waits, and reports false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
