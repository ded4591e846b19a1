package main

import (
	_ "embed"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

//go:embed rows.yaml
var rowsYAML []byte

// seed is one of the documents that the project grew from.
type seed struct {
	Title string `json:"seed"`
	Rows  []row  `json:"rows"`
}

// row is one promise.
type row struct {
	ID      string `json:"id"`
	Promise string `json:"promise"`
}

var idPattern = regexp.MustCompile(`^[A-Z][0-9]{2}$`)

func parseRows(text []byte) ([]seed, error) {
	var seeds []seed
	if err := yaml.UnmarshalStrict(text, &seeds); err != nil {
		return nil, fmt.Errorf("rows.yaml: %w", err)
	}
	known := map[string]bool{}
	for _, s := range seeds {
		for _, r := range s.Rows {
			if !idPattern.MatchString(r.ID) || known[r.ID] || r.Promise == "" {
				return nil, fmt.Errorf("rows.yaml: row %q wants an id of its own, such as H01, and a promise", r.ID)
			}
			known[r.ID] = true
		}
	}
	return seeds, nil
}

// testName is the name of a row's test.
var testName = regexp.MustCompile(`^TestSeed_([A-Z][0-9]{2})_[A-Z][A-Za-z0-9]*$`)

// assign notes in each test which row it shows. A test whose row is not in the table is an error, and so is a name that has no row.
func assign(seeds []seed, tests []*test) ([]*test, error) {
	var wrong []string
	for _, t := range tests {
		m := testName.FindStringSubmatch(t.name)
		if m == nil {
			wrong = append(wrong, fmt.Sprintf("%s: %s is called after no row; write TestSeed_<id>_<Words>", t.file, t.name))
			continue
		}
		t.row = m[1]
		if !slices.ContainsFunc(seeds, func(s seed) bool {
			return slices.ContainsFunc(s.Rows, func(r row) bool { return r.ID == t.row })
		}) {
			wrong = append(wrong, fmt.Sprintf("%s: %s is for row %s, which hack/seeds/rows.yaml does not have", t.file, t.name, t.row))
		}
	}
	if len(wrong) > 0 {
		return nil, fmt.Errorf("tests of unknown rows:\n  %s", strings.Join(wrong, "\n  "))
	}
	return tests, nil
}

// restrict leaves the tests that match, and their rows.
func restrict(seeds []seed, tests []*test, run *regexp.Regexp) ([]seed, []*test) {
	tests = slices.DeleteFunc(tests, func(t *test) bool { return !run.MatchString(t.name) })
	var left []seed
	for _, s := range seeds {
		s.Rows = slices.DeleteFunc(slices.Clone(s.Rows), func(r row) bool {
			return !slices.ContainsFunc(tests, func(t *test) bool { return t.row == r.ID })
		})
		if len(s.Rows) > 0 {
			left = append(left, s)
		}
	}
	return left, tests
}
