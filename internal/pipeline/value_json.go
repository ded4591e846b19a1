package pipeline

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// appendRow appends a row as a JSON object of its columns, in the form that PostgreSQL's to_jsonb gives them: numbers with
// every digit, times in RFC 3339. Bytes are base64.
func appendRow(dst []byte, columns []config.Column, row []Value) []byte {
	dst = append(dst, '{')
	for i, col := range columns {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(appendString(dst, col.Name), ':')
		dst = appendValue(dst, col.Type, row[i])
	}
	return append(dst, '}')
}

func appendValue(dst []byte, t config.ColumnType, v Value) []byte {
	if !v.Valid {
		return append(dst, "null"...)
	}
	switch t {
	case config.TypeBoolean:
		return strconv.AppendBool(dst, v.N != 0)
	case config.TypeSmallint, config.TypeInteger, config.TypeBigint:
		return strconv.AppendInt(dst, v.N, 10)
	case config.TypeNumeric:
		return append(dst, jsonNumber(v.S)...)
	case config.TypeReal:
		return strconv.AppendFloat(dst, float64(math.Float32frombits(uint32(v.N))), 'g', -1, 32)
	case config.TypeDouble:
		return strconv.AppendFloat(dst, math.Float64frombits(uint64(v.N)), 'g', -1, 64)
	case config.TypeTimestamptz:
		dst = time.UnixMicro(v.N).UTC().AppendFormat(append(dst, '"'), time.RFC3339Nano)
		return append(dst, '"')
	case config.TypeJSONB:
		return append(dst, v.S...)
	case config.TypeBytea:
		dst = base64.StdEncoding.AppendEncode(append(dst, '"'), []byte(v.S))
		return append(dst, '"')
	case config.TypeUUID:
		h := hex.EncodeToString([]byte(v.S))
		return appendString(dst, h[:8]+"-"+h[8:12]+"-"+h[12:16]+"-"+h[16:20]+"-"+h[20:])
	}
	if _, array := t.Element(); array {
		return append(dst, v.S...)
	}
	return appendString(dst, v.S)
}

func appendString(dst []byte, s string) []byte {
	text, _ := json.Marshal(s) // a string has no errors
	return append(dst, text...)
}

// jsonNumber writes a decimal number as JSON does: without a plus, with digits on both sides of a point, and without zeros
// before others.
func jsonNumber(s string) string {
	if json.Valid([]byte(s)) {
		return s
	}
	sign := ""
	if s[0] == '-' {
		sign = "-"
	}
	s = strings.TrimLeft(s, "+-")
	mantissa, exponent := s, ""
	if i := strings.IndexAny(s, "eE"); i >= 0 {
		mantissa, exponent = s[:i], s[i:]
	}
	whole, fraction, _ := strings.Cut(mantissa, ".")
	if whole = strings.TrimLeft(whole, "0"); whole == "" {
		whole = "0"
	}
	if fraction != "" {
		fraction = "." + fraction
	}
	return sign + whole + fraction + exponent
}
