package pipeline

import (
	"cmp"
	"math"
	"strings"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// Value is one column's value, in the form that its type needs on the wire:
//
//	text, numeric, jsonb, bytea    S holds the text or the bytes
//	uuid                           S holds 16 bytes
//	boolean, smallint … bigint     N
//	real, double precision         N holds math.Float32bits or math.Float64bits
//	timestamptz                    N holds microseconds since 1970
//	arrays                         S holds a JSON array, nested for several dimensions, whose elements are checked and in
//	                               the form that appendValue gives them: [1,null,3], ["a","b"], ["2026-01-02T03:04:05Z"]
//
// A value is often a part of the entry it came from and keeps that alive.
type Value struct {
	S     string
	N     int64
	Valid bool // false: null
}

func textValue(s string) Value { return Value{S: s, Valid: true} }
func intValue(n int64) Value   { return Value{N: n, Valid: true} }

func doubleValue(f float64) Value { return Value{N: int64(math.Float64bits(f)), Valid: true} }
func realValue(f float64) Value   { return Value{N: int64(math.Float32bits(float32(f))), Valid: true} }

// compareValues is a total order that every processor shares. It need not be the database's: rows only have to be
// written in the same order by everybody.
func compareValues(a, b Value) int {
	switch {
	case a.Valid != b.Valid:
		if a.Valid {
			return 1
		}
		return -1
	case a.N != b.N:
		return cmp.Compare(a.N, b.N)
	}
	return strings.Compare(a.S, b.S)
}

// isBytes says whether values of a type are held in S.
func isBytes(t config.ColumnType) bool {
	switch t {
	case config.TypeText, config.TypeNumeric, config.TypeJSONB, config.TypeBytea, config.TypeUUID:
		return true
	}
	_, array := t.Element()
	return array
}
