package pipeline

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

// deadLetterTable is the name of the table for dead letters.
const deadLetterTable = "millrace_dead_letter"

//go:embed queries/dead_letter_table.sql
var deadLetterTableQuery string

//go:embed queries/dead_letter_put.sql
var deadLetterPutQuery string

// DeadLetters set Redis entries aside in the sink's database.
type DeadLetters struct {
	pool      *pgxpool.Pool
	processor string
	put       string
}

// needsDeadLetters says whether entries of this pipeline become dead letters in the sink's database. Messages of a consumer
// group have their own place for them.
func needsDeadLetters(c *config.Config) bool {
	return c.Source.Redis != nil && c.Errors.Policy == config.PolicyDeadLetter
}

// deadLetterSchema is where the dead letters are: beside the sink's table, if it has one.
func deadLetterSchema(c *config.Config) string {
	if t := c.Sink.Table; t != nil {
		return t.Schema
	}
	return config.DefaultSchema
}

// createDeadLetters creates the table when it is missing.
func createDeadLetters(ctx context.Context, pool *pgxpool.Pool, c *config.Config) error {
	t := config.TableSink{Schema: deadLetterSchema(c), Name: deadLetterTable}
	if columns, err := tableColumns(ctx, pool, &t); err != nil || columns != nil {
		return err
	}
	name := pgx.Identifier{t.Schema, t.Name}.Sanitize()
	if err := createOnce(ctx, pool, t.Schema+"."+t.Name, strings.ReplaceAll(deadLetterTableQuery, "TABLE", name)); err != nil {
		return fmt.Errorf("create table %s for dead letters (or write errors.policy: Pending): %w", name, err)
	}
	return nil
}

// NewDeadLetters returns the place for dead letters, or nil when the pipeline needs none. Migrate comes before it.
func NewDeadLetters(pool *pgxpool.Pool, c *config.Config) *DeadLetters {
	if !needsDeadLetters(c) {
		return nil
	}
	name := pgx.Identifier{deadLetterSchema(c), deadLetterTable}.Sanitize()
	return &DeadLetters{pool: pool, processor: c.Name, put: strings.ReplaceAll(deadLetterPutQuery, "TABLE", name)}
}

// DeadLetter is one entry that could not be decoded or written.
type DeadLetter struct {
	Item       *Item
	Deliveries int
	Reason     string
}

// Put sets entries aside, all or none. Repeating it changes nothing.
func (d *DeadLetters) Put(ctx context.Context, letters []DeadLetter) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	n := len(letters)
	streams, ids, digests := make([]string, n), make([]string, n), make([][]byte, n)
	deliveries, reasons, entries := make([]int32, n), make([]string, n), make([]string, n)
	for i, l := range letters {
		entry, err := rawEntry(l.Item.Fields)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(entry)
		streams[i], ids[i], digests[i] = l.Item.Stream, l.Item.ID, sum[:]
		deliveries[i], reasons[i], entries[i] = int32(l.Deliveries), storable(l.Reason), string(entry)
	}
	if _, err := d.pool.Exec(ctx, d.put, d.processor, streams, ids, digests, deliveries, reasons, entries); err != nil {
		return fmt.Errorf("set %d dead letters aside: %w", n, err)
	}
	return nil
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
