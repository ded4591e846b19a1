package pipeline

import (
	"time"

	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"
	"github.com/tidwall/gjson"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/expression"
)

// variables shows one item to expressions, each part when the first expression asks for it. It is for one goroutine.
type variables struct {
	it      *Item
	columns []config.Column // of row; nil before the mapping
	opened  *document       // nil: not yet
	doc     ref.Val
	row     ref.Val
	state   ref.Val
	headers ref.Val
}

// Variables shows a decoded item to the expressions of a sink, whose row has the given columns. The result is for one
// goroutine, and for as long as the item.
func (it *Item) Variables(columns []config.Column) expression.Variables {
	return &variables{it: it, columns: columns}
}

// Variable implements expression.Variables.
func (v *variables) Variable(name string) ref.Val {
	it := v.it
	switch name {
	case expression.VarDoc:
		return v.document()
	case expression.VarID:
		return types.String(it.ID)
	case expression.VarStream:
		return types.String(it.Stream)
	case expression.VarKey:
		if it.Key == nil {
			return types.NullValue
		}
		return types.String(*it.Key)
	case expression.VarHeaders:
		if v.headers == nil {
			v.headers = it.headers()
		}
		return v.headers
	case expression.VarPosition:
		return types.Int(it.Position)
	case expression.VarReceivedAt:
		return expression.TimeValue(it.Received.UTC())
	case expression.VarCreatedAt:
		return expression.TimeValue(it.Created.UTC())
	case expression.VarDeliveries:
		return types.Int(it.Deliveries)
	case expression.VarState:
		if v.state == nil {
			v.state = it.before.value()
		}
		return v.state
	case expression.VarRow:
		if v.row == nil {
			v.row = rowObject(v.columns, it.Row)
		}
		return v.row
	}
	panic("pipeline: unknown variable " + name + " passed the compiler")
}

// document takes the item's document apart. A sink has to open it again.
func (v *variables) document() ref.Val {
	if v.doc != nil {
		return v.doc
	}
	codec := v.it.decoder.codec
	if v.opened == nil {
		d, err := codec.open(v.it)
		if err != nil {
			return types.WrapErr(err)
		}
		v.opened = &d
	}
	v.doc = codec.value(*v.opened, v.it)
	return v.doc
}

// headers are a message's, or the fields of a Redis entry beside its document.
func (it *Item) headers() ref.Val {
	if it.Fields == nil {
		if root := gjson.ParseBytes(it.Headers); root.IsObject() {
			return expression.JSON(root)
		}
		return expression.NewObject()
	}
	var members []expression.Member
	for _, f := range it.Fields {
		if it.decoder.field != "" && f.Field != it.decoder.field {
			members = append(members, expression.Member{Name: f.Field, Value: expression.TextOrBytes(f.Value)})
		}
	}
	return expression.NewObject(members...)
}

// value is a record as expressions see it: null when there is none.
func (r *Record) value() ref.Val {
	if r == nil {
		return types.NullValue
	}
	return expression.NewObject(
		expression.Member{Name: "last", Value: rowObject(r.columns, r.Last)},
		expression.Member{Name: "last_seen", Value: expression.TimeValue(r.LastSeen)},
		expression.Member{Name: "count", Value: types.Int(r.Count)},
	)
}

// microsTime is the time of a timestamptz.
func microsTime(n int64) time.Time { return time.UnixMicro(n).UTC() }
