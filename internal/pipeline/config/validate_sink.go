package config

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Bounds of sinks.
const (
	maxBranches    = 16
	maxHeaders     = 64
	maxStatement   = 64 << 10
	minHTTPTimeout = Duration(100 * time.Millisecond)
	maxHTTPTimeout = Duration(5 * time.Minute)
	maxConcurrent  = 256
)

var (
	branchName = regexp.MustCompile(`^[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?$`)
	headerName = regexp.MustCompile("^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")
	// readsBatch finds the table that a statement has to read.
	readsBatch = regexp.MustCompile(`(?i)\bbatch\b`)
)

// headersOfSink are the HTTP headers that the sink writes itself, in lower case.
var headersOfSink = []string{"content-type", "content-length", "host", "transfer-encoding", "connection", "idempotency-key"}

func (c *Config) validateSink(ps *Problems) {
	s := &c.Sink
	count := given(s.Table != nil, s.Stream != nil, s.SQL != nil, s.HTTP != nil, len(s.FanOut) > 0)
	if count != 1 {
		ps.add("sink", "there are %d; write exactly one of table, stream, sql, http and fanOut", count)
	}
	if n := len(s.FanOut); n > maxBranches {
		ps.add("sink.fanOut", "there are %d branches; write at most %d", n, maxBranches)
	}
	names := map[string]bool{}
	for i, b := range s.FanOut {
		at := s.path(i)
		if !branchName.MatchString(b.Name) {
			ps.add(at+".name", "%q is not a name; write up to 63 lower-case letters, digits, - or _, such as archive", b.Name)
		} else if names[b.Name] {
			ps.add(at+".name", "%q is the name of two branches; choose another", b.Name)
		}
		names[b.Name] = true
		if n := given(b.Table != nil, b.Stream != nil, b.SQL != nil, b.HTTP != nil); n != 1 {
			ps.add(at, "there are %d sinks; write exactly one of table, stream, sql and http", n)
		}
		if b.Mapping != nil {
			c.validateMapping(ps, at+".mapping", b.Mapping)
		}
	}
	for i, b := range c.Branches() {
		c.validateBranch(ps, s.path(i), &b)
	}
}

// validateBranch checks the sinks of a branch against the mapping that feeds them. There is one sink, unless that is a
// problem of its own.
func (c *Config) validateBranch(ps *Problems, at string, b *Branch) {
	mapping := "mapping"
	if b.Mapping != &c.Mapping {
		mapping = at + ".mapping"
	}
	if len(b.Mapping.Columns) == 0 && b.needsColumns() {
		ps.add(mapping+".columns", "is empty; write the columns that the sink fills")
	}
	if b.Table != nil {
		c.validateTable(ps, at+".table", b.Table, b.Mapping)
	}
	if b.Stream != nil {
		c.validateStream(ps, at+".stream", b.Stream)
	}
	if b.SQL != nil {
		b.SQL.validate(ps, at+".sql")
	}
	if b.HTTP != nil {
		c.validateHTTP(ps, at+".http", b.HTTP)
	}
}

func (c *Config) validateTable(ps *Problems, at string, t *TableSink, m *Mapping) {
	if msg := identifier(t.Schema); msg != "" {
		ps.add(at+".schema", "%s", msg)
	}
	if msg := identifier(t.Name); msg != "" {
		ps.add(at+".name", "%s", msg)
	}
	oneOf(ps, at+".idempotency", t.Idempotency, IdempotencyKey, IdempotencyLedger)
	if t.Idempotency == IdempotencyLedger && c.Source.Redis == nil {
		ps.add(at+".idempotency", "the ledger holds ids of Redis entries, and a consumer group has its own; leave it out")
	}
	if len(t.Key) == 0 && c.Source.Redis != nil && t.Idempotency != IdempotencyLedger {
		ps.add(at+".key", "is empty; write the columns of a unique constraint, which make redelivery harmless, or idempotency: Ledger")
	}
	for i, name := range t.Key {
		at := fmt.Sprintf("%s.key[%d]", at, i)
		col := m.column(name)
		if col == nil {
			ps.add(at, "%q is not a mapped column; write one of %s", name, m.columnNames(nil))
			continue
		}
		_, array := col.Type.Element()
		switch {
		case slices.Contains(t.Key[:i], name):
			ps.add(at, "%q is listed twice; keep one", name)
		case col.Path == PropertyReceivedAt:
			ps.add(at, "@received_at differs on redelivery, so it cannot identify a row; write a column that comes from the entry")
		case variesWith(col.Expression) != "":
			ps.add(at, "column %q is computed with %s, which differs on redelivery, so it cannot identify a row; write another column", name, variesWith(col.Expression))
		case array:
			ps.add(at, "an array cannot identify a row; write another column")
		case col.Type == TypeJSONB:
			ps.add(at, "a jsonb column cannot identify a row; write another column")
		case col.nullable():
			ps.add(at, "column %q may be null, which identifies nothing; write required: true or a default at the column", name)
		}
	}
	t.validateConflict(ps, at+".conflict", m)
	oneOf(ps, at+".create", t.Create, CreateNever, CreateIfMissing)
}

func (t *TableSink) validateConflict(ps *Problems, at string, m *Mapping) {
	conflict := t.Conflict
	oneOf(ps, at+".action", conflict.Action, ConflictNothing, ConflictUpdate, ConflictUpdateIfNewer)
	if len(t.Key) == 0 && (conflict.Action == ConflictUpdate || conflict.Action == ConflictUpdateIfNewer) {
		ps.add(at+".action", "%s needs a key; write the table's key", conflict.Action)
	}
	if conflict.DetectMismatch {
		switch {
		case conflict.Action != ConflictNothing:
			ps.add(at+".detectMismatch", "%s writes what differs, so there is nothing to detect; leave it out, or write action: Nothing", conflict.Action)
		case len(t.Key) == 0:
			ps.add(at+".detectMismatch", "needs a key; write the table's key")
		}
	}
	if conflict.Action != ConflictUpdateIfNewer {
		if conflict.Newer != "" {
			ps.add(at+".newer", "belongs to action UpdateIfNewer; leave it out, or write action: UpdateIfNewer")
		}
		return
	}
	// What says which row is newer: a column with an order that is the same at every delivery.
	fits := func(col *Column) bool {
		_, array := col.Type.Element()
		return !array && col.Type != TypeJSONB && col.Type != TypeBoolean && col.Path != PropertyReceivedAt && !slices.Contains(t.Key, col.Name)
	}
	switch col := m.column(conflict.Newer); {
	case conflict.Newer == "":
		ps.add(at+".newer", "is empty; write the column that tells which row is newer, one of %s", m.columnNames(fits))
	case col == nil:
		ps.add(at+".newer", "%q is not a mapped column; write one of %s", conflict.Newer, m.columnNames(fits))
	case slices.Contains(t.Key, conflict.Newer):
		ps.add(at+".newer", "%q is part of the key, so it is equal in rows that meet; write one of %s", conflict.Newer, m.columnNames(fits))
	case col.Path == PropertyReceivedAt:
		ps.add(at+".newer", "@received_at differs on redelivery, so an old entry would pass for a new one; write one of %s", m.columnNames(fits))
	case variesWith(col.Expression) != "":
		ps.add(at+".newer", "column %q is computed with %s, which differs on redelivery; write one of %s", conflict.Newer, variesWith(col.Expression), m.columnNames(fits))
	case !fits(col):
		ps.add(at+".newer", "%s has no order that says newer; write one of %s", col.Type, m.columnNames(fits))
	case col.nullable():
		ps.add(at+".newer", "column %q may be null, which is neither older nor newer; write required: true or a default at the column", conflict.Newer)
	}
}

func (c *Config) validateStream(ps *Problems, at string, s *StreamSink) {
	switch {
	case (s.Stream == "") == (s.Route == ""):
		ps.add(at, "write exactly one of stream, a name, and route, an expression")
	case s.Stream != "" && !engineName.MatchString(s.Stream):
		ps.add(at+".stream", "%q is not a name; write a lower-case letter followed by up to 47 letters, digits or underscores", s.Stream)
	}
	for _, e := range []struct {
		name, text string
		use        use
	}{{"route", s.Route, asText}, {"key", s.Key, asText}, {"payload", s.Payload, asPayload}} {
		if e.text != "" {
			c.validateExpression(ps, at+"."+e.name, e.text, e.use)
		}
	}
	if n := len(s.Headers); n > maxHeaders {
		ps.add(at+".headers", "there are %d; write at most %d", n, maxHeaders)
	}
	for _, name := range sortedKeys(s.Headers) {
		switch at := at + ".headers." + name; {
		case name == "":
			ps.add(at, "a header has no name; write one")
		case s.Headers[name] == "":
			ps.add(at, "is empty; write an expression, such as '\"orders\"' for a fixed text")
		default:
			c.validateExpression(ps, at, s.Headers[name], asText)
		}
	}
}

func (s *SQLSink) validate(ps *Problems, at string) {
	switch at += ".statement"; {
	case strings.TrimSpace(s.Statement) == "":
		ps.add(at, "is empty; write a statement such as insert into totals select device, sum(amount) from batch group by device")
	case len(s.Statement) > maxStatement:
		ps.add(at, "has %d bytes; write at most %d", len(s.Statement), maxStatement)
	case strings.ContainsRune(s.Statement, 0):
		ps.add(at, "contains a zero byte; write it without")
	case !readsBatch.MatchString(s.Statement):
		ps.add(at, "reads nothing of the batch; write select … from batch in it")
	}
}

func (c *Config) validateHTTP(ps *Problems, at string, h *HTTPSink) {
	if h.URL != "" {
		// The parser's error would repeat the URL, and with it a password.
		switch u, err := url.Parse(h.URL); {
		case err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https":
			ps.add(at+".url", "is not the address of a web server; write https://host/path")
		case u.User != nil:
			ps.add(at+".url", "holds credentials; put them into %s or the whole address into %s", EnvHTTPAuthorization, EnvHTTPURL)
		case u.Fragment != "":
			ps.add(at+".url", "has a fragment, which no server sees; leave # and what follows out")
		}
	}
	oneOf(ps, at+".mode", h.Mode, HTTPSingle, HTTPBatch)
	if strings.ContainsFunc(h.Type, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		ps.add(at+".type", "%q holds a control character; write a name such as %s", h.Type, DefaultHTTPType)
	}
	if h.Data != "" {
		c.validateExpression(ps, at+".data", h.Data, asPayload)
	}
	if n := len(h.Headers); n > maxHeaders {
		ps.add(at+".headers", "there are %d; write at most %d", n, maxHeaders)
	}
	for _, name := range sortedKeys(h.Headers) {
		at, lower := at+".headers."+name, strings.ToLower(name)
		switch {
		case !headerName.MatchString(name):
			ps.add(at, "%q is not the name of a header; write letters, digits and -", name)
		case lower == "authorization":
			ps.add(at, "is a secret; put it into the environment variable %s", EnvHTTPAuthorization)
		case slices.Contains(headersOfSink, lower) || strings.HasPrefix(lower, "ce-"):
			ps.add(at, "is written by the sink; leave it out")
		case strings.ContainsFunc(h.Headers[name], func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }):
			ps.add(at, "the value holds a control character; write it on one line")
		}
	}
	between(ps, at+".timeout", h.Timeout, minHTTPTimeout, maxHTTPTimeout)
	between(ps, at+".maxConcurrent", h.MaxConcurrent, 1, maxConcurrent)
}

// given counts what is there.
func given(there ...bool) int {
	n := 0
	for _, t := range there {
		if t {
			n++
		}
	}
	return n
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
