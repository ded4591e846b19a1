package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
)

// Exit codes of the program.
const (
	ExitOK          = 0
	ExitFailed      = 1
	ExitUsage       = 2   // the command line is wrong; nothing was done
	ExitDiffers     = 3   // migrate run --policy none: the schema is not this program's
	ExitNothing     = 4   // tail and receive: no message came in time
	ExitInterrupted = 130 // a signal ended what was not done yet
)

// exitError ends the program with a code. Its error may be nil: then there is nothing to say.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// usageError is about the command line: how the command is written is shown with it.
type usageError struct {
	cmd *cobra.Command
	err error
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// usage makes a usageError.
func usage(cmd *cobra.Command, format string, args ...any) error {
	return &usageError{cmd, fmt.Errorf(format, args...)}
}

// finish says what went wrong, and returns the exit code.
func finish(ctx context.Context, root *cobra.Command, err error, out io.Writer) int {
	var wrong *usageError
	var exit *exitError
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &wrong):
		fmt.Fprintf(out, "error: %v\n\n%s", wrong.err, usageLine(wrong.cmd))
		return ExitUsage
	case strings.HasPrefix(err.Error(), "unknown command"): // cobra's own, which has no type
		fmt.Fprintf(out, "error: %s\n\n%s", strings.TrimSpace(err.Error()), usageLine(root))
		return ExitUsage
	case errors.As(err, &exit):
		if exit.err != nil {
			fmt.Fprintf(out, "error: %v\n", exit.err)
		}
		return exit.code
	case ctx.Err() != nil:
		fmt.Fprintln(out, "interrupted")
		return ExitInterrupted
	}
	fmt.Fprintf(out, "error: %v\n", err)
	return ExitFailed
}
