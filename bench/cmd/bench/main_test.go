package main

import (
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/bench/engine"
	"github.com/millrace-dev/millrace/bench/report"
	"github.com/millrace-dev/millrace/bench/system"
)

// TestEveryWork runs every work with a few messages on the product and on a limit, which can do but a few. The figures mean nothing; that they
// are there and were checked does.
func TestEveryWork(t *testing.T) {
	check(t, nil, []string{"millrace", "limit-copy"})
}

// TestEverySystem runs every system at one work that most of them can do. Where a machine lacks a peer, the row says so.
func TestEverySystem(t *testing.T) {
	var names []string
	for _, s := range system.All() {
		names = append(names, s.Name())
	}
	check(t, []string{"consume-batch-100"}, names)
}

// check runs works, or all, on systems and looks at the rows.
func check(t *testing.T, works, systems []string) {
	out := filepath.Join(t.TempDir(), "engine.json")
	var table, progress strings.Builder
	err := run(t.Context(), []string{"-short", "-n", "100", "-runs", "1", "-work", strings.Join(works, ","), "-system", strings.Join(systems, ","), "-out", out},
		&table, &progress)
	if err != nil {
		t.Fatalf("%v\n%s", err, progress.String())
	}
	got, err := report.Read(out)
	if err != nil {
		t.Fatal(err)
	}
	if got.Settings["fsync"] != "on" || got.Settings["synchronous_commit"] != "on" || got.Settings["form"] != "short" {
		t.Errorf("settings are %v", got.Settings)
	}
	rows := map[[2]string]report.Row{}
	for _, row := range got.Rows {
		rows[[2]string{row.Work, row.System}] = row
	}
	for _, w := range engine.Works() {
		if len(works) > 0 && !slices.Contains(works, w.Name) {
			continue
		}
		for _, y := range w.Yield {
			if !strings.Contains(table.String(), "\n"+y.Name+" ("+y.Unit+")\n") {
				t.Errorf("the table has no %s", y.Name)
			}
			for _, s := range systems {
				row, found := rows[[2]string{y.Name, s}]
				// No dead row and no busy processor are figures too.
				mayBeZero := strings.HasPrefix(y.Name, "dead-tuples") || y.Unit == "cores" || y.Unit == "times" || strings.HasPrefix(y.Name, "cpu-")
				switch {
				case !found:
					t.Errorf("%s of %s is left out", y.Name, s)
				case row.Note == "" && (row.Runs != 1 || row.Median <= 0 && !mayBeZero):
					t.Errorf("%s of %s is %+v", y.Name, s, row)
				}
			}
		}
	}
	if row := rows[[2]string{"consume-batch-100", "millrace"}]; slices.Contains(systems, "skip-locked") && (row.Vs == "" || row.Ratio <= 0) {
		t.Errorf("millrace is compared with nothing: %+v", row)
	}
}

func TestAPartOfTheWorkDoesNotReplaceTheResults(t *testing.T) {
	for args, want := range map[string]string{
		"":                       "results/engine.json",
		"-short":                 "results/engine.json",
		"-short -n 10":           "results/engine.local.json",
		"-work publish-single":   "results/engine.local.json",
		"-system millrace":       "results/engine.local.json",
		"-payload 4000":          "results/engine.local.json",
		"-n 10 -out figure.json": "figure.json",
	} {
		t.Run("bench "+args, func(t *testing.T) {
			o, err := parse(strings.Fields(args), io.Discard)
			if err != nil || o.Out != want {
				t.Errorf("writes %q (%v), want %q", o.Out, err, want)
			}
		})
	}
}

func TestTheDSNIsNotRepeatedInErrors(t *testing.T) {
	for _, dsn := range []string{"host=nowhere password=secret", "postgres://u:secret@%zz/db", "postgres://u:secret@127.0.0.1:1/db?connect_timeout=1"} {
		err := run(t.Context(), []string{"-dsn", dsn}, io.Discard, io.Discard)
		if err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("the error is %v", err)
		}
	}
}
