package pgstream_test

import (
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// PostgreSQL compiles what it believes to be expensive, which takes up to half a second at each execution. Statements of the engine are short, but a large
// batch, or before PostgreSQL 18 a kind of plan that a function forbids and then needs, looks expensive: such a function turns the compiler off.
func TestNoStatementOfTheEngineIsCompiled(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	for _, sql := range []string{
		`select millrace.create_stream('orders', p_priorities => 2)`,
		`select millrace.create_stream('jobs')`,
		`select millrace.create_group('orders', 'shared', p_max_attempts => 4)`,
		`select millrace.create_group('orders', 'parks', p_mode => 'Ordered', p_failure_policy => 'Park', p_max_attempts => 4)`,
		`select millrace.create_group('jobs', 'short', p_queue_policy => 'Short')`,
		`select millrace.create_group('jobs', 'stately', p_queue_policy => 'Stately')`,
	} {
		e.run(sql)
	}

	// auto_explain tells the client of every statement, also of those within functions.
	config, err := pgx.ParseConfig(e.dsn)
	must(t, err)
	var mu sync.Mutex
	var plans []string
	config.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) {
		mu.Lock()
		defer mu.Unlock()
		plans = append(plans, n.Message+"\n"+n.Where)
	}
	conn, err := pgx.ConnectConfig(e.ctx, config)
	must(t, err)
	defer func() { _ = conn.Close(e.ctx) }()
	exec(e, conn, `load 'auto_explain'`)
	for _, setting := range []string{"log_min_duration = 0", "log_nested_statements = on", "log_settings = on", "log_level = notice"} {
		exec(e, conn, "set auto_explain."+setting)
	}
	exec(e, conn, "set jit = on")

	exec(e, conn, `select millrace.publish_batch('orders', array_agg(jsonb_build_object('n', n)), array_agg('k' || n % 5), p_dedupe_keys => array_agg('d' || n / 2))
		from generate_series(1, 20000) n`)
	exec(e, conn, `select millrace.publish('orders', '{}', 'k1', p_priority => 1), millrace.publish('orders', '{}', 'k1', p_delay_seconds => 0.001)`)
	exec(e, conn, `select millrace.publish('jobs', '{}', 'k' || n) from generate_series(1, 5) n`)
	for range 6 { // attempts, and beyond
		for _, group := range []string{"orders, shared", "orders, parks", "jobs, short", "jobs, stately"} {
			stream, name, _ := strings.Cut(group, ", ")
			var claim string
			var got []int64
			must(t, conn.QueryRow(e.ctx, `select coalesce(max(claim), ''), coalesce(array_agg("position"), '{}') from millrace.receive($1, $2, 'm', 20)`, stream, name).Scan(&claim, &got))
			if claim == "" {
				continue
			}
			exec(e, conn, `select millrace.nack($1, $2, 0, 'no')`, claim, got[:(len(got)+1)/2])
			for _, verb := range []string{"extend($1, 30)", "dead_letter($1, array[$2::bigint], 'bad')", "ack_messages($1, array[$2::bigint - 1])", "release($1)"} {
				args := []any{claim, got[len(got)-1]}
				if _, err := conn.Exec(e.ctx, `select millrace.`+verb, args[:strings.Count(verb, "$")]...); err != nil && sqlState(err) != "MR001" {
					t.Fatal(verb, err)
				}
			}
			exec(e, conn, `select millrace.redrive($1, $2), millrace.retry($1, $2, 'm'), millrace.leave($1, $2, 'm')`, stream, name)
		}
		exec(e, conn, `select millrace.stats()`)
	}

	mu.Lock()
	defer mu.Unlock()
	if len(plans) < 1000 {
		t.Fatalf("%d plans were told", len(plans))
	}
	cost := regexp.MustCompile(`\(cost=[0-9.]+\.\.([0-9.]+) `)
	told := map[string]bool{}
	for _, plan := range plans {
		found := cost.FindStringSubmatch(plan)
		if found == nil || strings.Contains(plan, "jit = 'off'") || !strings.Contains(plan, "PL/pgSQL function") {
			continue
		}
		total, err := strconv.ParseFloat(found[1], 64)
		must(t, err)
		_, where, _ := strings.Cut(plan, "PL/pgSQL function ")
		if where, _, _ = strings.Cut(where, "\n"); total >= 100_000 && !told[where] { // the default of jit_above_cost
			told[where] = true
			t.Errorf("%s is worth %.0f to the planner:\n%s", where, total, plan)
		}
	}
}
