package pipeline

import (
	"errors"
	"fmt"

	"github.com/tidwall/gjson"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// maxDimensions of an array in PostgreSQL.
const maxDimensions = 6

// arrayValue converts a JSON array. Each element has to fit the column's element type; null is an element of every type.
// Arrays in it are further dimensions, and as PostgreSQL wants it, all of one dimension have the same length.
func arrayValue(v gjson.Result, col *config.Column, element config.ColumnType) (Value, error) {
	if !v.IsArray() {
		return Value{}, fmt.Errorf("%s is not a JSON array", short(v.Raw))
	}
	a := arrayParser{column: config.Column{Name: col.Name, Type: element, TimeFormat: col.TimeFormat}}
	if element == config.TypeTimestamptz && a.column.TimeFormat == "" {
		a.column.TimeFormat = config.TimeRFC3339
	}
	if err := a.list(v, 0); err != nil {
		return Value{}, err
	}
	return textValue(asString(a.out)), nil
}

// arrayParser checks and rewrites one array.
type arrayParser struct {
	column  config.Column // an element as if it were a column
	out     []byte
	lengths [maxDimensions]int // of each dimension met so far, plus one
	deepest int                // dimension that holds the elements, plus one; 0 before the first element
}

var errRagged = errors.New("an array of arrays has parts of different lengths, which PostgreSQL cannot store; map it to jsonb")

func (a *arrayParser) list(v gjson.Result, dimension int) error {
	if dimension == maxDimensions {
		return fmt.Errorf("an array has more than %d dimensions, which PostgreSQL cannot store; map it to jsonb", maxDimensions)
	}
	a.out = append(a.out, '[')
	n := 0
	var failed error
	v.ForEach(func(_, elem gjson.Result) bool {
		if n++; n > 1 {
			a.out = append(a.out, ',')
		}
		failed = a.element(elem, dimension)
		return failed == nil
	})
	a.out = append(a.out, ']')
	switch {
	case failed != nil:
		return failed
	case n == 0 && dimension > 0, a.lengths[dimension] != 0 && a.lengths[dimension] != n+1:
		return errRagged
	}
	a.lengths[dimension] = n + 1
	return nil
}

func (a *arrayParser) element(v gjson.Result, dimension int) error {
	if v.IsArray() {
		if a.deepest == dimension+1 {
			return errRagged
		}
		return a.list(v, dimension+1)
	}
	if a.deepest == 0 {
		a.deepest = dimension + 1
	}
	if a.deepest != dimension+1 {
		return errRagged
	}
	if v.IsObject() && a.column.Type == config.TypeText {
		return errors.New("an element is an object; map it to jsonb")
	}
	value, err := fromJSON(v, &a.column)
	if err != nil {
		return fmt.Errorf("an element: %w", err)
	}
	a.out = appendValue(a.out, a.column.Type, value)
	return nil
}
