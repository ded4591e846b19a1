package main

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
)

// options are the command line's.
type options struct {
	config    string
	listen    string
	member    string
	logLevel  slog.Level
	logFormat string

	dryRun    bool
	limit     int
	fromStart bool
}

// dryRunMax bounds how much a dry run reads of one stream.
const dryRunMax = 10_000

const usage = `processor runs one pipeline.

  processor [run] [flags]            run it
  processor run --dry-run [flags]    show what it would write, and write, claim and acknowledge nothing
  processor validate -f file         check a configuration; - is standard input
  processor redrive [flags]          give dead letters to the pipeline again

Flags:
`

func parseOptions(args []string) (options, error) {
	var o options
	host, err := os.Hostname()
	if err != nil {
		host = "processor"
	}
	flags := flag.NewFlagSet("processor", flag.ContinueOnError)
	flags.StringVar(&o.config, "config", "/etc/millrace/processor.yaml", "`file` with the pipeline's configuration")
	flags.StringVar(&o.config, "f", "/etc/millrace/processor.yaml", "the same as --config")
	flags.StringVar(&o.listen, "listen", ":8080", "`address` of /healthz, /readyz, /metrics and /debug")
	flags.StringVar(&o.member, "member", host, "`name` of this process among the readers of its group; no other living process may have it")
	flags.TextVar(&o.logLevel, "log-level", slog.LevelInfo, "least `level` of what is logged: debug, info, warn or error")
	flags.StringVar(&o.logFormat, "log-format", "json", "`format` of the log: json or text")
	flags.BoolVar(&o.dryRun, "dry-run", false, "read and map what comes next, print it as lines of JSON, and leave everything as it is")
	flags.IntVar(&o.limit, "limit", 10, "with --dry-run: most `entries` of each stream to show")
	flags.BoolVar(&o.fromStart, "from-start", false, "with --dry-run: begin at the first entry there is, and not where the group stands")
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), usage)
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	problem := ""
	switch {
	case flags.NArg() > 0:
		problem = fmt.Sprintf("%q is not a command; write run, validate or redrive, before any flag", flags.Arg(0))
	case o.logFormat != "json" && o.logFormat != "text":
		problem = fmt.Sprintf("--log-format %q is unknown; write json or text", o.logFormat)
	case o.limit < 1 || o.limit > dryRunMax:
		problem = fmt.Sprintf("--limit %d is out of range; write 1 to %d", o.limit, dryRunMax)
	case !o.dryRun && (o.fromStart || o.limit != 10):
		problem = "--limit and --from-start belong to --dry-run"
	}
	if problem != "" {
		fmt.Fprintln(flags.Output(), problem)
		return o, errors.New("usage")
	}
	return o, nil
}

func (o options) logger() *slog.Logger {
	h := &slog.HandlerOptions{Level: o.logLevel}
	if o.logFormat == "text" {
		return slog.New(slog.NewTextHandler(os.Stderr, h))
	}
	return slog.New(slog.NewJSONHandler(os.Stderr, h))
}
