package pipeline

import (
	"github.com/google/cel-go/common/types"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/expression"
)

// documentJSON returns the document of a decoded item as JSON: with the JSON codec the very text, and otherwise what
// expressions see as doc.
func documentJSON(it *Item, codec *config.Codec) ([]byte, error) {
	if codec.Type == config.CodecJSON {
		text, err := body(it, codec.Field)
		return []byte(text), err
	}
	v := it.Variables(nil).Variable(expression.VarDoc)
	if failed, ok := v.(*types.Err); ok {
		return nil, failed
	}
	return expression.AppendJSON(nil, v)
}
