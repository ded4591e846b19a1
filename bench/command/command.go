// Package command is the frame that the benchmark programs share: how they begin and end, what they take and how they tell of their progress.
package command

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// Main runs a program until it is done or interrupted, and ends the process with 1 when it fails. Asking for help is no failure.
func Main(name string, run func(ctx context.Context, args []string, out, progress io.Writer) error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return
		}
		fmt.Fprintln(os.Stderr, name+":", err)
		stop()
		os.Exit(1)
	}
}

// List splits the names in a flag.
func List(names string) []string {
	return strings.FieldsFunc(names, func(r rune) bool { return r == ',' || r == ' ' })
}

// Progress returns what writes a line with the seconds since now before it.
func Progress(w io.Writer) func(line string) {
	start := time.Now()
	return func(line string) { fmt.Fprintf(w, "%5.0fs  %s\n", time.Since(start).Seconds(), line) }
}
