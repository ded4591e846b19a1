package pipeline

import (
	"context"
	_ "embed"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

//go:embed queries/table_columns.sql
var tableColumnsQuery string

//go:embed queries/table_lock.sql
var tableLockQuery string

// Migrate creates what the processor needs in the sink's database: tables, when it may, ledgers, and that for dead letters.
// Any number of processors may call it at once; each thing is created once.
func Migrate(ctx context.Context, pool *pgxpool.Pool, c *config.Config) error {
	for _, b := range c.Branches() {
		if t := b.Table; t != nil && t.Create == config.CreateIfMissing {
			if err := createMissing(ctx, pool, ofBranch(c, b)); err != nil {
				return fmt.Errorf("create table %s.%s: %w", t.Schema, t.Name, err)
			}
		}
		if t := b.Table; t != nil && t.Idempotency == config.IdempotencyLedger {
			if err := createLedger(ctx, pool, t.Schema); err != nil {
				return err
			}
		}
	}
	if m := c.Memory; m != nil && m.Create == config.CreateIfMissing {
		if err := createMemory(ctx, pool, m); err != nil {
			return err
		}
	}
	if needsDeadLetters(c) {
		if err := createDeadLetters(ctx, pool, c); err != nil {
			return err
		}
	}
	if needsIncarnations(c) {
		return createIncarnations(ctx, pool, c)
	}
	return nil
}

// createMissing creates the table of the sink when there is none.
func createMissing(ctx context.Context, pool *pgxpool.Pool, c *config.Config) error {
	actual, err := tableColumns(ctx, pool, c.Sink.Table)
	if err != nil || actual != nil {
		return err
	}
	return createTable(ctx, pool, c)
}

// checkTable checks that the table can take the mapped columns, and returns its types by column, without lengths.
func checkTable(ctx context.Context, pool *pgxpool.Pool, c *config.Config) (map[string]string, error) {
	t := c.Sink.Table
	actual, err := tableColumns(ctx, pool, t)
	if err != nil {
		return nil, err
	}
	if actual == nil {
		return nil, NewConfigurationError("table %s.%s does not exist; create it, or write sink.table.create: IfMissing", t.Schema, t.Name)
	}
	return checkColumns(c, actual)
}

// tableColumn is one row of queries/table_columns.sql.
type tableColumn struct {
	Name      string
	Type      string
	Generated bool
	MustFill  bool // NOT NULL without a default
	MayInsert bool
}

// tableColumns returns the table's columns, or nil when there is no such table.
func tableColumns(ctx context.Context, pool *pgxpool.Pool, t *config.TableSink) ([]tableColumn, error) {
	rows, err := pool.Query(ctx, tableColumnsQuery, t.Schema, t.Name)
	if err != nil {
		return nil, fmt.Errorf("read the columns of table %s.%s: %w", t.Schema, t.Name, err)
	}
	columns, err := pgx.CollectRows(rows, pgx.RowToStructByPos[tableColumn])
	if err != nil {
		return nil, fmt.Errorf("read the columns of table %s.%s: %w", t.Schema, t.Name, err)
	}
	if len(columns) == 0 {
		return nil, nil
	}
	return columns, nil
}

// checkColumns reports every mapped column that the table cannot take, and every column that the mapping would have to fill.
func checkColumns(c *config.Config, actual []tableColumn) (map[string]string, error) {
	t := c.Sink.Table
	types := map[string]string{}
	var problems []string
	for _, a := range actual {
		types[a.Name] = a.Type
		mapped := slices.ContainsFunc(c.Mapping.Columns, func(m config.Column) bool { return m.Name == a.Name })
		switch {
		case !mapped && a.MustFill:
			problems = append(problems, fmt.Sprintf("column %q is NOT NULL without a default, and no mapped column fills it: map it, or give it a default", a.Name))
		case mapped && a.Generated:
			problems = append(problems, fmt.Sprintf("column %q is generated always: take it out of the mapping", a.Name))
		case mapped && !a.MayInsert:
			problems = append(problems, fmt.Sprintf("no permission to insert into column %q: GRANT INSERT, and SELECT on the key, to the processor's role", a.Name))
		}
	}
	for _, col := range c.Mapping.Columns {
		if _, ok := types[col.Name]; !ok {
			problems = append(problems, fmt.Sprintf("column %q does not exist: ALTER TABLE … ADD COLUMN %s %s, or take it out of the mapping",
				col.Name, pgx.Identifier{col.Name}.Sanitize(), col.Type))
		}
	}
	if len(problems) > 0 {
		return nil, NewConfigurationError("table %s.%s does not fit the mapping: %s", t.Schema, t.Name, strings.Join(problems, "; "))
	}
	return types, nil
}

// createTable creates the table from the mapping. Any number of processors may do so at once: an advisory lock lets one go
// first, and the others find it done.
func createTable(ctx context.Context, pool *pgxpool.Pool, c *config.Config) error {
	t := c.Sink.Table
	var parts []string
	for _, col := range c.Mapping.Columns {
		part := pgx.Identifier{col.Name}.Sanitize() + " " + string(col.Type)
		if col.Required || slices.Contains(t.Key, col.Name) {
			part += " NOT NULL"
		}
		parts = append(parts, part)
	}
	if len(t.Key) > 0 {
		var key []string
		for _, name := range t.Key {
			key = append(key, pgx.Identifier{name}.Sanitize())
		}
		parts = append(parts, "PRIMARY KEY ("+strings.Join(key, ", ")+")")
	}
	sql := fmt.Sprintf("CREATE TABLE IF NOT EXISTS %s (%s)", pgx.Identifier{t.Schema, t.Name}.Sanitize(), strings.Join(parts, ", "))
	return createOnce(ctx, pool, t.Schema+"."+t.Name, sql)
}

// createOnce runs DDL under an advisory lock that carries the name of what it makes.
func createOnce(ctx context.Context, pool *pgxpool.Pool, name, ddl string) error {
	return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, tableLockQuery, name); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, ddl)
		return err
	})
}
