package operator

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/bench/report"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

// limits measures what no manager can be faster than.
func (r *run) limits(ctx context.Context) error {
	if r.measures(systemSQL) {
		if err := r.limitSQL(ctx); err != nil {
			return fmt.Errorf("%s: %w", systemSQL, err)
		}
	}
	if r.measures(systemAPI) {
		if err := r.limitAPI(ctx); err != nil {
			return fmt.Errorf("%s: %w", systemAPI, err)
		}
	}
	return nil
}

// limitSQL makes the same streams and groups by one statement each over one connection, and changes as many streams.
func (r *run) limitSQL(ctx context.Context) error {
	name, err := r.server.database(ctx)
	if err != nil {
		return err
	}
	conn, err := pgx.Connect(ctx, r.server.postgres.DSN(name))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	if _, err := schema.Migrate(ctx, conn, schema.Options{}); err != nil {
		return err
	}
	stream := func(i int) string { return fmt.Sprintf("orders_%d", i) }
	start := time.Now()
	for i := range r.Sizes.Streams {
		if _, err := conn.Exec(ctx, "select millrace.create_stream($1)", stream(i)); err != nil {
			return err
		}
	}
	for i := range r.Sizes.Groups {
		mode := "Shared"
		if i%2 == 1 {
			mode = "Ordered"
		}
		if _, err := conn.Exec(ctx, "select millrace.create_group($1, $2, $3)", stream(i%r.Sizes.Streams), fmt.Sprintf("billing_%d", i), mode); err != nil {
			return err
		}
	}
	took := time.Since(start).Seconds()
	r.figures.add(fmt.Sprintf("cold-%d-ready", r.Sizes.Streams), systemSQL, "s", "", took)
	r.log("%-24s %s: %.1f s", workCold, systemSQL, took)
	if !r.wants(workChange) {
		return nil
	}
	var changes []float64
	for i := range r.Changes {
		start := time.Now()
		if _, err := conn.Exec(ctx, "select millrace.create_stream($1, p_max_age_seconds => $2)", stream(i*7%r.Sizes.Streams), (i+1)*3600); err != nil {
			return err
		}
		changes = append(changes, float64(time.Since(start).Microseconds())/1000)
	}
	r.figures.add("apply-to-ready-p50", systemSQL, "ms", "", report.Percentile(changes, 50))
	r.figures.add("apply-to-ready-p99", systemSQL, "ms", "", report.Percentile(changes, 99))
	return nil
}

// limitAPI creates the same resources while no manager runs.
func (r *run) limitAPI(ctx context.Context) error {
	const namespace = "bare"
	if err := tenant(ctx, r.cluster.client, namespace, "postgres://nobody@127.0.0.1:1/nowhere"); err != nil {
		return err
	}
	start := time.Now()
	if err := create(ctx, r.cluster.client, resources(namespace, r.Sizes)); err != nil {
		return err
	}
	took := time.Since(start).Seconds()
	for _, name := range []string{"ready", "created"} {
		r.figures.add(fmt.Sprintf("cold-%d-%s", r.Sizes.Streams, name), systemAPI, "s", "", took)
	}
	r.log("%-24s %s: %.1f s", workCold, systemAPI, took)
	return nil
}
