package pipeline

import (
	"errors"
	"fmt"

	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"
	"github.com/tidwall/gjson"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/expression"
)

// fromCEL converts the value of an expression, by the rules of a JSON value of its kind. Null is a missing value.
func fromCEL(v ref.Val, col *config.Column) (Value, error) {
	switch x := v.(type) {
	case types.Null:
		return Value{}, nil
	case types.Bool:
		if x {
			return fromJSON(gjson.Result{Type: gjson.True, Raw: "true"}, col)
		}
		return fromJSON(gjson.Result{Type: gjson.False, Raw: "false"}, col)
	case types.Int, types.Uint, types.Double, expression.Decimal:
		text, _ := expression.TextOf(v)
		return fromJSON(gjson.Result{Type: gjson.Number, Raw: text}, col)
	case types.String:
		r := gjson.Result{Type: gjson.String, Str: string(x)}
		if col.Type == config.TypeJSONB {
			r.Raw = asString(expression.AppendText(nil, r.Str))
		}
		return fromJSON(r, col)
	case types.Timestamp:
		if col.Type == config.TypeTimestamptz {
			if s := x.Unix(); s < minMicros/1_000_000 || s >= maxMicros/1_000_000 {
				return Value{}, errors.New("is a time outside the range of timestamptz")
			}
			return timeValue(x.Time), nil
		}
		text, _ := expression.TextOf(v)
		return fromCEL(types.String(text), col)
	case types.Duration:
		text, _ := expression.TextOf(v)
		return fromCEL(types.String(text), col)
	case types.Bytes:
		switch col.Type {
		case config.TypeBytea:
			return textValue(string(x)), nil
		case config.TypeJSONB:
		default:
			return Value{}, fmt.Errorf("is bytes, not %s", describe(col))
		}
	}
	text, err := expression.AppendJSON(nil, v)
	if err != nil {
		return Value{}, err
	}
	doc := asString(text)
	if tooDeep(doc) {
		return Value{}, errors.New("is nested too deep")
	}
	return fromJSON(gjson.Parse(doc), col)
}

// toCEL is a column's value as expressions see it.
func toCEL(v Value, t config.ColumnType) ref.Val {
	if !v.Valid {
		return types.NullValue
	}
	switch t {
	case config.TypeText:
		return types.String(v.S)
	case config.TypeBytea:
		return types.Bytes(v.S)
	case config.TypeTimestamptz:
		return expression.TimeValue(microsTime(v.N))
	}
	// The others are in JSON what they are in an expression.
	return expression.JSON(gjson.ParseBytes(appendValue(nil, t, v)))
}

// rowObject is a row as expressions see it: a map of column to value.
func rowObject(columns []config.Column, row []Value) ref.Val {
	members := make([]expression.Member, len(columns))
	for i, col := range columns {
		members[i] = expression.Member{Name: col.Name, Value: toCEL(row[i], col.Type)}
	}
	return expression.NewObject(members...)
}
