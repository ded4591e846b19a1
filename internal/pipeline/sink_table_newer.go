package pipeline

import (
	"cmp"
	"math"
	"math/big"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// replaces says whether of two rows with one key in a batch the later is written instead of the earlier.
func (s *TableSink) replaces(later, earlier *Item) bool {
	switch s.action {
	case config.ConflictUpdate:
		return true
	case config.ConflictUpdateIfNewer:
		return compareAge(s.columns[s.newer].Type, earlier.Row[s.newer], later.Row[s.newer]) < 0
	case config.ConflictNothing:
	}
	return false
}

// isNewer is the condition under which a row replaces the one that is there. A row without an age is older than any. Texts are
// compared byte by byte, as here and unlike in most databases' own order, so that the outcome does not depend on which rows meet in a batch.
func (s *TableSink) isNewer(actual map[string]string) string {
	col := s.columns[s.newer]
	name := pgx.Identifier{col.Name}.Sanitize()
	was, is := "held."+name, "excluded."+name
	if col.Type == config.TypeText {
		if actual[col.Name] != string(config.TypeText) {
			was, is = was+"::text", is+"::text"
		}
		was, is = was+` COLLATE "C"`, is+` COLLATE "C"`
	}
	return "held." + name + " IS NULL OR " + was + " < " + is
}

// compareAge orders values of a column as PostgreSQL does.
func compareAge(t config.ColumnType, a, b Value) int {
	if !a.Valid || !b.Valid {
		return compareValues(a, b)
	}
	switch t {
	case config.TypeReal:
		return cmp.Compare(math.Float32frombits(uint32(a.N)), math.Float32frombits(uint32(b.N)))
	case config.TypeDouble:
		return cmp.Compare(math.Float64frombits(uint64(a.N)), math.Float64frombits(uint64(b.N)))
	case config.TypeNumeric:
		return compareDecimals(a.S, b.S)
	}
	return compareValues(a, b)
}

// compareDecimals compares numbers by value. Four bits for a digit keep different numbers apart.
func compareDecimals(a, b string) int {
	precision := 64 + 4*uint(max(len(a), len(b)))
	x, _, errX := big.ParseFloat(a, 10, precision, big.ToNearestEven)
	y, _, errY := big.ParseFloat(b, 10, precision, big.ToNearestEven)
	if errX != nil || errY != nil {
		return strings.Compare(a, b) // too large for any numeric: the database refuses it
	}
	return x.Cmp(y)
}
