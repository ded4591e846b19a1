package pipeline

import (
	"context"
	"time"
)

// bisect writes a batch. When a row is at fault it writes the halves one after the other, down to the single rows that
// cannot be written, so n bad rows among m cost about n·log2(m) writes. It reports false when ctx ended before every item
// had an outcome; those without are left to the source.
func (w *writer) bisect(ctx context.Context, b *Batch, found *findings) bool {
	os, err := w.writeOnce(ctx, b)
	if err == nil {
		for i, it := range b.Items {
			found.add(it, os[i])
		}
		w.p.finish(b, os)
		return true
	}
	if ctx.Err() != nil {
		return false
	}
	if len(b.Items) == 0 {
		return true // all of it was fenced
	}
	if len(b.Items) == 1 {
		found.add(b.Items[0], Outcome{Result: Rejected, Reason: reason(err)})
		found.stop = b.InOrder
		return true
	}
	w.p.metrics.bisects.Inc()
	middle := len(b.Items) / 2
	left := &Batch{Items: b.Items[:middle:middle], InOrder: b.InOrder}
	right := &Batch{Items: b.Items[middle:], InOrder: b.InOrder}
	b.Items = nil // their outcomes are reported with the halves
	if !w.bisect(ctx, left, found) {
		b.Items = append(left.Items, right.Items...)
		return false
	}
	if found.stop {
		found.rejected.Items = append(found.rejected.Items, right.Items...)
		found.reasons = append(found.reasons, outcomes(len(right.Items), Outcome{Result: Retry})...)
		return true
	}
	if !w.bisect(ctx, right, found) {
		b.Items = right.Items
		return false
	}
	return true
}

// writeOnce returns the outcomes of a batch, or an error of class ClassRow, or any error when ctx has ended. Everything
// else it sits out: the same batch again after a pause, for as long as it takes. Fenced items leave the batch.
func (w *writer) writeOnce(ctx context.Context, b *Batch) ([]Outcome, error) {
	p := w.p
	for attempt := 1; ; attempt++ {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		start := time.Now()
		os, err := p.sink.Write(ctx, b)
		if err == nil {
			p.metrics.writeSeconds.Observe(time.Since(start).Seconds())
			p.metrics.batchRows.Observe(float64(len(b.Items)))
			if attempt > 1 && p.health.Clear("sink") {
				p.log.Info("writing again", "attempts", attempt)
			}
			return os, nil
		}
		class := Classify(err)
		p.metrics.sinkErrors.WithLabelValues(class.String()).Inc()
		switch class {
		case ClassRow:
			return nil, err
		case ClassFenced:
			w.dropFenced(b, err)
			if len(b.Items) == 0 {
				return nil, err
			}
			continue
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		p.sinkFailed(class, err, attempt)
		if !pause(ctx, class, attempt) {
			return nil, ctx.Err()
		}
	}
}

// dropFenced takes the items out of a batch that this processor has no right to any more, or whose commit is in doubt.
func (w *writer) dropFenced(b *Batch, err error) {
	var kept, gone []*Item
	for _, it := range b.Items {
		if it.Fenced {
			gone = append(gone, it)
		} else {
			kept = append(kept, it)
		}
	}
	if len(gone) == 0 {
		panic("pipeline I7: a sink reported fenced items and its source marked none")
	}
	b.Items = kept
	w.p.log.Info("the right to some items was lost; dropping them", "n", len(gone), "reason", reason(err))
	w.p.finish(&Batch{Items: gone, InOrder: b.InOrder}, outcomes(len(gone), Outcome{Result: Fenced}))
}

// sinkFailed reports a failed write. The processor is unready at once when a person has to act, and otherwise when it
// lasts.
func (p *Pipeline) sinkFailed(class Class, err error, attempt int) {
	why := reason(err)
	if class == ClassConfiguration || attempt > 2 {
		if p.health.Set("sink", why) {
			p.log.Error("the sink cannot be written; nothing is acknowledged until it can", "class", class.String(), "error", why)
		}
		return
	}
	p.log.Warn("writing failed; trying again", "class", class.String(), "error", why)
}
