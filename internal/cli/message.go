package cli

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// messageJSON is a message as -o json prints it, and as publish --format message reads it. Exactly one of the payloads is there.
type messageJSON struct {
	Position     int64           `json:"position,omitempty"`
	Priority     int             `json:"priority,omitempty"`
	Key          *string         `json:"key"`
	Headers      json.RawMessage `json:"headers"`
	Payload      json.RawMessage `json:"payload,omitempty"`
	PayloadBytes []byte          `json:"payload_bytes,omitempty"` // base64
	CreatedAt    *time.Time      `json:"created_at,omitempty"`
	Attempt      int             `json:"attempt,omitempty"`
	DedupeKey    string          `json:"dedupe_key,omitempty"` // read, never printed
}

func newMessageJSON(m pgstream.Message, priority int, payload pgstream.PayloadType) messageJSON {
	out := messageJSON{Position: m.Position, Priority: priority, Key: m.Key, Headers: m.Headers, CreatedAt: &m.CreatedAt, Attempt: m.Attempt}
	if payload == pgstream.PayloadBytes {
		out.PayloadBytes = m.Payload
	} else {
		out.Payload = m.Payload
	}
	return out
}

// payloadText is a payload in one line, for a person.
func payloadText(payload []byte, kind pgstream.PayloadType) string {
	if kind == pgstream.PayloadBytes && !utf8.Valid(payload) {
		return "\\x" + hexText(payload)
	}
	return plain(string(payload))
}

func hexText(b []byte) string {
	const digits = "0123456789abcdef"
	text := make([]byte, 0, 2*len(b))
	for _, c := range b {
		text = append(text, digits[c>>4], digits[c&15])
	}
	return string(text)
}

// headersText are headers in one line, or a word for none.
func headersText(headers []byte) string {
	if headers == nil {
		return none
	}
	return plain(string(headers))
}

// indented is a JSON text for a person, with each further line indented.
func indented(text []byte, indent string) string {
	var b bytes.Buffer
	if json.Indent(&b, text, indent, "  ") != nil {
		return plain(string(text))
	}
	return b.String()
}

// messagePrinter prints messages as they come.
type messagePrinter struct {
	a        *app
	kind     pgstream.PayloadType
	lanes    bool // show a column for the priority
	attempts bool // show a column for the attempt
	widths   columns
	begun    bool
}

func (p *messagePrinter) print(m pgstream.Message, priority int) error {
	if p.a.json() {
		return printJSON(p.a.Out, newMessageJSON(m, priority, p.kind))
	}
	if !p.begun {
		p.begun = true
		// Room for what may come, so that the columns seldom move.
		p.widths.fit(p.cells("00000000", "0", "0", "0000000000", "2006-01-02 15:04:05", strings.Repeat("0", 30), ""))
		if err := p.line(p.cells("POSITION", "PRIORITY", "ATTEMPT", "KEY", "CREATED", "HEADERS", "PAYLOAD")); err != nil {
			return err
		}
	}
	return p.line(p.cells(strconv.FormatInt(m.Position, 10), strconv.Itoa(priority), strconv.Itoa(m.Attempt), keyText(m.Key),
		m.CreatedAt.Local().Format("2006-01-02 15:04:05"), headersText(m.Headers), payloadText(m.Payload, p.kind)))
}

// cells leaves out the columns that are not shown.
func (p *messagePrinter) cells(position, priority, attempt, key, created, headers, payload string) []string {
	row := []string{position}
	if p.lanes {
		row = append(row, priority)
	}
	if p.attempts {
		row = append(row, attempt)
	}
	row = append(row, key, created)
	if p.a.wide() {
		row = append(row, headers)
	}
	return append(row, payload)
}

// line prints a row. A terminal gets no more than fits, unless everything was asked for.
func (p *messagePrinter) line(row []string) error {
	p.widths.fit(row[:len(row)-1])
	line := p.widths.line(row)
	if width, ok := terminal(p.a.Out); ok && !p.a.wide() {
		line = cut(line[:len(line)-1], width) + "\n"
	}
	_, err := p.a.Out.Write([]byte(line))
	return err
}
