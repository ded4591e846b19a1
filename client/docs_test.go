package client_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestTheGoThatTheDocumentationShowsIsTheOneThatRuns compares it with the examples, whose functions indent it once, and handlers in them twice.
func TestTheGoThatTheDocumentationShowsIsTheOneThatRuns(t *testing.T) {
	t.Parallel()
	code, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	documents, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, path := range append(documents, "../README.md") {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, block := range regexp.MustCompile("(?ms)^```go\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
			found++
			indented := func(by string) string { return regexp.MustCompile(`(?m)^(.)`).ReplaceAllString(block[1], by+"$1") }
			if !strings.Contains(string(code), indented("\t")) && !strings.Contains(string(code), indented("\t\t")) {
				t.Errorf("%s shows Go that is in no example of the package client:\n%s", filepath.Base(path), block[1])
			}
		}
	}
	if found == 0 {
		t.Fatal("the documentation shows no Go")
	}
}
