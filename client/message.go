package client

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Headers are a message's headers: texts, numbers, booleans, and whatever else JSON has. Of messages that are received, numbers are json.Number.
type Headers map[string]any

// Text returns a header's text; empty when there is no such header, or it is no text.
func (h Headers) Text(name string) string {
	text, _ := h[name].(string)
	return text
}

// NewMessage is a message to publish. The zero value of every option is a message that is published at once.
type NewMessage struct {
	Key     string  // messages with one key are delivered in order to Ordered groups; empty: no order
	Headers Headers // nil: none
	Payload []byte  // JSON text or raw bytes, by the stream's payload type

	// Delay and DeliverAt keep the message out of the stream until then, by the database's clock; one of them at most. It has no position before it is due, so
	// publishing it returns 0.
	Delay     time.Duration
	DeliverAt time.Time
	// Priority is 1 or higher for a message that goes before those with a lower one, in a stream that has priorities.
	Priority int
	// DedupeKey, when not empty, makes publishing repeatable: a second message with the key within the stream's dedupe window is not appended, and
	// publishing it returns the position of the first (0 when that was delayed).
	DedupeKey string
	// Serialize makes the message wait for open transactions that have published its key with Serialize, so that the positions of the key are in the order of
	// commits.
	Serialize bool
}

// Message is a message of a stream.
type Message struct {
	Position  int64
	Key       string // empty when it has none
	Headers   Headers
	Payload   []byte
	CreatedAt time.Time // when the publishing statement began
}

// engine is the message as the engine takes it.
func (m NewMessage) engine(headers []byte) pgstream.NewMessage {
	n := pgstream.NewMessage{Headers: headers, Payload: m.Payload, Delay: m.Delay, DeliverAt: m.DeliverAt, Priority: m.Priority, DedupeKey: m.DedupeKey, Serialize: m.Serialize}
	if m.Key != "" {
		n.Key = &m.Key
	}
	return n
}

func messageOf(m *pgstream.Message) (Message, error) {
	out := Message{Position: m.Position, Payload: m.Payload, CreatedAt: m.CreatedAt}
	if m.Key != nil {
		out.Key = *m.Key
	}
	var err error
	if out.Headers, err = readHeaders(m.Headers); err != nil {
		return out, fmt.Errorf("the headers of position %d: %w", m.Position, err)
	}
	return out, nil
}

func readHeaders(text []byte) (Headers, error) {
	if text == nil {
		return nil, nil
	}
	var h Headers
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber() // a float64 would change large numbers
	err := d.Decode(&h)
	return h, err
}

// writeHeaders returns the JSON of headers, nil when there are none. with is added to them, unless they have it.
func writeHeaders(h Headers, with traceContext) ([]byte, error) {
	if with.parent == "" || h["traceparent"] != nil {
		if len(h) == 0 {
			return nil, nil
		}
		return marshalHeaders(h)
	}
	all := make(Headers, len(h)+2)
	for name, value := range h {
		all[name] = value
	}
	all["traceparent"] = with.parent
	if with.state != "" {
		all["tracestate"] = with.state
	}
	return marshalHeaders(all)
}

func marshalHeaders(h Headers) ([]byte, error) {
	text, err := json.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("%w: headers: %w", ErrRefused, err)
	}
	return text, nil
}
