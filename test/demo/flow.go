package main

import (
	"context"
	"errors"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/redis/rueidis"

	"github.com/millrace-dev/millrace/test/scenario"
)

// meters reads how many rows have arrived and how many wait. It keeps its connections for the length of the demo.
type meters struct {
	redis     rueidis.Client
	conn      *pgx.Conn
	positions scenario.Sink
	orders    scenario.Sink
}

// reading is one look at both ways that data takes.
type reading struct {
	positions, orders flow
}

// flow is one way: rows in the table, what no member has been given yet (lag), and what members have and did not settle
// yet (pending), which for Redis includes the undecodable entries that still wait for their last delivery.
type flow struct {
	rows, lag, pending int64
}

func openMeters(ctx context.Context, ns *scenario.Namespace) (*meters, error) {
	options, err := rueidis.ParseURL(ns.RedisURL)
	if err != nil {
		return nil, errors.New("the URL of Redis cannot be read") // its own error would repeat the password
	}
	options.DisableCache = true
	client, err := rueidis.NewClient(options)
	if err != nil {
		return nil, err
	}
	conn, err := pgx.Connect(ctx, ns.DSN)
	if err != nil {
		client.Close()
		return nil, err
	}
	return &meters{redis: client, conn: conn, positions: ns.PositionsSink(), orders: ns.OrdersSink()}, nil
}

func (m *meters) close(ctx context.Context) {
	m.redis.Close()
	_ = m.conn.Close(ctx)
}

func (m *meters) read(ctx context.Context) (reading, error) {
	var r reading
	err := errors.Join(
		m.conn.QueryRow(ctx, "select count(*) from "+m.positions.Table).Scan(&r.positions.rows),
		m.conn.QueryRow(ctx, "select count(*) from "+m.orders.Table).Scan(&r.orders.rows),
		m.conn.QueryRow(ctx, `select coalesce(sum(lag), 0)::bigint, coalesce(sum(in_flight + retrying), 0)::bigint from millrace.stats() where stream = $1 and "group" = $2`,
			m.orders.Stream, m.orders.Group).Scan(&r.orders.lag, &r.orders.pending),
	)
	if err != nil {
		return r, err
	}
	r.positions.lag, r.positions.pending, err = m.redisGroup(ctx)
	return r, err
}

// redisGroup reads lag and pending of the group; zero while there is no such stream or group.
func (m *meters) redisGroup(ctx context.Context) (lag, pending int64, err error) {
	groups, err := m.redis.Do(ctx, m.redis.B().XinfoGroups().Key(m.positions.RedisStream).Build()).ToArray()
	if redisErr, ok := rueidis.IsRedisErr(err); ok && strings.Contains(redisErr.Error(), "no such key") {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	for _, group := range groups {
		info, err := group.AsMap()
		if err != nil {
			return 0, 0, err
		}
		name, waiting, unsettled := info["name"], info["lag"], info["pending"]
		if text, err := name.ToString(); err != nil || text != m.positions.RedisGroup {
			continue
		}
		lag, err := waiting.AsInt64()
		if err != nil && !rueidis.IsRedisNil(err) { // nil: Redis has lost count, after entries were deleted
			return 0, 0, err
		}
		pending, err := unsettled.AsInt64()
		return lag, pending, err
	}
	return 0, 0, nil
}
