package pgstream

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// PrefetchConfig configures Messages. Zero values mean the defaults named here.
type PrefetchConfig struct {
	// FlushInterval is how long the ack of a message may stay in memory. A process that is killed has handled at most that much twice;
	// default 100ms.
	FlushInterval time.Duration
}

// Messages hands out one message at a time, for handlers that work like that, at the price of claims: it fetches a claim of up to the consumer's
// MaxMessages ahead of need, and settles it as a whole, together with the next receive, when all of its messages are acked.
//
// Guarantees: as of a claim, so at least once, and in order per key in an Ordered group as long as one goroutine handles its messages. Claims are
// extended while their messages wait or are being handled. What is acked is settled within FlushInterval.
//
// Next may be called by several goroutines. The idea is the prefetch of RabbitMQ and NATS.
type Messages struct {
	c        *Consumer
	cfg      PrefetchConfig
	ctx      context.Context
	cancel   context.CancelFunc
	running  sync.WaitGroup
	flushNow chan struct{} // a claim has nothing left but what flush must settle
	fenced   atomic.Int64

	mu       sync.Mutex
	claims   []*prefetched // in the order of their arrival; the ones before the last may still have messages at work
	finished []string      // tokens of claims whose messages are all acked, to be settled
	fetching bool
	changed  chan struct{} // closed and replaced when there may be something to hand out
	err      error         // of the last fetch, handed to one caller of Next
}

// prefetched is a claim in memory. Guarded by Messages.mu.
type prefetched struct {
	token    string
	messages []Message
	next     int     // of messages, the first that was not handed out
	acked    []int64 // acked and not yet settled in the database
	open     int     // messages that are not settled, in memory or in the database
	whole    bool    // no message of it was settled singly so far
	lost     bool    // it has ended, and is not in Messages.claims any more
	extendAt time.Time
}

// Delivery is one message at work. Settle it with Ack or Nack, once.
type Delivery struct {
	Message
	from  *Messages
	claim *prefetched
}

// Prefetch begins to hand out single messages. Call Stop at the end.
func (c *Consumer) Prefetch(cfg PrefetchConfig) *Messages {
	cfg.FlushInterval = orDefault(cfg.FlushInterval, 100*time.Millisecond)
	m := &Messages{c: c, cfg: cfg, changed: make(chan struct{}), flushNow: make(chan struct{}, 1)}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.running.Go(m.upkeep)
	return m
}

// Next returns the next message, waiting until there is one or ctx ends. An error of the database is returned once and does not end anything: call
// Next again.
func (m *Messages) Next(ctx context.Context) (*Delivery, error) {
	for {
		m.mu.Lock()
		d, changed, err := m.take(), m.changed, m.err
		m.err = nil
		if d == nil || m.ahead() < m.c.cfg.MaxMessages/2 {
			m.fetch()
		}
		m.mu.Unlock()
		if d != nil {
			return d, nil
		}
		if err != nil {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-m.ctx.Done():
			return nil, errors.New("the messages were stopped")
		case <-changed:
		}
	}
}

// take returns the next message in memory, nil when there is none.
func (m *Messages) take() *Delivery {
	for _, c := range m.claims {
		if c.next == len(c.messages) {
			continue
		}
		c.next++
		return &Delivery{Message: c.messages[c.next-1], from: m, claim: c}
	}
	return nil
}

// ahead is how many messages wait in memory.
func (m *Messages) ahead() int {
	n := 0
	for _, c := range m.claims {
		n += len(c.messages) - c.next
	}
	return n
}

// fetch starts a receive in the background, unless one is under way. It settles one finished claim in the same round trip.
func (m *Messages) fetch() {
	if m.fetching || m.ctx.Err() != nil {
		return
	}
	if m.c.facts.Load().mode == ModeOrdered && len(m.claims) > 0 {
		return // its lane has nothing for us while a claim of it is open
	}
	m.fetching = true
	token := ""
	if n := len(m.finished); n > 0 {
		token = m.finished[n-1]
		m.finished = m.finished[:n-1]
	}
	m.running.Go(func() {
		// Not cut short by Stop: whether the ack has happened would not be known.
		once, cancel := context.WithTimeout(context.WithoutCancel(m.ctx), m.c.lease())
		claim, err := m.c.AckAndTryReceive(once, token)
		cancel()
		if err == nil {
			token = ""
			if claim == nil {
				claim, err = m.c.Receive(m.ctx)
			}
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		m.fetching = false
		switch {
		case errors.Is(err, ErrFenced):
			m.fenced.Add(1) // its messages come again
		case err != nil:
			if token != "" {
				m.finished = append(m.finished, token)
			}
			if m.ctx.Err() == nil {
				m.err = err
			}
		default:
			m.claims = append(m.claims, &prefetched{token: claim.Token, messages: claim.Messages, open: len(claim.Messages), whole: true,
				extendAt: time.Now().Add(m.c.lease() / 2)})
		}
		m.wake()
	})
}

func (m *Messages) wake() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// Ack settles the message, in memory at first: within FlushInterval, or with the claim's last message, it is settled in the database.
func (d *Delivery) Ack() {
	m, c := d.from, d.claim
	m.mu.Lock()
	defer m.mu.Unlock()
	c.acked = append(c.acked, d.Position)
	m.settled(c, 1)
}

// settled counts messages of the claim, and finishes it with the last. One that was settled in parts has to be settled to its end that way.
func (m *Messages) settled(c *prefetched, n int) {
	if c.open -= n; c.open > 0 {
		return
	}
	if c.whole && !c.lost {
		m.finished = append(m.finished, c.token)
		c.acked = nil
	}
	if len(c.acked) > 0 && !c.lost {
		select {
		case m.flushNow <- struct{}{}:
		default:
		}
		return
	}
	m.done(c)
}

// done forgets a claim with nothing left in it. An Ordered group may go on only then.
func (m *Messages) done(c *prefetched) {
	m.remove(c)
	if m.c.facts.Load().mode == ModeOrdered {
		m.fetch()
	}
	m.wake()
}

func (m *Messages) remove(c *prefetched) {
	for i := range m.claims {
		if m.claims[i] == c {
			m.claims = append(m.claims[:i:i], m.claims[i+1:]...)
			return
		}
	}
}

// Nack gives the message back to be delivered again after delay (negative: the group's backoff), with the reason kept. In an Ordered group
// everything of its claim that is not acked comes again. ErrFenced when the claim had ended; the message comes again then, too.
func (d *Delivery) Nack(ctx context.Context, delay time.Duration, reason string) error {
	m, c := d.from, d.claim
	m.mu.Lock()
	acked := c.acked
	c.acked = nil
	c.whole = false
	if m.c.facts.Load().mode == ModeOrdered {
		c.lost = true
		m.remove(c)
		defer func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.wake()
		}()
	} else {
		m.settled(c, 1)
	}
	m.mu.Unlock()
	if len(acked) > 0 {
		if err := m.c.AckMessages(ctx, c.token, acked); err != nil {
			return err
		}
	}
	return m.c.Nack(ctx, c.token, []int64{d.Position}, delay, reason)
}

// Fenced is how many claims had ended before their acks reached the database. Their messages are handled again.
func (m *Messages) Fenced() int64 { return m.fenced.Load() }

// upkeep settles what was acked a while ago, and extends the claims that are at work.
func (m *Messages) upkeep() {
	ticker := time.NewTicker(m.cfg.FlushInterval)
	defer ticker.Stop()
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-m.flushNow:
			m.flushWhole()
		case <-ticker.C:
			m.flushWhole()
			m.extend()
		}
	}
}

// flushWhole is a flush that Stop does not cut short: whether an ack has happened would not be known, and acking again would look like a lost claim.
func (m *Messages) flushWhole() {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(m.ctx), m.c.lease())
	defer cancel()
	m.flush(ctx)
}

// flush settles in the database what is acked in memory.
func (m *Messages) flush(ctx context.Context) {
	type part struct {
		claim     *prefetched
		positions []int64
	}
	m.mu.Lock()
	finished := m.finished
	m.finished = nil
	var parts []part
	for _, c := range m.claims {
		if len(c.acked) > 0 {
			parts = append(parts, part{c, c.acked})
			c.acked = nil
			c.whole = false
		}
	}
	m.mu.Unlock()
	for i, token := range finished {
		if err := m.c.Ack(ctx, token); errors.Is(err, ErrFenced) {
			m.fenced.Add(1)
		} else if err != nil { // trouble that may pass: at the next flush
			m.mu.Lock()
			m.finished = append(m.finished, finished[i:]...)
			m.mu.Unlock()
			break
		}
	}
	for _, p := range parts {
		err := m.c.AckMessages(ctx, p.claim.token, p.positions)
		m.mu.Lock()
		switch {
		case errors.Is(err, ErrFenced):
			m.lose(p.claim)
		case err != nil:
			p.claim.acked = append(p.positions, p.claim.acked...)
		case p.claim.open == 0 && len(p.claim.acked) == 0:
			m.done(p.claim)
		}
		m.mu.Unlock()
	}
}

// lose forgets a claim that has ended: what it had in memory is somebody else's.
func (m *Messages) lose(c *prefetched) {
	if c.lost {
		return
	}
	c.lost = true
	m.fenced.Add(1)
	m.remove(c)
	m.wake()
}

// extend prolongs the claims whose lease is half used up.
func (m *Messages) extend() {
	lease := m.c.lease()
	m.mu.Lock()
	var due []*prefetched
	for _, c := range m.claims {
		if time.Now().After(c.extendAt) {
			due = append(due, c)
			c.extendAt = time.Now().Add(lease / 2)
		}
	}
	m.mu.Unlock()
	for _, c := range due {
		if _, err := m.c.Extend(m.ctx, c.token, lease); errors.Is(err, ErrFenced) {
			m.mu.Lock()
			if c.open > 0 { // else it was settled meanwhile
				m.lose(c)
			}
			m.mu.Unlock()
		}
	}
}

// Stop settles what is acked and gives everything else back at once, without counting an attempt. Wait for the handlers before: what they ack later
// is lost and comes again.
func (m *Messages) Stop(ctx context.Context) error {
	m.cancel()
	m.running.Wait()
	m.flush(ctx)
	m.mu.Lock()
	claims := m.claims
	m.claims = nil
	unsettled := len(m.finished)
	m.mu.Unlock()
	var failed []error
	for _, c := range claims {
		if err := m.c.Release(ctx, c.token); err != nil && !errors.Is(err, ErrFenced) {
			failed = append(failed, err)
		}
	}
	if unsettled > 0 && len(failed) == 0 {
		failed = append(failed, errors.New("some acks did not reach the database; their messages come again"))
	}
	return errors.Join(failed...)
}
