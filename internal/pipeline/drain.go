package pipeline

import (
	"context"
	"sync"
	"time"
)

// drainTimer calls stop when drain.timeout has passed since reading ended. Until then everything that was read is
// finished: the stages end one after the other, readers first, and the source gives back the rest last.
func (p *Pipeline) drainTimer(reading context.Context, stop context.CancelFunc) *drainTimer {
	d := &drainTimer{}
	d.undo = context.AfterFunc(reading, func() {
		p.health.Set("drain", "draining")
		d.mu.Lock()
		defer d.mu.Unlock()
		if !d.over {
			d.timer = time.AfterFunc(time.Duration(p.cfg.Drain.Timeout), stop)
		}
	})
	return d
}

type drainTimer struct {
	undo  func() bool
	mu    sync.Mutex
	timer *time.Timer
	over  bool
}

// Stop keeps the timer from firing.
func (d *drainTimer) Stop() {
	d.undo()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.over = true
	if d.timer != nil {
		d.timer.Stop()
	}
}
