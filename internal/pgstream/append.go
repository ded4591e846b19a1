package pgstream

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Expected versions of Append that are no numbers of messages.
const (
	// AnyVersion appends whatever has been appended before.
	AnyVersion int64 = -2
	// ExistingVersion appends to a key that has messages.
	ExistingVersion int64 = -1
	// NoVersion appends to a key that has none.
	NoVersion int64 = 0
)

// VersionError means that a key, or a workflow of a memory, has another version than the one that was expected. Nothing was appended or written.
type VersionError struct {
	Present int64 // the version that it has; 0 when there is none
}

func (e *VersionError) Error() string { return "another version than expected" }

// Appended is where an append has ended.
type Appended struct {
	Version  int64 // of the last message, and the one to expect for the next append
	Position int64 // of the last message, in the stream
}

// EntityMessage is one message of a key's history.
type EntityMessage struct {
	Version   int64
	Position  int64
	Headers   []byte // JSON object or nil
	Payload   []byte
	CreatedAt time.Time
}

// Append appends messages to the history of a key in a stream with versions, if the key's newest message has the expected version, and runs the
// stream's projections. With a pgx.Tx it takes part in that transaction. A *VersionError says which version the key has instead; like every error
// within a transaction of PostgreSQL it leaves nothing to do but to roll back. Of messages, Key and the options are not looked at.
func Append(ctx context.Context, db DB, stream, key string, expected int64, messages []NewMessage) (Appended, error) {
	payloads := make([][]byte, len(messages))
	var headers [][]byte // null unless some message has some
	for i, m := range messages {
		payloads[i] = m.Payload
		if m.Headers != nil {
			if headers == nil {
				headers = make([][]byte, len(messages))
			}
			headers[i] = m.Headers
		}
	}
	var version *int64
	if expected != AnyVersion {
		version = &expected
	}
	var a Appended
	err := db.QueryRow(ctx, "select version, position from millrace.append($1, $2, $3::jsonb[], $4, $5::jsonb[])", stream, key, payloads, version, headers).
		Scan(&a.Version, &a.Position)
	if err != nil {
		return a, fmt.Errorf("append to key %q of stream %q: %w", key, stream, translate(err))
	}
	return a, nil
}

// ReadEntity reads the history of a key, from a version to a version (0: the newest), at most limit messages. ErrOutOfRange when retention has
// removed the first of them.
func ReadEntity(ctx context.Context, db DB, stream, key string, from, to int64, limit int) ([]EntityMessage, error) {
	var last *int64
	if to != 0 {
		last = &to
	}
	rows, _ := db.Query(ctx, "select version, position, headers, payload, created_at from millrace.read_entity($1, $2, $3, $4, $5)", stream, key, from, last, limit)
	messages, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (EntityMessage, error) {
		var m EntityMessage
		err := row.Scan(&m.Version, &m.Position, &m.Headers, &m.Payload, &m.CreatedAt)
		return m, err
	})
	if err != nil {
		return nil, fmt.Errorf("read key %q of stream %q: %w", key, stream, translate(err))
	}
	return messages, nil
}

// IsVersionError says which version a key or a workflow has when Append or Memory.Write was refused for it.
func IsVersionError(err error) (present int64, ok bool) {
	var v *VersionError
	if errors.As(err, &v) {
		return v.Present, true
	}
	return 0, false
}
