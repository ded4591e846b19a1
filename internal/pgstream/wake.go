package pgstream

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// Reconnecting begins fast, because consumers only poll meanwhile, and ends slow, to leave a server in trouble alone.
const (
	reconnectMin = 100 * time.Millisecond
	reconnectMax = 10 * time.Second
)

// Listener holds the one LISTEN connection of a process and wakes its consumers. Everything works without it, by polling; it only makes
// waiting shorter.
//
// Invariant: a waiter that subscribed before it looked for messages is woken by every notification sent after it looked, and by
// every reconnection, because notifications sent while the connection was down are lost.
type Listener struct {
	cfg *pgx.ConnConfig

	mu      sync.Mutex
	waiting map[int32]chan struct{} // by stream id; closed to wake
	alive   bool
}

// NewListener returns a listener that connects with cfg, which must reach PostgreSQL directly and not through a transaction-pooling
// proxy, where LISTEN is silently lost.
func NewListener(cfg *pgx.ConnConfig) *Listener {
	return &Listener{cfg: cfg.Copy(), waiting: map[int32]chan struct{}{}}
}

// Run listens until ctx ends, and then returns nil. It reconnects with backoff.
func (l *Listener) Run(ctx context.Context) error {
	pause := reconnectMin
	for {
		connected, err := l.listen(ctx)
		if ctx.Err() != nil {
			return nil
		}
		_ = err // consumers poll meanwhile; their own calls report a server that is down
		if connected {
			pause = reconnectMin
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = min(2*pause, reconnectMax)
	}
}

// Alive says whether notifications arrive at present.
func (l *Listener) Alive() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.alive
}

func (l *Listener) listen(ctx context.Context) (connected bool, err error) {
	conn, err := pgx.ConnectConfig(ctx, l.cfg)
	if err != nil {
		return false, fmt.Errorf("connect to listen: %w", err)
	}
	defer func() {
		l.setAlive(false)
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = conn.Close(closing)
	}()
	if _, err := conn.Exec(ctx, "listen millrace"); err != nil {
		return false, fmt.Errorf("listen: %w", err)
	}
	l.setAlive(true)
	for {
		n, err := conn.WaitForNotification(ctx)
		if err != nil {
			return true, fmt.Errorf("wait for a notification: %w", err)
		}
		if id, err := strconv.ParseInt(n.Payload, 10, 32); err == nil {
			l.wake(int32(id))
		}
	}
}

// setAlive wakes everybody: whatever changed, what was sent meanwhile is not known.
func (l *Listener) setAlive(alive bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.alive = alive
	for id, ch := range l.waiting {
		close(ch)
		delete(l.waiting, id)
	}
}

func (l *Listener) wake(stream int32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if ch, ok := l.waiting[stream]; ok {
		close(ch)
		delete(l.waiting, stream)
	}
}

// subscribe returns a channel that is closed by the stream's next notification.
func (l *Listener) subscribe(stream int32) <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	ch, ok := l.waiting[stream]
	if !ok {
		ch = make(chan struct{})
		l.waiting[stream] = ch
	}
	return ch
}
