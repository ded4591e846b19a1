package pipeline

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/expression"
)

// Preview says what a pipeline would write, without any of its servers: for a person who writes a mapping.
type Preview struct {
	transform *Transform
	columns   int
	branches  []previewBranch
}

type previewBranch struct {
	config.Branch
	transform *Transform                     // nil when it takes the pipeline's rows
	http      *HTTPSink                      // makes the events
	texts     map[string]*expression.Program // of a stream sink: route, key, and header.<name>
	payload   *expression.Program
	codec     *config.Codec
}

// What would become of an item.
const (
	PreviewWrite    = "write"
	PreviewFiltered = "filtered"
	PreviewRejected = "rejected"
)

// PreviewResult is what one branch would make of one item. Its JSON is one line of the dry run.
type PreviewResult struct {
	ID      string `json:"id"`
	Stream  string `json:"stream"`
	Branch  string `json:"branch,omitempty"` // of a fan-out
	Outcome string `json:"outcome"`
	Reason  string `json:"reason,omitempty"` // of what is rejected
	To      string `json:"to,omitempty"`     // what would be written to

	Row     json.RawMessage   `json:"row,omitempty"`     // of a table or statement
	Key     *string           `json:"key,omitempty"`     // of a message
	Headers map[string]string `json:"headers,omitempty"` // of a message
	Payload json.RawMessage   `json:"payload,omitempty"` // of a message
	Event   json.RawMessage   `json:"event,omitempty"`   // of an HTTP sink
}

// NewPreview compiles a valid configuration.
func NewPreview(c *config.Config) (*Preview, error) {
	transform, err := NewTransform(c)
	if err != nil {
		return nil, err
	}
	if err := transform.Remember(NewState(c), c); err != nil {
		return nil, err
	}
	p := &Preview{transform: transform, columns: len(c.Mapping.Columns)}
	for _, b := range c.Branches() {
		branch, err := newPreviewBranch(c, b)
		if err != nil {
			return nil, err
		}
		p.branches = append(p.branches, branch)
	}
	return p, nil
}

func newPreviewBranch(c *config.Config, b config.Branch) (previewBranch, error) {
	out := previewBranch{Branch: b, codec: &c.Codec, texts: map[string]*expression.Program{}}
	alone := ofBranch(c, b)
	var err error
	if b.Mapping != &c.Mapping {
		if out.transform, err = NewTransform(alone); err != nil {
			return out, err
		}
	}
	if b.HTTP != nil {
		h := *b.HTTP
		if h.URL == "" {
			h.URL = "http://the.environment/" // it is not sent to
		}
		alone.Sink.HTTP = &h
		if out.http, err = NewHTTPSink(alone, NewMetrics()); err != nil {
			return out, err
		}
	}
	if s := b.Stream; s != nil {
		texts := map[string]string{"route": s.Route, "key": s.Key}
		for name, text := range s.Headers {
			texts["header."+name] = text
		}
		for name, text := range texts {
			if text == "" {
				continue
			}
			if out.texts[name], err = expression.Compile(text, expression.Text, expression.AfterMapping); err != nil {
				return out, NewConfigurationError("sink.stream.%s %v", name, err)
			}
		}
		if s.Payload != "" {
			if out.payload, err = expression.Compile(s.Payload, expression.Value, expression.AfterMapping); err != nil {
				return out, NewConfigurationError("sink.stream.payload %v", err)
			}
		}
	}
	return out, nil
}

// Of says what would become of an item: one result for each branch, or one in all when the item does not get as far.
func (p *Preview) Of(it *Item) []PreviewResult {
	it.Row = make([]Value, p.columns)
	all := PreviewResult{ID: it.ID, Stream: it.Stream}
	if err := p.transform.Decode(it); err != nil {
		all.Outcome, all.Reason = PreviewRejected, err.Error()
		return []PreviewResult{all}
	}
	if it.Filtered {
		all.Outcome = PreviewFiltered
		return []PreviewResult{all}
	}
	results := make([]PreviewResult, len(p.branches))
	for i := range p.branches {
		b, r := &p.branches[i], all
		r.Branch, r.To, r.Outcome = b.Name, b.Target(), PreviewWrite
		if err := b.fill(&r, it); err != nil {
			r.Outcome, r.Reason = PreviewRejected, err.Error()
		}
		results[i] = r
	}
	return results
}

// fill adds what the branch would write.
func (b *previewBranch) fill(r *PreviewResult, it *Item) error {
	columns := b.Mapping.Columns
	if b.transform != nil {
		own := *it
		own.Row = make([]Value, len(columns))
		if err := b.transform.Decode(&own); err != nil {
			return err
		}
		if it = &own; it.Filtered {
			r.Outcome, r.To = PreviewFiltered, ""
			return nil
		}
	}
	switch {
	case b.HTTP != nil:
		event, err := b.http.appendEvent(nil, it)
		r.Event = event
		return err
	case b.Stream != nil:
		return b.message(r, it)
	}
	r.Row = appendRow(nil, columns, it.Row)
	return nil
}

// message is what a stream sink would publish.
func (b *previewBranch) message(r *PreviewResult, it *Item) error {
	vars := it.Variables(b.Mapping.Columns)
	r.Key = it.Key
	for name, program := range b.texts {
		text, ok, err := program.EvalText(vars)
		if err != nil {
			return fmt.Errorf("sink.stream.%s: %w", name, err)
		}
		header, isHeader := strings.CutPrefix(name, "header.")
		switch {
		case isHeader && ok:
			if r.Headers == nil {
				r.Headers = map[string]string{}
			}
			r.Headers[header] = text
		case name == "key" && ok:
			r.Key = &text
		case name == "key":
			r.Key = nil
		case name == "route" && !ok:
			return errors.New("sink.stream.route gives no stream")
		case name == "route":
			r.To = "stream " + text
		}
	}
	var err error
	switch {
	case b.payload != nil:
		r.Payload, err = b.payload.EvalJSON(vars)
	case len(b.Mapping.Columns) > 0:
		r.Payload = appendRow(nil, b.Mapping.Columns, it.Row)
	default:
		r.Payload, err = documentJSON(it, b.codec)
	}
	return err
}
