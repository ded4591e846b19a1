package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// moduleEnv is what building a module's tests takes beside the environment: as its tools are built, so that the parts of Argo CD are compiled once.
var moduleEnv = map[string][]string{"test/gitops": {"CGO_ENABLED=0", "GOFLAGS=-trimpath"}}

// event is a line of go test -json, or of go build -json in it.
type event struct {
	Action     string
	Package    string
	ImportPath string
	Test       string
	Elapsed    float64
	Output     string
}

// runTests runs the tests, module by module, notes their results in them and returns the output of what failed.
func runTests(ctx context.Context, o options, tests []*test, progress *progress) (string, error) {
	progress.start(tests)
	defer progress.stop()
	var failures strings.Builder
	for len(tests) > 0 {
		n := slices.IndexFunc(tests, func(t *test) bool { return t.module != tests[0].module })
		if n < 0 {
			n = len(tests)
		}
		if err := runModule(ctx, o, tests[:n], progress, &failures); err != nil {
			return "", err
		}
		tests = tests[n:]
	}
	return failures.String(), ctx.Err()
}

// runModule runs tests of one module with one go test.
func runModule(ctx context.Context, o options, tests []*test, progress *progress, failures *strings.Builder) error {
	pattern := "^TestSeed_"
	if o.run != nil {
		var names []string
		for _, t := range tests {
			names = append(names, t.name)
		}
		slices.Sort(names)
		pattern = "^(" + strings.Join(slices.Compact(names), "|") + ")$"
	}
	args := []string{"test", "-json", "-timeout", o.timeout.String(), "-run", pattern}
	byPackage := map[string][]*test{}
	for _, t := range tests {
		if byPackage[t.pkg] == nil {
			args = append(args, "./"+t.dir)
		}
		byPackage[t.pkg] = append(byPackage[t.pkg], t)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = filepath.Join(o.root, filepath.FromSlash(tests[0].module))
	cmd.Env = append(os.Environ(), moduleEnv[tests[0].module]...)
	// Tests stop the servers that they have started.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = time.Minute
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	log := newLog()
	lines := bufio.NewReader(stdout)
	for {
		line, readErr := lines.ReadBytes('\n')
		var e event
		if len(line) > 0 {
			if json.Unmarshal(line, &e) != nil {
				e = event{Action: "output", Output: string(line)}
			}
			log.note(e)
			for _, t := range byPackage[e.Package] {
				if t.note(e) {
					progress.done(t)
				}
			}
		}
		if readErr != nil {
			break
		}
	}
	err = cmd.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return err
	}
	log.failures(failures, err != nil, stderr.String())
	return nil
}

// note takes an event of the test's package and tells whether the test has ended with it. A test of which a part was skipped was skipped.
func (t *test) note(e event) (ended bool) {
	if e.Action == "skip" && strings.HasPrefix(e.Test, t.name+"/") {
		t.partly = true
	}
	if e.Test != t.name || e.Action != "pass" && e.Action != "fail" && e.Action != "skip" {
		return false
	}
	t.result, t.seconds = result(e.Action), e.Elapsed
	if t.partly && t.result == passed {
		t.result = skipped
	}
	return true
}

// log keeps what tests, packages and builds have written until it is known whether they failed.
type log struct {
	order  []string // keys in the order in which they failed
	output map[string]*strings.Builder
	failed map[string]bool // packages of which a test failed
}

func newLog() *log { return &log{output: map[string]*strings.Builder{}, failed: map[string]bool{}} }

// note takes an event. Output of a subtest belongs to its test, which is what fails with it.
func (l *log) note(e event) {
	name, _, _ := strings.Cut(e.Test, "/")
	key := e.Package + " " + name
	if e.ImportPath != "" {
		key = e.ImportPath
	}
	switch e.Action {
	case "output", "build-output":
		if l.output[key] == nil {
			l.output[key] = &strings.Builder{}
		}
		l.output[key].WriteString(e.Output)
	case "pass", "skip":
		if e.Test == name {
			delete(l.output, key)
		}
	case "build-fail":
		l.order = append(l.order, key)
	case "fail":
		switch {
		case e.Test != "" && e.Test == name:
			l.failed[e.Package] = true
			l.order = append(l.order, key)
		case e.Test == "" && !l.failed[e.Package]: // its main failed, or a test took it down
			l.order = append(l.order, key)
		}
	}
}

// failures writes what belongs to failures, or everything when go test failed and nothing says why.
func (l *log) failures(w *strings.Builder, failed bool, stderr string) {
	for _, key := range l.order {
		if text := l.output[key]; text != nil {
			fmt.Fprintf(w, "--- %s\n%s\n", strings.TrimSpace(key), strings.TrimRight(text.String(), "\n"))
		}
	}
	if failed && len(l.order) == 0 || stderr != "" {
		w.WriteString(stderr)
	}
}
