package pipeline_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/test/env/pgbouncer"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// login is a role whose password a test changes, and the file that holds its connection string.
type login struct {
	w    *world
	role string
	file string
}

func (w *world) newLogin() *login {
	w.t.Helper()
	l := &login{w: w, role: "rotated_" + strings.ToLower(rand.Text()[:8]), file: filepath.Join(w.t.TempDir(), "dsn")}
	w.exec("create role " + l.role + " login superuser")
	w.t.Cleanup(func() {
		// The test's context and pool have ended.
		conn, err := pgx.Connect(context.Background(), w.dsn)
		if err != nil {
			w.t.Error(err)
			return
		}
		defer conn.Close(context.Background())
		if _, err := conn.Exec(context.Background(), "reassign owned by "+l.role+" to current_user; drop owned by "+l.role+"; drop role "+l.role); err != nil {
			w.t.Error(err)
		}
	})
	return l
}

// rotate gives the role another password, writes it into the file, as a mounted Secret is, and ends every session of the role.
func (l *login) rotate(password string) {
	l.w.t.Helper()
	l.w.exec(fmt.Sprintf("alter role %s password '%s'", l.role, password))
	u, err := url.Parse(l.w.dsn)
	if err != nil {
		l.w.t.Fatal(err)
	}
	u.User = url.UserPassword(l.role, password)
	fresh := l.file + ".new"
	if err := os.WriteFile(fresh, []byte(u.String()+"\n"), 0o600); err != nil {
		l.w.t.Fatal(err)
	}
	if err := os.Rename(fresh, l.file); err != nil {
		l.w.t.Fatal(err)
	}
	l.w.exec("select pg_terminate_backend(pid) from pg_stat_activity where usename = $1", l.role)
}

func TestAPasswordIsRotatedWithoutARestart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeShared)
	w.createOrders()
	l := w.newLogin()
	l.rotate("first-secret")
	p := w.start("one", strings.ReplaceAll(ordersConfig, "MODE", "Shared"), config.EnvSinkDatabaseURL+"=", config.EnvSourceDatabaseURL+"_FILE="+l.file)
	p.ready()
	w.order("k", orders(0, 10)...)
	becomes(t, "rows", 10, w.orderRows)
	for n, password := range []string{"second-secret", "third-secret"} {
		l.rotate(password)
		w.order("k", orders(10*(n+1), 10*(n+2))...)
		becomes(t, "rows", 10*(n+2), w.orderRows)
		// The connection for notifications too.
		becomes(t, "listeners", 1, func() int {
			return w.count("select count(*) from pg_stat_activity where usename = $1 and query like 'notify millrace, ''probe:%' and datname = current_database()", l.role)
		})
	}
	eventually(t, func() (bool, string) {
		code, text := p.get("/readyz")
		return code == 200, text
	})
	if log := p.tail(1 << 20); strings.Contains(log, "-secret") {
		t.Error("the log holds a password")
	}
}

// A file that is missing or empty is said, and what it holds is not.
func TestOpenPoolReadsAFile(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "dsn")
	open := func() error {
		pool, err := pipeline.OpenPool(t.Context(), config.FromFile("MILLRACE_SINK_DATABASE_URL", file), "t", 1)
		if err == nil {
			defer pool.Close()
			err = pool.Ping(t.Context())
		}
		return err
	}
	if err := open(); err == nil || !strings.Contains(err.Error(), "MILLRACE_SINK_DATABASE_URL_FILE") {
		t.Errorf("without the file: %v", err)
	}
	for text, want := range map[string]string{" \n": "is empty", "postgres://u:secret@h:port/d": "cannot be read"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := open(); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("with %q: %v", text, err)
		}
	}
	if err := os.WriteFile(file, []byte(postgres.NewDatabase(t)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := open(); err != nil {
		t.Error(err)
	}
}

// Before a pooler that hands a server connection to another client after every transaction, both sources write exactly what came. PgBouncer is found out
// by itself, and one that knows no statements of the protocol at all takes a parameter of the connection string.
func TestThroughPgBouncer(t *testing.T) {
	for _, parameter := range []string{"", "&default_query_exec_mode=exec", "&default_query_exec_mode=simple_protocol"} {
		name := strings.TrimPrefix(parameter, "&")
		if name == "" {
			name = "found out"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			bouncer := pgbouncer.New(t, w.dsn, pgbouncer.Options{Settings: map[string]string{"default_pool_size": "2"}})
			pooled := bouncer.DSN() + parameter
			const batches = "batch: {writers: 4, maxRows: 50}\n"

			w.newOrders(pgstream.ModeShared)
			w.createOrders()
			group := w.start("group", strings.ReplaceAll(ordersConfig, "MODE", "Shared")+batches,
				config.EnvSinkDatabaseURL+"="+pooled, config.EnvSourceDatabaseURL+"="+pooled, config.EnvSourceListenURL+"="+w.dsn)
			w.createPositions("check (odometer >= 0)")
			l := seeded(t, &load{total: 2000, duplicates: 0.05, poison: 0.01})
			redis := w.start("redis", w.configText()+batches, config.EnvSinkDatabaseURL+"="+pooled)
			group.ready()
			redis.ready()
			w.produce(l)
			all := orders(0, 300)
			all[17] = `{"order_id":"refused","amount":-1}`
			w.order("k", all...)
			becomes(t, "orders", 299, w.orderRows)
			w.balanced(l)
			// A statement that another client has prepared, or that is not in this server connection, would be overcome by trying again.
			for _, p := range []*processor{group, redis} {
				m := p.metrics()
				for _, class := range []string{"transient", "configuration"} {
					if n := m[`millrace_processor_sink_errors_total{class="`+class+`"}`]; n != 0 {
						t.Errorf("%g writes failed, of class %s", n, class)
					}
				}
			}
		})
	}
}
