package main

import (
	"bufio"
	"cmp"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// test is a function of a _test.go file.
type test struct {
	name, row string
	file      string // below the root
	module    string // directory of the module, below the root
	dir       string // of the package, below the module
	pkg       string // import path

	// What running it brought; result is empty when it did not run.
	result  result
	partly  bool // something in it was skipped
	seconds float64
}

type result string

const (
	passed  result = "pass"
	failed  result = "fail"
	skipped result = "skip"
)

// needNodes are the packages that make e2e runs.
var needNodes = []string{"test/e2e", "test/env/cluster"}

var testFunction = regexp.MustCompile(`(?m)^func (TestSeed_\w*)\(`)

// discover finds the tests by their source: what does not compile, or is left out by a build tag, must not go unnoticed.
func discover(root string) ([]*test, error) {
	var tests []*test
	modules := map[string]string{} // import path by directory
	err := filepath.WalkDir(root, func(p string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		below, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		below = filepath.ToSlash(below)
		name := entry.Name()
		if entry.IsDir() {
			if below != "." && (strings.HasPrefix(name, ".") || name == "testdata" || name == "node_modules" || slices.Contains(needNodes, below)) {
				return fs.SkipDir
			}
			if module, err := modulePath(filepath.Join(p, "go.mod")); err == nil {
				modules[below] = module
			}
			return nil
		}
		if !strings.HasSuffix(name, "_test.go") {
			return nil
		}
		text, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		for _, m := range testFunction.FindAllSubmatch(text, -1) {
			t := &test{name: string(m[1]), file: below}
			if err := t.locate(modules); err != nil {
				return err
			}
			tests = append(tests, t)
		}
		return nil
	})
	slices.SortStableFunc(tests, func(a, b *test) int { return cmp.Or(cmp.Compare(a.module, b.module), cmp.Compare(a.pkg, b.pkg)) })
	return tests, err
}

// locate finds the module and the package of the test's file.
func (t *test) locate(modules map[string]string) error {
	for dir := path.Dir(t.file); ; dir = path.Dir(dir) {
		if module, ok := modules[dir]; ok {
			t.module = dir
			t.dir = strings.TrimPrefix(strings.TrimPrefix(path.Dir(t.file), dir), "/")
			if dir == "." {
				t.dir = path.Dir(t.file)
			}
			t.pkg = path.Join(module, t.dir)
			return nil
		}
		if dir == "." {
			return fmt.Errorf("%s is in no module", t.file)
		}
	}
}

// modulePath reads the first line that says module.
func modulePath(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if module, ok := strings.CutPrefix(lines.Text(), "module "); ok {
			return strings.TrimSpace(module), nil
		}
	}
	return "", fmt.Errorf("%s names no module", file)
}
