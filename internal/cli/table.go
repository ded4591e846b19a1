package cli

import (
	"io"
	"strings"
	"unicode/utf8"
)

// gap stands between two columns, as kubectl has it.
const gap = "   "

// table is printed with its columns aligned. The first row is the header.
type table [][]string

func (t *table) row(cells ...string) { *t = append(*t, cells) }

func (t table) print(w io.Writer) error {
	var text strings.Builder
	widths := columns{}
	for _, row := range t {
		widths.fit(row)
	}
	for _, row := range t {
		text.WriteString(widths.line(row))
	}
	_, err := io.WriteString(w, text.String())
	return err
}

// columns are the widths of a table that grows while it is printed: they only get wider.
type columns []int

func (c *columns) fit(row []string) {
	for i, cell := range row {
		if i == len(*c) {
			*c = append(*c, 0)
		}
		(*c)[i] = max((*c)[i], utf8.RuneCountInString(cell))
	}
}

// line aligns a row. Its last cell is not padded.
func (c columns) line(row []string) string {
	var text strings.Builder
	for i, cell := range row {
		text.WriteString(cell)
		if i < len(row)-1 {
			text.WriteString(strings.Repeat(" ", c[i]-utf8.RuneCountInString(cell)) + gap)
		}
	}
	return strings.TrimRight(text.String(), " ") + "\n"
}
