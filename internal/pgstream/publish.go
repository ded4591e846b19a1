package pgstream

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// NewMessage is a message to publish.
type NewMessage struct {
	Key     *string // messages with one key are delivered in order to Ordered groups; nil: no order
	Headers []byte  // JSON object or nil
	Payload []byte  // JSON text or raw bytes, by the stream's payload type
}

// Publish appends one message and returns its position. With a pgx.Tx it takes part in that transaction: if that rolls back, the
// message was never there. ErrNotFound when the stream does not exist.
func Publish(ctx context.Context, db DB, stream string, m NewMessage) (int64, error) {
	// A plain INSERT, because pgx keeps its plan; the stream's trigger does what millrace.publish would.
	var position int64
	err := db.QueryRow(ctx, "insert into "+table(stream)+` (key, headers, payload) values ($1, $2, $3) returning "position"`,
		m.Key, m.Headers, m.Payload).Scan(&position)
	if err != nil {
		return 0, publishError(stream, err)
	}
	return position, nil
}

// PublishBatch appends messages in order and returns their positions in that order, in one statement: all of them or none.
func PublishBatch(ctx context.Context, db DB, stream string, ms []NewMessage) ([]int64, error) {
	if len(ms) == 0 {
		return nil, nil
	}
	var payloadType PayloadType
	err := db.QueryRow(ctx, "select payload_type from millrace_engine.stream where name = $1", stream).Scan(&payloadType)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, fmt.Errorf("publish to stream %q: %w", stream, ErrNotFound)
	}
	if err != nil {
		return nil, publishError(stream, err)
	}
	keys := make([]*string, len(ms))
	payloads := make([][]byte, len(ms))
	headers := make([][]byte, len(ms))
	withHeaders := false
	for i, m := range ms {
		keys[i], payloads[i], headers[i] = m.Key, m.Payload, m.Headers
		withHeaders = withHeaders || m.Headers != nil
	}
	if !withHeaders {
		headers = nil
	}
	function := "millrace.publish_batch"
	if payloadType == PayloadBytes {
		function = "millrace.publish_batch_bytes"
	}
	rows, err := db.Query(ctx, "select * from "+function+"($1, $2, $3, $4)", stream, payloads, keys, headers)
	if err != nil {
		return nil, publishError(stream, err)
	}
	positions, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return nil, publishError(stream, err)
	}
	return positions, nil
}

// Copier is what COPY needs: a pool, a connection or a transaction.
type Copier interface {
	CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, rows pgx.CopyFromSource) (int64, error)
}

// PublishCopy appends messages in order by COPY, the fastest way. All of them or none; their positions are not returned.
func PublishCopy(ctx context.Context, db Copier, stream string, ms []NewMessage) error {
	_, err := db.CopyFrom(ctx, pgx.Identifier{"millrace", stream}, []string{"key", "headers", "payload"},
		pgx.CopyFromSlice(len(ms), func(i int) ([]any, error) {
			return []any{ms[i].Key, ms[i].Headers, ms[i].Payload}, nil
		}))
	if err != nil {
		return publishError(stream, err)
	}
	return nil
}

func table(stream string) string { return pgx.Identifier{"millrace", stream}.Sanitize() }

func publishError(stream string, err error) error {
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "42P01" {
		err = ErrNotFound
	}
	return fmt.Errorf("publish to stream %q: %w", stream, translate(err))
}
