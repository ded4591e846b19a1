package config

import (
	"strings"

	"github.com/millrace-dev/millrace/internal/pipeline/expression"
)

// use is where an expression stands: what it may see, and what it has to give.
type use struct {
	kind  expression.Kind
	scope expression.Scope
}

var (
	asFilter  = use{expression.Boolean, expression.InMapping}
	asColumn  = use{expression.Value, expression.InMapping}
	asText    = use{expression.Text, expression.AfterMapping}  // a route, a key or a header
	asPayload = use{expression.Value, expression.AfterMapping} // what a sink sends
)

// validateExpression checks an expression that is not empty, as the processor will compile it (C1).
func (c *Config) validateExpression(ps *Problems, at, text string, u use) {
	program, err := expression.Compile(text, u.kind, u.scope)
	switch {
	case err != nil:
		ps.add(at, "%s", err)
	case c.State == nil && program.Uses(expression.VarState):
		ps.add(at, "uses state, and the pipeline keeps none; write state with key and time")
	case c.Source.Redis != nil && program.Uses(expression.VarPosition):
		ps.add(at, "a Redis entry has no position; use id, or read from a consumer group")
	}
}

// variesWith names the variables of an expression that differ when its entry is delivered again; empty when there is none.
func variesWith(text string) string {
	var names []string
	for _, name := range []string{expression.VarReceivedAt, expression.VarDeliveries, expression.VarState} {
		if uses(text, name) {
			names = append(names, name)
		}
	}
	return strings.Join(names, " and ")
}

// uses says whether a column's expression has a variable in it. One that cannot be compiled is a problem of its own.
func uses(text, variable string) bool {
	if text == "" {
		return false
	}
	program, err := expression.Compile(text, asColumn.kind, asColumn.scope)
	return err == nil && program.Uses(variable)
}
