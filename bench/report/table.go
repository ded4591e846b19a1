package report

import (
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Table prints the report for people: a block for each work, a line for each system.
func (r Report) Table(w io.Writer) error {
	width := 0
	for _, row := range r.Rows {
		if row.Note == "" {
			width = max(width, utf8.RuneCountInString(row.System))
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s, PostgreSQL %s, %s\n", r.Machine, r.Settings["postgres"], r.Date)
	work := ""
	var without notes
	for i := 0; i < len(r.Rows); {
		row := r.Rows[i]
		if row.Work != work {
			without.print(&b)
			work = row.Work
			fmt.Fprintf(&b, "\n%s (%s)\n", work, row.Unit)
		}
		var ratios []string
		for ; i < len(r.Rows) && r.Rows[i].Work == row.Work && r.Rows[i].System == row.System; i++ {
			if r.Rows[i].Vs != "" {
				ratios = append(ratios, fmt.Sprintf("%s × %s", strconv.FormatFloat(r.Rows[i].Ratio, 'g', 3, 64), r.Rows[i].Vs))
			}
		}
		if row.Note != "" {
			without.add(row)
			continue
		}
		line := fmt.Sprintf("  %-*s  ", width, row.System)
		if row.Runs == 1 {
			line += fmt.Sprintf("%10s  %-21s  %s", Number(row.Median), "one run", strings.Join(ratios, ", "))
		} else {
			line += fmt.Sprintf("%10s  %-21s  %s", Number(row.Median), Number(row.Min)+" … "+Number(row.Max), strings.Join(ratios, ", "))
		}
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	without.print(&b)
	_, err := io.WriteString(w, b.String())
	return err
}

// notes are the systems without figures, by the reason that they have in common.
type notes struct {
	reasons []string
	systems map[string][]string
}

func (n *notes) add(row Row) {
	if n.systems == nil {
		n.systems = map[string][]string{}
	}
	if n.systems[row.Note] == nil {
		n.reasons = append(n.reasons, row.Note)
	}
	n.systems[row.Note] = append(n.systems[row.Note], row.System)
}

func (n *notes) print(b *strings.Builder) {
	for _, reason := range n.reasons {
		fmt.Fprintf(b, "  – %s: %s\n", strings.Join(n.systems[reason], ", "), reason)
	}
	*n = notes{}
}

// Number writes a figure with the digits that matter and with thousands apart.
func Number(v float64) string {
	if v != 0 && math.Abs(v) < 0.001 {
		return strconv.FormatFloat(v, 'g', 2, 64)
	}
	decimals := 0
	switch size := math.Abs(v); {
	case v == 0:
	case size < 1:
		decimals = 3
	case size < 10:
		decimals = 2
	case size < 100:
		decimals = 1
	}
	digits := strconv.FormatFloat(v, 'f', decimals, 64)
	whole, rest, _ := strings.Cut(digits, ".")
	sign := ""
	if strings.HasPrefix(whole, "-") {
		sign, whole = "-", whole[1:]
	}
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if rest != "" {
		whole += "." + rest
	}
	return sign + whole
}
