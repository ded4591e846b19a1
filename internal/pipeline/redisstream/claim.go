package redisstream

import (
	"context"
	"fmt"
	"strconv"

	"github.com/redis/rueidis"
)

// claimsByReading says whether XREADGROUP takes over abandoned entries itself.
func (m *Member) claimsByReading() bool { return !m.cfg.Exclusive && m.cfg.Version.AtLeast(hasClaim) }

// readAndClaim takes over abandoned entries and reads new ones, in one command (Redis 8.4 and later).
func (m *Member) readAndClaim(ctx context.Context, count int, wait int64) ([]Entry, bool, error) {
	idle := strconv.FormatInt(m.cfg.ReclaimAfter.Milliseconds(), 10)
	answer := m.client.Do(ctx, m.client.B().Arbitrary("XREADGROUP", "GROUP", m.cfg.Group, m.cfg.Consumer,
		"COUNT", strconv.Itoa(count), "BLOCK", strconv.FormatInt(wait, 10), "CLAIM", idle, "STREAMS").
		Keys(m.cfg.Stream).Args(undelivered).Blocking())
	rows, err := streamRows(answer)
	if rueidis.IsRedisNil(err) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("read stream %q as group %q: %w", m.cfg.Stream, m.cfg.Group, err)
	}
	var claimed []Entry
	var fresh []rueidis.XRangeSlice
	for _, row := range rows {
		slice, deliveries, err := claimRow(row)
		if err != nil {
			return nil, false, fmt.Errorf("read stream %q as group %q: %w", m.cfg.Stream, m.cfg.Group, err)
		}
		if deliveries == 0 {
			fresh = append(fresh, slice)
		} else if slice.FieldValues != nil { // a trimmed one is left to XAUTOCLAIM, which counts it
			claimed = append(claimed, Entry{ID: slice.ID, Fields: slice.FieldValues, Deliveries: int(deliveries) + 1})
		}
	}
	var entries []Entry
	if len(fresh) > 0 {
		// Before the claimed ones are held: after an error all are read again, and what is held would be left out.
		if entries, err = m.holdNew(ctx, fresh); err != nil {
			return nil, false, err
		}
	}
	claimed = m.hold(claimed)
	m.mu.Lock()
	m.counters.Reclaimed += int64(len(claimed))
	m.mu.Unlock()
	return append(claimed, entries...), len(rows) == count, nil
}

// streamRows are the entries of the one stream of an XREADGROUP.
func streamRows(answer rueidis.RedisResult) ([]rueidis.RedisMessage, error) {
	message, err := answer.ToMessage()
	if err != nil {
		return nil, err
	}
	if message.IsMap() {
		streams, err := message.AsMap()
		if err != nil {
			return nil, err
		}
		for _, rows := range streams {
			return rows.ToArray()
		}
		return nil, nil
	}
	streams, err := message.ToArray()
	if err != nil || len(streams) == 0 {
		return nil, err
	}
	pair, err := streams[0].ToArray()
	if err != nil || len(pair) != 2 {
		return nil, fmt.Errorf("unexpected stream of %d parts: %w", len(pair), err)
	}
	return pair[1].ToArray()
}

// claimRow reads an entry and how often it had been delivered before: id, fields, idle time, and that number, which is 0
// for a new entry.
func claimRow(row rueidis.RedisMessage) (slice rueidis.XRangeSlice, deliveries int64, err error) {
	parts, err := row.ToArray()
	if err != nil {
		return slice, 0, err
	}
	if len(parts) != 2 && len(parts) != 4 {
		return slice, 0, fmt.Errorf("unexpected entry of %d parts", len(parts))
	}
	if slice.ID, err = parts[0].ToString(); err != nil {
		return slice, 0, err
	}
	if len(parts) == 4 {
		if deliveries, err = parts[3].AsInt64(); err != nil {
			return slice, 0, err
		}
	}
	fields, err := parts[1].ToArray()
	if rueidis.IsRedisNil(err) {
		return slice, deliveries, nil
	}
	if err != nil {
		return slice, 0, err
	}
	slice.FieldValues = make([]Field, 0, len(fields)/2)
	for i := 0; i+1 < len(fields); i += 2 {
		name, err1 := fields[i].ToString()
		value, err2 := fields[i+1].ToString()
		if err1 != nil || err2 != nil {
			return slice, 0, fmt.Errorf("unexpected field of entry %s", slice.ID)
		}
		slice.FieldValues = append(slice.FieldValues, Field{Field: name, Value: value})
	}
	return slice, deliveries, nil
}
