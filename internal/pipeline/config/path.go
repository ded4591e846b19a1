package config

import (
	"errors"
	"fmt"
	"strings"
)

// Properties of an entry that a path can name instead of a place in its document.
const (
	PropertyID         = "@id"          // text: the entry's id in its source; of a message its position, and p1- before it with priority 1
	PropertyStream     = "@stream"      // text: the stream it came from
	PropertyReceivedAt = "@received_at" // timestamptz: when this processor received it; differs on redelivery
	PropertyKey        = "@key"         // text: the key of a message; null when it has none, and for Redis
	PropertyPosition   = "@position"    // bigint: the position of a message within its priority; not for Redis
)

// propertyTypes are the types that a property's value can have.
var propertyTypes = map[string][]ColumnType{
	PropertyID:         {TypeText},
	PropertyStream:     {TypeText},
	PropertyReceivedAt: {TypeTimestamptz},
	PropertyKey:        {TypeText},
	PropertyPosition:   {TypeBigint, TypeText},
}

// IsProperty says whether a path names a property of the entry.
func IsProperty(path string) bool { return strings.HasPrefix(path, "@") }

// SplitPath returns the names of a path, with escapes removed.
func SplitPath(path string) ([]string, error) {
	if path == "" {
		return nil, errors.New("the path is empty; write a name such as device_id or position.latitude")
	}
	var names []string
	var name strings.Builder
	for i := 0; i < len(path); i++ {
		switch path[i] {
		case '\\':
			if i+1 == len(path) {
				return nil, fmt.Errorf("%q ends in a backslash; write \\\\ for a backslash and \\. for a dot inside a name", path)
			}
			i++
			name.WriteByte(path[i])
		case '.':
			if name.Len() == 0 {
				return nil, fmt.Errorf("%q has an empty name; write names joined by single dots", path)
			}
			names = append(names, name.String())
			name.Reset()
		default:
			name.WriteByte(path[i])
		}
	}
	if name.Len() == 0 {
		return nil, fmt.Errorf("%q has an empty name; write names joined by single dots", path)
	}
	return append(names, name.String()), nil
}
