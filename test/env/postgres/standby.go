package postgres

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/test/env/dirs"
	"github.com/millrace-dev/millrace/test/env/process"
)

// Standby starts a server that streams everything from this one, and makes this one wait for it: from then on, what a client
// was told is committed is on both. A server has one standby at most.
func (s *Server) Standby(ctx context.Context) (*Server, error) {
	standby, err := s.standby(ctx)
	if err != nil {
		return nil, fmt.Errorf("start a standby of PostgreSQL: %w", err)
	}
	return standby, nil
}

func (s *Server) standby(ctx context.Context) (_ *Server, err error) {
	b := &Server{install: s.install, user: s.user, listen: s.listen, password: s.password, settings: maps.Clone(s.settings)}
	if b.run, err = dirs.NewRun("postgres"); err != nil {
		return nil, err
	}
	b.dir = b.run.Path
	defer func() {
		if err != nil {
			err = errors.Join(err, b.run.Remove())
		}
	}()
	if err := s.backup(ctx, b); err != nil {
		return nil, err
	}
	if b.port, err = process.FreePort(b.listen...); err != nil {
		return nil, err
	}
	if err := b.launch(ctx); err != nil {
		return nil, err
	}
	// Only now, so that the setting is not part of the backup: a standby that is promoted must not wait for another.
	if err := errors.Join(s.sql(ctx, "alter system set synchronous_standby_names = '*'"), s.sql(ctx, "select pg_reload_conf()"), s.awaitSync(ctx)); err != nil {
		return nil, errors.Join(err, b.Kill())
	}
	return b, nil
}

// backup copies the data directory of the running server s for b, as pg_basebackup does, with the settings that make b a
// standby. pg_basebackup itself does not come with every set of server programs.
func (s *Server) backup(ctx context.Context, b *Server) error {
	conn, err := pgx.Connect(ctx, s.DSN("postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	// The slot keeps the log from here on, until the standby has it.
	if _, err := conn.Exec(ctx, "select pg_create_physical_replication_slot('standby', true), pg_backup_start('standby', true)"); err != nil {
		return err
	}
	data := filepath.Join(b.dir, "data")
	if err := copyRunning(filepath.Join(s.dir, "data"), data, s.user); err != nil {
		return fmt.Errorf("copy the data directory: %w", err)
	}
	var label string
	if err := conn.QueryRow(ctx, "select labelfile from pg_backup_stop()").Scan(&label); err != nil {
		return err
	}
	settings := fmt.Sprintf("primary_conninfo = 'host=%s port=%d user=postgres password=%s'\nprimary_slot_name = 'standby'\n", s.listen[0], s.port, s.password)
	for name, content := range map[string]string{"backup_label": label, "standby.signal": "", "postgresql.auto.conf": settings} {
		file := filepath.Join(data, name)
		if err := errors.Join(os.WriteFile(file, []byte(content), 0o600), ownedBy(s.user, file)); err != nil {
			return err
		}
	}
	return nil
}

// notCopied are what belongs to the running server alone. Of directories only the content is left out.
var notCopied = []string{"postmaster.pid", "postmaster.opts", "pg_wal/", "pg_replslot/", "pg_dynshmem/", "pg_notify/", "pg_serial/",
	"pg_snapshots/", "pg_stat_tmp/", "pg_subtrans/"}

// copyRunning is copyTree for a data directory in use, whose files change and go meanwhile; the log repairs that.
func copyRunning(from, to string, user *process.User) error {
	return filepath.WalkDir(from, func(path string, entry fs.DirEntry, err error) error {
		relative, relErr := filepath.Rel(from, path)
		if errors.Is(err, fs.ErrNotExist) || slices.ContainsFunc(notCopied, func(no string) bool { return strings.HasPrefix(relative, no) }) {
			return nil
		}
		if err := errors.Join(err, relErr); err != nil {
			return err
		}
		target := filepath.Join(to, relative)
		if entry.IsDir() {
			return errors.Join(os.Mkdir(target, 0o700), ownedBy(user, target))
		}
		content, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return errors.Join(err, os.WriteFile(target, content, 0o600), ownedBy(user, target))
	})
}

// awaitSync waits until commits wait for the standby.
func (s *Server) awaitSync(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.DSN("postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for {
		var synchronous bool
		err := conn.QueryRow(ctx, "select exists (select from pg_stat_replication where state = 'streaming' and sync_state = 'sync')").Scan(&synchronous)
		if err != nil || synchronous {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until the standby is synchronous: %w", ctx.Err())
		case <-poll.C:
		}
	}
}

// Promote makes a standby a primary, and returns when it takes writes.
func (s *Server) Promote(ctx context.Context) error {
	if err := s.sql(ctx, fmt.Sprintf("select pg_promote(true, %d)", int(startTimeout.Seconds()))); err != nil {
		return fmt.Errorf("promote PostgreSQL: %w", err)
	}
	return nil
}

func (s *Server) sql(ctx context.Context, statement string) error {
	conn, err := pgx.Connect(ctx, s.DSN("postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	_, err = conn.Exec(ctx, statement)
	return err
}

// PrimaryDSN is a connection string of the superuser that leads to that one of several servers which takes writes, as
// libpq and pgx read it. It holds the password, which servers that were copied from each other share.
func PrimaryDSN(database string, servers ...*Server) string {
	hosts := make([]string, len(servers))
	for i, s := range servers {
		hosts[i] = net.JoinHostPort(s.listen[0], strconv.Itoa(s.port))
	}
	dsn := url.URL{
		Scheme: "postgres", User: url.UserPassword("postgres", servers[0].password), Host: strings.Join(hosts, ","), Path: "/" + database,
		RawQuery: "sslmode=disable&target_session_attrs=read-write",
	}
	return dsn.String()
}
