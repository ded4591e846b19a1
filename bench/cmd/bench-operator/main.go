// Command bench-operator measures the manager with a thousand streams on simulated nodes. See bench/README.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/millrace-dev/millrace/bench/command"
	"github.com/millrace-dev/millrace/bench/operator"
	"github.com/millrace-dev/millrace/bench/report"
)

func main() { command.Main("bench-operator", run) }

type options struct {
	operator.Options
	command.Output
}

func parse(args []string, usage io.Writer) (options, error) {
	var o options
	var works, systems string
	var short bool
	flags := flag.NewFlagSet("bench-operator", flag.ContinueOnError)
	flags.SetOutput(usage)
	flags.StringVar(&works, "work", "", "only these `works`, with commas between: "+strings.Join(operator.Works, ", ")+"; cold is always done")
	flags.StringVar(&systems, "system", "", "only these `systems`, with commas between: "+strings.Join(operator.Systems, ", "))
	flags.IntVar(&o.Sizes.Streams, "n", 0, "`Streams`; default 1000, or 100 with -short")
	flags.IntVar(&o.Sizes.Groups, "groups", 0, "`ConsumerGroups`; default as many as Streams")
	flags.IntVar(&o.Sizes.Processors, "processors", 0, "`Processors`; default a fifth of the Streams")
	flags.DurationVar(&o.Rest, "rest", 0, "how `long` the manager is watched at rest; default 1m, or 15s with -short")
	flags.IntVar(&o.Changes, "changes", 50, "`Streams` that are changed, one after another")
	flags.IntVar(&o.Runs, "runs", 0, "`repetitions`; default 3, or 1 with -short")
	flags.BoolVar(&short, "short", false, "fewer resources")
	flags.StringVar(&o.Program, "manager", "", "measure this `binary`; default: built from the source tree")
	flags.BoolVar(&o.Verbose, "v", false, "tell requests, and the statements that took the most time")
	o.Bind(flags, "operator", "for a part of the works, systems or sizes")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unknown argument %q; bench-operator takes flags only", flags.Arg(0))
	}
	if o.Sizes.Streams < 0 || o.Sizes.Groups < 0 || o.Sizes.Processors < 0 || o.Rest < 0 || o.Runs < 0 || o.Changes < 1 {
		return o, errors.New("sizes cannot be negative, and -changes is 1 or more")
	}
	o.Works, o.Systems = command.List(works), command.List(systems)
	o.Choose(short || len(o.Works) > 0 || len(o.Systems) > 0 || o.Sizes != (operator.Sizes{}) || o.Program != "")
	setDefault := func(v *int, full, small int) {
		switch {
		case *v > 0:
		case short:
			*v = small
		default:
			*v = full
		}
	}
	setDefault(&o.Sizes.Streams, 1000, 100)
	setDefault(&o.Sizes.Groups, o.Sizes.Streams, o.Sizes.Streams)
	setDefault(&o.Sizes.Processors, max(o.Sizes.Streams/5, 1), max(o.Sizes.Streams/5, 1))
	setDefault(&o.Runs, 3, 1)
	if o.Rest == 0 {
		o.Rest = time.Minute
		if short {
			o.Rest = 15 * time.Second
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
	samples, settings, err := operator.Run(ctx, o.Options)
	if err != nil {
		return fmt.Errorf("nothing is written: %w", err)
	}
	settings["streams"], settings["groups"], settings["processors"] = strconv.Itoa(o.Sizes.Streams), strconv.Itoa(o.Sizes.Groups), strconv.Itoa(o.Sizes.Processors)
	settings["rest"] = o.Rest.String()
	command.DescribeGo(settings)
	return o.Write(report.Rows(samples, operator.Versus), settings, out, progress)
}
