package pipeline_test

import (
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// A processor never migrates. It waits for a schema that is not there yet, and leaves a newer one to a newer processor.
func TestAProcessorChecksTheSchemaOfItsStream(t *testing.T) {
	t.Parallel()
	c, err := config.Parse([]byte(strings.ReplaceAll(ordersConfig, "MODE", "Shared")))
	if err != nil {
		t.Fatal(err)
	}
	pool, err := pgxpool.New(t.Context(), postgres.NewDatabase(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	start := func() error {
		_, err := pipeline.NewStreamSource(t.Context(), pool, pool.Config().ConnConfig, "one", c, pipeline.NewMetrics(), slog.New(slog.DiscardHandler))
		return err
	}
	if err := start(); !errors.Is(err, schema.ErrOlder) || pipeline.Classify(err) != pipeline.ClassTransient {
		t.Errorf("without a schema: %v, class %v", err, pipeline.Classify(err))
	}
	peek := func() error {
		_, err := pipeline.PeekGroup(t.Context(), pool, c, false, 1)
		return err
	}
	if err := peek(); !errors.Is(err, schema.ErrOlder) {
		t.Errorf("a dry run without a schema: %v", err)
	}
	for _, sql := range []string{
		"create schema millrace_engine",
		"create table millrace_engine.schema_version (version integer)",
		"insert into millrace_engine.schema_version values (9999)",
	} {
		if _, err := pool.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	if err := start(); !errors.Is(err, schema.ErrNewer) || pipeline.Classify(err) != pipeline.ClassConfiguration {
		t.Errorf("with a newer schema: %v, class %v", err, pipeline.Classify(err))
	}
	if err := peek(); !errors.Is(err, schema.ErrNewer) {
		t.Errorf("a dry run with a newer schema: %v", err)
	}
}
