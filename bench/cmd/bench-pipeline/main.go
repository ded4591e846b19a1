// Command bench-pipeline measures Millrace's processor beside other programs that bring Redis streams into tables. See bench/README.md.
package main

import (
	"context"
	"fmt"
	"io"

	"github.com/millrace-dev/millrace/bench/command"
	"github.com/millrace-dev/millrace/bench/pipeline"
	"github.com/millrace-dev/millrace/bench/report"
)

func main() { command.Main("bench-pipeline", run) }

func parse(args []string, usage io.Writer) (command.Selection, error) {
	var o command.Selection
	err := o.Parse("bench-pipeline", args, usage, command.Defaults{File: "pipeline", Unit: "entries", Full: 3, Short: 2}, nil, nil)
	return o, err
}

func run(ctx context.Context, args []string, out, progress io.Writer) error {
	o, err := parse(args, progress)
	if err != nil {
		return err
	}
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
	o.Describe(settings, pipeline.Seed)
	samples, err := pipeline.Run(ctx, servers, pipeline.Options{Works: o.Works, Systems: o.Systems, N: o.N, Runs: o.Runs, Short: o.Short,
		Log: command.Progress(progress)})
	if err != nil {
		return fmt.Errorf("nothing is written: %w", err)
	}
	return o.Write(report.Rows(samples, pipeline.Versus), settings, out, progress)
}
