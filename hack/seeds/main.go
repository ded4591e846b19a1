// Command seeds runs the tests of the rows that the seed documents promise and prints the table of them: each row, the tests that show it, and whether they
// do. make seeds calls it. It exits with 1 unless every row is shown.
//
// A row's tests are those called TestSeed_<id>_…, in any package of any module of the repository. They run with go test, so what has not changed comes from
// its cache.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"syscall"
	"time"

	"golang.org/x/term"
)

// errNotShown is for a table that was printed and says what is missing.
var errNotShown = errors.New("not every row is shown")

func main() {
	var o options
	run := flag.String("run", "", "only tests whose name matches this regular expression, and their rows")
	flag.DurationVar(&o.timeout, "timeout", 20*time.Minute, "of a package's tests")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "usage: seeds [-run regexp] [-timeout duration]")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := show(ctx, o, *run)
	if err != nil && !errors.Is(err, errNotShown) {
		fmt.Fprintln(os.Stderr, "seeds:", err)
	}
	if err != nil {
		stop()
		os.Exit(1) //nolint:gocritic // stopped
	}
}

type options struct {
	root    string         // of the repository
	run     *regexp.Regexp // nil: all
	timeout time.Duration
}

func show(ctx context.Context, o options, run string) error {
	var err error
	if o.root, err = os.Getwd(); err != nil {
		return err
	}
	if run != "" {
		if o.run, err = regexp.Compile(run); err != nil {
			return err
		}
	}
	seeds, err := parseRows(rowsYAML)
	if err != nil {
		return err
	}
	out := &screen{w: os.Stdout, colour: term.IsTerminal(int(os.Stdout.Fd())) && os.Getenv("NO_COLOR") == ""}
	progress := &progress{w: os.Stderr, terminal: term.IsTerminal(int(os.Stderr.Fd()))}
	return table(ctx, o, seeds, out, progress)
}

// table finds the tests, runs them and prints what became of them. errNotShown when a row is not shown.
func table(ctx context.Context, o options, seeds []seed, out *screen, progress *progress) error {
	began := time.Now()
	tests, err := discover(o.root)
	if err != nil {
		return err
	}
	tests, err = assign(seeds, tests)
	if err != nil {
		return err
	}
	if o.run != nil {
		seeds, tests = restrict(seeds, tests, o.run)
		if len(tests) == 0 {
			return fmt.Errorf("no test of a row matches %s", o.run)
		}
	}
	output, err := runTests(ctx, o, tests, progress)
	if err != nil {
		return err
	}
	return out.print(seeds, tests, output, time.Since(began))
}
