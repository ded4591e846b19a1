package pipeline

import (
	"errors"
	"fmt"
	"slices"

	"github.com/google/cel-go/common/types"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/expression"
)

// messageMaker makes messages of items, as the configuration of a StreamSink says.
type messageMaker struct {
	columns []config.Column
	codec   config.Codec
	stream  string              // "" with a route
	route   *expression.Program // nil with a stream
	key     *expression.Program // nil: the key of the source's message
	headers []headerMaker       // by name
	payload *expression.Program // nil: the row, or without columns the document
}

type headerMaker struct {
	name  string
	value *expression.Program
}

// newMessageMaker compiles the expressions.
func newMessageMaker(c *config.Config) (*messageMaker, error) {
	s := c.Sink.Stream
	m := &messageMaker{columns: c.Mapping.Columns, codec: c.Codec, stream: s.Stream}
	compile := func(setting, text string, kind expression.Kind) (*expression.Program, error) {
		if text == "" {
			return nil, nil
		}
		p, err := expression.Compile(text, kind, expression.AfterMapping)
		if err != nil {
			return nil, NewConfigurationError("sink.stream.%s: %v", setting, err)
		}
		return p, nil
	}
	var err error
	for _, e := range []struct {
		setting, text string
		kind          expression.Kind
		program       **expression.Program
	}{
		{"route", s.Route, expression.Text, &m.route},
		{"key", s.Key, expression.Text, &m.key},
		{"payload", s.Payload, expression.Value, &m.payload},
	} {
		if *e.program, err = compile(e.setting, e.text, e.kind); err != nil {
			return nil, err
		}
	}
	for name, text := range s.Headers {
		p, err := compile("headers."+name, text, expression.Text)
		if err != nil {
			return nil, err
		}
		m.headers = append(m.headers, headerMaker{name, p})
	}
	slices.SortFunc(m.headers, func(a, b headerMaker) int {
		if a.name < b.name {
			return -1
		}
		return 1
	})
	return m, nil
}

// streamOf returns the stream that an item goes to.
func (m *messageMaker) streamOf(vars expression.Variables) (string, error) {
	if m.route == nil {
		return m.stream, nil
	}
	stream, ok, err := m.route.EvalText(vars)
	switch {
	case err != nil:
		return "", fmt.Errorf("route: %w", err)
	case !ok:
		return "", errors.New("route: the expression gave null, and a message needs a stream")
	}
	return stream, nil
}

// keyOf returns the key of an item's message; nil when it has none.
func (m *messageMaker) keyOf(it *Item, vars expression.Variables) (*string, error) {
	if m.key == nil {
		return it.Key, nil
	}
	key, ok, err := m.key.EvalText(vars)
	switch {
	case err != nil:
		return nil, fmt.Errorf("key: %w", err)
	case !ok:
		return nil, nil
	}
	return &key, nil
}

// message makes the message of an item for a stream with payloads of that type.
func (m *messageMaker) message(it *Item, vars expression.Variables, payloads pgstream.PayloadType) (pgstream.NewMessage, error) {
	var n pgstream.NewMessage
	var err error
	if n.Key, err = m.keyOf(it, vars); err != nil {
		return n, err
	}
	if n.Headers, err = m.headersOf(vars); err != nil {
		return n, err
	}
	n.Payload, err = m.payloadOf(it, vars, payloads)
	return n, err
}

// headersOf returns a JSON object of texts, without those whose expression gives null; nil when nothing is left.
func (m *messageMaker) headersOf(vars expression.Variables) ([]byte, error) {
	var object []byte
	for _, h := range m.headers {
		value, ok, err := h.value.EvalText(vars)
		if err != nil {
			return nil, fmt.Errorf("headers.%s: %w", h.name, err)
		}
		if !ok {
			continue
		}
		if object == nil {
			object = append(object, '{')
		} else {
			object = append(object, ',')
		}
		object = expression.AppendText(append(expression.AppendText(object, h.name), ':'), value)
	}
	if object == nil {
		return nil, nil
	}
	return append(object, '}'), nil
}

// payloadOf returns JSON, or for a stream of bytes the bytes or the text that there is.
func (m *messageMaker) payloadOf(it *Item, vars expression.Variables, payloads pgstream.PayloadType) ([]byte, error) {
	if m.payload != nil {
		v, err := m.payload.Eval(vars)
		if err != nil {
			return nil, fmt.Errorf("payload: %w", err)
		}
		if payloads == pgstream.PayloadBytes {
			switch v := v.(type) {
			case types.Bytes:
				return v, nil
			case types.String:
				return []byte(v), nil
			}
		}
		text, err := expression.AppendJSON(nil, v)
		if err != nil {
			return nil, fmt.Errorf("payload: %w", err)
		}
		return text, nil
	}
	if len(m.columns) > 0 {
		return appendRow(nil, m.columns, it.Row), nil
	}
	if payloads == pgstream.PayloadBytes && m.codec.Type != config.CodecFields {
		document, err := body(it, m.codec.Field)
		return []byte(document), err
	}
	return documentJSON(it, &m.codec)
}
