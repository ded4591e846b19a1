package report

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Report is the outcome of one run of a benchmark on one machine.
type Report struct {
	Machine  string            `json:"machine"` // in words: no host name, no path
	Date     string            `json:"date"`
	Settings map[string]string `json:"settings"`
	Rows     []Row             `json:"rows"`
}

// Row is one system at one work, and what it is compared with.
type Row struct {
	Work   string  `json:"work"`
	System string  `json:"system"`
	Unit   string  `json:"unit"`
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	Runs   int     `json:"runs"`
	// Vs is the system compared with, or the same system's row that this one is to be compared with, and Ratio this one's median
	// divided by that one's, both of the same run.
	Vs    string  `json:"vs,omitempty"`
	Ratio float64 `json:"ratio,omitempty"`
	// Note says why the system cannot do the work; the figures are zero then.
	Note string `json:"note,omitempty"`
}

// Samples are the figures of one system at one work, one for each repetition.
type Samples struct {
	Work, System, Unit string
	Values             []float64
	Note               string // why there are none
	Base               string // the work that this one is compared with, for the same system
}

// Rows turns samples into rows, in their order. rivals names the systems that a row is compared with; a row that has
// several appears once for each. Systems without samples cannot be compared with and are passed over.
func Rows(all []Samples, rivals func(work, system string) []string) []Row {
	var rows []Row
	for _, s := range all {
		row := Row{Work: s.Work, System: s.System, Unit: s.Unit, Runs: len(s.Values), Note: s.Note}
		if len(s.Values) == 0 {
			rows = append(rows, row)
			continue
		}
		row.Median, row.Min, row.Max = round(Median(s.Values)), round(slices.Min(s.Values)), round(slices.Max(s.Values))
		compared := false
		compare := func(name, work, system string) {
			i := slices.IndexFunc(all, func(o Samples) bool { return o.Work == work && o.System == system })
			if i < 0 || len(all[i].Values) == 0 || Median(all[i].Values) == 0 {
				return
			}
			row.Vs, row.Ratio = name, round(Median(s.Values)/Median(all[i].Values))
			rows = append(rows, row)
			compared = true
		}
		if s.Base != "" {
			compare(s.Base, s.Base, s.System)
		}
		for _, rival := range rivals(s.Work, s.System) {
			compare(rival, s.Work, rival)
		}
		if !compared {
			rows = append(rows, row)
		}
	}
	return rows
}

// round keeps four digits: no measurement here is better than that.
func round(v float64) float64 {
	if v == 0 || math.IsInf(v, 0) || math.IsNaN(v) {
		return v
	}
	scale := math.Pow(10, 3-math.Floor(math.Log10(math.Abs(v))))
	return math.Round(v*scale) / scale
}

// Today is the date as reports hold it.
func Today() string { return time.Now().UTC().Format(time.DateOnly) }

// Read returns the report in a file.
func Read(path string) (r Report, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return r, fmt.Errorf("read %s: %w", path, err)
	}
	return r, nil
}

// Merge puts the rows of a file whose works are not in the report before those that are. A file that does not exist has none.
func (r *Report) Merge(path string) error {
	old, err := Read(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	old.Rows = slices.DeleteFunc(old.Rows, func(row Row) bool {
		return slices.ContainsFunc(r.Rows, func(own Row) bool { return own.Work == row.Work })
	})
	r.Rows = append(old.Rows, r.Rows...)
	return nil
}

// Write puts the report into a file, whole or not at all.
func (r Report) Write(path string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", append(text, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
