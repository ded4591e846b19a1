package engine

import (
	"context"
	"time"

	"github.com/millrace-dev/millrace/bench/proc"
)

// watchCPU measures how many processors the server keeps busy in each of so many parts of time, from now on. The function that it
// returns waits for the end; it returns nothing when the server's processes are not visible from here.
func (b *bed) watchCPU(ctx context.Context, part time.Duration, parts int) func() ([]float64, error) {
	if b.postmaster == 0 {
		return func() ([]float64, error) { return nil, nil }
	}
	type outcome struct {
		cores []float64
		err   error
	}
	done := make(chan outcome, 1)
	go func() {
		var o outcome
		defer func() { done <- o }()
		before, err := proc.CPU(b.postmaster)
		start := time.Now()
		for i := 1; i <= parts && err == nil; i++ {
			if err = sleep(ctx, time.Until(start.Add(time.Duration(i)*part))); err != nil {
				break
			}
			var now time.Duration
			now, err = proc.CPU(b.postmaster)
			o.cores = append(o.cores, (now-before).Seconds()/part.Seconds())
			before = now
		}
		o.err = err
	}()
	return func() ([]float64, error) {
		o := <-done
		return o.cores, o.err
	}
}

// cpu is the processor time that the server has used so far, zero when its processes are not visible from here.
func (b *bed) cpu() (time.Duration, error) {
	if b.postmaster == 0 {
		return 0, nil
	}
	return proc.CPU(b.postmaster)
}
