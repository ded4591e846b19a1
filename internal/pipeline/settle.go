package pipeline

import (
	"context"
	"time"
)

// settlement is a batch whose outcomes are known, on its way back to the source.
type settlement struct {
	batch    *Batch
	outcomes []Outcome
}

// finish hands a batch with its outcomes to the settlers.
func (p *Pipeline) finish(b *Batch, os []Outcome) {
	if len(b.Items) == 0 {
		return
	}
	now := time.Now()
	rejected := false
	mismatched := 0
	var counts [numResults]int
	for i, o := range os {
		counts[o.Result]++
		if o.Mismatch {
			mismatched++
		}
		switch o.Result {
		case Written:
			if c := b.Items[i].Created; !c.IsZero() {
				p.metrics.endToEnd.Observe(now.Sub(c).Seconds())
			}
		case Rejected:
			rejected = true
		}
	}
	for r, n := range counts {
		if n > 0 {
			p.metrics.entries.WithLabelValues(Result(r).String()).Add(float64(n))
		}
	}
	if mismatched > 0 {
		p.metrics.mismatches.Add(float64(mismatched))
		p.log.Warn("duplicates have other content than the rows with their keys, which stay", "n", mismatched)
	}
	p.tracer.finished(b, os)
	p.metrics.unsettled.Add(float64(len(b.Items)))
	// What is in order stays in order: a nack must not overtake the ack of what came before.
	if rejected && !b.InOrder {
		p.refused <- settlement{b, os}
	} else {
		p.settled <- settlement{b, os}
	}
}

// lose gives up a batch that got no outcome before the drain's time was over. The source gives it back.
func (p *Pipeline) lose(b *Batch) {
	p.tracer.lost(b)
	p.permits.free(len(b.Items), b.Bytes())
}

// settle tells the source the outcomes, each until it has taken them, and then lets as much be read again (I1, I4).
func (p *Pipeline) settle(ctx context.Context, in <-chan settlement) {
	for s := range in {
		for attempt := 1; ctx.Err() == nil; attempt++ {
			traced, ended := p.tracer.settling(ctx, s.batch)
			err := p.source.Settle(traced, s.batch, s.outcomes)
			ended(err)
			if err == nil {
				if attempt > 2 {
					p.health.Clear("settle")
				}
				break
			}
			if ctx.Err() != nil {
				break
			}
			p.metrics.settleErrors.Inc()
			why := reason(err)
			if attempt == 1 {
				p.log.Warn("settling failed; trying again", "n", len(s.batch.Items), "error", why)
			}
			if attempt > 2 {
				p.health.Set("settle", why)
			}
			pause(ctx, Classify(err), attempt)
		}
		p.metrics.unsettled.Sub(float64(len(s.batch.Items)))
		p.permits.free(len(s.batch.Items), s.batch.Bytes())
	}
}
