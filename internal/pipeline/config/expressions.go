package config

import "strings"

// result says what an expression is for, and with it what it may see and give.
type result int

const (
	resultBoolean result = iota // a filter, before the mapping
	resultColumn                // a column's value, in the mapping
	resultSink                  // a part of what a sink sends: sees the mapped row
)

// validateExpression checks a CEL expression that is not empty.
func (c *Config) validateExpression(ps *Problems, at, text string, _ result) {
	if strings.TrimSpace(text) == "" {
		ps.add(at, "is blank; write an expression, or leave it out")
	}
}
