package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// claim is a claim at work.
//
// Invariants: a message is settled at most once, and only while the claim is this member's, because its token fences every settling. A claim that nothing was
// settled of singly is settled whole, which is cheap; one that was settled in parts is settled to its end that way. What is left at the end is given back
// without counting an attempt.
type claim struct {
	w        *worker
	token    string
	messages []pgstream.Message
	received trace.SpanContext
	ctx      context.Context // of its handlers; ends when the claim is lost
	cancel   context.CancelCauseFunc
	halt     chan struct{} // closed when nothing more of it is to be handled

	settling sync.Mutex // held while it is settled in parts, so that an ack does not come after the nack that ends the claim

	mu       sync.Mutex
	acked    []int64 // in memory and not yet settled in the database
	left     int     // messages that are not settled, in memory or in the database
	whole    bool    // no message of it was settled singly so far
	failed   []failure
	halted   bool
	lost     bool
	extendAt time.Time
	ends     time.Time // when the lease is over, if it is not extended: by our own clock, which only makes it stop early
}

// failure is a message of an Ordered group that is to be nacked when the claim's other handlers have ended.
type failure struct {
	position int64
	delay    time.Duration
	reason   string
}

func newClaim(w *worker, received *pgstream.Claim) *claim {
	c := &claim{w: w, token: received.Token, messages: received.Messages, left: len(received.Messages), whole: true, halt: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancelCause(w.handling)
	c.extended(time.Now())
	c.received = w.c.tracing.receiving(w, received)
	return c
}

// extended notes that the lease began anew at a time.
func (c *claim) extended(at time.Time) {
	c.extendAt, c.ends = at.Add(c.w.lease/3), at.Add(c.w.lease)
}

// run handles the claim's messages and settles them.
func (c *claim) run() {
	var handlers sync.WaitGroup
	begun := 0
	for _, unit := range c.units() {
		if !c.slot() {
			break
		}
		begun += len(unit)
		handlers.Go(func() {
			defer func() { <-c.w.slots }()
			c.handleUnit(unit)
		})
	}
	c.w.took(len(c.messages) - begun)
	handlers.Wait()
	c.end()
}

// units are what is handled one after the other: in an Ordered group the messages of a key, else each message. They are indexes of messages.
func (c *claim) units() [][]int {
	units := make([][]int, 0, len(c.messages))
	unitOf := map[string]int{}
	for i := range c.messages {
		key := c.messages[i].Key
		if c.w.ordered && key != nil {
			if u, ok := unitOf[*key]; ok {
				units[u] = append(units[u], i)
				continue
			}
			unitOf[*key] = len(units)
		}
		units = append(units, []int{i})
	}
	return units
}

// slot waits for a place for a handler. False when nothing more is to be handled.
func (c *claim) slot() bool {
	select {
	case <-c.w.stopping:
		return false
	case <-c.halt:
		return false
	default:
	}
	select {
	case <-c.w.stopping:
	case <-c.halt:
	case c.w.slots <- struct{}{}:
		return true
	}
	return false
}

func (c *claim) handleUnit(unit []int) {
	for n, i := range unit {
		select {
		case <-c.w.stopping:
			c.w.took(len(unit) - n)
			return
		case <-c.halt:
			c.w.took(len(unit) - n)
			return
		default:
		}
		c.w.took(1)
		if !c.handle(i) {
			c.w.took(len(unit) - n - 1)
			return
		}
	}
}

// handle handles one message and settles it. False when the later messages of its key must not be handled.
func (c *claim) handle(i int) bool {
	m := &c.messages[i]
	d := &Delivery{Stream: c.w.stream, Group: c.w.group, Attempt: m.Attempt, work: c}
	var err error
	d.Message, err = messageOf(m)
	ctx, span := c.w.c.tracing.processing(c.ctx, c.w, d, c.received)
	ended := false
	defer func() {
		if !ended && d.tx != nil { // the handler has ended its goroutine, as a test's FailNow does: its connection must not be lost to the pool
			_ = c.endTx(d, errors.New("the handler did not return"))
		}
	}()
	if err == nil {
		err = c.call(ctx, d)
	}
	ended = true
	result, err := c.settle(ctx, d, err)
	processed(span, result, err)
	return err == nil || result == "dead_lettered"
}

// call runs the handler.
func (c *claim) call(ctx context.Context, d *Delivery) (err error) {
	if t := c.w.o.HandlerTimeout; t > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, t)
		defer cancel()
	}
	defer func() {
		if value := recover(); value != nil {
			err = &panicError{value, string(debug.Stack())}
		}
	}()
	return c.w.handler(ctx, d)
}

// settle settles a message as its handler's error says, and returns what became of it.
func (c *claim) settle(ctx context.Context, d *Delivery, err error) (result string, _ error) {
	if d.tx != nil {
		err = c.endTx(d, err)
	} else if err == nil {
		c.ack(d.Position)
	}
	if err == nil {
		return "acked", nil
	}
	if errors.Is(err, ErrClaimLost) || c.isLost() {
		c.lose()
		return "lost", err
	}
	if c.w.handling.Err() != nil {
		return "released", err // it was told to end: no failure of the message
	}
	var unknown *unknownCommit
	if errors.As(err, &unknown) {
		// Whether the message is settled is not known, and the database decides: what is settled stays so, and what is not comes again.
		c.w.log.Warn("it is not known whether a transaction was committed; the message comes again if not", "position", d.Position, "error", err)
		c.singly(0)
		return "released", err
	}
	return c.fail(ctx, d, err), err
}

// unknownCommit is an error of a commit.
type unknownCommit struct{ err error }

func (e *unknownCommit) Error() string { return e.err.Error() }
func (e *unknownCommit) Unwrap() error { return e.err }

// endTx acks the message in the handler's transaction and commits, or rolls back.
func (c *claim) endTx(d *Delivery, err error) error {
	defer func() { <-c.w.c.transact }()
	// A handler whose ctx has ended may have done its work nevertheless.
	ctx, cancel := c.w.c.limit(context.WithoutCancel(c.ctx))
	defer cancel()
	tx := d.tx.Tx
	if err == nil {
		if err = c.w.engine.AckMessagesTx(ctx, tx, c.token, []int64{d.Position}); err == nil {
			if err = tx.Commit(ctx); err == nil {
				c.singly(1)
				return nil
			}
			if IsTransient(err) {
				err = &unknownCommit{fmt.Errorf("commit the transaction of a delivery: %w", err)}
			}
		}
	}
	_ = tx.Rollback(ctx) // a connection that was lost has rolled back
	return err
}

// fail gives a message back, or sets it aside.
func (c *claim) fail(ctx context.Context, d *Delivery, err error) (result string) {
	reason := storable(err.Error())
	log := c.w.log.With("position", d.Position, "attempt", d.Attempt)
	var panicked *panicError
	if errors.As(err, &panicked) {
		log.Error("a handler panicked", "panic", fmt.Sprint(panicked.value), "stack", panicked.stack)
	}
	var permanent *permanentError
	if errors.As(err, &permanent) {
		log.Error("a message becomes a dead letter", "error", err)
		c.insist(ctx, func(ctx context.Context) error {
			return c.w.engine.DeadLetter(ctx, c.token, []int64{d.Position}, reason)
		})
		return "dead_lettered"
	}
	delay := time.Duration(-1) // the group's backoff
	var later *retryError
	if errors.As(err, &later) {
		delay = later.delay
	}
	log.Log(ctx, slog.LevelWarn, "a handler failed; the message comes again, or becomes a dead letter after the group's last attempt", "error", err)
	if c.w.ordered && !c.w.parks {
		// The claim ends with the nack, so the handlers of its other keys end first.
		c.mu.Lock()
		c.failed = append(c.failed, failure{d.Position, delay, reason})
		c.mu.Unlock()
		c.stop()
		return "nacked"
	}
	c.insist(ctx, func(ctx context.Context) error {
		return c.w.engine.Nack(ctx, c.token, []int64{d.Position}, delay, reason)
	})
	return "nacked"
}

// insist settles a message singly, again and again while the lease lasts. When it does not succeed, the message comes again with the end of the claim.
func (c *claim) insist(ctx context.Context, settle func(ctx context.Context) error) {
	c.singly(0)
	err := c.repeat(ctx, settle)
	switch {
	case err == nil:
		c.singly(1)
	case errors.Is(err, ErrClaimLost):
		c.lose()
	default:
		c.w.log.Warn("a message could not be settled; it comes again", "error", err)
	}
}

// repeat repeats what fails for a passing reason, while the claim is ours.
func (c *claim) repeat(ctx context.Context, settle func(ctx context.Context) error) error {
	ctx = context.WithoutCancel(ctx)
	for pause := troubleMin; ; pause = min(2*pause, troubleMax) {
		call, cancel := c.w.c.limit(ctx)
		err := settle(call)
		cancel()
		if err == nil || !IsTransient(err) {
			return err
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-c.ctx.Done(): // lost, or told to end
			timer.Stop()
			return err
		}
	}
}

// ack settles a message in memory.
func (c *claim) ack(position int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.acked = append(c.acked, position)
	c.left--
}

// singly notes that n messages were settled in the database by themselves, or that it is tried.
func (c *claim) singly(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.whole = false
	c.left -= n
}

// stop keeps the rest of the claim from being handled.
func (c *claim) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.halted {
		c.halted = true
		close(c.halt)
	}
}

// lose stops everything of a claim that is somebody else's by now.
func (c *claim) lose() {
	c.mu.Lock()
	first := !c.lost
	c.lost = true
	c.mu.Unlock()
	if !first {
		return
	}
	c.w.log.Warn("a claim was lost; its messages come again, and their handlers are told to end")
	c.cancel(ErrClaimLost)
	c.stop()
}

func (c *claim) isLost() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lost
}

// keep settles what was acked a while ago, and extends the lease when a third of it is used up.
func (c *claim) keep(ctx context.Context) {
	if c.isLost() {
		return
	}
	now := time.Now()
	defer c.flush(ctx)
	c.mu.Lock()
	due, over := now.After(c.extendAt), now.After(c.ends)
	if due {
		c.extendAt = now.Add(flushInterval * 2) // again, if it fails
	}
	c.mu.Unlock()
	if over {
		c.lose() // others may have it
		return
	}
	if !due {
		return
	}
	call, cancel := context.WithTimeout(ctx, c.w.lease/3)
	defer cancel()
	_, err := c.w.engine.Extend(call, c.token, c.w.lease)
	switch {
	case err == nil:
		c.mu.Lock()
		c.extended(now)
		c.mu.Unlock()
	case errors.Is(err, ErrClaimLost):
		c.mu.Lock()
		settled := c.left == 0
		c.mu.Unlock()
		if !settled { // else it has ended as it should
			c.lose()
		}
	default:
		c.w.log.Debug("a lease could not be extended; trying again", "error", err)
	}
}

// flush settles in the database what is acked in memory, unless that is everything, which is settled whole.
func (c *claim) flush(ctx context.Context) {
	if !c.settling.TryLock() {
		return // its end is settling it
	}
	defer c.settling.Unlock()
	c.mu.Lock()
	acked := c.acked
	if c.lost || len(acked) == 0 || c.whole && c.left == 0 {
		c.mu.Unlock()
		return
	}
	c.acked, c.whole = nil, false
	c.mu.Unlock()
	call, cancel := context.WithTimeout(ctx, c.w.lease/3)
	defer cancel()
	err := c.w.engine.AckMessages(call, c.token, acked)
	switch {
	case errors.Is(err, ErrClaimLost):
		c.lose()
	case err != nil:
		c.mu.Lock()
		c.acked = append(acked, c.acked...)
		c.mu.Unlock()
	}
}

// end settles what is left to settle when no handler is at work any more.
func (c *claim) end() {
	c.settling.Lock()
	defer c.settling.Unlock()
	if c.isLost() {
		return
	}
	c.mu.Lock()
	acked, failed := c.acked, c.failed
	c.acked = nil
	if c.whole && c.left == 0 {
		c.mu.Unlock()
		c.w.finish(c.token)
		return
	}
	c.mu.Unlock()
	ctx := context.WithoutCancel(c.ctx)
	var err error
	if len(acked) > 0 {
		err = c.repeat(ctx, func(ctx context.Context) error { return c.w.engine.AckMessages(ctx, c.token, acked) })
	}
	if err == nil && len(failed) > 0 {
		positions := make([]int64, len(failed))
		for i, f := range failed {
			positions[i] = f.position
		}
		err = c.repeat(ctx, func(ctx context.Context) error {
			return c.w.engine.Nack(ctx, c.token, positions, failed[0].delay, failed[0].reason)
		})
	}
	c.mu.Lock()
	left := c.left
	c.mu.Unlock()
	if err == nil && left > 0 {
		// After a nack of an Ordered group there is often nothing left to give back.
		err = c.repeat(ctx, func(ctx context.Context) error { return c.w.engine.Release(ctx, c.token) })
		if errors.Is(err, ErrClaimLost) {
			err = nil
		}
	}
	switch {
	case errors.Is(err, ErrClaimLost):
		c.lose()
	case err != nil:
		c.w.log.Warn("a claim could not be settled; what is left of it comes again", "error", err)
	}
}

// maxReason is how much of an error's text is kept with a message.
const maxReason = 2000

// storable is a text that PostgreSQL takes.
func storable(text string) string {
	text = strings.ToValidUTF8(strings.ReplaceAll(text, "\x00", ""), "�")
	if len(text) > maxReason {
		text = strings.ToValidUTF8(text[:maxReason], "") + "…"
	}
	return text
}
