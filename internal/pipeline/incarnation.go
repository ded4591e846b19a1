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
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

// incarnationTable is the name of the table that remembers Redis streams.
const incarnationTable = "millrace_redis_stream"

//go:embed queries/incarnation_table.sql
var incarnationTableQuery string

//go:embed queries/incarnation_lock.sql
var incarnationLockQuery string

//go:embed queries/incarnation_put.sql
var incarnationPutQuery string

// needsIncarnations says whether something is deduplicated by the ids of Redis entries, which start over when Redis loses
// its data. Then the sink's database remembers the streams.
func needsIncarnations(c *config.Config) bool {
	if c.Source.Redis == nil {
		return false
	}
	return slices.ContainsFunc(c.Branches(), func(b config.Branch) bool {
		if b.Table == nil {
			return false
		}
		return b.Table.Idempotency == config.IdempotencyLedger || slices.ContainsFunc(b.Mapping.Columns, func(col config.Column) bool {
			// An expression may use the id.
			return slices.Contains(b.Table.Key, col.Name) && (col.Path == config.PropertyID || col.Expression != "")
		})
	})
}

func incarnationName(c *config.Config) pgx.Identifier {
	return pgx.Identifier{deadLetterName(c).Schema, incarnationTable}
}

// createIncarnations creates the table when it is missing.
func createIncarnations(ctx context.Context, pool *pgxpool.Pool, c *config.Config) error {
	t := config.TableSink{Schema: deadLetterName(c).Schema, Name: incarnationTable}
	if columns, err := tableColumns(ctx, pool, &t); err != nil || columns != nil {
		return err
	}
	name := incarnationName(c).Sanitize()
	if err := createOnce(ctx, pool, t.Schema+"."+t.Name, strings.ReplaceAll(incarnationTableQuery, "TABLE", name)); err != nil {
		return fmt.Errorf("create table %s, which remembers Redis streams because rows are told apart by @id: %w", name, err)
	}
	return nil
}

// incarnations remember Redis streams in the sink's database.
type incarnations struct {
	pool      *pgxpool.Pool
	processor string
	lock, put string
}

func newIncarnations(pool *pgxpool.Pool, c *config.Config) *incarnations {
	name := incarnationName(c).Sanitize()
	return &incarnations{pool: pool, processor: c.Name,
		lock: strings.ReplaceAll(incarnationLockQuery, "TABLE", name), put: strings.ReplaceAll(incarnationPutQuery, "TABLE", name)}
}

// Observe implements redisstream.Incarnations. The row's lock makes Redis' answer newer than what is remembered.
func (i *incarnations) Observe(ctx context.Context, stream string, known int, saw redisstream.Extent, extent func(context.Context) (redisstream.Extent, error)) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	var incarnation int
	err := pgx.BeginFunc(ctx, i.pool, func(tx pgx.Tx) error {
		var past redisstream.Extent
		err := tx.QueryRow(ctx, i.lock, i.processor, stream, known).Scan(&incarnation, &past.Top, &past.Added)
		if err != nil {
			return err
		}
		now, err := extent(ctx)
		if err != nil {
			return err
		}
		if incarnation == known {
			past = past.Join(saw) // of the same stream; otherwise the caller has seen an earlier one
		}
		if now.Before(past) {
			incarnation++
			past = now
		}
		past = past.Join(now)
		_, err = tx.Exec(ctx, i.put, i.processor, stream, incarnation, past.Top, past.Added)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("find out whether Redis stream %q has begun anew: %w", stream, err)
	}
	return incarnation, nil
}
