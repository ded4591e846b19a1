package pipeline

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

// deadLetterTable is the name of the table for dead letters.
const deadLetterTable = "millrace_dead_letter"

//go:embed queries/dead_letter_table.sql
var deadLetterTableQuery string

//go:embed queries/dead_letter_put.sql
var deadLetterPutQuery string

//go:embed queries/dead_letter_branch.sql
var deadLetterBranchQuery string

// DeadLetters set items aside in the sink's database.
type DeadLetters struct {
	pool      *pgxpool.Pool
	processor string
	put       string
}

// needsDeadLetters says whether items of this pipeline become dead letters in the sink's database. Messages of a consumer
// group have a place of their own for them, unless only a branch of a fan-out refuses them.
func needsDeadLetters(c *config.Config) bool {
	return c.Errors.Policy == config.PolicyDeadLetter && (c.Source.Redis != nil || len(c.Sink.FanOut) > 0)
}

// deadLetterName is the table for dead letters: beside the sink's first table, if it has one.
func deadLetterName(c *config.Config) config.TableSink {
	for _, b := range c.Branches() {
		if b.Table != nil {
			return config.TableSink{Schema: b.Table.Schema, Name: deadLetterTable}
		}
	}
	return config.TableSink{Schema: config.DefaultSchema, Name: deadLetterTable}
}

// createDeadLetters creates the table when it is missing, and brings one of an earlier release up to date.
func createDeadLetters(ctx context.Context, pool *pgxpool.Pool, c *config.Config) error {
	t := deadLetterName(c)
	columns, err := tableColumns(ctx, pool, &t)
	if err != nil {
		return err
	}
	name := pgx.Identifier{t.Schema, t.Name}.Sanitize()
	query := deadLetterTableQuery
	switch {
	case slices.ContainsFunc(columns, func(c tableColumn) bool { return c.Name == "branch" }):
		return nil
	case columns != nil:
		query = deadLetterBranchQuery
	}
	if err := createOnce(ctx, pool, t.Schema+"."+t.Name, strings.ReplaceAll(query, "TABLE", name)); err != nil {
		return fmt.Errorf("create table %s for dead letters (or write errors.policy: Pending): %w", name, err)
	}
	return nil
}

// NewDeadLetters returns the place for dead letters, or nil when the pipeline needs none. Migrate comes before it.
func NewDeadLetters(pool *pgxpool.Pool, c *config.Config) *DeadLetters {
	if !needsDeadLetters(c) {
		return nil
	}
	t := deadLetterName(c)
	name := pgx.Identifier{t.Schema, t.Name}.Sanitize()
	return &DeadLetters{pool: pool, processor: c.Name, put: strings.ReplaceAll(deadLetterPutQuery, "TABLE", name)}
}

// DeadLetter is one item that could not be decoded or written.
type DeadLetter struct {
	Item       *Item
	Branch     string // of a fan-out that refuses it; empty when it is the whole pipeline
	Deliveries int
	Reason     string
}

// Put sets items aside, all or none. Repeating it changes nothing.
func (d *DeadLetters) Put(ctx context.Context, letters []DeadLetter) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	return d.PutTx(ctx, d.pool, letters)
}

// PutTx sets items aside in a transaction of the caller.
func (d *DeadLetters) PutTx(ctx context.Context, tx pgstream.DB, letters []DeadLetter) error {
	n := len(letters)
	streams, ids, digests, branches := make([]string, n), make([]string, n), make([][]byte, n), make([]string, n)
	deliveries, reasons, entries := make([]int32, n), make([]string, n), make([]string, n)
	for i, l := range letters {
		entry, err := rawItem(l.Item)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(entry)
		streams[i], ids[i], digests[i], branches[i] = l.Item.Stream, l.Item.ID, sum[:], l.Branch
		deliveries[i], reasons[i], entries[i] = int32(l.Deliveries), storable(l.Reason), string(entry)
	}
	if _, err := tx.Exec(ctx, d.put, d.processor, streams, ids, digests, deliveries, reasons, entries, branches); err != nil {
		return fmt.Errorf("set %d dead letters aside: %w", n, err)
	}
	return nil
}

// rawMessage is a message as the dead-letter table holds it: the payload as the text that it came as, or in base64.
type rawMessage struct {
	Key           *string         `json:"key,omitempty"`
	Headers       json.RawMessage `json:"headers,omitempty"`
	Position      int64           `json:"position"`
	CreatedAt     time.Time       `json:"createdAt"`
	Payload       *string         `json:"payload,omitempty"`
	PayloadBase64 *string         `json:"payloadBase64,omitempty"`
}

// rawItem keeps every byte of an item: an array for an entry of Redis, an object for a message.
func rawItem(it *Item) ([]byte, error) {
	if it.Fields != nil {
		return rawEntry(it.Fields)
	}
	raw := rawMessage{Key: it.Key, Headers: it.Headers, Position: it.Position, CreatedAt: it.Created}
	if isText(it.Payload) {
		raw.Payload = &it.Payload
	} else {
		text := base64.StdEncoding.EncodeToString([]byte(it.Payload))
		raw.PayloadBase64 = &text
	}
	return json.Marshal(raw)
}

// rawField is one field of an entry as the dead-letter table holds it.
type rawField struct {
	Name   string  `json:"name"`
	Value  *string `json:"value,omitempty"`
	Base64 *string `json:"base64,omitempty"`
	// NameBase64 replaces a name that is not text.
	NameBase64 *string `json:"nameBase64,omitempty"`
}

// rawEntry keeps every byte of an entry, in the order of its fields.
func rawEntry(fields []redisstream.Field) ([]byte, error) {
	raw := make([]rawField, len(fields))
	for i, f := range fields {
		if isText(f.Field) {
			raw[i].Name = f.Field
		} else {
			name := base64.StdEncoding.EncodeToString([]byte(f.Field))
			raw[i].NameBase64 = &name
		}
		if isText(f.Value) {
			raw[i].Value = &fields[i].Value
		} else {
			value := base64.StdEncoding.EncodeToString([]byte(f.Value))
			raw[i].Base64 = &value
		}
	}
	return json.Marshal(raw)
}

// isText says whether jsonb can hold a string: it has no place for a zero byte or for what is not UTF-8.
func isText(s string) bool { return strings.IndexByte(s, 0) < 0 && utf8.ValidString(s) }

// storable makes a reason fit into a text column.
func storable(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "�"), "\x00", "�")
}
