package pipeline

import (
	"context"
	"errors"
	"slices"
	"time"
)

// bisect writes a batch. When a row is at fault it writes the halves one after the other, down to the single rows that
// cannot be written, so n bad rows among m cost about n·log2(m) writes. It reports false when ctx ended before every item
// had an outcome; those without are left to the source.
func (w *writer) bisect(ctx context.Context, b *Batch, found *findings) bool {
	var err error
	for round := 1; ; round++ {
		var os []Outcome
		if os, err = w.writeOnce(ctx, b); err != nil {
			break
		}
		why, again := w.sort(b, os, found)
		if !again {
			return true
		}
		w.p.metrics.sinkErrors.WithLabelValues(ClassTransient.String()).Inc()
		w.p.sinkFailed(ClassTransient, why, round)
		if !pause(ctx, ClassTransient, round) {
			return false
		}
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
		for _, it := range right.Items {
			found.hold(it)
		}
		return true
	}
	if !w.bisect(ctx, right, found) {
		b.Items = right.Items
		return false
	}
	return true
}

// sort settles what is done of a written batch, and leaves in found what the sink has rejected, and in order what comes
// after that. When the sink could not write some items yet, it leaves them in the batch and reports why.
func (w *writer) sort(b *Batch, os []Outcome, found *findings) (why error, again bool) {
	if !slices.ContainsFunc(os, func(o Outcome) bool { return !o.Result.Acknowledge() }) {
		for i, it := range b.Items {
			found.add(it, os[i])
		}
		w.p.finish(b, os)
		return nil, false
	}
	done := &Batch{InOrder: b.InOrder, Settled: b.Settled}
	var results []Outcome
	var left []*Item
	for i, it := range b.Items {
		switch o := os[i]; {
		case found.stop:
			found.hold(it)
		case o.Result == Retry:
			if left = append(left, it); len(left) == 1 {
				why = errors.New(o.Reason)
			}
		default:
			if found.add(it, o); o.Result.Acknowledge() {
				done.Items, results = append(done.Items, it), append(results, o)
			}
			found.stop = b.InOrder && o.Result == Rejected
		}
	}
	w.p.finish(done, results)
	b.Items, b.Settled = left, false
	return why, len(left) > 0
}

// writeOnce returns the outcomes of a batch, or an error of class ClassRow, or errTooSlow for a batch of several rows, or
// any error when ctx has ended. Everything else it sits out: the same batch again after a pause, for as long as it takes.
// Fenced items leave the batch.
func (w *writer) writeOnce(ctx context.Context, b *Batch) ([]Outcome, error) {
	p := w.p
	for attempt := 1; ; attempt++ {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err := w.fence(ctx, b); err != nil {
			return nil, err
		}
		start := time.Now()
		part := b.wanted()
		if len(part.Items) == 0 {
			return outcomes(len(b.Items), Outcome{Result: Filtered}), nil
		}
		traced, ended := p.tracer.writing(ctx, part)
		os, err := p.sink.Write(traced, part)
		ended(os, err)
		if err == nil {
			b.Settled = part.Settled
			took := time.Since(start)
			w.size.wrote(len(b.Items), took)
			p.metrics.batchLimit.Set(float64(w.size.rows))
			p.metrics.writeSeconds.Observe(took.Seconds())
			p.metrics.batchRows.Observe(float64(len(part.Items)))
			p.metrics.batchBytes.Observe(float64(part.Bytes()))
			_, os = part.complete(os)
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
		if isTimeout(err) {
			w.size.tooSlow()
		}
		if !pause(ctx, class, attempt) {
			return nil, ctx.Err()
		}
		if isTimeout(err) && len(b.Items) > w.size.rows {
			return nil, errTooSlow
		}
	}
}

// errFenced is why items are dropped that a LeasedSource has no right to any more.
var errFenced = errors.New("another member owns their stream now")

// fence drops items that this processor has no right to any more, after waiting until that is known. It returns an error
// when none is left, or when ctx has ended.
func (w *writer) fence(ctx context.Context, b *Batch) error {
	leased, ok := w.p.source.(LeasedSource)
	if !ok {
		return nil
	}
	for attempt := 1; !leased.Fence(b); attempt++ {
		if !pause(ctx, ClassTransient, attempt) {
			return ctx.Err()
		}
	}
	if !slices.ContainsFunc(b.Items, func(it *Item) bool { return it.Fenced }) {
		return nil
	}
	w.dropFenced(b, errFenced)
	if len(b.Items) == 0 {
		return errFenced
	}
	return nil
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
