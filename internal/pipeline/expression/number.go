package expression

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"reflect"
	"strconv"
	"strings"

	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"
	"github.com/google/cel-go/common/types/traits"
)

// Bounds of calculating with decimals. A number beyond them can be passed on and compared for equality, and nothing else.
const (
	maxDigits   = 1000
	maxExponent = 1000
)

// DecimalType is the CEL type of numbers that neither an integer nor a double holds exactly.
var DecimalType = types.NewOpaqueType("decimal")

// Decimal is a number as it is written in decimal. It is never equal to a CEL integer or double: where one of those holds the
// number exactly, Number returns it.
type Decimal string

// Number returns the CEL value of a JSON number or another plain decimal text (E1).
func Number(text string) ref.Val {
	if !strings.ContainsAny(text, ".eE") {
		if n, err := strconv.ParseInt(text, 10, 64); err == nil {
			return types.Int(n)
		}
		if n, err := strconv.ParseUint(text, 10, 64); err == nil {
			return types.Uint(n)
		}
	}
	return fraction(text)
}

// fraction returns the double that stands for text, or a Decimal when there is none.
func fraction(text string) ref.Val {
	f, err := strconv.ParseFloat(text, 64)
	if err != nil {
		return Decimal(text)
	}
	if f == 0 || !fewDigits(text) {
		var buf [32]byte
		if split(text) != split(string(strconv.AppendFloat(buf[:0], f, 'e', -1, 64))) {
			return Decimal(text)
		}
	}
	return types.Double(f)
}

// fewDigits says that a double holds the number for sure: up to 15 digits come back unchanged.
func fewDigits(text string) bool {
	n := 0
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case '0' <= c && c <= '9':
			n++
		case c == 'e' || c == 'E':
			return false
		}
	}
	return n <= 15
}

// scientific is a decimal number in the one form that equal numbers share: digits without zeros at either end, times ten to
// the exponent. Zero has no digits.
type scientific struct {
	negative bool
	digits   string
	exponent string // of a number whose exponent fits an int64; otherwise as written
}

func split(text string) scientific {
	s := scientific{}
	text, s.negative = strings.CutPrefix(text, "-")
	text = strings.TrimPrefix(text, "+")
	mantissa, exponent := text, "0"
	if i := strings.IndexAny(text, "eE"); i >= 0 {
		mantissa, exponent = text[:i], text[i+1:]
	}
	whole, part, _ := strings.Cut(mantissa, ".")
	digits := strings.TrimLeft(whole+part, "0")
	s.digits = strings.TrimRight(digits, "0")
	if s.digits == "" {
		return scientific{}
	}
	e, err := strconv.ParseInt(exponent, 10, 64)
	if err != nil || e > math.MaxInt64/2 || e < math.MinInt64/2 {
		s.exponent = exponent
		return s
	}
	s.exponent = strconv.FormatInt(e-int64(len(part))+int64(len(digits)-len(s.digits)), 10)
	return s
}

// ConvertToNative implements ref.Val.
func (d Decimal) ConvertToNative(t reflect.Type) (any, error) {
	if t.Kind() == reflect.String {
		return reflect.ValueOf(string(d)).Convert(t).Interface(), nil
	}
	return nil, fmt.Errorf("a decimal cannot be a %v", t)
}

// ConvertToType implements ref.Val. The expression has to ask for it: a double rounds, and an integer cuts off, as with doubles.
func (d Decimal) ConvertToType(t ref.Type) ref.Val {
	switch t {
	case DecimalType:
		return d
	case types.StringType:
		return types.String(d)
	case types.TypeType:
		return DecimalType
	case types.DoubleType:
		f, err := strconv.ParseFloat(string(d), 64)
		if err != nil {
			return types.NewErr("%s does not fit a double", clip(string(d)))
		}
		return types.Double(f)
	case types.IntType, types.UintType:
		x, err := parseExact(string(d))
		if err != nil {
			return types.WrapErr(err)
		}
		if n := whole(x, func(m, unit *big.Int) *big.Int { return new(big.Int).Quo(m, unit) }).value(); n.Type() != DecimalType {
			return n.ConvertToType(t)
		}
	}
	return types.NewErr("%s does not fit %s", clip(string(d)), t.TypeName())
}

// Equal implements ref.Val.
func (d Decimal) Equal(other ref.Val) ref.Val {
	o, ok := other.(Decimal)
	return types.Bool(ok && (d == o || split(string(d)) == split(string(o))))
}

// Type implements ref.Val.
func (d Decimal) Type() ref.Type { return DecimalType }

// Value implements ref.Val.
func (d Decimal) Value() any { return string(d) }

// exact is m times ten to the power of e.
type exact struct {
	m *big.Int
	e int
	// whole says that both operands so far were integers, so the result is one too, whatever its size.
	whole bool
}

var errTooLarge = fmt.Errorf("a number has more than %d digits, which cannot be calculated with", maxDigits)

// exactOf reads a number; ok is false when the value is none, or not finite.
func exactOf(v ref.Val) (x exact, ok bool, err error) {
	switch n := v.(type) {
	case types.Int:
		return exact{m: big.NewInt(int64(n)), whole: true}, true, nil
	case types.Uint:
		return exact{m: new(big.Int).SetUint64(uint64(n)), whole: true}, true, nil
	case types.Double:
		if f := float64(n); math.IsNaN(f) || math.IsInf(f, 0) {
			return x, false, nil
		}
		x, err = parseExact(strconv.FormatFloat(float64(n), 'e', -1, 64))
		return x, true, err
	case Decimal:
		x, err = parseExact(string(n))
		return x, true, err
	}
	return x, false, nil
}

func parseExact(text string) (exact, error) {
	s := split(text)
	if s.digits == "" {
		return exact{m: new(big.Int)}, nil
	}
	e, err := strconv.Atoi(s.exponent)
	if err != nil || len(s.digits) > maxDigits || e > maxExponent || e < -maxExponent {
		return exact{}, errTooLarge
	}
	m, ok := new(big.Int).SetString(s.digits, 10)
	if !ok {
		return exact{}, errors.New("a decimal holds what is no digit")
	}
	if s.negative {
		m.Neg(m)
	}
	return exact{m: m, e: e}, nil
}

// value returns the CEL value of a result.
func (x exact) value() ref.Val {
	digits := x.m.String()
	if len(digits) > maxDigits+maxExponent || x.e > maxExponent || x.e < -2*maxExponent {
		return types.WrapErr(errTooLarge)
	}
	if x.whole && x.e == 0 {
		return Number(digits)
	}
	if short := strings.TrimRight(digits, "0"); short != "" {
		return fraction(plain(short, x.e+len(digits)-len(short)))
	}
	return types.Double(0)
}

// plain writes digits times ten to the power of e without an exponent, but with a point.
func plain(digits string, e int) string {
	digits, negative := strings.CutPrefix(digits, "-")
	switch {
	case e >= 0:
		digits += strings.Repeat("0", e) + ".0"
	case len(digits) > -e:
		digits = digits[:len(digits)+e] + "." + digits[len(digits)+e:]
	default:
		digits = "0." + strings.Repeat("0", -e-len(digits)) + digits
	}
	if negative {
		return "-" + digits
	}
	return digits
}

// align writes both with the smaller exponent.
func align(a, b exact) (exact, exact) {
	if a.e > b.e {
		return scale(a, b.e), b
	}
	return a, scale(b, a.e)
}

func scale(x exact, e int) exact {
	if x.e == e {
		return x
	}
	factor := new(big.Int).Exp(big.NewInt(10), big.NewInt(int64(x.e-e)), nil)
	return exact{m: factor.Mul(factor, x.m), e: e, whole: x.whole}
}

func add(a, b exact) ref.Val {
	a, b = align(a, b)
	return exact{m: new(big.Int).Add(a.m, b.m), e: a.e, whole: a.whole && b.whole}.value()
}

func subtract(a, b exact) ref.Val {
	a, b = align(a, b)
	return exact{m: new(big.Int).Sub(a.m, b.m), e: a.e, whole: a.whole && b.whole}.value()
}

func multiply(a, b exact) ref.Val {
	return exact{m: new(big.Int).Mul(a.m, b.m), e: a.e + b.e, whole: a.whole && b.whole}.value()
}

func divide(a, b exact) ref.Val {
	if a.whole && b.whole {
		if b.m.Sign() == 0 {
			return types.NewErr("division by zero")
		}
		return exact{m: new(big.Int).Quo(a.m, b.m), whole: true}.value()
	}
	if b.m.Sign() == 0 {
		return types.NewErr("division by zero")
	}
	a, b = align(a, b)
	f, _ := new(big.Rat).SetFrac(a.m, b.m).Float64()
	if math.IsInf(f, 0) {
		return types.WrapErr(errTooLarge)
	}
	return types.Double(f)
}

// compare is the order of two values, with numbers of all kinds in one order; an error value when they have none.
func compare(a, b ref.Val) ref.Val {
	if a.Type() == b.Type() && a.Type() != DecimalType || !isNumber(a) || !isNumber(b) {
		c, ok := a.(traits.Comparer)
		if !ok {
			return types.MaybeNoSuchOverloadErr(a)
		}
		return c.Compare(b)
	}
	if holds(a) && holds(b) {
		return floatOf(a).Compare(floatOf(b))
	}
	x, finite, err := exactOf(a)
	y, finite2, err2 := exactOf(b)
	if err := errors.Join(err, err2); err != nil {
		return types.WrapErr(errTooLarge)
	}
	if !finite || !finite2 {
		return floatOf(a).Compare(floatOf(b))
	}
	x, y = align(x, y)
	return types.Int(x.m.Cmp(y.m))
}

// holds says whether a double is exactly this number, as far as that is cheap to say.
func holds(v ref.Val) bool {
	switch n := v.(type) {
	case types.Double:
		return true
	case types.Int:
		return -1<<53 <= n && n <= 1<<53
	}
	return false
}

func isNumber(v ref.Val) bool {
	switch v.(type) {
	case types.Int, types.Uint, types.Double, Decimal:
		return true
	}
	return false
}

// floatOf is for what is compared or calculated with NaN or an infinity.
func floatOf(v ref.Val) types.Double {
	if f, ok := v.ConvertToType(types.DoubleType).(types.Double); ok {
		return f
	}
	return types.Double(math.NaN())
}

// clip shows the beginning of a value in an error.
func clip(s string) string {
	const most = 40
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
