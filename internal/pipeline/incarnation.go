package pipeline

import (
	"context"
	_ "embed"
	"errors"
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

//go:embed queries/incarnation_mark.sql
var incarnationMarkQuery string

//go:embed queries/incarnation_remember.sql
var incarnationRememberQuery string

//go:embed queries/incarnation_put.sql
var incarnationPutQuery string

// needsIncarnations says whether something is deduplicated by the ids of Redis entries, which start over when Redis loses
// its data. Then the sink's database remembers the streams.
func needsIncarnations(c *config.Config) bool {
	if c.Source.Redis == nil {
		return false
	}
	return keyedByID(c) || slices.ContainsFunc(c.Branches(), func(b config.Branch) bool {
		return b.Table != nil && b.Table.Idempotency == config.IdempotencyLedger
	})
}

// keyedByID says whether the id of an item tells the rows of a table apart.
func keyedByID(c *config.Config) bool {
	return slices.ContainsFunc(c.Branches(), func(b config.Branch) bool {
		return b.Table != nil && slices.ContainsFunc(b.Mapping.Columns, func(col config.Column) bool {
			// An expression may use the id.
			return slices.Contains(b.Table.Key, col.Name) && (col.Path == config.PropertyID || col.Expression != "")
		})
	})
}

func incarnationName(c *config.Config) pgx.Identifier {
	return pgx.Identifier{deadLetterName(c).Schema, incarnationTable}
}

// createIncarnations creates the table when it is missing, and brings one of an earlier release up to date.
func createIncarnations(ctx context.Context, pool *pgxpool.Pool, c *config.Config) error {
	t := config.TableSink{Schema: deadLetterName(c).Schema, Name: incarnationTable}
	columns, err := tableColumns(ctx, pool, &t)
	if err != nil {
		return err
	}
	query := incarnationTableQuery
	switch {
	case slices.ContainsFunc(columns, func(c tableColumn) bool { return c.Name == "mark_id" }):
		return nil
	case columns != nil:
		query = incarnationMarkQuery
	}
	name := incarnationName(c).Sanitize()
	if err := createOnce(ctx, pool, t.Schema+"."+t.Name, strings.ReplaceAll(query, "TABLE", name)); err != nil {
		return fmt.Errorf("create table %s, or add its columns mark_incarnation, mark_id and mark_digest; it remembers Redis streams because rows are told apart by @id: %w", name, err)
	}
	return nil
}

// incarnations remember Redis streams in the sink's database.
type incarnations struct {
	pool                *pgxpool.Pool
	processor           string
	lock, put, remember string
}

func newIncarnations(pool *pgxpool.Pool, c *config.Config) *incarnations {
	on := func(query string) string { return strings.ReplaceAll(query, "TABLE", incarnationName(c).Sanitize()) }
	return &incarnations{pool: pool, processor: c.Name,
		lock: on(incarnationLockQuery), put: on(incarnationPutQuery), remember: on(incarnationRememberQuery)}
}

// Observe implements redisstream.Incarnations. The row's lock makes Redis' answer newer than what is remembered.
func (i *incarnations) Observe(
	ctx context.Context, stream string, known int, saw redisstream.Extent, look func(context.Context, ...string) (redisstream.Sight, error),
) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	var incarnation int
	err := pgx.BeginFunc(ctx, i.pool, func(tx pgx.Tx) error {
		var past redisstream.Extent
		err := tx.QueryRow(ctx, i.lock, i.processor, stream, known).Scan(&incarnation, &past.Top, &past.Added, &past.Mark.ID, &past.Mark.Digest)
		if err != nil {
			return err
		}
		if incarnation != known {
			saw = redisstream.Extent{Added: -1} // of another one
		}
		now, err := look(ctx, past.Mark.ID, saw.Mark.ID)
		if err != nil {
			return err
		}
		if now.Continues(past) && now.Continues(saw) {
			past = past.Join(saw).Join(now.Extent)
		} else {
			incarnation++
			past = now.Extent
		}
		_, err = tx.Exec(ctx, i.put, i.processor, stream, incarnation, past.Top, past.Added, past.Mark.ID, past.Mark.Digest)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("find out whether Redis stream %q has begun anew: %w", stream, err)
	}
	return incarnation, nil
}

// Remember implements redisstream.Incarnations.
func (i *incarnations) Remember(ctx context.Context, reached []redisstream.Reached) ([]int, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	now := make([]int, len(reached))
	batch := &pgx.Batch{}
	for n, r := range reached {
		batch.Queue(i.remember, i.processor, r.Stream, r.Incarnation, r.Mark.ID, r.Added, r.Mark.Digest).
			QueryRow(func(row pgx.Row) error {
				err := row.Scan(&now[n])
				if errors.Is(err, pgx.ErrNoRows) {
					now[n], err = -1, nil
				}
				return err
			})
	}
	if err := i.pool.SendBatch(ctx, batch).Close(); err != nil {
		return nil, fmt.Errorf("remember how far Redis streams were read: %w", err)
	}
	return now, nil
}
