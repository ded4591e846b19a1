package pgbouncer_test

import (
	"os"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/test/env/pgbouncer"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

func TestMain(m *testing.M) { os.Exit(postgres.Main(m, postgres.Options{})) }

// Two clients use one server connection in turn, and see what the other left in its session.
func TestServerConnectionsAreSharedBetweenClients(t *testing.T) {
	t.Parallel()
	s := pgbouncer.New(t, postgres.NewDatabase(t), pgbouncer.Options{Settings: map[string]string{"default_pool_size": "1"}})
	var pids [2]int
	for i := range pids {
		conn, err := pgx.Connect(t.Context(), s.DSN()+"&default_query_exec_mode=cache_describe")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		if err := conn.QueryRow(t.Context(), "select pg_backend_pid()").Scan(&pids[i]); err != nil {
			t.Fatal(err)
		}
	}
	if pids[0] != pids[1] {
		t.Errorf("the clients have the backends %v, want one", pids)
	}
}

func TestStopLeavesNothing(t *testing.T) {
	t.Parallel()
	s, err := pgbouncer.Start(t.Context(), postgres.NewDatabase(t), pgbouncer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s.Log() != "" {
		t.Error("its directory is still there")
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Errorf("a second Stop: %v", err)
	}
}
