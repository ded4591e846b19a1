// Package source finds the root of the source tree that the tests and commands of the test environment run in.
package source

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// module is the first line of the root's go.mod. Modules of the tools lie below it and have other names.
var module = []byte("module github.com/millrace-dev/millrace\n")

// Root is the directory of the project's go.mod, at or above the working directory. Tests run in their package's
// directory, so it is always found there.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find the source tree: %w", err)
	}
	for {
		content, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && bytes.HasPrefix(content, module) {
			return dir, nil
		}
		if parent := filepath.Dir(dir); parent != dir {
			dir = parent
			continue
		}
		return "", errors.New("find the source tree: no go.mod of Millrace at or above the working directory; run this inside a clone of it")
	}
}
