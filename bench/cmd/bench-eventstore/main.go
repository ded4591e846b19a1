// Command bench-eventstore measures Millrace as an event store and as a log of frames. See bench/README.md.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"maps"

	"github.com/millrace-dev/millrace/bench/command"
	"github.com/millrace-dev/millrace/bench/engine"
	"github.com/millrace-dev/millrace/bench/eventstore"
	"github.com/millrace-dev/millrace/bench/report"
)

func main() { command.Main("bench-eventstore", run) }

type options struct {
	command.Selection
	dsn string
}

func parse(args []string, usage io.Writer) (options, error) {
	var o options
	err := o.Parse("bench-eventstore", args, usage, command.Defaults{File: "eventstore", Unit: "calls", Full: 5, Short: 3}, func(flags *flag.FlagSet) {
		flags.StringVar(&o.dsn, "dsn", "", "use the server with this `URL` (its role creates databases) instead of a private one")
	}, nil)
	return o, err
}

func run(ctx context.Context, args []string, out, progress io.Writer) error {
	o, err := parse(args, progress)
	if err != nil {
		return err
	}
	server, err := engine.Start(ctx, o.dsn)
	if err != nil {
		return err
	}
	defer func() {
		if err := server.Stop(context.WithoutCancel(ctx)); err != nil {
			fmt.Fprintln(progress, "stop the server:", err)
		}
	}()
	settings, err := server.Describe(ctx)
	if err != nil {
		return err
	}
	maps.Copy(settings, eventstore.EmmettVersions(ctx))
	o.Describe(settings, engine.Seed)
	samples, err := eventstore.Run(ctx, server, eventstore.Options{Works: o.Works, Systems: o.Systems, N: o.N, Runs: o.Runs, Short: o.Short,
		Log: command.Progress(progress)})
	if err != nil {
		return fmt.Errorf("nothing is written: %w", err)
	}
	return o.Write(report.Rows(samples, eventstore.Rivals), settings, out, progress)
}
