package pipeline

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// compareText builds the query that gives the places, counted from 1, of the rows whose key is in the table with other
// content; nothing when there is nothing to compare. What differs by nature at each delivery is left out.
func (s *TableSink) compareText(t *config.TableSink, actual map[string]string) string {
	var params, aliases, match, differ []string
	for i, col := range s.columns {
		name, alias := "held."+pgx.Identifier{col.Name}.Sanitize(), "c"+strconv.Itoa(i+1)
		params = append(params, "$"+strconv.Itoa(i+1)+"::"+wireOf(col.Type).array)
		aliases = append(aliases, alias)
		value := s.value(i, actual)
		switch {
		case slices.Contains(s.key, i):
			match = append(match, name+" = "+value)
		case col.Path != config.PropertyReceivedAt:
			differ = append(differ, name+" IS DISTINCT FROM "+value)
		}
	}
	if len(differ) == 0 {
		return ""
	}
	return fmt.Sprintf("SELECT t.n FROM unnest(%s) WITH ORDINALITY AS t(%s, n) JOIN %s AS held ON %s WHERE %s",
		strings.Join(params, ", "), strings.Join(aliases, ", "), pgx.Identifier{t.Schema, t.Name}.Sanitize(),
		strings.Join(match, " AND "), strings.Join(differ, " OR "))
}

// detect marks the duplicates whose row has other content. It asks for duplicates only, so it costs nothing where there
// are none.
func (s *TableSink) detect(ctx context.Context, conn *pgx.Conn, items []*Item, os []Outcome) error {
	var duplicates []*Item
	var places []int
	for i := range os {
		if os[i].Result == Duplicate {
			duplicates = append(duplicates, items[i])
			places = append(places, i)
		}
	}
	if len(duplicates) == 0 {
		return nil
	}
	rr, err := s.compare.start(ctx, conn, s.encode(duplicates))
	if err != nil {
		return err
	}
	for rr.NextRow() {
		os[places[binary.BigEndian.Uint64(rr.Values()[0])-1]].Mismatch = true
	}
	_, err = rr.Close()
	return err
}

// encode gives a parameter for each column.
func (s *TableSink) encode(items []*Item) [][]byte {
	arrays := make([][]byte, len(s.columns))
	for i, col := range s.columns {
		arrays[i] = appendArray(nil, col.Type, items, i)
	}
	return arrays
}
