package client

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// listening is the one LISTEN connection of a client, and its scout. They run while somebody consumes or tails. Guarded by Client.mu.
type listening struct {
	users    int
	listener *pgstream.Listener
	stop     func()
}

// listen returns the client's listener. done says that it is not needed any more.
func (c *Client) listen() (l *pgstream.Listener, done func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, nil, errClosed
	}
	s := &c.listening
	if s.users++; s.users == 1 {
		s.listener = pgstream.NewListener(c.listenConfig())
		s.listener.Report = func(err error) {
			c.log.Warn("notifications do not arrive; messages are found by polling", "error", err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		var running sync.WaitGroup
		running.Go(func() { _ = s.listener.Run(ctx) })
		if c.o.Scout {
			running.Go(func() { pgstream.RunScout(ctx, c.pool, pgstream.ScoutConfig{}, c.scouted) })
		}
		s.stop = func() { cancel(); running.Wait() }
	}
	return s.listener, sync.OnceFunc(c.unlisten), nil
}

func (c *Client) unlisten() {
	c.mu.Lock()
	s := &c.listening
	stop := func() {}
	if s.users--; s.users == 0 {
		stop = s.stop
	}
	c.mu.Unlock()
	stop()
}

// listenConfig is the pool's. Where the pool asks for a password with every connection, so does the listener: the hook gets the copy that a connection is made of,
// before it is used for the login.
func (c *Client) listenConfig() *pgx.ConnConfig {
	if c.o.Listen != nil {
		return c.o.Listen
	}
	pool := c.pool.Config()
	cfg := pool.ConnConfig
	if before := pool.BeforeConnect; before != nil {
		own := cfg.Copy()
		cfg.AfterNetConnect = func(ctx context.Context, login *pgconn.Config, conn net.Conn) (net.Conn, error) {
			fresh := own.Copy()
			err := before(ctx, fresh)
			login.User, login.Password = fresh.User, fresh.Password
			return conn, err
		}
	}
	return cfg
}

func (c *Client) scouted(err error) {
	var z *pgstream.Zombie
	if errors.As(err, &z) {
		c.log.Warn("a transaction kept messages from others", "stream", z.Stream, "group", z.Group, "ended", z.Ended, "cause", z.Error())
		return
	}
	c.log.Warn("the scout failed; trying again", "error", err)
}

// Pauses after trouble: short at first, because most trouble passes at once, and then longer, to leave a server alone that is starting.
const (
	troubleMin = 100 * time.Millisecond
	troubleMax = 10 * time.Second
)

// trouble paces the attempts of one loop, and logs the first failure and the recovery.
type trouble struct {
	log   *slog.Logger
	delay time.Duration // 0: none at present
}

func (t *trouble) pause(ctx context.Context, what string, err error) {
	if t.delay == 0 {
		t.log.Warn(what, "error", err)
	}
	t.delay = min(max(2*t.delay, troubleMin), troubleMax)
	timer := time.NewTimer(t.delay/2 + rand.N(t.delay/2+1))
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

func (t *trouble) over(what string) {
	if t.delay > 0 {
		t.log.Info(what)
	}
	t.delay = 0
}
