package main

import (
	"context"
	"sync"
	"time"

	"github.com/millrace-dev/millrace/internal/pipeline"
)

// rates remembers the totals of the last minute, so that the status page can tell how fast things go.
type rates struct {
	metrics *pipeline.Metrics

	mu      sync.Mutex
	samples []sample // one per second, oldest first
}

type sample struct {
	at      time.Time
	read    float64
	results map[string]float64
}

// rateWindow is how long samples are kept.
const rateWindow = time.Minute

// run takes a sample per second until ctx ends.
func (r *rates) run(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		r.take()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (r *rates) take() {
	s := sample{at: time.Now()}
	s.read, s.results = r.metrics.Totals()
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.samples) > 0 && s.at.Sub(r.samples[0].at) > rateWindow+time.Second {
		r.samples = r.samples[1:]
	}
	r.samples = append(r.samples, s)
}

// over returns the entries per second, read and by result, between the sample that is about as old as window and now. A
// process that is younger has an average over its life.
func (r *rates) over(window time.Duration) (read float64, results map[string]float64) {
	results = map[string]float64{}
	now := time.Now()
	total, totals := r.metrics.Totals()
	r.mu.Lock()
	defer r.mu.Unlock()
	var from *sample
	for i := range r.samples {
		if from = &r.samples[i]; now.Sub(from.at) <= window {
			break
		}
	}
	if from == nil || now.Sub(from.at) <= 0 {
		return 0, results
	}
	seconds := now.Sub(from.at).Seconds()
	for name, n := range totals {
		results[name] = (n - from.results[name]) / seconds
	}
	return (total - from.read) / seconds, results
}
