package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"strings"
	"time"
	"unicode/utf8"
)

// screen is where the table goes.
type screen struct {
	w      io.Writer
	colour bool
}

const (
	bold  = "1"
	dim   = "2"
	red   = "31"
	green = "32"
)

func (s *screen) paint(code, text string) string {
	if !s.colour {
		return text
	}
	return "\033[" + code + "m" + text + "\033[0m"
}

// print writes the output of what failed, the table and the count. errNotShown when a row is not shown.
func (s *screen) print(seeds []seed, tests []*test, output string, took time.Duration) error {
	if output != "" {
		fmt.Fprintln(s.w, output)
	}
	byRow := map[string][]*test{}
	for _, t := range tests {
		byRow[t.row] = append(byRow[t.row], t)
	}
	widths := columns{}
	for _, one := range seeds {
		for _, r := range one.Rows {
			widths.promise = max(widths.promise, utf8.RuneCountInString(r.Promise))
			for _, t := range byRow[r.ID] {
				widths.test = max(widths.test, len(t.words()))
				widths.pkg = max(widths.pkg, len(t.place()))
			}
		}
	}
	total, shown, without := 0, 0, 0
	for _, one := range seeds {
		fmt.Fprintf(s.w, "\n  %s\n", s.paint(bold, one.Title))
		for _, r := range one.Rows {
			total++
			verdict := verdictOf(byRow[r.ID])
			switch verdict {
			case tick:
				shown++
			case noTest:
				without++
			}
			s.row(r, verdict, byRow[r.ID], widths)
		}
	}
	server := ""
	if major := os.Getenv("PG"); major != "" {
		server = " on PostgreSQL " + major
	}
	count := fmt.Sprintf("%d of %d rows are shown by tests%s", shown, total, server)
	if without > 0 {
		count += fmt.Sprintf(", %d have no test", without)
	}
	if others := total - shown - without; others > 0 {
		count += fmt.Sprintf(", %d failed or did not run", others)
	}
	colour := green
	if shown < total {
		colour = red
	}
	fmt.Fprintf(s.w, "\n  %s %s\n\n", s.paint(colour, count+"."), s.paint(dim, fmt.Sprintf("%d s", int(math.Ceil(took.Seconds())))))
	if shown < total {
		return errNotShown
	}
	return nil
}

// columns are the widths of those that are as wide as what is in them.
type columns struct{ promise, test, pkg int }

// row writes one line for each test of the row.
func (s *screen) row(r row, v verdict, tests []*test, widths columns) {
	mark := s.paint(red, "✗")
	if v == tick {
		mark = s.paint(green, "✓")
	}
	left := fmt.Sprintf("  %s %s  %-*s", mark, r.ID, widths.promise, r.Promise)
	if len(tests) == 0 {
		fmt.Fprintf(s.w, "%s  %s\n", left, s.paint(red, string(noTest)))
	}
	for i, t := range tests {
		if i > 0 {
			left = strings.Repeat(" ", len("  ✓ H01  ")-len("✓")+1+widths.promise)
		}
		outcome := s.paint(dim, fmt.Sprintf("%5.1f s", t.seconds))
		if one := verdictOf([]*test{t}); one != tick {
			outcome = s.paint(red, string(one))
		}
		fmt.Fprintf(s.w, "%s  %-*s  %s  %s\n", left, widths.test, t.words(), s.paint(dim, fmt.Sprintf("%-*s", widths.pkg, t.place())), outcome)
	}
}

// words is the name without what the row's id says already.
func (t *test) words() string { return strings.TrimPrefix(t.name, "TestSeed_"+t.row+"_") }

// place is the directory of the test's package.
func (t *test) place() string { return path.Dir(t.file) }

// verdict is what the tests of a row say together.
type verdict string

const (
	tick   verdict = "shown"
	noTest verdict = "no test"
	broken verdict = "failed"
	notAll verdict = "skipped"
	notRun verdict = "did not run"
)

func verdictOf(tests []*test) verdict {
	if len(tests) == 0 {
		return noTest
	}
	verdict := tick
	for _, t := range tests {
		switch t.result {
		case passed:
		case failed:
			return broken
		case skipped:
			verdict = notAll
		default:
			verdict = notRun
		}
	}
	return verdict
}
