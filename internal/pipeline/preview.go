package pipeline

import (
	"encoding/json"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// Preview says what a pipeline would write, without any of its servers: for a person who writes a mapping.
type Preview struct {
	transform *Transform
	columns   int
	branches  []previewBranch
}

type previewBranch struct {
	config.Branch
	transform *Transform    // nil when it takes the pipeline's rows
	http      *HTTPSink     // makes the events
	messages  *messageMaker // of a stream sink
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

	Row     json.RawMessage `json:"row,omitempty"`     // of a table or statement
	Key     *string         `json:"key,omitempty"`     // of a message
	Headers json.RawMessage `json:"headers,omitempty"` // of a message
	Payload json.RawMessage `json:"payload,omitempty"` // of a message
	Event   json.RawMessage `json:"event,omitempty"`   // of an HTTP sink
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
	out := previewBranch{Branch: b}
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
	if b.Stream != nil {
		if out.messages, err = newMessageMaker(alone); err != nil {
			return out, err
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

// message is what a stream sink would publish, to a stream of JSON.
func (b *previewBranch) message(r *PreviewResult, it *Item) error {
	vars := it.Variables(b.Mapping.Columns)
	stream, err := b.messages.streamOf(vars)
	if err != nil {
		return err
	}
	r.To = "stream " + stream
	m, err := b.messages.message(it, vars, pgstream.PayloadJSON)
	r.Key, r.Headers, r.Payload = m.Key, m.Headers, m.Payload
	return err
}
