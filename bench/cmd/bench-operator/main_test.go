package main

import (
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/bench/report"
)

// TestEveryWork measures a few resources. The times mean nothing; that they are there, that all resources became Ready on simulated nodes and in the
// database, and that a manager that starts again writes nothing, does.
func TestEveryWork(t *testing.T) {
	out := filepath.Join(t.TempDir(), "operator.json")
	var table, progress strings.Builder
	if err := run(t.Context(), []string{"-n", "12", "-processors", "3", "-changes", "3", "-rest", "4s", "-runs", "1", "-out", out}, &table, &progress); err != nil {
		t.Fatalf("%v\n%s", err, progress.String())
	}
	got, err := report.Read(out)
	if err != nil {
		t.Fatal(err)
	}
	rows := map[[2]string]report.Row{}
	for _, row := range got.Rows {
		rows[[2]string{row.Work, row.System}] = row
	}
	for _, work := range []string{"cold-12-ready", "cold-stream-p50", "cold-group-p99", "cold-processor-p99", "cold-requests", "cold-request patch streams/status", "manager-memory",
		"rest-12-statements", "rest-10-statements", "rest-12-manager-memory", "apply-to-ready-p50", "restart-observed", "restart-statements"} {
		if row := rows[[2]string{work, "millrace"}]; row.Runs != 1 || row.Median <= 0 {
			t.Errorf("%s is %+v", work, row)
		}
	}
	// A manager that begins to lead sends one event that says so.
	for work, most := range map[string]float64{"rest-10-api-writes": 0, "rest-12-api-writes": 0, "restart-api-writes": 1} {
		if row, found := rows[[2]string{work, "millrace"}]; !found || row.Max > most {
			t.Errorf("%s is %+v: nothing has changed\n%s", work, row, progress.String())
		}
	}
	for _, limit := range []string{"limit-sql", "limit-api"} {
		if row := rows[[2]string{"cold-12-ready", limit}]; row.Median <= 0 {
			t.Errorf("%s is %+v", limit, row)
		}
	}
	if row := rows[[2]string{"rest-12-statements", "millrace"}]; row.Vs != "rest-10-statements" {
		t.Errorf("the manager at rest is compared with %q", row.Vs)
	}
}

func TestAPartDoesNotReplaceTheResults(t *testing.T) {
	for args, want := range map[string]string{
		"":                          "results/operator.json",
		"-runs 2":                   "results/operator.json",
		"-short":                    "results/operator.local.json",
		"-n 10":                     "results/operator.local.json",
		"-work cold":                "results/operator.local.json",
		"-system limit-sql":         "results/operator.local.json",
		"-n 10 -out some/figure.js": "some/figure.js",
	} {
		t.Run("bench-operator "+args, func(t *testing.T) {
			o, err := parse(strings.Fields(args), io.Discard)
			if err != nil || o.Out != want {
				t.Errorf("writes %q (%v), want %q", o.Out, err, want)
			}
		})
	}
}

func TestSizesFollowTheStreams(t *testing.T) {
	o, err := parse(strings.Fields("-n 30"), io.Discard)
	if err != nil || o.Sizes.Groups != 30 || o.Sizes.Processors != 6 {
		t.Errorf("sizes are %+v, %v", o.Sizes, err)
	}
}
