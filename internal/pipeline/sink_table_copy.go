package pipeline

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

//go:embed queries/table_copy.sql
var tableCopyQuery string

// tableCopy is the faster way into a table: COPY, of the rows whose keys are not in it. Keys that have not come by lately
// are most likely new; of the others, and of redelivered items, a query tells which are there.
//
// A key that is there after all, because another processor has just written it or because nobody remembers it, makes the
// whole COPY fail. Its rows are inserted with ON CONFLICT then. Such a failure leaves dead rows behind and its work is lost, so after
// each more batches have all their keys looked up, and when that does not help, more batches are inserted; after each
// success fewer. So two processors that meet the same keys look them up, and one that has nothing but
// conflicts soon inserts only.
type tableCopy struct {
	statement string
	lookup    statement // not without a key
	columns   []copied
	seen      *seenKeys
	// Under seen.mu: which batches have every key looked up, and which are not copied at all.
	look, insert setback
}

// leastCopyRows is from how many rows on COPY is faster than an INSERT, which needs one round trip less.
const leastCopyRows = 50

// setback counts batches that take the safer way, because the faster one has failed.
type setback struct {
	next int // after the next failure
	left int
}

// maxSetback is how many batches pass between two attempts at the most.
const maxSetback = 1023

func (s *setback) failed() {
	s.next = min(2*s.next+1, maxSetback)
	s.left = s.next
}

func (s *setback) succeeded() { s.next /= 2 }

// take reports whether the next batch takes the safer way.
func (s *setback) take() bool {
	if s.left == 0 {
		return false
	}
	s.left--
	return true
}

// newTableCopy returns nil when COPY cannot do what the INSERT does. It is for conflicts that change nothing: rows that
// replace others have keys that come again and again.
func (s *TableSink) newTableCopy(ctx context.Context, t *config.TableSink, actual map[string]string) (*tableCopy, error) {
	if t.Conflict.Action != config.ConflictNothing {
		return nil, nil
	}
	var names []string
	for _, col := range s.columns {
		if !copies(col.Type) || actual[col.Name] != string(col.Type) {
			return nil, nil // COPY converts nothing
		}
		names = append(names, pgx.Identifier{col.Name}.Sanitize())
	}
	var able bool
	if err := s.pool.QueryRow(ctx, tableCopyQuery, t.Schema, t.Name).Scan(&able); err != nil || !able {
		return nil, err
	}
	c := &tableCopy{
		lookup:    statement{text: s.lookupText(t), unnamed: true}, // so that it is planned anew for the size that the table has
		statement: s.typesGuard(t) + fmt.Sprintf("COPY %s (%s) FROM STDIN (FORMAT binary)", pgx.Identifier{t.Schema, t.Name}.Sanitize(), strings.Join(names, ", ")),
		seen:      newSeenKeys(),
	}
	for _, col := range s.columns {
		c.columns = append(c.columns, copied{isBytes(col.Type), col.Type == config.TypeJSONB, col.Type == config.TypeTimestamptz, wireOf(col.Type).size})
	}
	return c, nil
}

// copied is how a column's values are sent.
type copied struct {
	bytes, jsonb, time bool
	size               int // in bytes, when it does not vary
}

// copies says whether a column's values are kept in the form that COPY takes.
func copies(t config.ColumnType) bool {
	_, array := t.Element()
	return !array && t != config.TypeNumeric
}

// typesGuard stands before the COPY, in its transaction and its round trip, and fails when a column's type is no longer the one
// that its values are encoded for. COPY would read them as the new type: eight bytes of a bigint make a double precision of
// another value without any error. Under the lock nobody changes the types before the rows are in.
func (s *TableSink) typesGuard(t *config.TableSink) string {
	literal := func(text string) string { return "'" + strings.ReplaceAll(text, "'", "''") + "'" }
	var types []string
	for _, col := range s.columns {
		types = append(types, "("+literal(col.Name)+", "+literal(string(col.Type))+"::regtype)")
	}
	table := pgx.Identifier{t.Schema, t.Name}.Sanitize()
	return fmt.Sprintf("LOCK TABLE ONLY %s IN ROW EXCLUSIVE MODE; SELECT 1 / (count(*) = %d)::integer AS types_are_as_mapped FROM pg_catalog.pg_attribute "+
		"WHERE attrelid = %s::regclass AND NOT attisdropped AND (attname, atttypid) IN (%s); ", table, len(s.columns), literal(table), strings.Join(types, ", "))
}

// lookupText builds the query that gives the places, counted from 1, of the keys that are in the table. Each key is looked up
// by itself: that is the index for any number of keys, where a join might read the table.
func (s *TableSink) lookupText(t *config.TableSink) string {
	var params, aliases, match []string
	for n, k := range s.key {
		alias := "c" + strconv.Itoa(n+1)
		params = append(params, "$"+strconv.Itoa(n+1)+"::"+wireOf(s.columns[k].Type).array)
		aliases = append(aliases, alias)
		match = append(match, "held."+pgx.Identifier{s.columns[k].Name}.Sanitize()+" = t."+alias)
	}
	return fmt.Sprintf("SELECT t.n FROM unnest(%s) WITH ORDINALITY AS t(%s, n) CROSS JOIN LATERAL (SELECT FROM %s AS held WHERE %s OFFSET 0) AS found",
		strings.Join(params, ", "), strings.Join(aliases, ", "), pgx.Identifier{t.Schema, t.Name}.Sanitize(), strings.Join(match, " AND "))
}

// plan decides how the rows of w go in. It returns false for an INSERT; otherwise w.suspect holds the rows whose keys have to be
// looked up before the COPY, and looked says that it holds all because of a failure. Every key counts as seen from now on, whatever
// becomes of the batch.
func (c *tableCopy) plan(s *TableSink, w *tableWork) (copy, looked bool) {
	w.suspect = w.suspect[:0]
	c.seen.mu.Lock()
	defer c.seen.mu.Unlock()
	if len(w.unique) >= leastCopyRows {
		if copy = !c.insert.take(); copy {
			looked = c.look.take()
		}
	}
	if len(s.key) == 0 {
		return copy, false // nothing can conflict
	}
	for i, it := range w.unique {
		// A redelivery may have been written before.
		if c.seen.add(s.Shard(it)) || it.Deliveries != 1 || looked {
			w.suspect = append(w.suspect, i)
		}
	}
	return copy, looked
}

// note learns from a COPY.
func (c *tableCopy) note(looked, failed bool) {
	c.seen.mu.Lock()
	defer c.seen.mu.Unlock()
	way := &c.look
	if looked {
		way = &c.insert
	}
	if failed {
		way.failed()
	} else {
		way.succeeded()
	}
}

// copyError is a COPY that the server refused. The same rows can be inserted, which also tells what is wrong with them.
type copyError struct{ err error }

// Error says what the server said.
func (e *copyError) Error() string { return "COPY: " + e.err.Error() }

// Unwrap returns what the server said.
func (e *copyError) Unwrap() error { return e.err }

// copyRows looks up what has to be looked up and copies what is not there. It writes all of that, or nothing.
func (s *TableSink) copyRows(ctx context.Context, conn *pgx.Conn, w *tableWork, looked bool) error {
	for i := range w.written {
		w.written[i] = true
	}
	there, err := s.findSuspects(ctx, conn, w)
	if err != nil {
		return err
	}
	if there == len(w.unique) {
		return nil
	}
	w.copy = append(w.copy[:0], "PGCOPY\n\xff\r\n\x00\x00\x00\x00\x00\x00\x00\x00\x00"...)
	for i, it := range w.unique {
		if w.written[i] {
			w.copy = s.copy.appendRow(w.copy, it.Row)
		}
	}
	w.copy = binary.BigEndian.AppendUint16(w.copy, 0xffff)
	_, err = conn.PgConn().CopyFrom(ctx, bytes.NewReader(w.copy), s.copy.statement)
	var pg *pgconn.PgError
	failed := errors.As(err, &pg) && Classify(err) != ClassTransient
	if err == nil || failed {
		s.copy.note(looked, failed)
	}
	if s.metrics != nil && err == nil {
		s.metrics.copied.Add(float64(len(w.unique) - there))
	}
	if s.metrics != nil && failed {
		s.metrics.copyReplays.Inc()
	}
	if failed {
		return &copyError{err}
	}
	return err
}

// findSuspects unmarks the suspects that are in the table, and returns how many they are.
func (s *TableSink) findSuspects(ctx context.Context, conn *pgx.Conn, w *tableWork) (there int, err error) {
	if len(w.suspect) == 0 {
		return 0, nil
	}
	w.part = w.part[:0]
	for _, i := range w.suspect {
		w.part = append(w.part, w.unique[i])
	}
	keys := w.arrays[:len(s.key)]
	for n, k := range s.key {
		keys[n] = appendArray(keys[n][:0], s.columns[k].Type, w.part, k)
	}
	found, err := s.copy.lookup.start(ctx, conn, keys)
	if err != nil {
		return 0, err
	}
	for found.NextRow() {
		w.written[w.suspect[binary.BigEndian.Uint64(found.Values()[0])-1]] = false
		there++
	}
	_, err = found.Close()
	return there, err
}

// appendRow writes a row in the binary format of COPY: the number of columns, then each value after its length, where -1 is null.
func (c *tableCopy) appendRow(buf []byte, row []Value) []byte {
	be := binary.BigEndian
	buf = be.AppendUint16(buf, uint16(len(c.columns)))
	for i := range c.columns {
		col, v := &c.columns[i], &row[i]
		switch {
		case !v.Valid:
			buf = be.AppendUint32(buf, 0xffffffff)
		case col.jsonb:
			buf = be.AppendUint32(buf, uint32(len(v.S)+1))
			buf = append(buf, 1) // version of jsonb's binary format
			buf = append(buf, v.S...)
		case col.bytes:
			buf = be.AppendUint32(buf, uint32(len(v.S)))
			buf = append(buf, v.S...)
		default:
			n := v.N
			if col.time {
				n -= postgresEpoch
			}
			buf = be.AppendUint32(buf, uint32(col.size))
			switch col.size {
			case 1:
				buf = append(buf, byte(n))
			case 2:
				buf = be.AppendUint16(buf, uint16(n))
			case 4:
				buf = be.AppendUint32(buf, uint32(n))
			case 8:
				buf = be.AppendUint64(buf, uint64(n))
			}
		}
	}
	return buf
}
