package operator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/bench/engine"
	"github.com/millrace-dev/millrace/bench/proc"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// Server is a private PostgreSQL with durability as by default, which counts statements.
type Server struct {
	postgres   *postgres.Server
	admin      *pgx.Conn
	postmaster int
	databases  int
}

// StartServer starts it.
func StartServer(ctx context.Context) (_ *Server, err error) {
	settings := maps.Clone(engine.Settings)
	maps.Copy(settings, map[string]string{
		"shared_preload_libraries": "pg_stat_statements", "pg_stat_statements.max": "20000", "pg_stat_statements.track_utility": "on",
		"autovacuum_naptime": "1min", // the default: nothing is published here
	})
	s := &Server{}
	if s.postgres, err = postgres.Start(ctx, postgres.Options{Settings: settings}); err != nil {
		return nil, fmt.Errorf("%w\nThe benchmark needs the extension pg_stat_statements, which comes with PostgreSQL's contrib modules", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Stop(context.WithoutCancel(ctx)))
		}
	}()
	if s.admin, err = pgx.Connect(ctx, s.postgres.DSN("postgres")); err != nil {
		return nil, err
	}
	if _, err = s.admin.Exec(ctx, "create extension pg_stat_statements"); err != nil {
		return nil, err
	}
	var file string
	if err = s.admin.QueryRow(ctx, "select pg_read_file('postmaster.pid')").Scan(&file); err != nil {
		return nil, err
	}
	line, _, _ := strings.Cut(file, "\n")
	s.postmaster, err = strconv.Atoi(strings.TrimSpace(line))
	return s, err
}

// Stop ends it and removes its files.
func (s *Server) Stop(ctx context.Context) error {
	var err error
	if s.admin != nil {
		err = s.admin.Close(ctx)
	}
	return errors.Join(err, s.postgres.Stop(ctx))
}

// database makes an empty database and returns its name.
func (s *Server) database(ctx context.Context) (string, error) {
	s.databases++
	name := fmt.Sprintf("millrace_bench_%d", s.databases)
	_, err := s.admin.Exec(ctx, "create database "+name+" template template0")
	return name, err
}

func (s *Server) drop(ctx context.Context, name string) error {
	_, err := s.admin.Exec(ctx, "drop database if exists "+name+" with (force)")
	return err
}

// load is what a database has had to do, counted from some beginning.
type load struct {
	transactions, statements float64
	executing                time.Duration // of statements
	cpu                      time.Duration // of the whole server
}

// load reads it. The statements are those of clients; what functions do inside is in their time.
func (s *Server) load(ctx context.Context, database string) (l load, err error) {
	var ms float64
	if err := s.admin.QueryRow(ctx, `select d.xact_commit + d.xact_rollback,
			coalesce((select sum(p.calls) from pg_stat_statements p where p.dbid = d.datid), 0),
			coalesce((select sum(p.total_exec_time) from pg_stat_statements p where p.dbid = d.datid), 0)
		from pg_stat_database d where d.datname = $1`, database).Scan(&l.transactions, &l.statements, &ms); err != nil {
		return l, fmt.Errorf("read the database's statistics: %w", err)
	}
	l.executing = time.Duration(ms * float64(time.Millisecond))
	l.cpu, err = proc.CPU(s.postmaster)
	return l, err
}

// top are the statements that took the most time since they were counted anew, for whoever looks for causes.
func (s *Server) top(ctx context.Context, database string) ([]string, error) {
	rows, err := s.admin.Query(ctx, `select format('%10s calls %10s ms  %s', p.calls, round(p.total_exec_time::numeric, 1), left(regexp_replace(p.query, '\s+', ' ', 'g'), 150))
		from pg_stat_statements p join pg_database d on d.oid = p.dbid where d.datname = $1 order by p.total_exec_time desc limit 12`, database)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

func (s *Server) reset(ctx context.Context) error {
	_, err := s.admin.Exec(ctx, "select pg_stat_statements_reset()")
	return err
}

// connections are those of the manager to a database.
func (s *Server) connections(ctx context.Context, database string) (n int, err error) {
	err = s.admin.QueryRow(ctx, "select count(*) from pg_stat_activity where datname = $1 and application_name = 'millrace-manager'", database).Scan(&n)
	return n, err
}

// count checks what the manager says against what is in the database.
func (s *Server) count(ctx context.Context, database string) (streams, groups int, err error) {
	conn, err := pgx.Connect(ctx, s.postgres.DSN(database))
	if err != nil {
		return 0, 0, err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	err = conn.QueryRow(ctx, `select (select count(*) from millrace_engine.stream s where s.owner is not null and to_regclass(format('millrace.%I', s.name)) is not null),
		(select count(*) from millrace_engine.consumer_group g where g.owner is not null)`).Scan(&streams, &groups)
	return streams, groups, err
}

// Describe returns what a reader of the figures has to know of the server.
func (s *Server) Describe(ctx context.Context) (map[string]string, error) {
	settings := map[string]string{}
	for _, name := range []string{"server_version", "fsync", "synchronous_commit", "shared_buffers"} {
		var value string
		if err := s.admin.QueryRow(ctx, "select current_setting($1)", name).Scan(&value); err != nil {
			return nil, err
		}
		settings[name] = value
	}
	settings["postgres"], _, _ = strings.Cut(settings["server_version"], " ")
	delete(settings, "server_version")
	return settings, nil
}
