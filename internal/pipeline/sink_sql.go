package pipeline

import (
	"context"
	"errors"
	"hash/maphash"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// SQLSink runs one statement per batch. The statement reads the mapped columns of the batch, one row per item in the order
// of the source, from a table named batch.
//
// The table is a common table expression over the arrays that carry the columns, put before the statement: no table is made,
// and the planner sees through it. Whether a statement may run twice for one item is its author's affair: from a consumer
// group of the same database it never does, otherwise it can after a failure.
type SQLSink struct {
	pool      *pgxpool.Pool
	columns   []config.Column
	statement statement
	source    TxSource // settles in the sink's transactions; nil when it is elsewhere
	seed      maphash.Seed
}

// NewSQLSink checks the statement against the database and returns a sink. Its errors are of class ClassConfiguration when a
// person has to act.
func NewSQLSink(ctx context.Context, pool *pgxpool.Pool, c *config.Config) (*SQLSink, error) {
	s := &SQLSink{pool: pool, columns: c.Mapping.Columns, seed: maphash.MakeSeed()}
	err := pool.AcquireFunc(ctx, func(conn *pgxpool.Conn) error {
		s.statement = newStatement(conn.Conn(), withBatch(s.columns, c.Sink.SQL.Statement))
		// EXPLAIN runs nothing, and checks syntax, names, types, privileges and the unique constraint of an ON CONFLICT.
		explain := statement{text: "EXPLAIN " + s.statement.text, unnamed: true}
		return explain.run(ctx, conn.Conn(), s.arrays(nil))
	})
	return s, statementError("sink.sql.statement", err)
}

// statementError makes of what the database has against a statement of the configuration an error of class
// ClassConfiguration.
func statementError(setting string, err error) error {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || Classify(err) == ClassTransient {
		return err
	}
	text := reason(err)
	if pg.Hint != "" {
		text += "; " + pg.Hint
	}
	return NewConfigurationError("%s: %s", setting, text)
}

// withBatch puts the table named batch before a statement, as the first of its common table expressions.
func withBatch(columns []config.Column, statement string) string {
	var names, values, arrays, aliases []string
	for i, col := range columns {
		alias := "c" + strconv.Itoa(i+1)
		names = append(names, pgx.Identifier{col.Name}.Sanitize())
		values = append(values, alias+"::"+string(col.Type))
		arrays = append(arrays, "$"+strconv.Itoa(i+1)+"::"+wireOf(col.Type).array)
		aliases = append(aliases, alias)
	}
	with, rest := "WITH ", statement
	end := "\n"
	if word, after := keyword(statement); word == "with" {
		end, rest = ",\n", after
		if word, after = keyword(after); word == "recursive" {
			with, rest = "WITH RECURSIVE ", after
		}
	}
	return with + "batch(" + strings.Join(names, ", ") + ") AS (SELECT " + strings.Join(values, ", ") +
		" FROM unnest(" + strings.Join(arrays, ", ") + ") AS t(" + strings.Join(aliases, ", ") + "))" + end + rest
}

// keyword returns the first word of SQL in lower case, skipping comments, and what follows it.
func keyword(sql string) (word, rest string) {
	for {
		sql = strings.TrimLeft(sql, " \t\r\n\f")
		switch {
		case strings.HasPrefix(sql, "--"):
			_, sql, _ = strings.Cut(sql, "\n")
		case strings.HasPrefix(sql, "/*"):
			sql = afterComment(sql)
		default:
			n := 0
			for n < len(sql) && (sql[n]|0x20 >= 'a' && sql[n]|0x20 <= 'z' || sql[n] == '_') {
				n++
			}
			return strings.ToLower(sql[:n]), sql[n:]
		}
	}
}

// afterComment returns what follows a block comment. Such comments nest.
func afterComment(sql string) string {
	depth := 0
	for i := 0; i+1 < len(sql); i++ {
		switch sql[i : i+2] {
		case "/*":
			depth++
			i++
		case "*/":
			depth--
			i++
			if depth == 0 {
				return sql[i+1:]
			}
		}
	}
	return ""
}

func (s *SQLSink) prepared() *statement { return &s.statement }

// SettleWith implements SettlingSink.
func (s *SQLSink) SettleWith(source TxSource) { s.source = source }

// Shard implements Sharder. Nobody knows what the statement's result depends on, so the order of a stream is kept.
func (s *SQLSink) Shard(it *Item) uint64 { return maphash.String(s.seed, it.Stream) }

// Write implements Sink. Everything that it does not refuse is Written.
func (s *SQLSink) Write(ctx context.Context, b *Batch) ([]Outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Release()
	os, err := settledWrite(ctx, conn.Conn(), s.source, b, func(tx pgx.Tx) ([]Outcome, error) { return s.WriteTx(ctx, tx, b) })
	return os, s.statement.forget(ctx, conn.Conn(), err)
}

// WriteTx implements TxSink.
func (s *SQLSink) WriteTx(ctx context.Context, tx pgx.Tx, b *Batch) ([]Outcome, error) {
	if err := s.statement.run(ctx, tx.Conn(), s.arrays(b.Items)); err != nil {
		return nil, err
	}
	return outcomes(len(b.Items), Outcome{Result: Written}), nil
}

func (s *SQLSink) arrays(items []*Item) [][]byte {
	arrays := make([][]byte, len(s.columns))
	for i, col := range s.columns {
		arrays[i] = appendArray(nil, col.Type, items, i)
	}
	return arrays
}
