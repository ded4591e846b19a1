package pipeline

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// writeTimeout bounds one write. It is longer than any sane write and shorter than a person's patience: after it the
// connection is given up, and the batch is written again.
const writeTimeout = 30 * time.Second

// TableSink writes batches into one table, each with one statement: INSERT … SELECT FROM unnest(arrays), or COPY where that
// is faster (tableCopy).
//
// Rows are sorted by key, so that concurrent writers, in this process or another, wait for each other and never
// deadlock. Rows of one batch with the same key are reduced to one: the first, or with Update the last. Which rows were
// duplicates is the difference between the keys sent and the keys returned; for skipped rows RETURNING returns nothing.
// Of rows with one key in a batch UpdateIfNewer takes the newest, and of equally new ones the first.
type TableSink struct {
	pool    *pgxpool.Pool
	columns []config.Column
	key     []int // columns of the key
	action  config.ConflictAction
	newer   int // column that is compared, with UpdateIfNewer
	insert  statement
	copy    *tableCopy // nil: every row is inserted
	compare *statement // finds duplicates with other content; nil: nobody wants to know
	ledger  *ledger    // nil: the key alone makes redelivery harmless
	metrics *Metrics   // nil: nobody wants to know
	source  TxSource   // settles in the sink's transactions; nil when it is elsewhere
	seed    maphash.Seed
	work    sync.Pool
}

// tableWork is the memory of one write, used again by the next.
type tableWork struct {
	rank    []int // for each item of the batch, its row in unique
	order   []int // items of the batch sorted by key, then by arrival
	unique  []*Item
	written []bool
	suspect []int   // rows of unique whose keys may be in the table
	part    []*Item // these rows
	arrays  [][]byte
	copy    []byte
}

// NewTableSink checks the table against the mapping and returns a sink. Migrate comes before it. Its errors are of class ClassConfiguration when a person has to act.
func NewTableSink(ctx context.Context, pool *pgxpool.Pool, c *config.Config) (*TableSink, error) {
	t := c.Sink.Table
	s := &TableSink{
		pool:    pool,
		columns: c.Mapping.Columns,
		action:  t.Conflict.Action,
		newer:   slices.IndexFunc(c.Mapping.Columns, func(col config.Column) bool { return col.Name == t.Conflict.Newer }),
		seed:    maphash.MakeSeed(),
	}
	for _, name := range t.Key {
		s.key = append(s.key, slices.IndexFunc(s.columns, func(c config.Column) bool { return c.Name == name }))
	}
	actual, err := checkTable(ctx, pool, c)
	if err != nil {
		return nil, err
	}
	s.work.New = func() any { return &tableWork{arrays: make([][]byte, len(s.columns))} }
	if err := s.probe(ctx, t, actual); err != nil {
		return nil, err
	}
	if t.Idempotency == config.IdempotencyLedger {
		s.ledger = newLedger(c)
	}
	s.copy, err = s.newTableCopy(ctx, t, actual)
	return s, err
}

func (s *TableSink) prepared() *statement { return &s.insert }

// SettleWith implements SettlingSink.
func (s *TableSink) SettleWith(source TxSource) { s.source = source }

// Shard implements Sharder: a row's key has one writer.
func (s *TableSink) Shard(it *Item) uint64 {
	if len(s.key) == 0 {
		return maphash.String(s.seed, it.ID)
	}
	sum := uint64(0)
	for _, k := range s.key {
		const prime = 0x9e3779b97f4a7c15
		v := &it.Row[k]
		sum = (sum+uint64(v.N))*prime ^ maphash.String(s.seed, v.S)
		sum ^= sum >> 32
	}
	return sum
}

// insertText builds the INSERT. actual holds the table's type per column.
func (s *TableSink) insertText(t *config.TableSink, actual map[string]string) string {
	var names, values, params, aliases, key, set []string
	for i, col := range s.columns {
		name := pgx.Identifier{col.Name}.Sanitize()
		alias := "c" + strconv.Itoa(i+1)
		names = append(names, name)
		values = append(values, s.value(i, actual))
		params = append(params, "$"+strconv.Itoa(i+1)+"::"+wireOf(col.Type).array)
		aliases = append(aliases, alias)
		if !slices.Contains(s.key, i) {
			set = append(set, name+" = excluded."+name)
		}
	}
	var returning []string
	for _, i := range s.key {
		name := pgx.Identifier{s.columns[i].Name}.Sanitize()
		key = append(key, name)
		// Back in the type it was sent in, so that the bytes can be compared.
		as := string(s.columns[i].Type)
		if as == string(config.TypeNumeric) {
			as = "text"
		}
		if actual[s.columns[i].Name] == as {
			returning = append(returning, name)
		} else {
			returning = append(returning, name+"::"+as)
		}
	}
	sql := fmt.Sprintf("INSERT INTO %s AS held (%s) SELECT %s FROM unnest(%s) AS t(%s)",
		pgx.Identifier{t.Schema, t.Name}.Sanitize(), strings.Join(names, ", "), strings.Join(values, ", "),
		strings.Join(params, ", "), strings.Join(aliases, ", "))
	if len(key) == 0 {
		return sql
	}
	if s.action != config.ConflictNothing && len(set) > 0 {
		sql += fmt.Sprintf(" ON CONFLICT (%s) DO UPDATE SET %s", strings.Join(key, ", "), strings.Join(set, ", "))
		if s.action == config.ConflictUpdateIfNewer {
			sql += " WHERE " + s.isNewer(actual)
		}
	} else {
		sql += fmt.Sprintf(" ON CONFLICT (%s) DO NOTHING", strings.Join(key, ", "))
	}
	return sql + " RETURNING " + strings.Join(returning, ", ")
}

// value is the SQL of a column's value, out of what it travels as, in the type that the table has.
func (s *TableSink) value(i int, actual map[string]string) string {
	col := s.columns[i]
	value := "c" + strconv.Itoa(i+1)
	if cast := wireOf(col.Type).cast; cast != "" {
		value += "::" + cast
	}
	if actual[col.Name] != string(col.Type) {
		// Without a length, so that a text that is too long for a varchar(n) is an error and is not cut off.
		value += "::" + actual[col.Name]
	}
	return value
}

// probe writes no rows, so that PostgreSQL checks the statement: names, types, privileges, and that the key is a unique
// constraint, which it only looks for when it plans.
func (s *TableSink) probe(ctx context.Context, t *config.TableSink, actual map[string]string) error {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	s.insert = newStatement(conn.Conn(), s.insertText(t, actual))
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(ctx) }()
	w := &tableWork{arrays: make([][]byte, len(s.columns))}
	err = s.exec(ctx, conn.Conn(), w)
	if text := s.compareText(t, actual); err == nil && t.Conflict.DetectMismatch && text != "" {
		compare := newStatement(conn.Conn(), text)
		s.compare = &compare
		if err = compare.run(ctx, conn.Conn(), s.encode(nil)); err != nil && Classify(err) == ClassConfiguration {
			return NewConfigurationError("table %s.%s has a mapped column that cannot be compared, so detectMismatch cannot work: %s; leave it out", t.Schema, t.Name, reason(err))
		}
	}
	var pg *pgconn.PgError
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &pg), Classify(err) == ClassTransient:
		return err
	case pg.Code == "42P10":
		return NewConfigurationError("table %s.%s has no primary key or unique index over exactly (%s); add one, or write the columns of one as sink.table.key",
			t.Schema, t.Name, strings.Join(t.Key, ", "))
	}
	return NewConfigurationError("table %s.%s does not take the mapped columns: %s", t.Schema, t.Name, reason(err))
}

// Write implements Sink.
func (s *TableSink) Write(ctx context.Context, b *Batch) ([]Outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	w := s.work.Get().(*tableWork)
	defer s.recycle(w)
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Release()
	os, err := s.write(ctx, conn.Conn(), w, b, s.copy != nil)
	if failed := (*copyError)(nil); errors.As(err, &failed) {
		os, err = s.write(ctx, conn.Conn(), w, b, false)
	}
	if s.compare != nil {
		_ = s.compare.forget(ctx, conn.Conn(), err) // what it says, the other says as well
	}
	return os, s.insert.forget(ctx, conn.Conn(), err)
}

// write writes the batch, in a transaction when there is more to it than rows.
func (s *TableSink) write(ctx context.Context, conn *pgx.Conn, w *tableWork, b *Batch, copying bool) ([]Outcome, error) {
	if s.source == nil && s.ledger == nil {
		return s.rows(ctx, conn, w, b.Items, copying)
	}
	return settledWrite(ctx, conn, s.source, b, func(tx pgx.Tx) ([]Outcome, error) { return s.inTx(ctx, tx, w, b.Items, copying) })
}

// WriteTx implements TxSink. There is no COPY, whose failure would cost the caller its transaction.
func (s *TableSink) WriteTx(ctx context.Context, tx pgx.Tx, b *Batch) ([]Outcome, error) {
	w := s.work.Get().(*tableWork)
	defer s.recycle(w)
	return s.inTx(ctx, tx, w, b.Items, false)
}

func (s *TableSink) inTx(ctx context.Context, tx pgx.Tx, w *tableWork, items []*Item, copying bool) ([]Outcome, error) {
	write := func(items []*Item) ([]Outcome, error) { return s.rows(ctx, tx.Conn(), w, items, copying) }
	if s.ledger != nil {
		return s.ledger.write(ctx, tx, items, write)
	}
	return write(items)
}

// rows writes a row for each item: with one statement, so that all its keys come in one order and concurrent batches never deadlock.
func (s *TableSink) rows(ctx context.Context, conn *pgx.Conn, w *tableWork, items []*Item, copying bool) ([]Outcome, error) {
	s.arrange(w, items)
	var err error
	looked := false
	if copying {
		copying, looked = s.copy.plan(s, w)
	}
	if copying {
		err = s.copyRows(ctx, conn, w, looked)
	} else {
		err = s.exec(ctx, conn, w)
	}
	if err != nil {
		return nil, err
	}
	os := s.outcomes(w, items)
	if s.compare != nil {
		return os, s.detect(ctx, conn, items, os)
	}
	return os, nil
}

// arrange sorts the rows by key and drops all but one of those with the same key. Without a key every row stays, as it came.
func (s *TableSink) arrange(w *tableWork, items []*Item) {
	w.order, w.unique = w.order[:0], w.unique[:0]
	w.rank = slices.Grow(w.rank[:0], len(items))[:len(items)]
	for i := range items {
		w.order = append(w.order, i)
	}
	if len(s.key) > 0 {
		slices.SortFunc(w.order, func(a, b int) int {
			if c := s.compareKeys(items[a], items[b]); c != 0 {
				return c
			}
			return a - b
		})
	}
	for _, i := range w.order {
		it := items[i]
		if n := len(w.unique); n > 0 && len(s.key) > 0 && s.compareKeys(w.unique[n-1], it) == 0 {
			if s.replaces(it, w.unique[n-1]) {
				w.unique[n-1] = it
			}
		} else {
			w.unique = append(w.unique, it)
		}
		w.rank[i] = len(w.unique) - 1
	}
	w.written = slices.Grow(w.written[:0], len(w.unique))[:len(w.unique)]
	clear(w.written)
}

func (s *TableSink) compareKeys(a, b *Item) int {
	for _, k := range s.key {
		if c := compareValues(a.Row[k], b.Row[k]); c != 0 {
			return c
		}
	}
	return 0
}

// exec inserts the rows and marks those that were written.
func (s *TableSink) exec(ctx context.Context, conn *pgx.Conn, w *tableWork) error {
	for i, col := range s.columns {
		w.arrays[i] = appendArray(w.arrays[i][:0], col.Type, w.unique, i)
	}
	rr, err := s.insert.start(ctx, conn, w.arrays)
	if err != nil {
		return err
	}
	next, matched, unknown := 0, 0, 0
	for rr.NextRow() {
		matched++
		if unknown > maxUnknownKeys {
			continue
		}
		if i := s.find(w.unique, next, rr.Values()); i >= 0 {
			w.written[i] = true
			next = i + 1
		} else {
			unknown++
		}
	}
	tag, err := rr.Close()
	if err != nil {
		return err
	}
	if len(s.key) == 0 {
		matched = int(tag.RowsAffected())
	}
	if matched == len(w.unique) {
		for i := range w.written {
			w.written[i] = true // also those whose key came back in another form, such as 1.50 for 1.5
		}
	}
	return nil
}

// maxUnknownKeys bounds the search for keys that came back in another form than they were sent in. Their rows count as
// duplicates, which changes a figure and nothing else: both are settled alike.
const maxUnknownKeys = 16

// find looks for the row with the returned key. Rows come back in the order they were sent, so it is nearly always the
// next one or a few further; that nobody promises this order is why it starts over once.
func (s *TableSink) find(rows []*Item, next int, key [][]byte) int {
	for n := range rows {
		i := next + n
		if i >= len(rows) {
			i -= len(rows)
		}
		if s.sameKey(rows[i], key) {
			return i
		}
	}
	return -1
}

func (s *TableSink) sameKey(it *Item, key [][]byte) bool {
	for n, k := range s.key {
		if !sameValue(s.columns[k].Type, it.Row[k], key[n]) {
			return false
		}
	}
	return true
}

// outcomes gives each item of the batch its result. Of several items with one key, one can be the written one.
func (s *TableSink) outcomes(w *tableWork, items []*Item) []Outcome {
	os := make([]Outcome, len(items))
	for i, it := range items {
		row := w.rank[i]
		if !w.written[row] || w.unique[row] != it {
			os[i].Result = Duplicate
		}
	}
	return os
}

// recycle keeps the memory of ordinary writes for the next one.
func (s *TableSink) recycle(w *tableWork) {
	const maxKept = 4 << 20
	kept := cap(w.copy)
	for _, a := range w.arrays {
		kept += cap(a)
	}
	if kept <= maxKept {
		clear(w.unique)
		clear(w.part)
		s.work.Put(w)
	}
}
