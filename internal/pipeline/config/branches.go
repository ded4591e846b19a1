package config

import (
	"fmt"
	"net/url"
)

// Branches are the sinks of the pipeline in one form: those of a fan-out, or the only one as a branch without a name. Each has
// its mapping, also where it is the pipeline's.
func (c *Config) Branches() []Branch {
	bs := make([]Branch, 0, max(1, len(c.Sink.FanOut)))
	for _, b := range c.Sink.FanOut {
		if b.Mapping == nil {
			b.Mapping = &c.Mapping
		}
		bs = append(bs, b)
	}
	if len(bs) == 0 {
		s := &c.Sink
		bs = append(bs, Branch{Mapping: &c.Mapping, Table: s.Table, Stream: s.Stream, SQL: s.SQL, HTTP: s.HTTP})
	}
	return bs
}

// Target says in a few words where the branch writes. It holds no secret.
func (b *Branch) Target() string {
	switch {
	case b.Table != nil:
		return "table " + b.Table.Schema + "." + b.Table.Name
	case b.SQL != nil:
		return "sql"
	case b.Stream != nil && b.Stream.Stream != "":
		return "stream " + b.Stream.Stream
	case b.Stream != nil:
		return "streams by " + b.Stream.Route
	case b.HTTP != nil && b.HTTP.URL != "":
		return "http " + b.HTTP.Place()
	case b.HTTP != nil:
		return "http $" + EnvHTTPURL
	}
	return "nothing"
}

// Place is the address to post to as it may be shown: without credentials and the query, which can hold a token.
func (h *HTTPSink) Place() string {
	u, err := url.Parse(h.URL)
	if err != nil {
		return hiddenPart // a parser's error would repeat the address
	}
	query := u.RawQuery != ""
	u.User, u.RawQuery = nil, ""
	if query {
		return u.String() + "?" + hiddenPart
	}
	return u.String()
}

// hiddenPart stands for what is not shown.
const hiddenPart = "(hidden)"

// path is where the i-th of Branches stands in the configuration.
func (s *Sink) path(i int) string {
	if len(s.FanOut) == 0 {
		return "sink"
	}
	return fmt.Sprintf("sink.fanOut[%d]", i)
}

// needsColumns says whether the branch writes columns: the others can send the document as it came.
func (b *Branch) needsColumns() bool { return b.Table != nil || b.SQL != nil }

// KeyedByPosition says whether a table tells rows apart by @position and not by @id. Messages of two priorities may have one position.
func (c *Config) KeyedByPosition() bool {
	for _, b := range c.Branches() {
		if b.Table != nil && b.Mapping.identifiesBy(b.Table.Key, PropertyPosition) && !b.Mapping.identifiesBy(b.Table.Key, PropertyID) {
			return true
		}
	}
	return false
}

// identifiesBy says whether one of the key's columns holds that property.
func (m *Mapping) identifiesBy(key []string, property string) bool {
	for _, name := range key {
		if col := m.column(name); col != nil && col.Path == property {
			return true
		}
	}
	return false
}
