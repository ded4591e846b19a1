package eventstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/millrace-dev/millrace/bench/report"
)

// log is the bed's system as a log of frames.
func (b *bed) log() (FrameLog, error) {
	l, ok := b.store.(FrameLog)
	if !ok {
		return nil, errors.New("the system has no frames")
	}
	return l, nil
}

// share lets clients make n calls, each the next one, and returns how long that took.
func share(ctx context.Context, clients, n int, call func(ctx context.Context, i int) error) (time.Duration, error) {
	var next atomic.Int64
	start := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for range clients {
		g.Go(func() error {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					return nil
				}
				if err := call(ctx, i); err != nil {
					return err
				}
			}
		})
	}
	err := g.Wait()
	return time.Since(start), err
}

func perSecond(n int, took time.Duration) float64 { return float64(n) / took.Seconds() }

// framesPerRun is how many frames a run gets where there are many runs.
const framesPerRun = 50

// frames measures clients that append frames to many runs.
func (b *bed) frames(ctx context.Context) (float64, error) {
	l, err := b.log()
	if err != nil {
		return 0, err
	}
	runs := max(b.n/framesPerRun, 1)
	appendTo := func(prefix string) func(context.Context, int) error {
		return func(ctx context.Context, i int) error {
			return l.AppendFrame(ctx, prefix+strconv.Itoa(i%runs), event(i))
		}
	}
	if _, err := share(ctx, clients, max(b.n/5, clients), appendTo("warm-")); err != nil {
		return 0, err
	}
	if err := b.analyze(ctx); err != nil {
		return 0, err
	}
	took, err := share(ctx, clients, b.n, appendTo("run-"))
	if err != nil {
		return 0, err
	}
	total := 0
	for i := range runs {
		n, err := l.Frames(ctx, "run-"+strconv.Itoa(i))
		if err != nil {
			return 0, err
		}
		total += n
	}
	return perSecond(b.n, took), counted(total, b.n)
}

func counted(got, want int) error {
	if got != want {
		return fmt.Errorf("there are %d frames of %d", got, want)
	}
	return nil
}

// frameRun measures one client that appends to one run, in its first tenth and its last: does a long run cost more?
func (b *bed) frameRun(ctx context.Context) (map[string]float64, error) {
	l, err := b.log()
	if err != nil {
		return nil, err
	}
	tenth := max(b.n/10, 1)
	for i := range tenth {
		if err := l.AppendFrame(ctx, "warm", event(i)); err != nil {
			return nil, err
		}
	}
	if err := b.analyze(ctx); err != nil {
		return nil, err
	}
	start := time.Now()
	marks := make([]time.Duration, b.n+1)
	for i := range b.n {
		if err := l.AppendFrame(ctx, "run", event(i)); err != nil {
			return nil, err
		}
		marks[i+1] = time.Since(start)
	}
	n, err := l.Frames(ctx, "run")
	if err != nil {
		return nil, err
	}
	return map[string]float64{
		"frame-append-run-first": perSecond(tenth, marks[tenth]),
		"frame-append-run-last":  perSecond(tenth, marks[b.n]-marks[b.n-tenth]),
	}, counted(n, b.n)
}

// The rate of the works with a steady stream of frames, per second.
const frameRate = 200

// steadily calls for each number when it is due, and says when it called: when it was due, if the call before was not over by then.
func steadily(ctx context.Context, n int, start time.Time, call func(i int, began time.Duration) error) error {
	for i := range n {
		due := time.Duration(i) * time.Second / frameRate
		if wait := due - time.Since(start); wait > 0 {
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return ctx.Err()
			}
			due = time.Since(start)
		}
		if err := call(i, due); err != nil {
			return err
		}
	}
	return nil
}

// tail measures the time from the call that appends a frame until a reader who waits for it has it.
func (b *bed) tail(ctx context.Context) (map[string]float64, error) {
	l, err := b.log()
	if err != nil {
		return nil, err
	}
	if _, err := b.follow(ctx, l, "warm", frameRate/2); err != nil {
		return nil, fmt.Errorf("warm up: %w", err)
	}
	if err := b.analyze(ctx); err != nil {
		return nil, err
	}
	latencies, err := b.follow(ctx, l, "run", b.n)
	if err != nil {
		return nil, err
	}
	return map[string]float64{"tail-200-p50": report.Percentile(latencies, 50), "tail-200-p99": report.Percentile(latencies, 99)}, nil
}

// follow appends n frames while a reader follows, and returns the latencies in ms. Every frame must come once, in order.
func (b *bed) follow(ctx context.Context, l FrameLog, run string, n int) (latencies []float64, err error) {
	// A run begins with its first frame; there may be none to follow before.
	if err := l.AppendFrame(ctx, run, event(n)); err != nil {
		return nil, err
	}
	f, err := l.Follow(ctx, run)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	began := make([]atomic.Int64, n)
	latencies = make([]float64, n)
	start := time.Now().Add(50 * time.Millisecond) // the reader waits by then
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		ctx, cancel := context.WithTimeout(ctx, time.Duration(n)*time.Second/frameRate+stalled)
		defer cancel()
		for received := 0; received < n; {
			payloads, err := f.Next(ctx)
			now := time.Since(start)
			if err != nil {
				return fmt.Errorf("follow, after %d of %d frames: %w", received, n, err)
			}
			for _, p := range payloads {
				got, err := number(p)
				if err != nil || got != received {
					return fmt.Errorf("frame %d came instead of %d: %w", got, received, err)
				}
				latencies[got] = float64(now-time.Duration(began[got].Load())) / float64(time.Millisecond)
				received++
			}
		}
		return nil
	})
	g.Go(func() error {
		return steadily(ctx, n, start, func(i int, at time.Duration) error {
			began[i].Store(int64(at))
			return l.AppendFrame(ctx, run, event(i))
		})
	})
	return latencies, g.Wait()
}

// stalled is how long a reader may wait in vain. It is long: machines can be busy.
const stalled = 30 * time.Second

// steps is how many parts a summary has. A patch changes one.
const steps = 20

// patch is the merge patch with number i.
func patch(i int) []byte {
	return fmt.Appendf(nil, `{"n": %d, "steps": {"step-%d": {"state": "running", "progress": %d, "note": "the quick brown fox jumps over the lazy dog"}}, "error": null}`, i, i%steps, i)
}

// merges measures clients that merge patches into the summaries of so many runs.
func (b *bed) merges(ctx context.Context, runs int) (float64, error) {
	l, err := b.log()
	if err != nil {
		return 0, err
	}
	merge := func(prefix string) func(context.Context, int) error {
		return func(ctx context.Context, i int) error {
			_, err := l.Merge(ctx, prefix+strconv.Itoa(i%runs), patch(i/runs))
			return err
		}
	}
	if _, err := share(ctx, clients, max(b.n/5, clients), merge("warm-")); err != nil {
		return 0, err
	}
	if err := b.analyze(ctx); err != nil {
		return 0, err
	}
	took, err := share(ctx, clients, b.n, merge("run-"))
	if err != nil {
		return 0, err
	}
	for run := range runs {
		patches := b.n / runs
		if run < b.n%runs {
			patches++
		}
		if err := checkSummary(ctx, l, "run-"+strconv.Itoa(run), patches); err != nil {
			return 0, err
		}
	}
	return perSecond(b.n, took), nil
}

// checkSummary looks whether every patch has been merged once.
func checkSummary(ctx context.Context, l FrameLog, run string, patches int) error {
	text, version, err := l.Summary(ctx, run)
	if err != nil {
		return err
	}
	var document struct {
		Steps map[string]struct{ Progress int }
	}
	if err := json.Unmarshal(text, &document); err != nil {
		return err
	}
	if version != int64(patches) || len(document.Steps) != min(patches, steps) {
		return fmt.Errorf("after %d patches the summary of %s has version %d and %d steps", patches, run, version, len(document.Steps))
	}
	return nil
}

// summaries measures clients that read summaries of a hundred runs.
func (b *bed) summaries(ctx context.Context) (float64, error) {
	l, err := b.log()
	if err != nil {
		return 0, err
	}
	const runs, patches = 100, steps
	name := func(i int) string { return "run-" + strconv.Itoa(i%runs) }
	if _, err := share(ctx, clients, runs*patches, func(ctx context.Context, i int) error {
		_, err := l.Merge(ctx, name(i), patch(i/runs))
		return err
	}); err != nil {
		return 0, err
	}
	for i := range runs {
		if err := checkSummary(ctx, l, name(i), patches); err != nil {
			return 0, err
		}
	}
	if err := b.analyze(ctx); err != nil {
		return 0, err
	}
	read := func(ctx context.Context, i int) error {
		text, version, err := l.Summary(ctx, name(i))
		if err == nil && (version != patches || len(text) < patches*20) {
			err = fmt.Errorf("read version %d of the summary, %d bytes", version, len(text))
		}
		return err
	}
	if _, err := share(ctx, clients, max(b.n/5, clients), read); err != nil {
		return 0, err
	}
	took, err := share(ctx, clients, b.n, read)
	return perSecond(b.n, took), err
}
