package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Handler handles one message. nil acks it. An error gives it back to come again after the group's backoff, with the error's text kept as the reason, and
// after the group's max_attempts it is a dead letter; Permanent and RetryAfter change that for one error. A panic is an error like any other.
//
// ctx ends when the messages are not this consumer's any more (its cause is then ErrClaimLost), after ConsumeOptions.HandlerTimeout, and after
// StopTimeout of a consumer that stops (ErrStopping). It does not end with the ctx of Consume.
type Handler func(ctx context.Context, d *Delivery) error

// ConsumeOptions configure Consume. Zero values mean the defaults named here.
type ConsumeOptions struct {
	// Concurrency is how many handlers work at the same time; default 10. In an Ordered group messages of one key are handled one after the other, whatever
	// this is.
	Concurrency int
	// Batch is how many messages are claimed in one round trip; default 100, at most 10,000. They are this consumer's until they are handled, so fewer are
	// better for handlers that take long.
	Batch int
	// Lease is for how long messages are this consumer's; default: the group's ack wait. It is extended while they wait or are handled, so it need not be as long as
	// a handler takes. It is how long others wait for the messages of a process that died.
	Lease time.Duration
	// Member is this consumer's name in the group; default: the host's name and something random. No two consumers of a group may have one name.
	Member string
	// HandlerTimeout is after how long a handler's ctx ends; default: never.
	HandlerTimeout time.Duration
	// StopTimeout is how long handlers may go on after the ctx of Consume has ended; default 30s. Then their own ctx ends, and their messages are given back
	// without counting an attempt.
	StopTimeout time.Duration
}

// Timing of consumers.
const (
	flushInterval = 100 * time.Millisecond // how long an ack may stay in memory: what a process that is killed handles twice
	abandonAfter  = 5 * time.Second        // how long a handler that has been told to end is waited for
	leaveTimeout  = 5 * time.Second
	minLease      = time.Second
)

// Delivery is a message that is handled.
type Delivery struct {
	Message
	Stream, Group string
	Attempt       int // 1 on the first delivery

	work *claim
	tx   *handlerTx
}

// Tx begins a transaction at READ COMMITTED that belongs to this delivery: when the handler returns nil, the message is acked in it and it is committed, so the
// handler's effect and the ack happen together, exactly once; otherwise it is rolled back. Called again it returns the same transaction.
//
// The transaction keeps the group from giving the message to somebody else only while it is being acked. Keep it short, as any transaction.
func (d *Delivery) Tx(ctx context.Context) (pgx.Tx, error) {
	if d.tx != nil {
		return d.tx, nil
	}
	w := d.work.w
	select {
	case w.c.transact <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	call, cancel := w.c.limit(ctx)
	defer cancel()
	tx, err := w.c.pool.BeginTx(call, pgx.TxOptions{IsoLevel: pgx.ReadCommitted})
	if err != nil {
		<-w.c.transact
		return nil, fmt.Errorf("begin the transaction of a delivery: %w", err)
	}
	d.tx = &handlerTx{tx}
	return d.tx, nil
}

// handlerTx is a transaction whose end is Consume's.
type handlerTx struct{ pgx.Tx }

func (handlerTx) Commit(context.Context) error {
	return errors.New("the transaction of a delivery is committed by Consume, when the handler returns nil")
}

func (handlerTx) Rollback(context.Context) error {
	return errors.New("the transaction of a delivery is rolled back by Consume, when the handler returns an error")
}

// worker is one run of Consume.
type worker struct {
	c             *Client
	engine        *pgstream.Consumer
	stream, group string
	handler       Handler
	o             ConsumeOptions
	ordered       bool
	parks         bool // Ordered, and a message that fails holds up only its key
	lease         time.Duration
	log           *slog.Logger

	stopping <-chan struct{} // the ctx of Consume has ended
	handling context.Context // of handlers
	slots    chan struct{}   // a place for each handler at work
	settled  chan struct{}   // holds a value when a claim was finished since the receiver last looked
	begun    chan struct{}   // holds a value when a handler began since the receiver last looked
	claims   sync.WaitGroup

	mu       sync.Mutex
	open     map[*claim]struct{}
	waiting  int      // messages that were received and are not handled yet
	finished []string // tokens of claims whose messages are all acked, to be settled
	idle     bool     // the receiver waits for messages, so nobody takes finished
}

// Consume receives messages of a consumer group and gives each to the handler, until ctx ends. Then it stops in order: it receives nothing more, waits for its
// handlers (see ConsumeOptions.StopTimeout), settles what they did, gives the rest back, leaves the group, and returns nil, or ErrStopTimeout.
//
// It returns early with ErrNotFound when the stream or group does not exist or is dropped, with ErrLapsed when the group has lapsed, and with whatever keeps it from
// beginning. Trouble that comes later is logged, and it goes on when that is over.
//
// Messages are delivered at least once; with Delivery.Tx, what a handler does in the database is done exactly once. In an Ordered group the messages of a key
// are handled in order, and one that fails holds up the later ones as the group's failure policy says.
func (c *Client) Consume(ctx context.Context, stream, group string, handler Handler, o ConsumeOptions) error {
	o.Concurrency = cmp.Or(max(o.Concurrency, 0), 10)
	o.Batch = cmp.Or(max(o.Batch, 0), 100)
	o.StopTimeout = cmp.Or(max(o.StopTimeout, 0), 30*time.Second)
	listener, unlisten, err := c.listen()
	if err != nil {
		return err
	}
	defer unlisten()
	w, err := c.newWorker(ctx, stream, group, handler, o, listener)
	if err != nil {
		return err
	}
	return w.run(ctx)
}

func (c *Client) newWorker(ctx context.Context, stream, group string, handler Handler, o ConsumeOptions, l *pgstream.Listener) (*worker, error) {
	call, cancel := c.limit(ctx)
	defer cancel()
	info, err := pgstream.DescribeGroup(call, c.pool, stream, group)
	if err != nil {
		return nil, err
	}
	// Told with every claim, so that it and the extensions go by the same lease when the group's ack wait changes.
	lease := max(cmp.Or(o.Lease, info.Spec.AckWait), minLease)
	engine, err := pgstream.NewConsumer(call, c.pool, pgstream.ConsumerConfig{
		Stream: stream, Group: group, Member: o.Member, MaxMessages: o.Batch, Lease: lease, PollInterval: c.o.PollInterval, Listener: l, CallTimeout: c.callTimeout(),
	})
	if err != nil {
		return nil, err
	}
	w := &worker{
		c: c, engine: engine, stream: stream, group: group, handler: handler, o: o, ordered: info.Spec.Mode == pgstream.ModeOrdered,
		lease: lease,
		log:   c.log.With("stream", stream, "group", group, "member", engine.Member()),
		slots: make(chan struct{}, o.Concurrency), settled: make(chan struct{}, 1), begun: make(chan struct{}, 1), open: map[*claim]struct{}{},
	}
	w.parks = w.ordered && info.Spec.FailurePolicy == pgstream.FailurePark
	return w, nil
}

func (w *worker) run(ctx context.Context) error {
	handling, endHandlers := context.WithCancelCause(context.WithoutCancel(ctx))
	defer endHandlers(nil)
	w.handling = handling
	background, endBackground := context.WithCancel(context.WithoutCancel(ctx))
	var upkeep sync.WaitGroup
	upkeep.Go(func() { w.upkeep(background) })
	w.log.Info("consumer started")

	receiving, stop := context.WithCancel(ctx)
	w.stopping = receiving.Done()
	err := w.receive(receiving)
	stop() // also when it ended by itself
	if !w.drain(endHandlers) {
		err = errors.Join(err, ErrStopTimeout)
	}
	endBackground()
	upkeep.Wait()
	// What was finished and not settled is settled here, or comes again.
	leaving, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
	defer cancel()
	w.flush(leaving)
	if lerr := w.engine.Leave(leaving); lerr != nil {
		w.log.Warn("the group could not be left; what is not settled comes again when its lease is over", "error", lerr)
	}
	w.log.Info("consumer stopped")
	return err
}

// drain waits for the handlers; false when they had to be told to end.
func (w *worker) drain(endHandlers context.CancelCauseFunc) bool {
	done := make(chan struct{})
	go func() { w.claims.Wait(); close(done) }()
	timer := time.NewTimer(w.o.StopTimeout)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
	}
	w.log.Warn("handlers are still at work; their contexts end now", "after", w.o.StopTimeout)
	endHandlers(ErrStopping)
	timer.Reset(abandonAfter)
	select {
	case <-done:
	case <-timer.C:
		w.log.Error("handlers do not end, though their contexts have; going on without them")
	}
	return false
}

// receive receives claims and starts them, until ctx ends or there is nothing to be received ever again.
func (w *worker) receive(ctx context.Context) error {
	trouble := trouble{log: w.log}
	for w.room(ctx) {
		received, err := w.next(ctx, &trouble)
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrNotFound), errors.Is(err, ErrLapsed):
			return err
		default:
			trouble.pause(ctx, "receiving failed; trying again", err)
		}
		if received != nil {
			w.start(received)
		}
	}
	return nil
}

// room waits until most of what was received is being handled. False when ctx has ended.
func (w *worker) room(ctx context.Context) bool {
	for {
		w.mu.Lock()
		room := w.waiting < w.o.Concurrency
		w.mu.Unlock()
		if room {
			return ctx.Err() == nil
		}
		select {
		case <-ctx.Done():
			return false
		case <-w.begun:
		}
	}
}

// next receives a claim, and settles a finished one with the same round trip. nil when there may be one later.
func (w *worker) next(ctx context.Context, trouble *trouble) (*pgstream.Claim, error) {
	w.mu.Lock()
	token := ""
	if n := len(w.finished); n > 0 {
		token = w.finished[n-1]
		w.finished = w.finished[:n-1]
	}
	w.mu.Unlock()
	received, err := w.engine.AckAndTryReceive(ctx, token)
	switch {
	case token != "" && errors.Is(err, ErrClaimLost):
		w.lostAcks(err)
		return nil, nil
	case err != nil:
		if token != "" {
			w.later(token)
		}
		return nil, err
	}
	trouble.over("receiving again") // said now, because what follows waits for messages
	if received != nil {
		return received, nil
	}
	w.mu.Lock()
	openClaims, unsettled := len(w.open), len(w.finished)
	held := w.ordered && openClaims > 0
	w.idle = unsettled == 0 && !held
	w.mu.Unlock()
	if unsettled > 0 {
		return nil, nil
	}
	if held {
		return w.receiveUntilSettled(ctx)
	}
	defer func() {
		w.mu.Lock()
		w.idle = false
		w.mu.Unlock()
	}()
	return w.engine.Receive(ctx)
}

// receiveUntilSettled receives what other partitions have. A partition hands out nothing while a claim of it is open, and no notification tells that our own
// settling has opened it again, so the wait ends with that.
func (w *worker) receiveUntilSettled(ctx context.Context) (*pgstream.Claim, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel(nil)
	watching.Go(func() {
		select {
		case <-w.settled:
			cancel(errSettled)
		case <-ctx.Done():
		}
	})
	received, err := w.engine.Receive(ctx) // what it has sent is not cut short
	if received == nil && errors.Is(context.Cause(ctx), errSettled) {
		return nil, nil
	}
	return received, err
}

var errSettled = errors.New("a claim was settled")

func (w *worker) later(tokens ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.finished = append(w.finished, tokens...)
}

func (w *worker) lostAcks(err error) {
	w.log.Warn("a claim had ended before it was settled; its messages come again", "error", err)
}

// start handles a claim in the background.
func (w *worker) start(received *pgstream.Claim) {
	c := newClaim(w, received)
	w.mu.Lock()
	w.open[c] = struct{}{}
	w.waiting += len(received.Messages)
	w.mu.Unlock()
	w.claims.Go(func() {
		defer c.cancel(nil)
		c.run()
		w.mu.Lock()
		delete(w.open, c)
		w.mu.Unlock()
		signal(w.settled)
	})
}

// finish settles a claim whose messages are all acked: now when the receiver waits, and else with its next round trip.
func (w *worker) finish(token string) {
	w.mu.Lock()
	w.finished = append(w.finished, token)
	now := w.idle
	w.mu.Unlock()
	if now {
		w.flush(context.WithoutCancel(w.handling))
	}
}

// upkeep settles what was acked a while ago, and extends leases.
func (w *worker) upkeep(ctx context.Context) {
	ticker := time.NewTicker(flushInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		w.flush(ctx)
		w.mu.Lock()
		open := make([]*claim, 0, len(w.open))
		for c := range w.open {
			open = append(open, c)
		}
		w.mu.Unlock()
		for _, c := range open {
			c.keep(ctx)
		}
	}
}

// flush settles the claims that are finished.
func (w *worker) flush(ctx context.Context) {
	w.mu.Lock()
	finished := w.finished
	w.finished = nil
	w.mu.Unlock()
	for i, token := range finished {
		call, cancel := context.WithTimeout(ctx, w.lease)
		err := w.engine.Ack(call, token)
		cancel()
		if errors.Is(err, ErrClaimLost) {
			w.lostAcks(err)
		} else if err != nil { // trouble that may pass
			w.later(finished[i:]...)
			return
		}
	}
}

// took counts messages that are not waiting any more.
func (w *worker) took(n int) {
	if n == 0 {
		return
	}
	w.mu.Lock()
	w.waiting -= n
	w.mu.Unlock()
	signal(w.begun)
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
