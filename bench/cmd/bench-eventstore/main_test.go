package main

import (
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/bench/report"
)

// The works themselves are tested in package eventstore.
func TestTheReportIsPrintedAndWritten(t *testing.T) {
	out := filepath.Join(t.TempDir(), "eventstore.json")
	var table, progress strings.Builder
	if err := run(t.Context(), []string{"-short", "-n", "40", "-runs", "1", "-work", "append-1", "-system", "millrace,limit-table", "-out", out}, &table, &progress); err != nil {
		t.Fatalf("%v\n%s", err, progress.String())
	}
	got, err := report.Read(out)
	if err != nil {
		t.Fatal(err)
	}
	if got.Settings["fsync"] != "on" || got.Settings["synchronous_commit"] != "on" || got.Settings["form"] != "short" {
		t.Errorf("settings are %v", got.Settings)
	}
	if len(got.Rows) != 2 || got.Rows[0].Vs != "limit-table" || got.Rows[0].Ratio <= 0 || !strings.Contains(table.String(), "\nappend-1 (appends/s)\n") {
		t.Errorf("the report has %+v\n%s", got.Rows, table.String())
	}
}

func TestAPartOfTheWorkDoesNotReplaceTheResults(t *testing.T) {
	for args, want := range map[string]string{
		"":                       "results/eventstore.json",
		"-short":                 "results/eventstore.json",
		"-work append-1":         "results/eventstore.local.json",
		"-work append-1 -merge":  "results/eventstore.json",
		"-system millrace":       "results/eventstore.local.json",
		"-n 10":                  "results/eventstore.local.json",
		"-n 10 -out figure.json": "figure.json",
	} {
		t.Run("bench-eventstore "+args, func(t *testing.T) {
			o, err := parse(strings.Fields(args), io.Discard)
			if err != nil || o.Out != want {
				t.Errorf("writes %q (%v), want %q", o.Out, err, want)
			}
		})
	}
}
