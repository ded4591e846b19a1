package pgstream

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// In a backlog, claims of an Ordered group, and large ones of a Shared group, are made and read by two transactions in one round trip: the first claims and
// commits, the second reads what was claimed. So the group's receive lock is held for microseconds and never while messages travel to a slow member, and the
// messages come from the table and not through a function's result, which stores them once more. Members of an Ordered group do not wait for each other at all.
//
// The reading statement cannot know what the claiming one will answer, because both are sent at once. It finds the claim by its nonce, which is the
// client's own choice here; when there is none it reads nothing, and the client calls receive.
//
// Between the two a claim can only be lost as any claim of a slow member: it expires, and is handed out again.

// fetchFrom is the size of a claim of a Shared group from which that is faster than receive.
const fetchFrom = 50

// fetchStatements returns the SQL that claims, and the SQL that reads. A planner that has no statistics yet, or those of an emptied table, would read
// whole segments: the reading statement is planned and run under fetchSettings.
func fetchStatements(stream int32, name string, mode Mode) (claim, fetch string) {
	function, arguments, messages, lane, slots := fmt.Sprintf("claim_next(%d, 'millrace_engine.position_%[1]d', ", stream), "", "r.high - r.low", "", ""
	if mode == ModeOrdered {
		function, arguments, messages = fmt.Sprintf("claim_ordered_%d(", stream), ", $7, false", "r.messages"
		lane = "join millrace_engine.lane l on l.id = $1"
		slots = `and (millrace_engine.slot(x.key, x."position") - l.slot_low) & 1023 < l.slot_high - l.slot_low`
	}
	claim = fmt.Sprintf(`select r.claim, r.low, r.high, %s, r.expires_at
		from millrace_engine.%scase when set_config('synchronous_commit', 'off', true) is not null then $1 end, $2, $3, $4, $5, $6%s) r
		where r.low is not null`, messages, function, arguments)
	fetch = fmt.Sprintf(`select m."position", m.key, m.headers, m.payload, m.created_at
		from (select c.low, c.high, c.nonce from millrace_engine.claim c where c.lane_id = $1 order by c.claim desc limit 64) c %s,
			lateral (select * from millrace.%s x where x."position" > c.low and x."position" <= c.high %s order by x."position") m
		where c.nonce = $2`, lane, pgx.Identifier{name}.Sanitize(), slots)
	return claim, fetch
}

const fetchSettings = `select set_config('plan_cache_mode', 'force_generic_plan', true), set_config('enable_seqscan', 'off', true),
	set_config('enable_bitmapscan', 'off', true), set_config('enable_sort', 'off', true), set_config('enable_hashjoin', 'off', true),
	set_config('enable_mergejoin', 'off', true), set_config('enable_material', 'off', true)`

// fetches says whether the next claim is to be made by claimAndFetch. Without prepared statements, as before some poolers, receive is better.
func (c *Consumer) fetches(conn *pgxpool.Conn) bool {
	f := c.facts.Load()
	return (f.mode == ModeOrdered || c.cfg.MaxMessages >= fetchFrom) && c.backlog.Load() && c.lane.Load() != 0 && f.claimSQL != "" && !c.otherIsolation.Load() &&
		conn.Conn().Config().DefaultQueryExecMode == pgx.QueryExecModeCacheStatement
}

// remember notes what the next claim depends on.
func (c *Consumer) remember(claim *Claim) {
	if claim == nil {
		c.backlog.Store(false)
		return
	}
	c.backlog.Store(len(claim.Messages) > c.cfg.MaxMessages/2)
	c.lane.Store(laneOf(claim.Token))
}

// laneOf returns the lane in a token, 0 when it has none.
func laneOf(token string) int64 {
	parts := strings.SplitN(token, ".", 3)
	if len(parts) < 3 {
		return 0
	}
	lane, _ := strconv.ParseInt(parts[1], 10, 64) // 0 when it is no number
	return lane
}

// claimAndFetch claims and reads, or lets receive decide. An error after the claim was made gives it back, and the connection to the pool.
func (c *Consumer) claimAndFetch(ctx context.Context, conn *pgxpool.Conn, lease *int64, ack *string) (*Claim, error) {
	f := c.facts.Load()
	claim, made, err := c.pipeline(ctx, conn, f, lease, ack)
	var refused *pgconn.PgError
	if claim == nil && errors.As(err, &refused) {
		// As with the previous release's functions, or when a statement has become stale. Receive will do, or say what is wrong.
		c.backlog.Store(false)
		err = deallocate(ctx, conn, f.claimSQL, fetchSettings, f.fetchSQL)
	}
	missing := err == nil && claim != nil && int64(len(claim.Messages)) < made.messages
	if missing && f.mode == ModeShared {
		// Positions that rollbacks left empty. The claim must know of them, to be settled when all its messages are.
		_, err = conn.Exec(ctx, fmt.Sprintf("select millrace_engine.note_claimed_%d($1, $2, $3, $4)", f.stream), claim.Token, made.low, made.high, len(claim.Messages))
	}
	switch {
	case missing && f.mode == ModeOrdered:
		// They were counted, and removed since by retention. Receive knows what that means.
		if _, err := conn.Exec(ctx, "select millrace.release($1)", claim.Token); err != nil {
			return nil, err
		}
		return c.receive(ctx, conn, lease, nil)
	case err != nil && claim != nil:
		// First the connection: the pool may have no other, or all that have one may be here.
		conn.Release()
		_, _ = c.pool.Exec(ctx, "select millrace.release($1)", claim.Token) // or it expires
		return nil, err
	case err != nil:
		return nil, err
	case made.nothing:
		return nil, nil
	case claim == nil:
		return c.receive(ctx, conn, lease, ack)
	case len(claim.Messages) == 0:
		return c.receive(ctx, conn, lease, nil) // its positions are all empty; it is settled, and has settled the one before
	}
	return claim, nil
}

// made is the range of a claim, and the number of messages that it was made for; or that nothing is there.
type made struct {
	low, high, messages int64
	nothing             bool
}

// pipeline sends both transactions at once and reads the answers.
func (c *Consumer) pipeline(ctx context.Context, conn *pgxpool.Conn, f *facts, lease *int64, ack *string) (claim *Claim, m made, err error) {
	var statements [3]*pgconn.StatementDescription
	for i, sql := range []string{f.claimSQL, fetchSettings, f.fetchSQL} {
		// Prepare remembers what it has prepared on this connection.
		if statements[i], err = conn.Conn().Prepare(ctx, sql, sql); err != nil {
			return nil, m, err
		}
	}
	nonce := strconv.AppendInt(nil, rand.Int64N(999_999_999_999_999)+1, 10)
	args := [][]byte{[]byte(c.cfg.Group), []byte(c.cfg.Member), strconv.AppendInt(nil, int64(c.cfg.MaxMessages), 10), nil, nil, nonce}
	if lease != nil {
		args[3] = strconv.AppendInt(nil, *lease, 10)
	}
	if ack != nil {
		args[4] = []byte(*ack)
	}
	lane := strconv.AppendInt(nil, c.lane.Load(), 10)
	if f.mode == ModeOrdered {
		args = append(args, lane)
	}
	const text, bin = pgx.TextFormatCode, pgx.BinaryFormatCode
	p := conn.Conn().PgConn().StartPipeline(ctx)
	p.SendQueryPrepared(statements[0].Name, args, nil, []int16{text, bin, bin, bin, bin})
	p.SendPipelineSync() // commits
	p.SendQueryPrepared(statements[1].Name, nil, nil, nil)
	p.SendQueryPrepared(statements[2].Name, [][]byte{lane, nonce}, nil,
		[]int16{bin, text, text, payloadFormat(statements[2]), bin})
	if err = p.Sync(); err == nil {
		claim, m, err = readPipeline(p)
	}
	return claim, m, errors.Join(err, p.Close())
}

func deallocate(ctx context.Context, conn *pgxpool.Conn, statements ...string) error {
	var errs error
	for _, sql := range statements {
		errs = errors.Join(errs, conn.Conn().Deallocate(ctx, sql))
	}
	return errs
}

func payloadFormat(fetch *pgconn.StatementDescription) int16 {
	const bytea = 17
	if fetch.Fields[3].DataTypeOID == bytea {
		return pgx.BinaryFormatCode
	}
	return pgx.TextFormatCode
}

// readPipeline reads the answers: the claim, the settings, the messages.
func readPipeline(p *pgconn.Pipeline) (claim *Claim, m made, err error) {
	for answer := 0; ; {
		results, err := p.GetResults()
		if err != nil || results == nil {
			return claim, m, err
		}
		reader, ok := results.(*pgconn.ResultReader)
		if !ok {
			continue // a transaction's end
		}
		for reader.NextRow() {
			values := reader.Values()
			switch answer {
			case 0:
				if values[0] == nil {
					m.nothing = true
					continue
				}
				claim = &Claim{Token: string(values[0]), ExpiresAt: binaryTime(values[4])}
				m = made{low: binaryInt(values[1]), high: binaryInt(values[2]), messages: binaryInt(values[3])}
				claim.Messages = make([]Message, 0, m.messages)
			case 2:
				claim.Messages = append(claim.Messages, fetched(values))
			}
		}
		if _, err := reader.Close(); err != nil {
			return claim, m, err
		}
		answer++
	}
}

// fetched copies a row, which the connection's buffer holds only until the next. One allocation has all of a message.
func fetched(values [][]byte) Message {
	m := Message{Position: binaryInt(values[0]), CreatedAt: binaryTime(values[4]), Attempt: 1}
	all := slices.Concat(values[2], values[3])
	if values[1] != nil {
		key := string(values[1])
		m.Key = &key
	}
	if n := len(values[2]); values[2] != nil {
		m.Headers = all[:n:n]
	}
	m.Payload = all[len(values[2]):]
	return m
}

func binaryInt(b []byte) int64 { return int64(binary.BigEndian.Uint64(b)) }

// binaryTime reads a timestamptz: microseconds since 2000.
func binaryTime(b []byte) time.Time {
	const epoch = 946684800 * 1_000_000
	return time.UnixMicro(binaryInt(b) + epoch)
}
