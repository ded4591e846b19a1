package main

import (
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/bench/pipeline"
	"github.com/millrace-dev/millrace/bench/report"
)

// TestEveryWork runs every work with a few entries on the product. The figures mean nothing; that they are there and were checked does. The
// peers are left out, because building them takes minutes.
func TestEveryWork(t *testing.T) {
	out := filepath.Join(t.TempDir(), "pipeline.json")
	var table, progress strings.Builder
	measure := func(args ...string) {
		t.Helper()
		args = append(args, "-short", "-runs", "1", "-system", "millrace,limit-copy", "-out", out, "-merge")
		if err := run(t.Context(), args, &table, &progress); err != nil {
			t.Fatalf("%v\n%s", err, progress.String())
		}
	}
	var others []string
	for _, w := range pipeline.Works() {
		if w.Name != "memory-sink-down" {
			others = append(others, w.Name)
		}
	}
	measure("-n", "1000", "-work", strings.Join(others, ","))
	measure("-n", "1", "-work", "memory-sink-down") // seconds
	got, err := report.Read(out)
	if err != nil {
		t.Fatal(err)
	}
	rows := map[[2]string]report.Row{}
	for _, row := range got.Rows {
		rows[[2]string{row.Work, row.System}] = row
	}
	for _, w := range pipeline.Works() {
		if row := rows[[2]string{w.Name, "millrace"}]; row.Runs != 1 || row.Median <= 0 {
			t.Errorf("%s is %+v", w.Name, row)
		}
	}
	if row := rows[[2]string{"redis-to-table", "millrace"}]; row.Vs != "limit-copy" || row.Ratio <= 0 {
		t.Errorf("millrace is compared with nothing: %+v", row)
	}
}

func TestAPartOfTheWorkDoesNotReplaceTheResults(t *testing.T) {
	for args, want := range map[string]string{
		"":                            "results/pipeline.json",
		"-short":                      "results/pipeline.json",
		"-short -n 10":                "results/pipeline.local.json",
		"-work replicas-2":            "results/pipeline.local.json",
		"-work replicas-2 -merge":     "results/pipeline.json",
		"-system millrace":            "results/pipeline.local.json",
		"-n 10 -out some/figure.json": "some/figure.json",
	} {
		t.Run("bench-pipeline "+args, func(t *testing.T) {
			o, err := parse(strings.Fields(args), io.Discard)
			if err != nil || o.Out != want {
				t.Errorf("writes %q (%v), want %q", o.Out, err, want)
			}
		})
	}
}
