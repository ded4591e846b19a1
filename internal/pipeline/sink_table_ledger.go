package pipeline

import (
	"cmp"
	"context"
	_ "embed"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

//go:embed queries/ledger_table.sql
var ledgerTableQuery string

//go:embed queries/ledger_put.sql
var ledgerPutQuery string

//go:embed queries/ledger_prune.sql
var ledgerPruneQuery string

// ledgerTable is the name of the ledger, in the schema of the table whose entries it holds.
const ledgerTable = "millrace_ledger"

// ledger notes the entries of a batch in the transaction that writes them. An entry that it holds already was written, so
// it is not written again, whatever the table's key is, and also without one.
//
// An entry can come again until it is acknowledged in Redis. After that it is pruned (TableSink.Upkeep).
type ledger struct {
	processor, target string
	put, prune        string
}

func newLedger(c *config.Config) *ledger {
	t := c.Sink.Table
	name := pgx.Identifier{t.Schema, ledgerTable}.Sanitize()
	return &ledger{
		processor: c.Name, target: t.Schema + "." + t.Name,
		put:   strings.ReplaceAll(ledgerPutQuery, "TABLE", name),
		prune: strings.ReplaceAll(ledgerPruneQuery, "TABLE", name),
	}
}

// createLedger creates the table when it is missing.
func createLedger(ctx context.Context, pool *pgxpool.Pool, schema string) error {
	t := config.TableSink{Schema: schema, Name: ledgerTable}
	if columns, err := tableColumns(ctx, pool, &t); err != nil || columns != nil {
		return err
	}
	name := pgx.Identifier{schema, ledgerTable}.Sanitize()
	if err := createOnce(ctx, pool, schema+"."+ledgerTable, strings.ReplaceAll(ledgerTableQuery, "TABLE", name)); err != nil {
		return fmt.Errorf("create table %s.%s: %w", schema, ledgerTable, err)
	}
	return nil
}

// write notes the items and lets write write those that were not noted before. The others are duplicates.
func (l *ledger) write(ctx context.Context, tx pgx.Tx, items []*Item, write func([]*Item) ([]Outcome, error)) ([]Outcome, error) {
	order := make([]int, len(items))
	digests := make([]int64, len(items))
	for i, it := range items {
		order[i], digests[i] = i, redisstream.Digest(it.Fields)
	}
	slices.SortFunc(order, func(a, b int) int {
		x, y := items[a], items[b]
		return cmp.Or(strings.Compare(x.Stream, y.Stream), strings.Compare(x.ID, y.ID), cmp.Compare(digests[a], digests[b]), a-b)
	})
	streams, ids := make([]string, len(items)), make([]string, len(items))
	times, sums := make([]time.Time, len(items)), make([]int64, len(items))
	for n, i := range order {
		streams[n], times[n], ids[n], sums[n] = items[i].Stream, items[i].Created, items[i].ID, digests[i]
	}
	rows, err := tx.Query(ctx, l.put, l.processor, l.target, streams, times, ids, sums)
	if err != nil {
		return nil, err
	}
	places, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return nil, err
	}
	at := make([]int, len(places)) // of the new items, in the order in which they came
	for n, place := range places {
		at[n] = order[place-1]
	}
	slices.Sort(at)
	fresh := make([]*Item, len(at))
	for n, i := range at {
		fresh[n] = items[i]
	}
	os := outcomes(len(items), Outcome{Result: Duplicate})
	if len(fresh) == 0 {
		return os, nil
	}
	written, err := write(fresh)
	if err != nil {
		return nil, err
	}
	for n, i := range at {
		os[i] = written[n]
	}
	return os, nil
}

// SettledSource is a source that knows how far it is settled.
type SettledSource interface {
	// SettledBefore returns for each stream a time: every entry that was made before it and had been delivered, to any
	// member, is acknowledged.
	SettledBefore(ctx context.Context) (map[string]time.Time, error)
}

// Upkeeper is a sink that has to be tidied up from time to time.
type Upkeeper interface {
	// Upkeep tidies up. It may be called at any time, by one goroutine.
	Upkeep(ctx context.Context, source SettledSource) error
}

// prunePage is how many entries are forgotten in one transaction.
const prunePage = 10_000

// Upkeep implements Upkeeper: it prunes the ledger.
func (s *TableSink) Upkeep(ctx context.Context, source SettledSource) error {
	if s.ledger == nil {
		return nil
	}
	before, err := source.SettledBefore(ctx)
	if err != nil {
		return err
	}
	for stream, at := range before {
		for {
			tag, err := s.pool.Exec(ctx, s.ledger.prune, s.ledger.processor, s.ledger.target, stream, at, prunePage)
			if err != nil {
				return fmt.Errorf("prune the ledger: %w", err)
			}
			if tag.RowsAffected() < prunePage {
				break
			}
		}
	}
	return nil
}
