// Command bench-pipeline measures Millrace's processor beside other programs that bring Redis streams into tables. See bench/README.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/millrace-dev/millrace/bench/command"
	"github.com/millrace-dev/millrace/bench/pipeline"
	"github.com/millrace-dev/millrace/bench/report"
)

func main() { command.Main("bench-pipeline", run) }

// The files of a whole run, and of one that measured only a part and must not replace it.
var (
	whole = filepath.Join("results", "pipeline.json")
	part  = filepath.Join("results", "pipeline.local.json")
)

type options struct {
	pipeline.Options
	out   string
	merge bool
}

func parse(args []string, usage io.Writer) (options, error) {
	var o options
	var works, systems string
	flags := flag.NewFlagSet("bench-pipeline", flag.ContinueOnError)
	flags.SetOutput(usage)
	flags.StringVar(&works, "work", "", "only these `works`, with commas between")
	flags.StringVar(&systems, "system", "", "only these `systems`, with commas between")
	flags.IntVar(&o.N, "n", 0, "`entries` in a measurement; default: by work")
	flags.IntVar(&o.Runs, "runs", 0, "`repetitions`, at most; default 3, or 2 with -short")
	flags.BoolVar(&o.Short, "short", false, "fewer entries")
	flags.BoolVar(&o.merge, "merge", false, "replace the measured works in the file and keep its other rows")
	flags.StringVar(&o.out, "out", "", "write this `file`; default "+whole+", or "+part+" when -work, -system or -n is given without -merge")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unknown argument %q; bench-pipeline takes flags only", flags.Arg(0))
	}
	if o.N < 0 || o.Runs < 0 {
		return o, errors.New("-n and -runs cannot be negative")
	}
	if o.Runs == 0 {
		o.Runs = 3
		if o.Short {
			o.Runs = 2
		}
	}
	o.Works, o.Systems = command.List(works), command.List(systems)
	if o.out == "" {
		o.out = whole
		if !o.merge && (len(o.Works) > 0 || len(o.Systems) > 0 || o.N > 0) {
			o.out = part
		}
	}
	return o, nil
}

func run(ctx context.Context, args []string, out, progress io.Writer) error {
	o, err := parse(args, progress)
	if err != nil {
		return err
	}
	o.Log = command.Progress(progress)
	servers, err := pipeline.StartServers(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if err := servers.Stop(context.WithoutCancel(ctx)); err != nil {
			fmt.Fprintln(progress, "stop the servers:", err)
		}
	}()
	settings, err := servers.Describe(ctx)
	if err != nil {
		return err
	}
	settings["form"] = "full"
	if o.Short {
		settings["form"] = "short"
	}
	if o.N > 0 {
		settings["n"] = strconv.Itoa(o.N)
	}
	settings["seed"] = strconv.Itoa(pipeline.Seed)
	settings["go"] = strings.TrimPrefix(runtime.Version(), "go")
	samples, err := pipeline.Run(ctx, servers, o.Options)
	if err != nil {
		return fmt.Errorf("nothing is written: %w", err)
	}
	result := report.Report{Machine: report.Machine(), Date: report.Today(), Settings: settings, Rows: report.Rows(samples, pipeline.Versus)}
	fmt.Fprintln(progress)
	if err := result.Table(out); err != nil {
		return err
	}
	if o.merge {
		if err := result.Merge(o.out); err != nil {
			return err
		}
	}
	if err := result.Write(o.out); err != nil {
		return err
	}
	fmt.Fprintf(progress, "\nwritten to %s\n", o.out)
	return nil
}
