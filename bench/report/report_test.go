package report

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPercentiles(t *testing.T) {
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(100 - i)
	}
	for name, c := range map[string]struct {
		values     []float64
		p          float64
		want       float64
		wantMedian float64
	}{
		"of nothing are zero":                    {nil, 50, 0, 0},
		"of one value are that value":            {[]float64{7}, 99, 7, 7},
		"do not need sorted values":              {[]float64{3, 1, 2}, 50, 2, 2},
		"are values that occurred":               {[]float64{1, 2, 3, 4}, 50, 2, 2.5},
		"the 99th of a hundred leaves one above": {hundred, 99, 99, 50.5},
		"the 100th is the largest":               {hundred, 100, 100, 50.5},
	} {
		t.Run(name, func(t *testing.T) {
			if got := Percentile(c.values, c.p); got != c.want {
				t.Errorf("Percentile(%v) = %v, want %v", c.p, got, c.want)
			}
			if got := Median(c.values); got != c.wantMedian {
				t.Errorf("Median = %v, want %v", got, c.wantMedian)
			}
		})
	}
}

func sample() Report {
	return Report{
		Machine: "2 cores, an engine, 24 GiB", Date: "2026-11-20", Settings: map[string]string{"postgres": "15.9"},
		Rows: Rows([]Samples{
			{Work: "drain", System: "ours", Unit: "msg/s", Values: []float64{3000, 1000, 2000}},
			{Work: "drain", System: "theirs", Unit: "msg/s", Values: []float64{500, 400, 600}},
			{Work: "drain", System: "limit", Unit: "msg/s", Values: []float64{12345.678}},
			{Work: "drain", System: "other", Unit: "msg/s", Note: "cannot drain"},
		}, func(_, system string) []string {
			if system == "ours" {
				return []string{"theirs", "limit", "other"}
			}
			return nil
		}),
	}
}

func TestRowsCompareMediansOfTheSameRun(t *testing.T) {
	got := sample().Rows
	want := []Row{
		{Work: "drain", System: "ours", Unit: "msg/s", Median: 2000, Min: 1000, Max: 3000, Runs: 3, Vs: "theirs", Ratio: 4},
		{Work: "drain", System: "ours", Unit: "msg/s", Median: 2000, Min: 1000, Max: 3000, Runs: 3, Vs: "limit", Ratio: 0.162},
		{Work: "drain", System: "theirs", Unit: "msg/s", Median: 500, Min: 400, Max: 600, Runs: 3},
		{Work: "drain", System: "limit", Unit: "msg/s", Median: 12350, Min: 12350, Max: 12350, Runs: 1},
		{Work: "drain", System: "other", Unit: "msg/s", Note: "cannot drain"},
	}
	if len(got) != len(want) {
		t.Fatalf("%d rows, want %d: %+v", len(got), len(want), got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("row %d is\n%+v, want\n%+v", i, got[i], want[i])
		}
	}
}

func TestARowIsComparedWithItsBase(t *testing.T) {
	got := Rows([]Samples{
		{Work: "many", System: "ours", Unit: "µs", Values: []float64{3}, Base: "one"},
		{Work: "one", System: "ours", Unit: "µs", Values: []float64{2}},
		{Work: "many", System: "theirs", Unit: "µs", Note: "cannot", Base: "one"},
		{Work: "one", System: "theirs", Unit: "µs", Values: []float64{1}},
	}, func(string, string) []string { return nil })
	if len(got) != 4 || got[0].Vs != "one" || got[0].Ratio != 1.5 || got[1].Vs != "" || got[2].Ratio != 0 {
		t.Errorf("the rows are %+v", got)
	}
}

func TestTheFileHasTheAgreedShape(t *testing.T) {
	path := filepath.Join(t.TempDir(), "results", "engine.json")
	if err := sample().Write(path); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"machine", "date", "settings", "rows"} {
		if got[name] == nil {
			t.Errorf("no %q", name)
		}
	}
	row := got["rows"].([]any)[0].(map[string]any)
	for _, name := range []string{"work", "system", "unit", "median", "min", "max", "runs", "vs", "ratio"} {
		if row[name] == nil {
			t.Errorf("a row has no %q", name)
		}
	}
}

func TestTheTableShowsEverySystem(t *testing.T) {
	var b strings.Builder
	r := sample()
	r.Rows = append(r.Rows, Row{Work: "drain", System: "another", Unit: "msg/s", Note: "cannot drain"})
	if err := r.Table(&b); err != nil {
		t.Fatal(err)
	}
	want := `2 cores, an engine, 24 GiB, PostgreSQL 15.9, 2026-11-20

drain (msg/s)
  ours         2,000  1,000 … 3,000          4 × theirs, 0.162 × limit
  theirs         500  400 … 600
  limit       12,350  one run
  – other, another: cannot drain
`
	if b.String() != want {
		t.Errorf("the table is\n%s\nwant\n%s", b.String(), want)
	}
}

func TestNumbersKeepTheDigitsThatMatter(t *testing.T) {
	for want, v := range map[string]float64{"0": 0, "6e-05": 0.00006, "0.372": 0.3719, "4.20": 4.2, "56.3": 56.26, "123": 123.4, "1,234,567": 1234567, "-1,000": -1000} {
		if got := Number(v); got != want {
			t.Errorf("Number(%v) = %s, want %s", v, got, want)
		}
	}
}

func TestTheMachineIsDescribedWithoutItsName(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	words := Machine()
	if !strings.Contains(words, " cores, ") || strings.Contains(words, host) || strings.Contains(words, "/") {
		t.Errorf("Machine() = %q", words)
	}
}
