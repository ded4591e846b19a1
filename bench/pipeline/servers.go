package pipeline

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/rueidis"

	"github.com/millrace-dev/millrace/bench/engine"
	"github.com/millrace-dev/millrace/test/env/postgres"
	"github.com/millrace-dev/millrace/test/env/redis"
)

// The schema that every system writes. It stands here and not in a system's file, so that nobody gets another one.
const createTable = `create table positions (device_id text not null, ts timestamptz not null, seq bigint not null, latitude float8, longitude float8,
	altitude integer, angle integer, speed float8, satellites smallint, attributes jsonb, primary key (device_id, ts))`

const (
	streamName = "positions"
	database   = "bench"
)

// Servers are a private PostgreSQL and a private Redis.
type Servers struct {
	Postgres *postgres.Server
	Redis    *redis.Server
	client   rueidis.Client
	db       *pgx.Conn
	ids      struct{ postmaster, redis int }
}

// StartServers starts them. PostgreSQL has the settings of the engine's benchmarks, durability included; Redis keeps nothing on disk.
func StartServers(ctx context.Context) (_ *Servers, err error) {
	s := &Servers{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Stop(context.WithoutCancel(ctx)))
		}
	}()
	if s.Postgres, err = postgres.Start(ctx, postgres.Options{Settings: engine.Settings}); err != nil {
		return s, err
	}
	if s.Redis, err = redis.Start(ctx, redis.Options{}); err != nil {
		return s, err
	}
	if s.client, err = rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{s.Redis.Addr()}, DisableCache: true}); err != nil {
		return s, err
	}
	admin, err := pgx.Connect(ctx, s.Postgres.DSN("postgres"))
	if err != nil {
		return s, err
	}
	defer admin.Close(context.WithoutCancel(ctx))
	if _, err = admin.Exec(ctx, "create database "+database); err != nil {
		return s, err
	}
	if s.db, err = pgx.Connect(ctx, s.Postgres.DSN(database)); err != nil {
		return s, err
	}
	var file string
	if err = s.db.QueryRow(ctx, "select pg_read_file('postmaster.pid')").Scan(&file); err != nil {
		return s, err
	}
	line, _, _ := strings.Cut(file, "\n")
	if s.ids.postmaster, err = strconv.Atoi(strings.TrimSpace(line)); err != nil {
		return s, err
	}
	s.ids.redis, err = s.redisInfo(ctx, "server", "process_id")
	return s, err
}

// DSN is the database of the table.
func (s *Servers) DSN() string { return s.Postgres.DSN(database) }

func (s *Servers) redisInfo(ctx context.Context, section, name string) (int, error) {
	text, err := s.client.Do(ctx, s.client.B().Info().Section(section).Build()).ToString()
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(text) {
		if value, found := strings.CutPrefix(strings.TrimSpace(line), name+":"); found {
			return strconv.Atoi(value)
		}
	}
	return 0, fmt.Errorf("Redis does not tell its %s", name)
}

// Stop stops what was started.
func (s *Servers) Stop(ctx context.Context) error {
	var err error
	if s.client != nil {
		s.client.Close()
	}
	if s.db != nil {
		err = s.db.Close(ctx)
	}
	if s.Redis != nil {
		err = errors.Join(err, s.Redis.Stop(ctx))
	}
	if s.Postgres != nil {
		err = errors.Join(err, s.Postgres.Stop(ctx))
	}
	return err
}

// Describe returns what a reader of the figures has to know of the servers.
func (s *Servers) Describe(ctx context.Context) (map[string]string, error) {
	settings := map[string]string{}
	for _, name := range []string{"server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers", "max_wal_size", "checkpoint_timeout"} {
		var value string
		if err := s.db.QueryRow(ctx, "select current_setting($1)", name).Scan(&value); err != nil {
			return nil, err
		}
		settings[name] = value
	}
	settings["postgres"], _, _ = strings.Cut(settings["server_version"], " ")
	delete(settings, "server_version")
	text, err := s.client.Do(ctx, s.client.B().Info().Section("server").Build()).ToString()
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(text) {
		if version, found := strings.CutPrefix(strings.TrimSpace(line), "redis_version:"); found {
			settings["redis"] = version
		}
	}
	return settings, nil
}

// load replaces the stream by a backlog.
func (s *Servers) load(ctx context.Context, b *Backlog) error {
	if err := s.client.Do(ctx, s.client.B().Del().Key(streamName).Build()).Error(); err != nil {
		return err
	}
	return s.append(ctx, b)
}

// append adds entries to the stream.
func (s *Servers) append(ctx context.Context, b *Backlog) error {
	const together = 2000
	for at := 0; at < len(b.Entries); at += together {
		part := b.Entries[at:min(at+together, len(b.Entries))]
		commands := make(rueidis.Commands, len(part))
		for i := range part {
			commands[i] = s.add(&part[i])
		}
		for _, answer := range s.client.DoMulti(ctx, commands...) {
			if err := answer.Error(); err != nil {
				return fmt.Errorf("add entries: %w", err)
			}
		}
	}
	return nil
}

func (s *Servers) add(e *Entry) rueidis.Completed {
	return s.client.B().Xadd().Key(streamName).Id("*").FieldValue().FieldValue("payload", e.JSON()).Build()
}

// prepare makes an empty table and a group that has read nothing.
func (s *Servers) prepare(ctx context.Context, group string) error {
	for _, sql := range []string{"drop table if exists positions", "checkpoint", createTable} {
		if _, err := s.db.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return s.client.Do(ctx, s.client.B().XgroupCreate().Key(streamName).Group(group).Id("0").Mkstream().Build()).Error()
}

func (s *Servers) dropGroup(ctx context.Context, group string) error {
	return s.client.Do(ctx, s.client.B().XgroupDestroy().Key(streamName).Group(group).Build()).Error()
}

// progress returns how many entries the group has not read yet, and how many are pending.
func (s *Servers) progress(ctx context.Context, group string) (lag, pending int64, err error) {
	groups, err := s.client.Do(ctx, s.client.B().XinfoGroups().Key(streamName).Build()).ToArray()
	if err != nil {
		return 0, 0, err
	}
	for _, g := range groups {
		fields, err := g.AsMap()
		if err != nil {
			return 0, 0, err
		}
		nameField := fields["name"]
		if name, err := nameField.ToString(); err != nil || name != group {
			continue
		}
		lagField, pendingField := fields["lag"], fields["pending"]
		if lag, err = lagField.AsInt64(); err != nil {
			return 0, 0, fmt.Errorf("the group's lag is unknown: %w", err)
		}
		pending, err = pendingField.AsInt64()
		return lag, pending, err
	}
	return 0, 0, fmt.Errorf("the group %s is gone", group)
}

// drained waits until nothing of the stream is unread or pending.
func (s *Servers) drained(ctx context.Context, group string, limit time.Duration, running func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for {
		lag, pending, err := s.progress(ctx, group)
		if err != nil && ctx.Err() == nil {
			return err
		}
		if err == nil && lag == 0 && pending == 0 {
			return nil
		}
		if err := running(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not done within %s: %d entries unread and %d pending", limit, lag, pending)
		case <-poll.C:
		}
	}
}

// check compares the table with what was sent.
func (s *Servers) check(ctx context.Context, distinct int, sum int64) error {
	var rows int
	var got int64
	if err := s.db.QueryRow(ctx, "select count(*), coalesce(sum(seq), 0)::bigint from positions").Scan(&rows, &got); err != nil {
		return err
	}
	if rows != distinct || got != sum {
		return fmt.Errorf("the table has %d rows whose numbers have the sum %d; sent were %d with the sum %d", rows, got, distinct, sum)
	}
	return nil
}
