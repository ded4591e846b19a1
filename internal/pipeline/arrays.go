package pipeline

import (
	"encoding/binary"
	"fmt"

	"github.com/jackc/pgx/v5/pgtype"
	"github.com/tidwall/gjson"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// postgresEpoch is 2000-01-01 in microseconds since 1970: PostgreSQL counts from there.
const postgresEpoch = 946_684_800_000_000

// wire is how a column type travels in a parameter array.
type wire struct {
	oid   uint32 // of an element
	array string // SQL type of the parameter
	size  int    // of an element in bytes; 0 when it varies
	// cast is the SQL type that an element has to be cast to, because it travels as text; empty when it travels as itself.
	cast string
}

// wireOf knows every column type. A numeric travels as text, which keeps every digit and costs no conversion here. So does
// an array, as the literal '{1,2}': an array of arrays would have to be of equal lengths, and unnest would take it apart.
func wireOf(t config.ColumnType) wire {
	if _, array := t.Element(); array {
		return wire{pgtype.TextOID, "text[]", 0, string(t)}
	}
	switch t {
	case config.TypeText:
		return wire{pgtype.TextOID, "text[]", 0, ""}
	case config.TypeNumeric:
		return wire{pgtype.TextOID, "text[]", 0, string(t)}
	case config.TypeJSONB:
		return wire{pgtype.JSONBOID, "jsonb[]", 0, ""}
	case config.TypeBytea:
		return wire{pgtype.ByteaOID, "bytea[]", 0, ""}
	case config.TypeUUID:
		return wire{pgtype.UUIDOID, "uuid[]", 16, ""}
	case config.TypeBoolean:
		return wire{pgtype.BoolOID, "boolean[]", 1, ""}
	case config.TypeSmallint:
		return wire{pgtype.Int2OID, "smallint[]", 2, ""}
	case config.TypeInteger:
		return wire{pgtype.Int4OID, "integer[]", 4, ""}
	case config.TypeBigint:
		return wire{pgtype.Int8OID, "bigint[]", 8, ""}
	case config.TypeReal:
		return wire{pgtype.Float4OID, "real[]", 4, ""}
	case config.TypeDouble:
		return wire{pgtype.Float8OID, "double precision[]", 8, ""}
	case config.TypeTimestamptz:
		return wire{pgtype.TimestamptzOID, "timestamptz[]", 8, ""}
	}
	panic(fmt.Sprintf("pipeline: column type %q passed validation", t))
}

// appendArray writes one column of rows in PostgreSQL's binary array format: dimensions, null flag, element type, length
// and lower bound, then each element with its length, where -1 is null.
func appendArray(buf []byte, t config.ColumnType, rows []*Item, col int) []byte {
	w := wireOf(t)
	_, array := t.Element()
	hasNull := uint32(0)
	for _, it := range rows {
		if !it.Row[col].Valid {
			hasNull = 1
			break
		}
	}
	be := binary.BigEndian
	buf = be.AppendUint32(buf, 1)
	buf = be.AppendUint32(buf, hasNull)
	buf = be.AppendUint32(buf, w.oid)
	buf = be.AppendUint32(buf, uint32(len(rows)))
	buf = be.AppendUint32(buf, 1)
	for _, it := range rows {
		v := &it.Row[col]
		if !v.Valid {
			buf = be.AppendUint32(buf, 0xffffffff)
			continue
		}
		switch {
		case array:
			at := len(buf)
			buf = appendLiteral(append(buf, 0, 0, 0, 0), gjson.Parse(v.S))
			be.PutUint32(buf[at:], uint32(len(buf)-at-4))
		case t == config.TypeJSONB:
			buf = be.AppendUint32(buf, uint32(len(v.S)+1))
			buf = append(buf, 1) // version of jsonb's binary format
			buf = append(buf, v.S...)
		case isBytes(t):
			buf = be.AppendUint32(buf, uint32(len(v.S)))
			buf = append(buf, v.S...)
		default:
			buf = be.AppendUint32(buf, uint32(w.size))
			switch w.size {
			case 1:
				buf = append(buf, byte(v.N))
			case 2:
				buf = be.AppendUint16(buf, uint16(v.N))
			case 4:
				buf = be.AppendUint32(buf, uint32(v.N))
			case 8:
				n := v.N
				if t == config.TypeTimestamptz {
					n -= postgresEpoch
				}
				buf = be.AppendUint64(buf, uint64(n))
			}
		}
	}
	return buf
}

// appendLiteral writes a JSON array as PostgreSQL writes arrays.
func appendLiteral(buf []byte, v gjson.Result) []byte {
	switch v.Type {
	case gjson.Null:
		return append(buf, "NULL"...)
	case gjson.String:
		buf = append(buf, '"')
		for i := 0; i < len(v.Str); i++ {
			if c := v.Str[i]; c == '"' || c == '\\' {
				buf = append(buf, '\\')
			}
			buf = append(buf, v.Str[i])
		}
		return append(buf, '"')
	case gjson.JSON:
		buf = append(buf, '{')
		first := true
		v.ForEach(func(_, elem gjson.Result) bool {
			if !first {
				buf = append(buf, ',')
			}
			first = false
			buf = appendLiteral(buf, elem)
			return true
		})
		return append(buf, '}')
	}
	return append(buf, v.Raw...)
}

// sameValue compares a value with what PostgreSQL returned for a column of that type in binary format.
func sameValue(t config.ColumnType, v Value, wire []byte) bool {
	if wire == nil {
		return !v.Valid
	}
	be := binary.BigEndian
	switch {
	case !v.Valid:
		return false
	case isBytes(t):
		return v.S == string(wire)
	case t == config.TypeTimestamptz:
		return len(wire) == 8 && int64(be.Uint64(wire))+postgresEpoch == v.N
	}
	switch len(wire) {
	case 1:
		return wire[0] == byte(v.N)
	case 2:
		return be.Uint16(wire) == uint16(v.N)
	case 4:
		return be.Uint32(wire) == uint32(v.N)
	case 8:
		return be.Uint64(wire) == uint64(v.N)
	}
	return false
}
