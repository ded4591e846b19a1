package pipeline

import (
	"context"
	"time"
)

// writer collects the items of its keys into batches and writes them, one batch at a time.
type writer struct {
	p    *Pipeline
	in   <-chan *Batch
	rest *Batch // taken from in and not yet written
	size *batchSize
}

func (p *Pipeline) newWriter(in <-chan *Batch) *writer {
	return &writer{p: p, in: in, size: newBatchSize(p.cfg.Batch.MaxRows)}
}

// run writes until in is closed and everything is written, or ctx ends.
func (w *writer) run(ctx context.Context) {
	for {
		b := w.collect()
		if b == nil {
			return
		}
		w.write(ctx, b)
	}
}

// collect waits for items and returns as many as there are, up to the bounds of a batch. While the source has more at hand
// it waits a little for a fuller batch; when the source is idle it does not wait at all.
func (w *writer) collect() *Batch {
	b := w.next(nil)
	if b == nil {
		return nil
	}
	var linger <-chan time.Time
	for {
		if b.InOrder || w.split(b) {
			return b
		}
		var timeout <-chan time.Time
		if b.More {
			if linger == nil {
				linger = time.After(time.Duration(w.p.cfg.Batch.Linger))
			}
			timeout = linger
		}
		more := w.next(&timeout)
		if more == nil {
			return b
		}
		if more.InOrder || more.Together && len(b.Items)+len(more.Items) > w.size.rows {
			w.rest = more
			return b
		}
		b = &Batch{Items: append(b.Items, more.Items...), More: more.More, Together: more.Together}
	}
}

// next takes a batch. A nil wait waits for ever, a wait for a nil channel not at all. It returns nil when there is none.
func (w *writer) next(wait *<-chan time.Time) *Batch {
	if b := w.rest; b != nil {
		w.rest = nil
		return b
	}
	if wait == nil {
		return <-w.in
	}
	if *wait == nil {
		select {
		case b := <-w.in:
			return b
		default:
			return nil
		}
	}
	select {
	case b := <-w.in:
		return b
	case <-*wait:
		return nil
	}
}

// split cuts a batch that is too large and keeps the rest. It reports whether the batch is full.
func (w *writer) split(b *Batch) bool {
	if b.Together {
		return len(b.Items) >= w.size.rows
	}
	bytes := 0
	for i, it := range b.Items {
		bytes += it.size
		if i == w.size.rows || i > 0 && bytes > w.p.cfg.Batch.MaxBytes {
			w.rest = &Batch{Items: b.Items[i:], More: b.More, Together: b.Together}
			b.Items = b.Items[:i:i]
			return true
		}
	}
	return len(b.Items) == w.size.rows
}

// write brings a batch to its outcomes. It returns when every item has one, or when ctx ended: then nothing is known of
// the batch, and the source gives it back.
func (w *writer) write(ctx context.Context, b *Batch) {
	p := w.p
	if !p.breaker.enter(ctx) {
		p.lose(b)
		return
	}
	found := &findings{rejected: Batch{InOrder: b.InOrder}}
	if b.InOrder {
		b = w.untilProblem(b, found)
	}
	if !w.attempt(ctx, b, found) {
		p.breaker.abandon()
		p.lose(b)
		p.lose(&found.rejected)
		return
	}
	open := p.breaker.leave(found.firstGood, found.firstBad)
	if open {
		if p.health.Set("sink", "too many rows cannot be written, which looks like the table and not the rows: "+found.reason) {
			p.log.Error("writing has stopped because too many rows fail; repair the table, or wait for the next try",
				"reason", found.reason, "failed", found.bad, "of", found.good+found.bad)
		}
	} else if found.bad == 0 || found.good > 0 {
		if p.health.Clear("sink") {
			p.log.Info("writing again")
		}
	}
	if open {
		// Kept in the source, and not held against them: they come again when the breaker is closed.
		for i := range found.reasons {
			found.reasons[i] = Outcome{Result: Retry}
		}
	}
	p.finish(&found.rejected, found.reasons)
}

// untilProblem leaves in the batch what stands before its first undecodable item. That item and those after it are
// settled after the others are written.
func (w *writer) untilProblem(b *Batch, found *findings) *Batch {
	for i, it := range b.Items {
		if it.Problem == "" {
			continue
		}
		found.rejected.Items = append(found.rejected.Items, b.Items[i:]...)
		found.reasons = append(problems(b.Items[i:i+1]), outcomes(len(b.Items)-i-1, Outcome{Result: Retry})...)
		return &Batch{Items: b.Items[:i:i], Together: true, InOrder: true}
	}
	return b
}

// findings are what one batch came to.
type findings struct {
	good, bad           int
	duplicates          int
	firstGood, firstBad int   // of items on their first delivery
	rejected            Batch // settled last, with reasons as outcomes
	reasons             []Outcome
	reason              string // of the last rejected row
	stop                bool   // an item of an ordered batch has failed; nothing after it may be written
}

func (f *findings) add(it *Item, o Outcome) {
	switch o.Result {
	case Rejected:
		f.bad++
		f.reason = o.Reason
		f.rejected.Items = append(f.rejected.Items, it)
		f.reasons = append(f.reasons, o)
	case Duplicate:
		f.good++
		f.duplicates++
	case Written:
		f.good++
	case DeadLettered:
		f.bad++
		f.reason = o.Reason
	default:
		return
	}
	if it.Deliveries == 1 {
		if o.Result == Rejected || o.Result == DeadLettered {
			f.firstBad++
		} else {
			f.firstGood++
		}
	}
}

// hold keeps an item of an ordered batch that comes after one that has failed.
func (f *findings) hold(it *Item) {
	f.rejected.Items = append(f.rejected.Items, it)
	f.reasons = append(f.reasons, Outcome{Result: Retry})
}

// attempt writes a batch, again and again while only time can help, in halves when a row is at fault. Good outcomes are
// settled at once; rejected rows are left in found. It reports false when ctx ended.
func (w *writer) attempt(ctx context.Context, b *Batch, found *findings) bool {
	before := *found
	done := len(b.Items) == 0 || w.bisect(ctx, b, found)
	inserted := found.good - found.duplicates - (before.good - before.duplicates)
	w.p.log.Debug("batch written", "inserted", inserted, "duplicates", found.duplicates-before.duplicates, "failed", found.bad-before.bad)
	return done
}
