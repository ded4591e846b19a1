package pgstream

import (
	"context"
	cryptorand "crypto/rand"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// Reconnecting begins fast, because consumers only poll meanwhile, and ends slow, to leave a server in trouble alone. A listener that hears nothing needs
// a person, so it tries again even more slowly.
const (
	reconnectMin = 100 * time.Millisecond
	reconnectMax = 10 * time.Second
	silentMax    = time.Minute
	// connectTimeout bounds a connection attempt and LISTEN: a network that swallows the answers must not end the attempts.
	connectTimeout = 10 * time.Second
)

// ErrSilent means that LISTEN was accepted, but notifications do not arrive.
var ErrSilent = errors.New("LISTEN is silent")

// Listener holds the one LISTEN connection of a process and wakes its consumers. Everything works without it, by polling; it only makes
// waiting shorter. It listens while it runs, whether or not a consumer waits: an idle LISTEN costs nothing, because publishers notify only
// while somebody is registered to wait (stream_state.sql), and UNLISTEN with every pause would miss what comes in between.
//
// Invariant: a waiter that subscribed before it looked for messages is woken by every notification sent after it looked, and by
// every reconnection, because notifications sent while the connection was down are lost.
type Listener struct {
	// Report, when set before Run, is told when notifications do not arrive though the connection stands (ErrSilent), once until they do again.
	Report func(error)
	// ProbeInterval is for how long nothing may be heard before the listener makes sure that it would hear something. Default 30s. Set it before Run.
	ProbeInterval time.Duration
	// ProbeTimeout is how long a notification of the listener's own may take. Default 5s. Set it before Run.
	ProbeTimeout time.Duration

	cfg *pgx.ConnConfig

	mu      sync.Mutex
	waiting map[string]*subscription // by the notifications' payload
	alive   bool
}

// subscription is what all who wait for one payload share, until it is heard.
type subscription struct {
	wake    chan struct{} // closed to wake
	waiters int
}

// NewListener returns a listener that connects with cfg, which must reach PostgreSQL directly and not through a transaction-pooling
// proxy: LISTEN is silently lost there. The listener notices, and consumers poll.
func NewListener(cfg *pgx.ConnConfig) *Listener {
	return &Listener{cfg: cfg.Copy(), waiting: map[string]*subscription{}}
}

// Run listens until ctx ends, and then returns nil. It reconnects with backoff.
func (l *Listener) Run(ctx context.Context) error {
	l.ProbeInterval = orDefault(l.ProbeInterval, 30*time.Second)
	l.ProbeTimeout = orDefault(l.ProbeTimeout, 5*time.Second)
	pause, silent := reconnectMin, false
	for {
		heard, err := l.listen(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if heard {
			pause, silent = reconnectMin, false
		}
		longest := reconnectMax
		if errors.Is(err, ErrSilent) { // other errors are of a server that is down, and the consumers' own calls tell that
			longest = silentMax
			if !silent && l.Report != nil {
				l.Report(err)
			}
			silent = true
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = min(2*pause, longest)
	}
}

// Alive says whether notifications arrive at present.
func (l *Listener) Alive() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.alive
}

// listen returns when the connection is lost or silent. heard says whether it was good before.
func (l *Listener) listen(ctx context.Context) (heard bool, err error) {
	begin, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	conn, err := pgx.ConnectConfig(begin, l.cfg)
	if err != nil {
		return false, fmt.Errorf("connect to listen: %w", err)
	}
	defer func() {
		l.setAlive(false)
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = conn.Close(closing)
	}()
	if _, err := conn.Exec(begin, "listen millrace"); err != nil {
		return false, fmt.Errorf("listen: %w", err)
	}
	if err := l.probe(ctx, conn); err != nil {
		return false, err
	}
	l.setAlive(true)
	for {
		// Whatever is heard, another listener's probe too, shows that LISTEN works.
		pause := l.ProbeInterval + rand.N(l.ProbeInterval/4+1)
		err := l.wait(ctx, conn, pause)
		if errors.Is(err, errNothing) {
			err = l.probe(ctx, conn)
		}
		if err != nil {
			return true, err
		}
	}
}

// errNothing means that no notification came in time. The connection is as good as before: pgx ends the wait by a read deadline, which loses nothing.
var errNothing = errors.New("no notification came")

// wait waits for one notification, wakes whom it is for, and returns errNothing when none comes.
func (l *Listener) wait(ctx context.Context, conn *pgx.Conn, limit time.Duration) error {
	waiting, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	n, err := conn.WaitForNotification(waiting)
	if err != nil {
		if ctx.Err() == nil && waiting.Err() != nil && !conn.IsClosed() {
			return errNothing
		}
		return fmt.Errorf("wait for a notification: %w", err)
	}
	l.wake(n.Payload)
	return nil
}

// probe makes sure that notifications arrive, and returns ErrSilent when they do not. Through a transaction-pooling proxy, a notification
// that the listener sends itself can arrive with the answer, from the server connection that happened to get both LISTEN and NOTIFY, and no other
// ever would. So behind a proxy, which is known by its own idea of the backend's process id, another connection sends it.
func (l *Listener) probe(ctx context.Context, conn *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, l.ProbeTimeout)
	defer cancel()
	word := "probe:" + cryptorand.Text()
	direct, err := isDirect(ctx, conn, "notify millrace, '"+word+"'; ")
	if err != nil {
		return fmt.Errorf("notify to see whether it is heard: %w", err)
	}
	if !direct {
		word = "probe:" + cryptorand.Text()
		if err := l.notify(ctx, word); err != nil {
			return fmt.Errorf("notify to see whether it is heard: %w", err)
		}
	}
	for {
		n, err := conn.WaitForNotification(ctx)
		switch {
		case err == nil && n.Payload == word:
			return nil
		case err == nil:
			l.wake(n.Payload)
		case !errors.Is(ctx.Err(), context.DeadlineExceeded) || conn.IsClosed():
			return fmt.Errorf("wait for a notification: %w", err)
		case direct:
			return fmt.Errorf("%w: a notification of its own did not arrive within %s. Waiting consumers poll until one does", ErrSilent, l.ProbeTimeout)
		default:
			return fmt.Errorf("%w: the connection goes through a transaction-pooling proxy. Waiting consumers poll; "+
				"give the listener a connection string that reaches PostgreSQL directly, or through a session pool", ErrSilent)
		}
	}
}

// notify notifies through a connection of its own.
func (l *Listener) notify(ctx context.Context, word string) error {
	conn, err := pgx.ConnectConfig(ctx, l.cfg)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	_, err = conn.Exec(ctx, "notify millrace, '"+word+"'")
	return err
}

// setAlive wakes everybody: whatever changed, what was sent meanwhile is not known.
func (l *Listener) setAlive(alive bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.alive = alive
	for payload, s := range l.waiting {
		close(s.wake)
		delete(l.waiting, payload)
	}
}

func (l *Listener) wake(payload string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s, ok := l.waiting[payload]; ok {
		close(s.wake)
		delete(l.waiting, payload)
	}
}

// subscribe returns what the next notification with this payload wakes. Whoever waits no longer unsubscribes it: frames have a payload for each key.
func (l *Listener) subscribe(payload string) *subscription {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, ok := l.waiting[payload]
	if !ok {
		s = &subscription{wake: make(chan struct{})}
		l.waiting[payload] = s
	}
	s.waiters++
	return s
}

func (l *Listener) unsubscribe(payload string, s *subscription) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.waiters--; s.waiters == 0 && l.waiting[payload] == s {
		delete(l.waiting, payload)
	}
}
