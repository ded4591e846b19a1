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
		width = max(width, utf8.RuneCountInString(row.System))
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s, PostgreSQL %s, %s\n", r.Machine, r.Settings["postgres"], r.Date)
	work := ""
	for i := 0; i < len(r.Rows); {
		row := r.Rows[i]
		if row.Work != work {
			work = row.Work
			fmt.Fprintf(&b, "\n%s (%s)\n", work, row.Unit)
		}
		var ratios []string
		for ; i < len(r.Rows) && r.Rows[i].Work == row.Work && r.Rows[i].System == row.System; i++ {
			if r.Rows[i].Vs != "" {
				ratios = append(ratios, fmt.Sprintf("%s × %s", strconv.FormatFloat(r.Rows[i].Ratio, 'g', 3, 64), r.Rows[i].Vs))
			}
		}
		line := fmt.Sprintf("  %-*s  ", width, row.System)
		switch {
		case row.Note != "":
			line += "         –  " + row.Note
		case row.Runs == 1:
			line += fmt.Sprintf("%10s  %-21s  %s", Number(row.Median), "one run", strings.Join(ratios, ", "))
		default:
			line += fmt.Sprintf("%10s  %-21s  %s", Number(row.Median), Number(row.Min)+" … "+Number(row.Max), strings.Join(ratios, ", "))
		}
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
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
