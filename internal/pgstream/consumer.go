package pgstream

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Message is one message of a stream.
type Message struct {
	Position  int64
	Key       *string
	Headers   []byte // JSON object, nil when there are none
	Payload   []byte // JSON text or raw bytes, by the stream's payload type
	CreatedAt time.Time
	Attempt   int // 1 on the first delivery
}

// Claim is a set of messages that a member holds until ExpiresAt. Its token fences every later verb.
type Claim struct {
	Token     string
	Messages  []Message
	ExpiresAt time.Time // database time
}

// ConsumerConfig configures a Consumer. Zero values mean the defaults named here.
type ConsumerConfig struct {
	Stream, Group string
	Member        string        // unique per process; default: host name plus random suffix
	MaxMessages   int           // per claim; default 1,000, at most 10,000
	Lease         time.Duration // default: the group's ack wait
	PollInterval  time.Duration // fallback when no notification comes; default 1s
	Listener      *Listener     // nil: polling only
	AutoAck       bool          // settle messages as they are received: at most once
	// CallTimeout bounds every round trip of receiving, so that a server that does not answer is an error and not a wait without an end. What has been
	// sent is then not cut short by the caller's ctx, because a claim that was made would be nobody's. 0: as long as ctx lets it.
	CallTimeout time.Duration
}

// facts are what a consumer knows of its stream and group. They are read again every factsAge, because priorities can be added to a stream
// that is being consumed.
type facts struct {
	stream     int32
	mode       Mode
	ackWait    time.Duration
	receiveSQL string
	claimSQL   string // empty where receive alone knows how: priorities, auto-ack (fetch.go)
	fetchSQL   string
	readAt     time.Time
}

const factsAge = 10 * time.Second

// Consumer receives, settles and leaves on behalf of one member. Its methods are safe for concurrent use.
type Consumer struct {
	pool   *pgxpool.Pool
	cfg    ConsumerConfig
	facts  atomic.Pointer[facts]
	waiter waiter

	otherIsolation atomic.Bool // transactions are not READ COMMITTED by themselves here

	backlog atomic.Bool  // the last claim was full, so there is probably more
	lane    atomic.Int64 // of the last claim; 0 before the first, and after one of retries
}

// NewConsumer checks that stream and group exist (ErrNotFound).
func NewConsumer(ctx context.Context, pool *pgxpool.Pool, cfg ConsumerConfig) (*Consumer, error) {
	cfg.MaxMessages = orDefault(cfg.MaxMessages, 1000)
	cfg.PollInterval = orDefault(cfg.PollInterval, time.Second)
	if cfg.Member == "" {
		cfg.Member = memberName()
	}
	c := &Consumer{pool: pool, cfg: cfg, waiter: waiter{pool: pool, listener: cfg.Listener, poll: cfg.PollInterval, limit: cfg.CallTimeout}}
	if err := c.learn(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// learn asks the database what receive depends on. ErrNotFound when there is no such stream or group.
func (c *Consumer) learn(ctx context.Context) error {
	f := &facts{readAt: time.Now()}
	var payloadType PayloadType
	var ackWait int64
	var priorities int
	var hot bool
	// Through JSON, because the previous release has no such column; nor has it functions for each mode. A group with a filter or a policy has nothing to gain
	// from these.
	err := c.pool.QueryRow(ctx, `select s.id, s.payload_type, coalesce((to_jsonb(s) ->> 'priorities')::integer, 1), g.mode, g.ack_wait_ms,
			to_regproc('millrace_engine.receive_shared_' || s.id) is not null and to_regproc('millrace_engine.receive_ordered_' || s.id) is not null
				and to_jsonb(g) ->> 'filter' is null and to_jsonb(g) ->> 'queue_policy' is null
		from millrace_engine.stream s join millrace_engine.consumer_group g on g.stream_id = s.id where s.name = $1 and g.name = $2`,
		c.cfg.Stream, c.cfg.Group).Scan(&f.stream, &payloadType, &priorities, &f.mode, &ackWait, &hot)
	if errors.Is(err, pgx.ErrNoRows) {
		return fmt.Errorf("consumer group %q of stream %q: %w", c.cfg.Group, c.cfg.Stream, ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("consumer group %q of stream %q: %w", c.cfg.Group, c.cfg.Stream, translate(err))
	}
	f.ackWait = time.Duration(ackWait) * time.Millisecond
	payload := "payload"
	if payloadType == PayloadBytes {
		payload = "payload_bytes"
	}
	autoAck := ""
	if c.cfg.AutoAck {
		autoAck = ", true" // the functions of the previous release do not have it
	}
	receive := fmt.Sprintf("receive_%d(", f.stream)
	hot = hot && priorities == 1 && !c.cfg.AutoAck
	switch {
	case priorities > 1:
		receive = fmt.Sprintf("receive_priorities(%d, ", f.stream)
	case hot:
		receive = fmt.Sprintf("receive_%s_%d(", strings.ToLower(string(f.mode)), f.stream)
	}
	// The setting is local to the statement's own transaction, and is made before the function runs because it is the function's argument. (A join with it
	// costs more than the setting.)
	f.receiveSQL = fmt.Sprintf(`select r.claim, r."position", r.key, r.headers, r.%s, r.created_at, r.attempt, r.expires_at
		from millrace_engine.%scase when set_config('synchronous_commit', 'off', true) is not null then $1 end, $2, $3, $4, $5%s) r`,
		payload, receive, autoAck)
	if hot {
		f.claimSQL, f.fetchSQL = fetchStatements(f.stream, c.cfg.Stream, f.mode)
	}
	c.facts.Store(f)
	return nil
}

func memberName() string {
	host, err := os.Hostname()
	if err != nil {
		host = "member"
	}
	var random [4]byte
	_, _ = rand.Read(random[:]) // never fails; crashes the program instead
	return host + "-" + hex.EncodeToString(random[:])
}

// lease is how long a claim of this consumer is held.
func (c *Consumer) lease() time.Duration { return orDefault(c.cfg.Lease, c.facts.Load().ackWait) }

// Member is the name under which this consumer is a member of the group.
func (c *Consumer) Member() string { return c.cfg.Member }

// Receive waits until there is at least one message or ctx ends. No connection is held while it waits.
func (c *Consumer) Receive(ctx context.Context) (*Claim, error) { return c.AckAndReceive(ctx, "") }

// AckAndReceive settles the claim with this token, when it is not empty, and receives the next one, in one round trip when there is
// one. ErrFenced when the claim had ended; nothing is received then.
func (c *Consumer) AckAndReceive(ctx context.Context, token string) (*Claim, error) {
	var claim *Claim
	err := c.waiter.until(ctx, func() topic { return messagesOf(c.facts.Load().stream) }, func() (bool, error) {
		var err error
		claim, err = c.AckAndTryReceive(ctx, token)
		token = "" // settled, or the error says why not
		return claim != nil, err
	})
	return claim, err
}

// TryReceive returns at once; nil when there is nothing to deliver.
func (c *Consumer) TryReceive(ctx context.Context) (*Claim, error) {
	return c.AckAndTryReceive(ctx, "")
}

// AckAndTryReceive settles the claim with this token, when it is not empty, and claims the next messages, in one round trip; nil when there
// are none. ErrFenced when the claim had ended; nothing is received then.
//
// It commits asynchronously: a crash of the server may forget it, and then messages are delivered again, never lost.
func (c *Consumer) AckAndTryReceive(ctx context.Context, token string) (*Claim, error) {
	begun := ctx
	ctx, cancel := limited(ctx, c.cfg.CallTimeout)
	defer cancel()
	if time.Since(c.facts.Load().readAt) > factsAge {
		if err := c.learn(ctx); err != nil {
			return nil, err
		}
	}
	var ack *string
	if token != "" {
		ack = &token
	}
	var lease *int64
	if c.cfg.Lease > 0 {
		ms := c.cfg.Lease.Milliseconds()
		lease = &ms
	}
	conn, err := c.pool.Acquire(ctx)
	if err != nil {
		return nil, fmt.Errorf("receive from group %q: %w", c.cfg.Group, translate(err))
	}
	defer conn.Release()
	if c.cfg.CallTimeout > 0 {
		var cancelSent context.CancelFunc
		ctx, cancelSent = limited(context.WithoutCancel(begun), c.cfg.CallTimeout)
		defer cancelSent()
	}
	receive := c.receive
	if c.fetches(conn) {
		receive = c.claimAndFetch
	}
	claim, err := receive(ctx, conn, lease, ack)
	if err != nil {
		return nil, fmt.Errorf("receive from group %q: %w", c.cfg.Group, translate(err))
	}
	c.remember(claim)
	return claim, nil
}

// receive runs one receive as a transaction of its own, which is the statement itself. Where the role or the database has another isolation
// level by default, it is begun explicitly.
func (c *Consumer) receive(ctx context.Context, conn *pgxpool.Conn, lease *int64, ack *string) (*Claim, error) {
	args := []any{c.cfg.Group, c.cfg.Member, c.cfg.MaxMessages, lease, ack}
	if !c.otherIsolation.Load() {
		rows, _ := conn.Query(ctx, c.facts.Load().receiveSQL, args...)
		claim, err := readClaim(rows)
		if !isIsolation(err) {
			return claim, err
		}
		c.otherIsolation.Store(true)
	}
	var claim *Claim
	err := pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) (err error) {
		rows, _ := tx.Query(ctx, c.facts.Load().receiveSQL, args...)
		claim, err = readClaim(rows)
		return err
	})
	return claim, err
}

func readClaim(rows pgx.Rows) (*Claim, error) {
	defer rows.Close()
	var claim *Claim
	for rows.Next() {
		var m Message
		if claim == nil {
			claim = &Claim{}
			if err := rows.Scan(&claim.Token, &m.Position, &m.Key, &m.Headers, &m.Payload, &m.CreatedAt, &m.Attempt, &claim.ExpiresAt); err != nil {
				return nil, err
			}
		} else if err := rows.Scan(nil, &m.Position, &m.Key, &m.Headers, &m.Payload, &m.CreatedAt, &m.Attempt, nil); err != nil {
			return nil, err
		}
		claim.Messages = append(claim.Messages, m)
	}
	return claim, rows.Err()
}

// Ack settles the whole claim. ErrFenced when it has ended.
func (c *Consumer) Ack(ctx context.Context, token string) error {
	return c.settle(ctx, "ack", "select millrace.ack($1)", token)
}

// AckTx settles the whole claim inside the caller's transaction: effect and ack commit together (exactly once). On ErrFenced the caller
// must roll back.
func (c *Consumer) AckTx(ctx context.Context, tx pgx.Tx, token string) error {
	_, err := tx.Exec(ctx, "select millrace.ack($1)", token)
	return c.wrap("ack", err)
}

// AckMessagesTx settles some messages of a claim inside the caller's transaction. On ErrFenced the caller must roll back.
func (c *Consumer) AckMessagesTx(ctx context.Context, tx pgx.Tx, token string, positions []int64) error {
	_, err := tx.Exec(ctx, "select millrace.ack_messages($1, $2)", token, positions)
	return c.wrap("ack", err)
}

// AckMessages settles some messages of a claim; the last of them settles the claim.
func (c *Consumer) AckMessages(ctx context.Context, token string, positions []int64) error {
	return c.settle(ctx, "ack", "select millrace.ack_messages($1, $2)", token, positions)
}

// Nack gives messages back to be delivered again after delay (negative: the group's backoff), with the reason kept. A message at the group's
// MaxAttempts becomes a dead letter, except with FailureBlock. In a Shared group the rest of the claim stays held. In an Ordered group the claim ends, and
// everything unsettled in it is delivered again in order; with FailurePark it stays held, but for the later messages of the nacked one's key: skip those,
// they come after it.
func (c *Consumer) Nack(ctx context.Context, token string, positions []int64, delay time.Duration, reason string) error {
	var seconds *float64
	if delay >= 0 {
		s := delay.Seconds()
		seconds = &s
	}
	return c.settle(ctx, "nack", "select millrace.nack($1, $2, $3, $4)", token, positions, seconds, reason)
}

// DeadLetter moves messages of a claim to the dead-letter table at once, whatever their attempt; the rest of the claim stays held.
func (c *Consumer) DeadLetter(ctx context.Context, token string, positions []int64, reason string) error {
	return c.settle(ctx, "dead letter", "select millrace.dead_letter($1, $2, $3)", token, positions, reason)
}

// DeadLetterTx is DeadLetter inside the caller's transaction. On ErrFenced the caller must roll back.
func (c *Consumer) DeadLetterTx(ctx context.Context, tx pgx.Tx, token string, positions []int64, reason string) error {
	_, err := tx.Exec(ctx, "select millrace.dead_letter($1, $2, $3)", token, positions, reason)
	return c.wrap("dead letter", err)
}

// Release gives the whole claim back at once without counting an attempt: used on drain.
func (c *Consumer) Release(ctx context.Context, token string) error {
	return c.settle(ctx, "release", "select millrace.release($1)", token)
}

// Extend prolongs the claim to now plus d and returns its new end, in database time.
func (c *Consumer) Extend(ctx context.Context, token string, d time.Duration) (time.Time, error) {
	var ends time.Time
	err := c.pool.QueryRow(ctx, "select millrace.extend($1, $2)", token, d.Seconds()).Scan(&ends)
	return ends, c.wrap("extend", err)
}

// Leave gives up membership and everything still held, so that other members take over at once. Call it after the last settle. When the group was
// dropped meanwhile, there is nothing to leave, and that is no error.
func (c *Consumer) Leave(ctx context.Context) error {
	_, err := c.pool.Exec(ctx, "select millrace.leave($1, $2, $3)", c.cfg.Stream, c.cfg.Group, c.cfg.Member)
	if err := c.wrap("leave", err); !errors.Is(err, ErrNotFound) {
		return err
	}
	return nil
}

func (c *Consumer) settle(ctx context.Context, verb, sql string, args ...any) error {
	_, err := c.pool.Exec(ctx, sql, args...)
	return c.wrap(verb, err)
}

func (c *Consumer) wrap(verb string, err error) error {
	if err != nil {
		return fmt.Errorf("%s in group %s: %w", verb, strconv.Quote(c.cfg.Group), translate(err))
	}
	return nil
}
