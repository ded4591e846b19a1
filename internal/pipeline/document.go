package pipeline

import (
	"slices"

	"github.com/tidwall/gjson"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

// rawDocument returns the document of an item as it came. With the Fields codec it is a JSON object of the fields, of which the
// last of each name counts.
func rawDocument(it *Item, codec *config.Codec) (document []byte, isJSON bool) {
	if codec.Type == config.CodecFields {
		document = append(document, '{')
		for i, f := range it.Fields {
			if slices.ContainsFunc(it.Fields[i+1:], func(later redisstream.Field) bool { return later.Field == f.Field }) {
				continue
			}
			if len(document) > 1 {
				document = append(document, ',')
			}
			document = appendString(append(appendString(document, f.Field), ':'), f.Value)
		}
		return append(document, '}'), true
	}
	text := it.Payload
	if codec.Field != "" {
		text, _ = fieldOf(it, codec.Field)
	}
	return []byte(text), codec.Type != config.CodecProtobuf && gjson.Valid(text)
}
