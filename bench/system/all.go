package system

import (
	"fmt"
	"slices"
	"strings"

	"github.com/millrace-dev/millrace/bench/engine"
)

// All are the systems, in the order of the report.
func All() []engine.System {
	return []engine.System{
		millrace, millraceOrdered, millraceBytes, millraceSQL{}, millraceSQLToGo,
		limitInsert, limitCopy, limitRead,
		skipLocked, skipLockedAsync,
		riverSystem{}, watermillSystem{}, pgqSystem{}, pgmqSystem,
	}
}

// Named returns the systems with these names; without names, all.
func Named(names []string) ([]engine.System, error) {
	all := All()
	if len(names) == 0 {
		return all, nil
	}
	var known []string
	for _, s := range all {
		known = append(known, s.Name())
	}
	for _, name := range names {
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("there is no system %q; choose from %s", name, strings.Join(known, ", "))
		}
	}
	return slices.DeleteFunc(all, func(s engine.System) bool { return !slices.Contains(names, s.Name()) }), nil
}
