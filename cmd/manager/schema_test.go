package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/test/env/postgres"
)

func TestMain(m *testing.M) {
	if os.Getenv("MILLRACE_TEST_SERVE") != "" { // the process that a test starts
		if err := schemaCommand([]string{"serve"}, os.Stdout, os.Stderr); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if os.Getenv("MILLRACE_TEST_APPLY") != "" { // a replica
		if err := schemaCommand([]string{"apply"}, os.Stdout, os.Stderr); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if os.Getenv("MILLRACE_TEST_MANAGER") != "" {
		main()
		return
	}
	os.Exit(postgres.Main(m, postgres.Options{}))
}

func TestTheSchemaCommandBringsAndServesADatabaseWithoutKubernetes(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	url := postgres.NewDatabase(t)
	t.Setenv("MILLRACE_DATABASE_URL", url)
	for _, want := range []string{"has version", "already"} {
		var out bytes.Buffer
		if err := schemaCommand([]string{"apply"}, &out, os.Stderr); err != nil || !strings.Contains(out.String(), want) {
			t.Fatalf("apply: %q, %v; want %q", out.String(), err, want)
		}
	}
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	if _, err := conn.Exec(ctx, "select millrace.create_stream('orders')"); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(ctx, "select millrace.publish('orders', '{}', p_delay_seconds => 0.1)"); err != nil {
		t.Fatal(err)
	}
	serve := exec.CommandContext(ctx, os.Args[0])
	serve.Env = append(os.Environ(), "MILLRACE_TEST_SERVE=1")
	serve.Stderr = os.Stderr
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	for n := 0; n == 0; {
		if err := conn.QueryRow(ctx, "select count(*) from millrace.orders").Scan(&n); err != nil {
			t.Fatalf("the delayed message was not moved: %v", err)
		}
	}
	if err := serve.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := serve.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

func TestTheSchemaCommandSaysWhatIsWrong(t *testing.T) {
	t.Setenv("MILLRACE_DATABASE_URL", "")
	for _, c := range []struct{ args, want string }{
		{"", "usage: manager schema"},
		{"drop", `there is no verb "drop"`},
		{"print now", `unknown argument "now"`},
		{"apply", "MILLRACE_DATABASE_URL is empty"},
		{"serve", "MILLRACE_DATABASE_URL is empty"},
	} {
		err := schemaCommand(strings.Fields(c.args), new(bytes.Buffer), new(bytes.Buffer))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("schema %s: %v; want %q", c.args, err, c.want)
		}
	}
	var out bytes.Buffer
	if err := schemaCommand([]string{"print"}, &out, os.Stderr); err != nil || !strings.Contains(out.String(), "create table millrace_engine.stream") {
		t.Errorf("print: %v, %d bytes", err, out.Len())
	}
}

// Several replicas bring one empty database to its schema at once: each version is applied once, by one of them, and all of them go on. Whoever holds the advisory lock
// keeps all others waiting, and not failing.
func TestSeed_D02_MigrationsOfReplicasAreSerialised(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	url := postgres.NewDatabase(t)
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	one := func(sql string) (n int) {
		t.Helper()
		if err := conn.QueryRow(ctx, sql).Scan(&n); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
		return n
	}
	// The test is the first to have the lock.
	if _, err := conn.Exec(ctx, "select pg_advisory_lock(1836019570, 0)"); err != nil {
		t.Fatal(err)
	}
	const replicas = 4
	outputs := make([]bytes.Buffer, replicas)
	var processes []*exec.Cmd
	for i := range replicas {
		cmd := exec.CommandContext(ctx, os.Args[0])
		cmd.Env = append(os.Environ(), "MILLRACE_TEST_APPLY=1", "MILLRACE_DATABASE_URL="+url)
		cmd.Stdout, cmd.Stderr = &outputs[i], &outputs[i]
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		processes = append(processes, cmd)
	}
	// All of them have come as far as the lock.
	for one("select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() and xact_start is not null and query ~ 'advisory'") < replicas {
		if ctx.Err() != nil {
			t.Fatal(ctx.Err())
		}
	}
	if n := one("select count(*) from pg_namespace where nspname = 'millrace'"); n != 0 {
		t.Error("somebody migrated without the lock")
	}
	if _, err := conn.Exec(ctx, "select pg_advisory_unlock(1836019570, 0)"); err != nil {
		t.Fatal(err)
	}
	for i, cmd := range processes {
		if err := cmd.Wait(); err != nil {
			t.Errorf("replica %d: %v\n%s", i, err, outputs[i].String())
		}
	}
	if n := one("select count(distinct xmin::text) from millrace_engine.schema_version"); n != 1 {
		t.Errorf("%d replicas migrated", n)
	}
	if n, want := one("select count(*) from millrace_engine.schema_version"), one("select max(version) from millrace_engine.schema_version"); n != want || n == 0 {
		t.Errorf("%d versions are noted, want %d", n, want)
	}
	if _, err := conn.Exec(ctx, "select millrace.create_stream('orders'); select millrace.publish('orders', '1')"); err != nil {
		t.Error(err)
	}
}
