package scenario

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/rueidis"
)

// Ledger says what became of everything that was produced.
type Ledger struct {
	Table string

	// What was produced.
	Entries, Valid, Repeated, Undecodable, RolledBack, Rollbacks int

	// What is in the table.
	Rows, Once int
	Missing    []string // valid, and not in the table
	Twice      []string // in the table more than once
	Different  []string // in the table with other content
	Strange    []string // in the table, and never produced
	Undone     []string // in the table, although rolled back

	// What became of undecodable entries.
	Dead, Pending int
	Lost          []string // neither set aside nor pending
	WronglyDead   []string // set aside, although valid
	DeadTwice     []string // set aside more than once

	// Unsettled is the number of valid entries or messages that the source still holds.
	Unsettled int

	redis, stream bool
}

// Err is nil when the ledger is exact: every valid id is one row with its content and nothing else is, every
// undecodable entry is set aside or pending, and the source holds nothing else.
func (l *Ledger) Err() error {
	var wrong []string
	say := func(ids []string, what string) {
		if len(ids) > 0 {
			wrong = append(wrong, fmt.Sprintf("%d %s, such as %s", len(ids), what, strings.Join(ids[:min(3, len(ids))], ", ")))
		}
	}
	say(l.Missing, "are missing")
	say(l.Twice, "are there more than once")
	say(l.Different, "have other content")
	say(l.Strange, "were never produced")
	say(l.Undone, "were rolled back and are there")
	say(l.Lost, "undecodable ones are lost")
	say(l.WronglyDead, "valid ones are dead letters")
	say(l.DeadTwice, "are dead letters more than once")
	if l.Unsettled > 0 {
		wrong = append(wrong, fmt.Sprintf("%d are not settled", l.Unsettled))
	}
	if len(wrong) == 0 {
		return nil
	}
	return fmt.Errorf("the ledger of table %s is not exact: %s", l.Table, strings.Join(wrong, "; "))
}

// String is a small table.
func (l *Ledger) String() string {
	var b strings.Builder
	line := func(what string, n int, note string) {
		if note != "" {
			note = "  " + note
		}
		fmt.Fprintf(&b, "  %-28s %9s%s\n", what, thousands(n), note)
	}
	bad := func(what string, n int) {
		note := ""
		if n > 0 {
			note = "<- must be 0"
		}
		line(what, n, note)
	}
	fmt.Fprintf(&b, "table %s\n", l.Table)
	line("produced", l.Entries, "")
	line("  distinct valid ids", l.Valid, "")
	if l.redis {
		line("  repeats of them", l.Repeated, "")
		line("  undecodable", l.Undecodable, "")
	}
	if l.stream {
		line("rolled back", l.RolledBack, fmt.Sprintf("in %s transactions", thousands(l.Rollbacks)))
	}
	note := ""
	if l.Rows == l.Valid {
		note = "= distinct valid ids"
	}
	line("rows", l.Rows, note)
	line("  ids with exactly one row", l.Once, "")
	bad("  missing", len(l.Missing))
	bad("  more than once", len(l.Twice))
	bad("  other content", len(l.Different))
	bad("  never produced", len(l.Strange))
	if l.stream {
		bad("  rolled back", len(l.Undone))
	}
	if l.redis {
		line("undecodable: dead letters", l.Dead, "")
		line("undecodable: still pending", l.Pending, "")
		bad("undecodable: lost", len(l.Lost))
		bad("dead letters: valid ones", len(l.WronglyDead))
		bad("dead letters: more than once", len(l.DeadTwice))
	}
	bad("not settled", l.Unsettled)
	if l.Err() == nil {
		b.WriteString("  exact\n")
	} else {
		b.WriteString("  NOT EXACT\n")
	}
	return b.String()
}

// Sink is where rows arrive, and the source whose rest is counted.
type Sink struct {
	// DSN of the database, and the table in it.
	DSN, Table string
	// RowsQuery returns id and content of each row.
	RowsQuery string

	// Redis, when its URL is set, is the source.
	RedisURL, RedisStream, RedisGroup string
	// Processor is the name under which dead letters are kept.
	Processor string

	// Stream and Group are the source otherwise.
	Stream, Group string
}

// Ledger compares what was produced so far with what there is now.
func (s Sink) Ledger(ctx context.Context, produced *Produced) (*Ledger, error) {
	l, err := s.ledger(ctx, produced.snapshot())
	if err != nil {
		return nil, fmt.Errorf("take the ledger of table %s: %w", s.Table, err)
	}
	return l, nil
}

func (s Sink) ledger(ctx context.Context, p *Produced) (*Ledger, error) {
	l := &Ledger{
		Table: s.Table, Entries: p.entries, Valid: len(p.valid), Undecodable: len(p.undecodable),
		RolledBack: len(p.rolledBack), Rollbacks: p.rollbacks, redis: s.RedisURL != "", stream: s.Stream != "",
	}
	l.Repeated = l.Entries - l.Valid - l.Undecodable
	conn, err := pgx.Connect(ctx, s.DSN)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	// The source first: what it hands over meanwhile is found in the table then, and not the other way round.
	pending := map[string]struct{}{}
	switch {
	case l.redis:
		pending, err = s.pendingInRedis(ctx)
	case l.stream:
		l.Unsettled, err = s.backlog(ctx, conn)
	}
	if err != nil {
		return nil, err
	}
	if err := l.countRows(ctx, conn, s.RowsQuery, p); err != nil {
		return nil, err
	}
	if l.redis {
		if err := l.countUndecodable(ctx, conn, s, p, pending); err != nil {
			return nil, err
		}
	}
	return l, nil
}

func (l *Ledger) countRows(ctx context.Context, conn *pgx.Conn, query string, p *Produced) error {
	rows, err := conn.Query(ctx, query)
	if err != nil {
		return err
	}
	seen := make(map[string]int, len(p.valid))
	var id, content string
	_, err = pgx.ForEachRow(rows, []any{&id, &content}, func() error {
		l.Rows++
		seen[id]++
		switch want, ok := p.valid[id]; {
		case !ok && has(p.rolledBack, id):
			l.Undone = append(l.Undone, id)
		case !ok:
			l.Strange = append(l.Strange, id)
		case want.content != content:
			l.Different = append(l.Different, fmt.Sprintf("%s (%s instead of %s)", id, content, want.content))
		}
		if seen[id] == 2 {
			l.Twice = append(l.Twice, id)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for id := range p.valid {
		switch seen[id] {
		case 0:
			l.Missing = append(l.Missing, id)
		case 1:
			l.Once++
		}
	}
	slices.Sort(l.Missing)
	return nil
}

func (l *Ledger) countUndecodable(ctx context.Context, conn *pgx.Conn, s Sink, p *Produced, pending map[string]struct{}) error {
	var there bool
	if err := conn.QueryRow(ctx, "select to_regclass('public.millrace_dead_letter') is not null").Scan(&there); err != nil {
		return err
	}
	dead := map[string]struct{}{}
	if there {
		rows, err := conn.Query(ctx, "select entry_id from millrace_dead_letter where processor = $1 and stream = $2", s.Processor, s.RedisStream)
		if err != nil {
			return err
		}
		var id string
		_, err = pgx.ForEachRow(rows, []any{&id}, func() error {
			switch {
			case has(dead, id):
				l.DeadTwice = append(l.DeadTwice, id)
			case !has(p.undecodable, id):
				l.WronglyDead = append(l.WronglyDead, id)
			}
			dead[id] = struct{}{}
			return nil
		})
		if err != nil {
			return err
		}
	}
	for id := range pending {
		if !has(p.undecodable, id) {
			l.Unsettled++
		}
	}
	for _, id := range sorted(p.undecodable) {
		switch {
		case has(dead, id):
			l.Dead++
		case has(pending, id):
			l.Pending++
		default:
			l.Lost = append(l.Lost, id)
		}
	}
	return nil
}

// pendingInRedis returns the ids that the group has not settled: delivered and not acknowledged, or not delivered yet.
func (s Sink) pendingInRedis(ctx context.Context) (map[string]struct{}, error) {
	client, err := openRedis(s.RedisURL)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	pending := map[string]struct{}{}
	const size = 10_000
	for start := "-"; ; {
		page, err := client.Do(ctx, client.B().Xpending().Key(s.RedisStream).Group(s.RedisGroup).Start(start).End("+").Count(size).Build()).ToArray()
		if re, ok := rueidis.IsRedisErr(err); ok && strings.HasPrefix(re.Error(), "NOGROUP") {
			break // no group yet: nothing is delivered
		}
		if err != nil {
			return nil, fmt.Errorf("list what is pending in Redis: %w", err)
		}
		for _, row := range page {
			columns, err := row.ToArray()
			if err != nil || len(columns) == 0 {
				return nil, errors.Join(errors.New("list what is pending in Redis: unexpected answer"), err)
			}
			id, err := columns[0].ToString()
			if err != nil {
				return nil, err
			}
			pending[id], start = struct{}{}, "("+id
		}
		if len(page) < size {
			break
		}
	}
	return pending, s.undelivered(ctx, client, pending)
}

// undelivered adds what lies behind the last entry that the group was given.
func (s Sink) undelivered(ctx context.Context, client rueidis.Client, pending map[string]struct{}) error {
	groups, err := client.Do(ctx, client.B().XinfoGroups().Key(s.RedisStream).Build()).ToArray()
	if re, ok := rueidis.IsRedisErr(err); ok && strings.Contains(re.Error(), "no such key") {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the groups of the Redis stream: %w", err)
	}
	from := "-"
	for _, g := range groups {
		info, err := g.AsStrMap()
		if err != nil {
			return err
		}
		if info["name"] == s.RedisGroup {
			from = "(" + info["last-delivered-id"]
		}
	}
	const size = 10_000
	for {
		entries, err := client.Do(ctx, client.B().Xrange().Key(s.RedisStream).Start(from).End("+").Count(size).Build()).AsXRange()
		if err != nil && !rueidis.IsRedisNil(err) {
			return fmt.Errorf("read the Redis stream: %w", err)
		}
		for _, e := range entries {
			pending[e.ID], from = struct{}{}, "("+e.ID
		}
		if len(entries) < size {
			return nil
		}
	}
}

// backlog is what the consumer group has still to do.
func (s Sink) backlog(ctx context.Context, conn *pgx.Conn) (int, error) {
	var n int
	err := conn.QueryRow(ctx, "select lag + in_flight + retrying + dead_letters from millrace.stats() where stream = $1 and \"group\" = $2", s.Stream, s.Group).Scan(&n)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, fmt.Errorf("stream %q has no group %q", s.Stream, s.Group)
	}
	return n, err
}

// Await takes the ledger again and again until it is exact. At the deadline, or when time cannot heal what is wrong, it
// returns the last one with its Err.
func (s Sink) Await(ctx context.Context, produced *Produced, patience time.Duration) (*Ledger, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var last *Ledger
	for {
		l, err := s.Ledger(ctx, produced)
		if err == nil {
			last, err = l, l.Err()
		}
		if err == nil || l != nil && len(l.Twice)+len(l.Different)+len(l.Undone) > 0 {
			return last, err
		}
		// Reading every row takes a good part of a second of the CPU that the pods want.
		const pause = 2 * time.Second
		select {
		case <-ctx.Done():
			return last, fmt.Errorf("after %s: %w", patience, err)
		case <-time.After(pause):
		}
	}
}

func has(ids map[string]struct{}, id string) bool {
	_, ok := ids[id]
	return ok
}

// thousands writes 12345 as 12,345.
func thousands(n int) string {
	text := strconv.Itoa(n)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
