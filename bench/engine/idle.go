package engine

import (
	"context"
	"fmt"
	"syscall"
	"time"
)

// idle measures how many processors waiting consumers keep busy while nothing is published: the server's and this program's. It lasts as many
// milliseconds as there are messages; then a tenth as many messages, or a few, are published, to see that the consumers did wait.
func (b *bed) idle(ctx context.Context) (map[string]float64, error) {
	const rate = 500
	if err := b.warmUp(ctx, 1, 1, rate, consumers, waitBatch); err != nil {
		return nil, err
	}
	long := time.Duration(b.n) * time.Millisecond
	type outcome struct {
		used map[string]float64
		err  error
	}
	done := make(chan outcome, 1)
	go func() {
		used, err := b.usage(ctx, long)
		done <- outcome{used, err}
	}()
	if _, err := b.flow(ctx, flowPlan{n: min(max(b.n/10, 10), b.n), producers: 1, rate: rate, lead: long + settling}); err != nil {
		return nil, err
	}
	o := <-done
	return o.used, o.err
}

// settling is how long consumers have been waiting before their idleness is measured.
const settling = 200 * time.Millisecond

// usage measures processors for so long, after a moment.
func (b *bed) usage(ctx context.Context, long time.Duration) (map[string]float64, error) {
	if err := sleep(ctx, settling); err != nil {
		return nil, err
	}
	start := time.Now()
	serverBefore, err := b.cpu()
	if err != nil {
		return nil, err
	}
	clientBefore, err := ownTime()
	if err != nil {
		return nil, err
	}
	if err := sleep(ctx, long); err != nil {
		return nil, err
	}
	client, err := ownTime()
	if err != nil {
		return nil, err
	}
	server, err := b.cpu()
	if err != nil {
		return nil, err
	}
	took := time.Since(start).Seconds()
	used := map[string]float64{"idle-client": (client - clientBefore).Seconds() / took}
	if b.postmaster != 0 {
		used["idle-server"] = (server - serverBefore).Seconds() / took
	}
	return used, nil
}

// ownTime is the processor time that this program has used so far.
func ownTime() (time.Duration, error) {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0, fmt.Errorf("read this program's processor time: %w", err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), nil
}
