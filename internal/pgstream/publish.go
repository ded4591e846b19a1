package pgstream

import "context"

// NewMessage is a message to publish.
type NewMessage struct {
	Key     *string
	Headers []byte // JSON object or nil
	Payload []byte
}

// Publish appends one message and returns its position. With a pgx.Tx it takes part in that transaction.
func Publish(ctx context.Context, db DB, stream string, m NewMessage) (int64, error) { panic("todo") }

// PublishBatch appends messages in order and returns their positions.
func PublishBatch(ctx context.Context, db DB, stream string, ms []NewMessage) ([]int64, error) {
	panic("todo")
}
