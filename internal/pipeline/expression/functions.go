package expression

import (
	"fmt"
	"math/big"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/common/decls"
	"github.com/google/cel-go/common/env"
	"github.com/google/cel-go/common/operators"
	"github.com/google/cel-go/common/stdlib"
	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"
	"github.com/google/cel-go/common/types/traits"
)

// Bounds of what one step of an evaluation may make (E3).
const (
	maxText = 16 << 20 // bytes
	maxList = 1 << 20  // elements
)

// numbersMix are the operators that this package defines itself (E2).
var numbersMix = map[string]func(a, b ref.Val) ref.Val{
	operators.Add:           addValues,
	operators.Subtract:      arithmetic(subtract, traits.Subtractor.Subtract),
	operators.Multiply:      arithmetic(multiply, traits.Multiplier.Multiply),
	operators.Divide:        arithmetic(divide, traits.Divider.Divide),
	operators.Less:          relation(func(c types.Int) bool { return c < 0 }),
	operators.LessEquals:    relation(func(c types.Int) bool { return c <= 0 }),
	operators.Greater:       relation(func(c types.Int) bool { return c > 0 }),
	operators.GreaterEquals: relation(func(c types.Int) bool { return c >= 0 }),
}

var numberTypes = []*types.Type{types.IntType, types.UintType, types.DoubleType, DecimalType}

// language is the environment without variables.
func language() []cel.EnvOption {
	without := env.NewLibrarySubset()
	for name := range numbersMix {
		without.ExcludeFunctions = append(without.ExcludeFunctions, env.NewFunction(name))
	}
	without.ExcludeFunctions = append(without.ExcludeFunctions, env.NewFunction(operators.Negate))
	options := []cel.EnvOption{cel.StdLib(cel.StdLibSubset(without)), cel.OptionalTypes()}
	for _, f := range stdlib.Functions() {
		if op, ok := numbersMix[f.Name()]; ok {
			options = append(options, cel.Function(f.Name(), mixed(f, op)...))
		}
		if f.Name() == operators.Negate {
			opts := []cel.FunctionOpt{cel.Overload("negate_decimal", []*types.Type{DecimalType}, types.DynType), cel.SingletonUnaryBinding(negate)}
			for _, o := range f.OverloadDecls() {
				opts = append(opts, cel.Overload(o.ID(), o.ArgTypes(), o.ResultType()))
			}
			options = append(options, cel.Function(f.Name(), opts...))
		}
	}
	return append(append(options, numberFunctions()...), textFunctions()...)
}

// mixed declares an operator with the standard's overloads and those that mix kinds of numbers.
func mixed(standard *decls.FunctionDecl, op func(a, b ref.Val) ref.Val) []cel.FunctionOpt {
	var opts []cel.FunctionOpt
	result := types.DynType // a double, or a decimal where a double would round
	var have [][]*types.Type
	for _, o := range standard.OverloadDecls() {
		if o.ResultType() == types.BoolType {
			result = types.BoolType
		}
		have = append(have, o.ArgTypes())
		returns := o.ResultType()
		if returns == types.DoubleType {
			returns = result
		}
		opts = append(opts, cel.Overload(o.ID(), o.ArgTypes(), returns))
	}
	for _, a := range numberTypes {
		for _, b := range numberTypes {
			if !slices.ContainsFunc(have, func(args []*types.Type) bool { return args[0] == a && args[1] == b }) {
				opts = append(opts, cel.Overload(standard.Name()+a.TypeName()+"_"+b.TypeName(), []*types.Type{a, b}, result))
			}
		}
	}
	return append(opts, cel.SingletonBinaryBinding(op))
}

// arithmetic calculates exactly with numbers and leaves everything else to the standard.
func arithmetic[T any](calculate func(a, b exact) ref.Val, standard func(T, ref.Val) ref.Val) func(a, b ref.Val) ref.Val {
	return func(a, b ref.Val) ref.Val {
		if isNumber(a) && isNumber(b) {
			x, finite, err := exactOf(a)
			y, finite2, err2 := exactOf(b)
			if err != nil || err2 != nil {
				return types.WrapErr(errTooLarge)
			}
			if finite && finite2 {
				return calculate(x, y)
			}
			a, b = floatOf(a), floatOf(b)
		}
		left, ok := a.(T)
		if !ok {
			return types.MaybeNoSuchOverloadErr(a)
		}
		return standard(left, b)
	}
}

// addValues is + of numbers, texts, bytes, lists, times and durations.
func addValues(a, b ref.Val) ref.Val {
	switch x := a.(type) {
	case types.Int:
		if y, ok := b.(types.Int); ok {
			if sum := x + y; (sum > x) == (y > 0) {
				return sum
			}
		}
	case types.String:
		if y, ok := b.(types.String); ok && len(x)+len(y) > maxText {
			return tooLong()
		}
	case types.Bytes:
		if y, ok := b.(types.Bytes); ok && len(x)+len(y) > maxText {
			return tooLong()
		}
	case traits.Lister:
		if y, ok := b.(traits.Lister); ok {
			return concat(x, y)
		}
	}
	return addNumbers(a, b)
}

var addNumbers = arithmetic(add, traits.Adder.Add)

// concat copies, because the standard's list of two lists may hold the same list any number of times.
func concat(a, b traits.Lister) ref.Val {
	n, m := a.Size().(types.Int), b.Size().(types.Int)
	if n+m > maxList {
		return types.NewErr("a list grows beyond %d elements", maxList)
	}
	elems := make([]ref.Val, 0, n+m)
	for _, l := range []traits.Lister{a, b} {
		for it := l.Iterator(); it.HasNext() == types.True; {
			elems = append(elems, it.Next())
		}
	}
	return types.DefaultTypeAdapter.NativeToValue(elems)
}

func negate(v ref.Val) ref.Val {
	if isNumber(v) {
		if x, finite, err := exactOf(v); err == nil && finite {
			x.m.Neg(x.m)
			return x.value()
		}
	}
	n, ok := v.(traits.Negater)
	if !ok {
		return types.MaybeNoSuchOverloadErr(v)
	}
	return n.Negate()
}

func relation(holds func(c types.Int) bool) func(a, b ref.Val) ref.Val {
	return func(a, b ref.Val) ref.Val {
		switch c := compare(a, b).(type) {
		case types.Int:
			return types.Bool(holds(c))
		default:
			if d, ok := a.(types.Double); ok && d != d {
				return types.False
			}
			if d, ok := b.(types.Double); ok && d != d {
				return types.False
			}
			return c
		}
	}
}

// numberFunctions are conversions of decimals and the usual ways to round.
func numberFunctions() []cel.EnvOption {
	var options []cel.EnvOption
	for _, t := range []*types.Type{types.IntType, types.UintType, types.DoubleType, types.StringType} {
		options = append(options, cel.Function(t.TypeName(), cel.Overload("decimal_to_"+t.TypeName(), []*types.Type{DecimalType}, t,
			cel.UnaryBinding(func(v ref.Val) ref.Val { return v.ConvertToType(t) }))))
	}
	for name, round := range map[string]func(x, unit *big.Int) *big.Int{
		"math.trunc": func(x, unit *big.Int) *big.Int { return new(big.Int).Quo(x, unit) },
		"math.floor": floor,
		"math.ceil":  func(x, unit *big.Int) *big.Int { return new(big.Int).Neg(floor(new(big.Int).Neg(x), unit)) },
		"math.round": func(x, unit *big.Int) *big.Int { // half away from zero, as PostgreSQL rounds a numeric
			twice := new(big.Int).Abs(x)
			twice.Lsh(twice, 1).Add(twice, unit)
			twice.Quo(twice, new(big.Int).Lsh(unit, 1))
			if x.Sign() < 0 {
				twice.Neg(twice)
			}
			return twice
		},
	} {
		options = append(options, cel.Function(name, cel.Overload(strings.ReplaceAll(name, ".", "_")+"_number", []*types.Type{types.DynType}, types.DynType,
			cel.UnaryBinding(func(v ref.Val) ref.Val {
				x, finite, err := exactOf(v)
				switch {
				case err != nil:
					return types.WrapErr(err)
				case !finite:
					return types.MaybeNoSuchOverloadErr(v)
				}
				return whole(x, round).value()
			}))))
	}
	return append(options, cel.Function("math.abs", cel.Overload("math_abs_number", []*types.Type{types.DynType}, types.DynType,
		cel.UnaryBinding(func(v ref.Val) ref.Val {
			x, finite, err := exactOf(v)
			switch {
			case err != nil:
				return types.WrapErr(err)
			case !finite:
				return types.MaybeNoSuchOverloadErr(v)
			case x.m.Sign() >= 0:
				return v
			}
			x.m.Neg(x.m)
			return x.value()
		}))))
}

// whole is x without a fraction, rounded in units of ten to the power of its places.
func whole(x exact, round func(x, unit *big.Int) *big.Int) exact {
	if x.e >= 0 {
		return exact{m: scale(x, 0).m, whole: true}
	}
	unit := new(big.Int).Exp(big.NewInt(10), big.NewInt(int64(-x.e)), nil)
	return exact{m: round(x.m, unit), whole: true}
}

func floor(x, unit *big.Int) *big.Int { return new(big.Int).Div(x, unit) } // Euclidean, and unit is positive

// textFunctions are the functions on texts that CEL's string extension has under the same names, each bounded.
func textFunctions() []cel.EnvOption {
	text, list := types.StringType, types.NewListType(types.StringType)
	unary := func(name string, f func(string) string) cel.EnvOption {
		return cel.Function(name, cel.MemberOverload("string_"+name, []*types.Type{text}, text,
			cel.UnaryBinding(func(v ref.Val) ref.Val { return types.String(f(string(v.(types.String)))) })))
	}
	return []cel.EnvOption{
		unary("lowerAscii", lowerASCII), unary("upperAscii", upperASCII), unary("trim", strings.TrimSpace),
		cel.Function("replace", cel.MemberOverload("string_replace", []*types.Type{text, text, text}, text,
			cel.FunctionBinding(func(args ...ref.Val) ref.Val {
				s, from, to := string(args[0].(types.String)), string(args[1].(types.String)), string(args[2].(types.String))
				if n := strings.Count(s, from); n > 0 && len(to) > (maxText-len(s))/n {
					return tooLong()
				}
				return types.String(strings.ReplaceAll(s, from, to))
			}))),
		cel.Function("split", cel.MemberOverload("string_split", []*types.Type{text, text}, list,
			cel.BinaryBinding(func(s, sep ref.Val) ref.Val {
				parts := strings.SplitN(string(s.(types.String)), string(sep.(types.String)), maxList+1)
				if len(parts) > maxList {
					return types.NewErr("a list grows beyond %d elements", maxList)
				}
				return types.NewStringList(types.DefaultTypeAdapter, parts)
			}))),
		cel.Function("join", cel.MemberOverload("list_join", []*types.Type{list, text}, text, cel.BinaryBinding(join))),
		cel.Function("indexOf", cel.MemberOverload("string_index_of", []*types.Type{text, text}, types.IntType,
			cel.BinaryBinding(func(s, sub ref.Val) ref.Val {
				i := strings.Index(string(s.(types.String)), string(sub.(types.String)))
				if i > 0 {
					i = utf8.RuneCountInString(string(s.(types.String))[:i])
				}
				return types.Int(i)
			}))),
		cel.Function("substring",
			cel.MemberOverload("string_substring_from", []*types.Type{text, types.IntType}, text,
				cel.BinaryBinding(func(s, from ref.Val) ref.Val { return substring(s, from, types.IntNegOne) })),
			cel.MemberOverload("string_substring", []*types.Type{text, types.IntType, types.IntType}, text,
				cel.FunctionBinding(func(args ...ref.Val) ref.Val {
					if args[2].(types.Int) < 0 {
						return types.NewErr("substring(%v, %v): an index is negative", args[1], args[2])
					}
					return substring(args[0], args[1], args[2])
				}))),
	}
}

func join(l, sep ref.Val) ref.Val {
	var b strings.Builder
	for it, first := l.(traits.Lister).Iterator(), true; it.HasNext() == types.True; first = false {
		s, ok := it.Next().(types.String)
		if !ok {
			return types.NewErr("join: the list holds something that is no text; write string(…) around its elements")
		}
		if !first {
			b.WriteString(string(sep.(types.String)))
		}
		b.WriteString(string(s))
		if b.Len() > maxText {
			return tooLong()
		}
	}
	return types.String(b.String())
}

// substring counts characters. A negative end means the end of the text.
func substring(s, from, to ref.Val) ref.Val {
	text, start, end := string(s.(types.String)), int64(from.(types.Int)), int64(to.(types.Int))
	n := int64(utf8.RuneCountInString(text))
	if end < 0 {
		end = n
	}
	if start < 0 || start > end || end > n {
		return types.NewErr("substring(%d, %d) of a text of %d characters", start, end, n)
	}
	at, first := int64(0), len(text)
	for i := range text {
		if at == start {
			first = i
		}
		if at == end {
			return types.String(text[min(first, i):i])
		}
		at++
	}
	return types.String(text[first:])
}

func lowerASCII(s string) string { return mapASCII(s, 'A', 'Z', 'a'-'A') }
func upperASCII(s string) string { return mapASCII(s, 'a', 'z', 'A'-'a') }

func mapASCII(s string, first, last byte, shift int) string {
	b := []byte(s)
	for i, c := range b {
		if first <= c && c <= last {
			b[i] = byte(int(c) + shift)
		}
	}
	return string(b)
}

func tooLong() ref.Val { return types.WrapErr(fmt.Errorf("a text grows beyond %d MiB", maxText>>20)) }
