package pipeline

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

//go:embed queries/table_copy.sql
var tableCopyQuery string

// tableCopy is the faster way into a table: COPY, for rows whose keys are most likely new. A key that is there after all
// makes the whole COPY fail; then its rows are inserted with ON CONFLICT like all others.
//
// A failed COPY leaves dead rows behind and its work is lost, so after each failure more batches go without one, until
// some have succeeded again. So a processor that reads again what it has written before, or whose fellows write the same
// keys, soon stops trying, and one that was only restarted soon tries again.
type tableCopy struct {
	statement string
	columns   []copied
	seen      *seenKeys
	// Under seen.mu:
	pause int // batches to let pass after the next failure
	left  int // of those
}

// maxCopyPause is how many batches of a writer pass between two attempts at the least.
const maxCopyPause = 1023

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
		statement: fmt.Sprintf("COPY %s (%s) FROM STDIN (FORMAT binary)", pgx.Identifier{t.Schema, t.Name}.Sanitize(), strings.Join(names, ", ")),
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

// part divides the rows of w: those for COPY and the rest. Every key counts as seen from now on, so a batch that is
// written again goes without COPY, whatever became of it the first time. In a transaction of several statements there is
// no mixture: two sorted sequences of keys after another are not sorted, and could deadlock.
func (c *tableCopy) part(s *TableSink, w *tableWork, together bool) {
	w.fresh, w.rest = w.fresh[:0], w.rest[:0]
	c.seen.mu.Lock()
	defer c.seen.mu.Unlock()
	for i, it := range w.unique {
		// A redelivery may have been written before.
		if !c.seen.add(s.Shard(it)) && it.Deliveries == 1 {
			w.fresh = append(w.fresh, i)
		} else {
			w.rest = append(w.rest, i)
		}
	}
	switch {
	case len(w.fresh) == 0:
		return
	case c.left > 0:
		c.left--
	case together && len(w.rest) > 0, len(w.fresh) < len(w.rest):
	default:
		return
	}
	w.fresh, w.rest = w.fresh[:0], w.rest[:0]
	for i := range w.unique {
		w.rest = append(w.rest, i)
	}
}

// note learns from a COPY.
func (c *tableCopy) note(failed bool) {
	c.seen.mu.Lock()
	defer c.seen.mu.Unlock()
	if failed {
		c.pause = min(2*c.pause+1, maxCopyPause)
		c.left = c.pause
	} else {
		c.pause /= 2
	}
}

// copyError is a COPY that the server refused. The same rows can be inserted, which also tells what is wrong with them.
type copyError struct{ err error }

// Error says what the server said.
func (e *copyError) Error() string { return "COPY: " + e.err.Error() }

// Unwrap returns what the server said.
func (e *copyError) Unwrap() error { return e.err }

// copyFresh sends the rows of w.fresh. All of them are written, or none.
func (s *TableSink) copyFresh(ctx context.Context, conn *pgx.Conn, w *tableWork) error {
	w.copy = append(w.copy[:0], "PGCOPY\n\xff\r\n\x00\x00\x00\x00\x00\x00\x00\x00\x00"...)
	for _, i := range w.fresh {
		w.copy = s.copy.appendRow(w.copy, w.unique[i].Row)
	}
	w.copy = binary.BigEndian.AppendUint16(w.copy, 0xffff)
	_, err := conn.PgConn().CopyFrom(ctx, bytes.NewReader(w.copy), s.copy.statement)
	if err == nil {
		s.copy.note(false)
		if s.metrics != nil {
			s.metrics.copied.Add(float64(len(w.fresh)))
		}
		for _, i := range w.fresh {
			w.written[i] = true
		}
		return nil
	}
	var pg *pgconn.PgError
	if errors.As(err, &pg) && Classify(err) != ClassTransient {
		s.copy.note(true)
		if s.metrics != nil {
			s.metrics.copyReplays.Inc()
		}
		return &copyError{err}
	}
	return err
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
