package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// parseHeaders reads headers that are written name=value. A value that is a number, true, false or null is one; anything else is a string.
func parseHeaders(pairs []string) (map[string]any, error) {
	if len(pairs) == 0 {
		return nil, nil
	}
	headers := map[string]any{}
	for _, pair := range pairs {
		name, value, ok := strings.Cut(pair, "=")
		if !ok || name == "" {
			return nil, fmt.Errorf("--header %q is no header: write name=value", pair)
		}
		headers[name] = scalar(value)
	}
	return headers, nil
}

// scalar reads a JSON number, boolean, null or string in quotes; anything else is a string as it is.
func scalar(text string) any {
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	var v any
	if d.Decode(&v) == nil && d.InputOffset() == int64(len(text)) {
		switch v.(type) {
		case json.Number, bool, nil, string:
			return v
		}
	}
	return text
}

// filterFlags are the flags of a filter on messages, as consumer groups have one.
type filterFlags struct {
	keys    []string
	prefix  string
	headers []string
}

func (f *filterFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringArrayVar(&f.keys, "key", nil, "only messages with this key; repeat it for more")
	cmd.Flags().StringVar(&f.prefix, "key-prefix", "", "only messages whose key begins so")
	cmd.Flags().StringArrayVarP(&f.headers, "header", "H", nil, "only messages with this header, as name=value; repeat it for more")
}

func (f *filterFlags) filter(cmd *cobra.Command) (filter, error) {
	headers, err := parseHeaders(f.headers)
	if err != nil {
		return filter{}, usage(cmd, "%w", err)
	}
	return filter{pgstream.Filter{Keys: f.keys, KeyPrefix: f.prefix, Headers: headers}}, nil
}

// filter is a filter that is applied here: what follows a stream reads each message once, and the server would read those again that do not pass.
type filter struct{ pgstream.Filter }

// passes says whether a message passes, by the rules of millrace_engine.matches.
func (f filter) passes(m pgstream.Message) bool {
	if len(f.Keys) > 0 && (m.Key == nil || !slices.Contains(f.Keys, *m.Key)) {
		return false
	}
	if f.KeyPrefix != "" && (m.Key == nil || !strings.HasPrefix(*m.Key, f.KeyPrefix)) {
		return false
	}
	if len(f.Headers) == 0 {
		return true
	}
	d := json.NewDecoder(bytes.NewReader(m.Headers))
	d.UseNumber()
	var headers map[string]any
	if d.Decode(&headers) != nil {
		return false
	}
	for name, want := range f.Headers {
		if has, ok := headers[name]; !ok || !equal(has, want) {
			return false
		}
	}
	return true
}

// equal compares two JSON values of which one is no object or array. Numbers are compared by value: 1 is 1.0.
func equal(a, b any) bool {
	x, ok := a.(json.Number)
	y, also := b.(json.Number)
	if ok && also {
		const precision = 256
		p, _, errP := big.ParseFloat(x.String(), 10, precision, big.ToNearestEven)
		q, _, errQ := big.ParseFloat(y.String(), 10, precision, big.ToNearestEven)
		return errP == nil && errQ == nil && p.Cmp(q) == 0
	}
	switch a.(type) {
	case map[string]any, []any:
		return false // they cannot be compared by ==
	}
	return a == b
}
