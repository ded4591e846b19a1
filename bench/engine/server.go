package engine

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/test/env/postgres"
)

// Settings are those of the private server. Durability is PostgreSQL's default; sizes are such that no system is measured at the
// server's limits, and autovacuum looks often enough for a queue, as every textbook on queues in PostgreSQL asks.
var Settings = map[string]string{
	"fsync":                     "on",
	"full_page_writes":          "on",
	"synchronous_commit":        "on",
	"shared_buffers":            "1GB",
	"max_wal_size":              "8GB",
	"checkpoint_timeout":        "30min",
	"autovacuum_naptime":        "5s",
	"max_connections":           "100",
	"max_locks_per_transaction": "256", // room for the work foreign-locks-10k
	"jit":                       "off",
	"log_min_messages":          "error",
	"track_io_timing":           "off",
	"log_checkpoints":           "off",
	"default_statistics_target": "100",
}

// Server is the PostgreSQL server that all systems are measured on.
type Server struct {
	admin      *pgx.Conn
	dsn        *url.URL
	postmaster int // process id; zero when the server is not ours
	stop       func(context.Context) error
	databases  int
}

// Start brings up a private server, or connects to the one that dsn names, where the role must be able to create databases and to
// make checkpoints.
func Start(ctx context.Context, dsn string) (*Server, error) {
	s := &Server{stop: func(context.Context) error { return nil }}
	own := dsn == ""
	if own {
		p, err := postgres.Start(ctx, postgres.Options{Settings: Settings})
		if err != nil {
			return nil, err
		}
		dsn, s.stop = p.DSN("postgres"), p.Stop
	}
	if err := s.connect(ctx, dsn, own); err != nil {
		return nil, errors.Join(err, s.stop(context.WithoutCancel(ctx)))
	}
	return s, nil
}

func (s *Server) connect(ctx context.Context, dsn string, own bool) (err error) {
	if s.dsn, err = url.Parse(dsn); err != nil || s.dsn.Host == "" {
		// The parser's message would repeat the DSN with its password.
		return errors.New("the DSN is not a URL; write postgres://user:password@host:port/database")
	}
	if s.admin, err = pgx.Connect(ctx, dsn); err != nil {
		return fmt.Errorf("connect to the server: %w", err)
	}
	if !own {
		return nil
	}
	var file string
	if err := s.admin.QueryRow(ctx, "select pg_read_file('postmaster.pid')").Scan(&file); err != nil {
		return err
	}
	line, _, _ := strings.Cut(file, "\n")
	s.postmaster, err = strconv.Atoi(strings.TrimSpace(line))
	return err
}

// Stop ends a private server and removes its files.
func (s *Server) Stop(ctx context.Context) error {
	return errors.Join(s.admin.Close(ctx), s.stop(ctx))
}

// Describe returns the settings that figures depend on.
func (s *Server) Describe(ctx context.Context) (map[string]string, error) {
	settings := map[string]string{}
	for _, name := range []string{"server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_level", "data_checksums", "shared_buffers",
		"max_wal_size", "checkpoint_timeout", "autovacuum_naptime", "jit"} {
		var value string
		if err := s.admin.QueryRow(ctx, "select current_setting($1)", name).Scan(&value); err != nil {
			return nil, fmt.Errorf("read the server's settings: %w", err)
		}
		settings[name] = value
	}
	settings["postgres"], _, _ = strings.Cut(settings["server_version"], " ")
	delete(settings, "server_version")
	return settings, nil
}

// Database makes an empty database. Dropping it makes a checkpoint, so each measurement begins after one.
func (s *Server) Database(ctx context.Context) (dsn string, drop func() error, err error) {
	s.databases++
	name := fmt.Sprintf("millrace_bench_%d", s.databases)
	for _, sql := range []string{"drop database if exists " + name + " with (force)", "create database " + name + " template template0"} {
		if _, err := s.admin.Exec(ctx, sql); err != nil {
			return "", nil, fmt.Errorf("make a database: %w", err)
		}
	}
	own := *s.dsn
	own.Path = "/" + name
	return own.String(), func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if s.admin.IsClosed() { // an interrupt closes it in the middle of a statement
			return nil
		}
		_, err := s.admin.Exec(ctx, "drop database "+name+" with (force)")
		return err
	}, nil
}
