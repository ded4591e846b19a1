package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// tree writes a repository of two modules, runs the program in it and returns what it printed.
func tree(t *testing.T, rows string, o options, files map[string]string) (string, error) {
	t.Helper()
	// The caller's workspace and flags are of another module.
	t.Setenv("GOFLAGS", "")
	t.Setenv("GOWORK", "off")
	o.root, o.timeout = t.TempDir(), time.Minute
	files["go.mod"] = "module example.com/product\n\ngo 1.26\n"
	files["test/gitops/go.mod"] = "module example.com/product/test/gitops\n\ngo 1.26\n"
	for name, text := range files {
		path := filepath.Join(o.root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "_test.go") {
			text = "package p\n\nimport \"testing\"\n\n" + text
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	seeds, err := parseRows([]byte(rows))
	if err != nil {
		t.Fatal(err)
	}
	var out, progressed bytes.Buffer
	err = table(t.Context(), o, seeds, &screen{w: &out}, &progress{w: &progressed})
	return out.String(), err
}

const twoRows = `
- seed: first
  rows:
  - {id: X01, promise: "it runs"}
- seed: second
  rows:
  - {id: Y01, promise: "it walks"}
`

func TestEveryRowIsShown(t *testing.T) {
	out, err := tree(t, twoRows, options{}, map[string]string{
		"a/a_test.go":           "func TestSeed_X01_Runs(t *testing.T) {}\nfunc TestOther(t *testing.T) { t.Fatal() }\n",
		"b/b_test.go":           "func TestSeed_X01_RunsElsewhere(t *testing.T) {}\n",
		"test/gitops/y_test.go": "func TestSeed_Y01_Walks(t *testing.T) {}\n",
		"test/e2e/e_test.go":    "func TestSeed_Y01_NeedsANode(t *testing.T) { t.Fatal() }\n",
	})
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	want := regexp.MustCompile(`(?s)^
  first
  ✓ X01  it runs   Runs           a            +\d\.\d s
                   RunsElsewhere  b            +\d\.\d s

  second
  ✓ Y01  it walks  Walks          test/gitops  +\d\.\d s

  2 of 2 rows are shown by tests[^,]*\. \d+ s
\n$`)
	if !want.MatchString(out) {
		t.Errorf("%s", out)
	}
}

func TestWhatIsNotShownIsAnError(t *testing.T) {
	for name, c := range map[string]struct {
		tests string
		says  []string
	}{
		"a row without a test": {tests: "", says: []string{"✗ Y01  it walks  no test", "1 of 2 rows", "1 have no test"}},
		"a test that fails": {tests: "func TestSeed_Y01_Walks(t *testing.T) { t.Run(`slowly`, func(t *testing.T) { t.Fatal(`it stumbled`) }) }",
			says: []string{"it stumbled", "✗ Y01  it walks  Walks", "failed", "1 of 2 rows"}},
		"a test that is skipped": {tests: "func TestSeed_Y01_Walks(t *testing.T) { t.Skip() }", says: []string{"✗ Y01", "skipped"}},
		"a test of which a part is skipped": {tests: "func TestSeed_Y01_Walks(t *testing.T) { t.Run(`slowly`, func(t *testing.T) { t.Skip() }) }",
			says: []string{"✗ Y01", "skipped"}},
		"one of two tests fails": {tests: "func TestSeed_Y01_Walks(t *testing.T) {}\nfunc TestSeed_Y01_Trots(t *testing.T) { t.Error(`it fell`) }",
			says: []string{"it fell", "✗ Y01"}},
		"a test that does not compile": {tests: "func TestSeed_Y01_Walks(t *testing.T) { undefined() }", says: []string{"undefined: undefined", "✗ Y01", "did not run"}},
		"a package whose main fails":   {tests: "func TestMain(*testing.M) { panic(`no server`) }\nfunc TestSeed_Y01_Walks(t *testing.T) {}", says: []string{"no server", "✗ Y01", "did not run"}},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := tree(t, twoRows, options{}, map[string]string{
				"x/x_test.go": "func TestSeed_X01_Runs(t *testing.T) {}\n", "y/y_test.go": c.tests + "\nvar _ = testing.Short\n",
			})
			if !errors.Is(err, errNotShown) {
				t.Errorf("error %v", err)
			}
			for _, text := range append(c.says, "✓ X01") {
				if !strings.Contains(out, text) {
					t.Errorf("it does not say %q:\n%s", text, out)
				}
			}
		})
	}
}

func TestATestOfAnUnknownRowIsAnError(t *testing.T) {
	for _, name := range []string{"TestSeed_Z01_Flies", "TestSeed_Flies", "TestSeed_X1_Runs", "TestSeed_X01"} {
		out, err := tree(t, twoRows, options{}, map[string]string{"x/x_test.go": "func " + name + "(t *testing.T) {}\n"})
		if err == nil || errors.Is(err, errNotShown) || !strings.Contains(err.Error(), "x/x_test.go: "+name) {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

func TestOnlyWhatIsAskedForRuns(t *testing.T) {
	out, err := tree(t, twoRows, options{run: regexp.MustCompile("X01")}, map[string]string{
		"x/x_test.go": "func TestSeed_X01_Runs(t *testing.T) {}\nfunc TestSeed_Y01_Walks(t *testing.T) { t.Fatal() }\n",
	})
	if err != nil || strings.Contains(out, "Y01") || !strings.Contains(out, "1 of 1 rows") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestTheTableIsComplete(t *testing.T) {
	seeds, err := parseRows(rowsYAML)
	if err != nil {
		t.Fatal(err)
	}
	rows := 0
	for _, s := range seeds {
		rows += len(s.Rows)
	}
	if len(seeds) != 6 || rows != 66 {
		t.Errorf("%d rows of %d documents", rows, len(seeds))
	}
	for _, text := range []string{
		"- seed: s\n  rows: [{id: X01, promise: p}, {id: X01, promise: p}]", "- seed: s\n  rows: [{id: X1, promise: p}]", "- seed: s\n  rows: [{id: X01}]", "- seed: s\n  row: []",
	} {
		if _, err := parseRows([]byte(text)); err == nil {
			t.Errorf("accepted: %s", text)
		}
	}
}
