package pipeline

import (
	"context"
	_ "embed"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/rueidis"

	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

//go:embed queries/peek_lanes.sql
var peekLanesQuery string

// PeekRedis returns up to max entries of each stream that the group would be given next, or with fromStart the first there are. It is no member of the
// group: nothing moves and nothing becomes pending.
func PeekRedis(ctx context.Context, client rueidis.Client, c *config.Config, fromStart bool, max int) ([]*Item, error) {
	from := redisstream.PeekNext
	if fromStart {
		from = redisstream.PeekFirst
	}
	var items []*Item
	for _, stream := range c.Source.Redis.Streams {
		entries, err := redisstream.Peek(ctx, client, stream, c.Source.Redis.Group, from, max)
		if err != nil {
			return nil, err
		}
		now := time.Now()
		for _, e := range entries {
			items = append(items, &Item{
				ID: e.ID, Stream: stream, Fields: e.Fields, Deliveries: e.Deliveries, Received: now, Created: time.UnixMilli(redisstream.Millis(e.ID)),
			})
		}
	}
	return items, nil
}

// PeekGroup returns up to max messages from the first that the group has not settled, or with fromStart from the first that is left, the highest
// priority first. Nothing is claimed. Messages that the group has settled ahead of others are among them.
func PeekGroup(ctx context.Context, pool *pgxpool.Pool, c *config.Config, fromStart bool, max int) ([]*Item, error) {
	source := c.Source.ConsumerGroup
	if err := schema.Check(ctx, pool); err != nil {
		return nil, err
	}
	var items []*Item
	// Read only, so that the database itself refuses what would change something.
	err := pgx.BeginTxFunc(ctx, pool, pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		lanes, err := peekLanes(ctx, tx, source, fromStart)
		if err != nil {
			return err
		}
		if len(lanes) == 0 {
			return NewConfigurationError("the database has no stream %q; publish to it or create it first, or correct source.consumerGroup.stream", source.Stream)
		}
		for _, l := range lanes {
			if left := max - len(items); left > 0 {
				more, err := l.read(ctx, tx, source.Stream, left)
				if err != nil {
					return err
				}
				items = append(items, more...)
			}
		}
		return nil
	})
	return items, err
}

// peekLane is one priority of a stream, and where to read on.
type peekLane struct {
	Name     string
	Priority int
	Next     int64
	Filter   []byte
}

func peekLanes(ctx context.Context, tx pgx.Tx, source *config.ConsumerGroupSource, fromStart bool) ([]peekLane, error) {
	rows, err := tx.Query(ctx, peekLanesQuery, source.Stream, source.Group, fromStart)
	if err != nil {
		return nil, fmt.Errorf("find the place of group %q: %w", source.Group, err)
	}
	lanes, err := pgx.CollectRows(rows, pgx.RowToStructByPos[peekLane])
	if err != nil {
		return nil, fmt.Errorf("find the place of group %q: %w", source.Group, err)
	}
	return lanes, nil
}

// read returns messages of one priority as a StreamSource would.
func (l *peekLane) read(ctx context.Context, tx pgx.Tx, stream string, max int) ([]*Item, error) {
	rows, err := tx.Query(ctx, `select "position", key, headers, coalesce(convert_to(payload::text, 'UTF8'), payload_bytes), created_at
		from millrace.read($1, $2, $3, null, $4)`, l.Name, l.Next, max, l.Filter)
	if err != nil {
		return nil, fmt.Errorf("read stream %q: %w", l.Name, err)
	}
	now, prefix := time.Now(), ""
	if l.Priority > 0 {
		prefix = fmt.Sprintf("p%d-", l.Priority)
	}
	items, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (*Item, error) {
		it := &Item{Stream: stream, Received: now, Deliveries: 1}
		var payload []byte
		err := row.Scan(&it.Position, &it.Key, &it.Headers, &payload, &it.Created)
		it.ID, it.Payload = prefix+strconv.FormatInt(it.Position, 10), asString(payload)
		return it, err
	})
	if err != nil {
		return nil, fmt.Errorf("read stream %q: %w", l.Name, err)
	}
	return items, nil
}
