package pipeline

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

var binaryFormat = []int16{pgx.BinaryFormatCode}

// statement is SQL whose parameters are encoded in binary by its owner. It is prepared once per connection, unless a pooler
// stands in between that loses prepared statements.
type statement struct {
	text    string
	name    string // on each connection, of its own for each text
	unnamed bool   // send the text with every run
}

// newStatement returns a statement for the connections of the pool that conn is from.
func newStatement(conn *pgx.Conn, text string) statement {
	sum := sha256.Sum256([]byte(text))
	// All connections of a pool have one mode. Every mode but the default is there for poolers.
	return statement{text, "millrace_" + hex.EncodeToString(sum[:8]), conn.Config().DefaultQueryExecMode != pgx.QueryExecModeCacheStatement}
}

// start runs the statement. Errors that it does not return come with the result.
func (s *statement) start(ctx context.Context, conn *pgx.Conn, params [][]byte) (*pgconn.ResultReader, error) {
	if s.unnamed {
		return conn.PgConn().ExecParams(ctx, s.text, params, nil, binaryFormat, binaryFormat), nil
	}
	if _, err := conn.Prepare(ctx, s.name, s.text); err != nil {
		return nil, err
	}
	return conn.PgConn().ExecPrepared(ctx, s.name, params, binaryFormat, binaryFormat), nil
}

// run runs the statement and drops what it returns.
func (s *statement) run(ctx context.Context, conn *pgx.Conn, params [][]byte) error {
	result, err := s.start(ctx, conn, params)
	if err != nil {
		return err
	}
	_, err = result.Close()
	return err
}

// forget drops the prepared statement when what it reads has changed under it; the same batch then succeeds.
func (s *statement) forget(ctx context.Context, conn *pgx.Conn, err error) error {
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "0A000" && !s.unnamed && conn.PgConn().TxStatus() == 'I' {
		if derr := conn.Deallocate(ctx, s.name); derr == nil {
			return fmt.Errorf("a table has changed: %s", pg.Message) // no longer a PgError: transient
		}
	}
	return err
}
