package client

import (
	"context"
	"fmt"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Expected versions of Append and Memory.Write that are no version of an event or write.
const (
	// AnyVersion appends or writes whatever was before.
	AnyVersion = pgstream.AnyVersion
	// ExistingVersion is for a key that has events, or a workflow that was written.
	ExistingVersion = pgstream.ExistingVersion
	// NoVersion is for one that has none, or was not.
	NoVersion = pgstream.NoVersion
)

// NewEvent is an event to append.
type NewEvent struct {
	Headers Headers // nil: none
	Payload []byte  // JSON
}

// Event is an event in the history of a key.
type Event struct {
	Version   int64 // 1, 2, 3 … within the key
	Position  int64 // in the stream, which is the order of all keys together
	Headers   Headers
	Payload   []byte
	CreatedAt time.Time
}

// Appended is where an append has ended.
type Appended struct {
	Version  int64 // of the last event, and the one to expect for the next append
	Position int64 // of the last event, in the stream
}

// Append appends events to the history of a key, in a stream with versions, if the key's newest event has the expected version. Otherwise a *VersionError says which
// version it has. The stream's projections run in the same transaction.
func (s Session) Append(ctx context.Context, stream, key string, expected int64, events ...NewEvent) (a Appended, err error) {
	ctx, span := s.c.tracing.publishing(ctx, stream, len(events), key)
	defer func() { span.published(a.Position, err) }()
	with := contextOf(ctx)
	messages := make([]pgstream.NewMessage, len(events))
	for i, e := range events {
		headers, err := writeHeaders(e.Headers, with)
		if err != nil {
			return a, err
		}
		messages[i] = pgstream.NewMessage{Headers: headers, Payload: e.Payload}
	}
	ctx, cancel := s.c.limit(ctx)
	defer cancel()
	done, err := pgstream.Append(ctx, s.db, stream, key, expected, messages)
	return Appended(done), versioned(err, stream, key, expected)
}

// ReadOptions say which part of a history to read. The zero value is all of it.
type ReadOptions struct {
	From, To int64 // versions, both included; 0: the first, and the newest
}

// entityPage is how many events one round trip reads.
const entityPage = 1000

// ReadEntity reads the history of a key, in order. It has no events when there are none of the key. ErrOutOfRange when retention has removed a part
// that was asked for.
func (s Session) ReadEntity(ctx context.Context, stream, key string, o ReadOptions) ([]Event, error) {
	var all []Event
	err := s.entity(ctx, stream, key, o, func(e Event) error {
		all = append(all, e)
		return nil
	})
	return all, err
}

// Aggregate folds the history of a key, from an initial state, and returns the state with its version, the one to expect for the next Append. s is
// Client.Session, or what Client.In returns. An error of evolve ends it.
func Aggregate[S any](ctx context.Context, s Session, stream, key string, initial S, evolve func(S, Event) (S, error)) (state S, version int64, err error) {
	state = initial
	err = s.entity(ctx, stream, key, ReadOptions{}, func(e Event) error {
		var err error
		if state, err = evolve(state, e); err != nil {
			return fmt.Errorf("version %d of key %q of stream %q: %w", e.Version, key, stream, err)
		}
		version = e.Version
		return nil
	})
	return state, version, err
}

// entity reads a history page by page.
func (s Session) entity(ctx context.Context, stream, key string, o ReadOptions, each func(Event) error) error {
	from := max(o.From, 1)
	for {
		page, err := s.entityPage(ctx, stream, key, from, o.To)
		if err != nil {
			return err
		}
		for _, m := range page {
			e := Event{Version: m.Version, Position: m.Position, Payload: m.Payload, CreatedAt: m.CreatedAt}
			if e.Headers, err = readHeaders(m.Headers); err != nil {
				return fmt.Errorf("the headers of version %d of key %q of stream %q: %w", m.Version, key, stream, err)
			}
			if err := each(e); err != nil {
				return err
			}
			from = m.Version + 1
		}
		if len(page) < entityPage || o.To != 0 && from > o.To {
			return nil
		}
	}
}

func (s Session) entityPage(ctx context.Context, stream, key string, from, to int64) ([]pgstream.EntityMessage, error) {
	ctx, cancel := s.c.limit(ctx)
	defer cancel()
	return pgstream.ReadEntity(ctx, s.db, stream, key, from, to, entityPage)
}
