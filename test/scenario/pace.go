package scenario

import (
	"context"
	"time"
)

// pace keeps a producer to a rate.
type pace struct {
	perSecond int
	began     time.Time
	handed    int
}

func newPace(perSecond int) *pace { return &pace{perSecond: perSecond, began: time.Now()} }

// next returns how many to produce now, at least one and at most max. It waits when the producer is ahead, and returns
// an error when ctx ends.
func (p *pace) next(ctx context.Context, max int) (int, error) {
	if p.perSecond <= 0 {
		return max, ctx.Err()
	}
	const step = 20 * time.Millisecond // of a steady stream; a tick for each entry would be nearly all we do
	for {
		if due := int(time.Since(p.began).Seconds()*float64(p.perSecond)) - p.handed; due > 0 {
			n := min(due, max)
			p.handed += n
			return n, ctx.Err()
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(step):
		}
	}
}
