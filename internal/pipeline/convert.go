package pipeline

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"math/big"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tidwall/gjson"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

const (
	// Range of PostgreSQL's timestamptz in microseconds since 1970: 4714-11-24 BC to the end of 294246 AD. PostgreSQL goes
	// thirty years further, where microseconds since 1970 no longer fit 64 bits.
	minMicros = -210_866_803_200_000_000
	maxMicros = math.MaxInt64
	// maxExponent bounds the work that a number such as 1e999999999 causes.
	maxExponent = 400
	// maxDigits bounds a numeric; PostgreSQL takes 131,072 digits before the point.
	maxDigits = 100_000
)

var decimal = regexp.MustCompile(`^[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?$`)

// fromJSON converts a JSON value. A null is a missing value.
func fromJSON(v gjson.Result, col *config.Column) (Value, error) {
	if v.Type == gjson.Null {
		return Value{}, nil
	}
	if element, array := col.Type.Element(); array && v.Type != gjson.String {
		return arrayValue(v, col, element)
	}
	switch col.Type {
	case config.TypeJSONB:
		return jsonbValue(v)
	case config.TypeBytea:
		if v.Type == gjson.JSON {
			data, ok := nodeBuffer(v)
			if !ok {
				return Value{}, errors.New(`is neither base64 nor {"type":"Buffer","data":[…]}`)
			}
			return textValue(asString(data)), nil
		}
	}
	switch v.Type {
	case gjson.String:
		return fromText(v.Str, col)
	case gjson.Number:
		if col.Type == config.TypeBytea || col.Type == config.TypeUUID || col.Type == config.TypeTimestamptz && col.TimeFormat == config.TimeRFC3339 {
			return Value{}, fmt.Errorf("%s is a number, not %s", short(v.Raw), describe(col))
		}
		return fromText(v.Raw, col)
	case gjson.True, gjson.False:
		if col.Type != config.TypeBoolean && col.Type != config.TypeText {
			return Value{}, fmt.Errorf("%s is a boolean, not %s", v.Raw, describe(col))
		}
		return fromText(v.Raw, col)
	}
	if col.Type == config.TypeText {
		return fromText(v.Raw, col) // an object or array, as it is written
	}
	return Value{}, fmt.Errorf("is an object or array, not %s", describe(col))
}

// fromField converts the value of a Redis entry's field, which is bytes.
func fromField(s string, col *config.Column) (Value, error) {
	if col.Type == config.TypeBytea {
		return textValue(s), nil
	}
	if !utf8.ValidString(s) {
		return Value{}, errors.New("is not UTF-8")
	}
	if col.Type == config.TypeJSONB && gjson.Valid(s) && !tooDeep(s) {
		return jsonbValue(gjson.Parse(s))
	}
	return fromText(s, col)
}

// fromText converts the text form of a value.
func fromText(s string, col *config.Column) (Value, error) {
	switch col.Type {
	case config.TypeText:
		if strings.IndexByte(s, 0) >= 0 {
			return Value{}, errors.New("holds a zero byte, which PostgreSQL cannot store in a text; map it to bytea")
		}
		return textValue(s), nil
	case config.TypeBoolean:
		switch s {
		case "true", "t", "1":
			return intValue(1), nil
		case "false", "f", "0":
			return intValue(0), nil
		}
	case config.TypeSmallint:
		if n, ok := integer(s, 16); ok {
			return intValue(n), nil
		}
	case config.TypeInteger:
		if n, ok := integer(s, 32); ok {
			return intValue(n), nil
		}
	case config.TypeBigint:
		if n, ok := integer(s, 64); ok {
			return intValue(n), nil
		}
	case config.TypeNumeric:
		if len(s) <= maxDigits && decimal.MatchString(s) {
			return textValue(s), nil
		}
	case config.TypeReal, config.TypeDouble:
		return float(s, col)
	case config.TypeTimestamptz:
		return timestamp(s, col)
	case config.TypeJSONB:
		if gjson.Valid(s) && !tooDeep(s) {
			return textValue(s), nil
		}
		return Value{}, fmt.Errorf("%s is not a JSON document", short(s))
	case config.TypeBytea:
		if data, ok := decodeBase64(s); ok {
			return textValue(asString(data)), nil
		}
	case config.TypeUUID:
		if data, ok := decodeUUID(s); ok {
			return textValue(string(data[:])), nil
		}
	default:
		if element, array := col.Type.Element(); array && gjson.Valid(s) && !tooDeep(s) {
			return arrayValue(gjson.Parse(s), col, element)
		}
	}
	return Value{}, fmt.Errorf("%s is not %s", short(s), describe(col))
}

// integer reads a whole number exactly, also when it is written with a fraction of zeros or an exponent.
func integer(s string, bits int) (int64, bool) {
	if n, err := strconv.ParseInt(s, 10, bits); err == nil {
		return n, true
	}
	r, ok := rational(s)
	if !ok || !r.IsInt() || !r.Num().IsInt64() {
		return 0, false
	}
	n := r.Num().Int64()
	if shift := 64 - bits; n<<shift>>shift != n {
		return 0, false
	}
	return n, true
}

// rational reads a decimal number exactly.
func rational(s string) (*big.Rat, bool) {
	if len(s) > maxExponent || !decimal.MatchString(s) {
		return nil, false
	}
	if i := strings.IndexAny(s, "eE"); i >= 0 {
		if e, err := strconv.Atoi(s[i+1:]); err != nil || e > maxExponent || e < -maxExponent {
			return nil, false
		}
	}
	return new(big.Rat).SetString(s)
}

func float(s string, col *config.Column) (Value, error) {
	bits := 64
	if col.Type == config.TypeReal {
		bits = 32
	}
	f, err := strconv.ParseFloat(s, bits)
	// ParseFloat also takes hexadecimal numbers, underscores and names of infinities.
	if err != nil || math.IsInf(f, 0) || math.IsNaN(f) || strings.ContainsAny(s, "xX_pP") {
		return Value{}, fmt.Errorf("%s is not %s", short(s), describe(col))
	}
	if bits == 32 {
		return realValue(f), nil
	}
	return doubleValue(f), nil
}

// timestamp reads a time and cuts off what is smaller than a microsecond: PostgreSQL would round it, and a rounded key
// is another key.
func timestamp(s string, col *config.Column) (Value, error) {
	var unit int64
	switch col.TimeFormat {
	case config.TimeUnixSeconds:
		unit = 1_000_000
	case config.TimeUnixMillis:
		unit = 1000
	case config.TimeUnixMicros:
		unit = 1
	default:
		t, err := time.Parse(time.RFC3339Nano, s)
		if err != nil {
			return Value{}, fmt.Errorf("%s is not %s", short(s), describe(col))
		}
		return timeValue(t), nil
	}
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		if n < minMicros/unit || n > maxMicros/unit {
			return Value{}, fmt.Errorf("%s is outside the range of timestamptz", short(s))
		}
		return intValue(n * unit), nil
	}
	r, ok := rational(s)
	if !ok {
		return Value{}, fmt.Errorf("%s is not %s", short(s), describe(col))
	}
	r.Mul(r, new(big.Rat).SetInt64(unit))
	// Euclidean division by a positive denominator rounds towards the past, before 1970 as well.
	n := new(big.Int).Div(r.Num(), r.Denom())
	if !n.IsInt64() || n.Int64() < minMicros {
		return Value{}, fmt.Errorf("%s is outside the range of timestamptz", short(s))
	}
	return intValue(n.Int64()), nil
}

// jsonbValue keeps the document as it is written, so that no digit of a number changes, except for Node's way of writing
// a Buffer, which becomes base64 wherever it stands.
func jsonbValue(v gjson.Result) (Value, error) {
	raw := v.Raw
	if !strings.Contains(raw, `"Buffer"`) {
		return textValue(raw), nil
	}
	return textValue(asString(replaceBuffers(make([]byte, 0, len(raw)), v))), nil
}

// replaceBuffers appends v to dst with every {"type":"Buffer","data":[…]} written as a base64 string.
func replaceBuffers(dst []byte, v gjson.Result) []byte {
	if v.Type != gjson.JSON {
		return append(dst, v.Raw...)
	}
	if data, ok := nodeBuffer(v); ok {
		dst = append(dst, '"')
		dst = base64.StdEncoding.AppendEncode(dst, data)
		return append(dst, '"')
	}
	open, end := byte('['), byte(']')
	if v.IsObject() {
		open, end = '{', '}'
	}
	dst = append(dst, open)
	first := true
	v.ForEach(func(key, val gjson.Result) bool {
		if !first {
			dst = append(dst, ',')
		}
		first = false
		if open == '{' {
			dst = append(append(dst, key.Raw...), ':')
		}
		dst = replaceBuffers(dst, val)
		return true
	})
	return append(dst, end)
}

// nodeBuffer reads what JSON.stringify makes of a Buffer in Node: exactly a type and a list of bytes.
func nodeBuffer(v gjson.Result) ([]byte, bool) {
	if !v.IsObject() {
		return nil, false
	}
	var data gjson.Result
	members, isBuffer := 0, false
	v.ForEach(func(key, val gjson.Result) bool {
		members++
		switch key.Str {
		case "type":
			isBuffer = val.Type == gjson.String && val.Str == "Buffer"
		case "data":
			data = val
		}
		return true
	})
	if members != 2 || !isBuffer || !data.IsArray() {
		return nil, false
	}
	bytes, ok := []byte{}, true
	data.ForEach(func(_, n gjson.Result) bool {
		b, err := strconv.ParseUint(n.Raw, 10, 8)
		ok = err == nil && n.Type == gjson.Number
		bytes = append(bytes, byte(b))
		return ok
	})
	return bytes, ok
}

// decodeBase64 takes the standard and the URL alphabet, with and without padding.
func decodeBase64(s string) ([]byte, bool) {
	enc := base64.RawStdEncoding
	if strings.ContainsAny(s, "-_") {
		enc = base64.RawURLEncoding
	}
	data, err := enc.DecodeString(strings.TrimRight(s, "="))
	return data, err == nil
}

func decodeUUID(s string) (id [16]byte, ok bool) {
	var digits [32]byte
	switch len(s) {
	case 32:
		copy(digits[:], s)
	case 36:
		if s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
			return id, false
		}
		n := copy(digits[:], s[:8])
		n += copy(digits[n:], s[9:13])
		n += copy(digits[n:], s[14:18])
		n += copy(digits[n:], s[19:23])
		copy(digits[n:], s[24:])
	default:
		return id, false
	}
	_, err := hex.Decode(id[:], digits[:])
	return id, err == nil
}

// describe names what a column expects.
func describe(col *config.Column) string {
	switch col.Type {
	case config.TypeTimestamptz:
		if col.TimeFormat == config.TimeRFC3339 {
			return "an RFC 3339 time such as 2006-01-02T15:04:05Z"
		}
		return "a time in " + string(col.TimeFormat)
	case config.TypeSmallint, config.TypeInteger, config.TypeBigint:
		return "a whole number that fits " + string(col.Type)
	case config.TypeBytea:
		return "base64"
	case config.TypeBoolean:
		return "true or false"
	}
	if _, array := col.Type.Element(); array {
		return "a JSON array"
	}
	return "a " + string(col.Type)
}

// short quotes the beginning of a value: enough to recognise the mistake, not enough to log a document.
func short(s string) string {
	const maxShort = 40
	if len(s) > maxShort {
		s = s[:maxShort] + "…"
	}
	return strconv.Quote(s)
}
