// Command bench measures Millrace's engine beside plain PostgreSQL and other queues. See bench/README.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/millrace-dev/millrace/bench/command"
	"github.com/millrace-dev/millrace/bench/engine"
	"github.com/millrace-dev/millrace/bench/report"
	"github.com/millrace-dev/millrace/bench/system"
)

func main() { command.Main("bench", run) }

func run(ctx context.Context, args []string, out, progress io.Writer) error {
	o, err := parse(args, progress)
	if err != nil {
		return err
	}
	systems, err := system.Named(o.systems)
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
	describeRun(settings, o)

	samples, err := engine.Run(ctx, server, engine.Options{Works: o.works, Systems: systems, N: o.n, Payload: o.payload, Runs: o.runs, Short: o.short,
		Rival: func(name string) bool { return !strings.HasPrefix(name, "millrace") },
		Log:   command.Progress(progress)})
	if err != nil {
		return fmt.Errorf("nothing is written: %w", err)
	}
	result := report.Report{Machine: report.Machine(), Date: report.Today(), Settings: settings, Rows: report.Rows(samples, engine.Rivals)}
	fmt.Fprintln(progress)
	if err := result.Table(out); err != nil {
		return err
	}
	if err := result.Write(o.out); err != nil {
		return err
	}
	fmt.Fprintf(progress, "\nwritten to %s\n", o.out)
	return nil
}

type options struct {
	works, systems []string
	n, runs        int
	payload        int
	dsn, out       string
	short          bool
}

// The files of a whole run, and of one that measured only a part and must not replace it.
var (
	whole = filepath.Join("results", "engine.json")
	part  = filepath.Join("results", "engine.local.json")
)

func parse(args []string, usage io.Writer) (options, error) {
	var o options
	var works, systems string
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(usage)
	flags.StringVar(&works, "work", "", "only these `works`, with commas between")
	flags.StringVar(&systems, "system", "", "only these `systems`, with commas between")
	flags.IntVar(&o.n, "n", 0, "`messages` in a measurement; default: by work")
	flags.IntVar(&o.payload, "payload", 0, "`bytes` of a message's payload; default about 250")
	flags.IntVar(&o.runs, "runs", 0, "`repetitions`, at most; default 5, or 3 with -short; works that take long have fewer")
	flags.StringVar(&o.dsn, "dsn", "", "use the server with this `URL` (its role creates databases) instead of a private one")
	flags.BoolVar(&o.short, "short", false, "minutes instead of about an hour")
	flags.StringVar(&o.out, "out", "", "write this `file`; default "+whole+", or "+part+" when -work, -system, -n or -payload is given")
	flags.StringVar(&system.PGMQFile, "pgmq", "", "install pgmq from this `file`, pgmq.sql of its repository, where the server has no such extension")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unknown argument %q; bench takes flags only", flags.Arg(0))
	}
	if o.n < 0 || o.runs < 0 || o.payload < 0 {
		return o, errors.New("-n, -runs and -payload cannot be negative")
	}
	if o.runs == 0 {
		o.runs = 5
		if o.short {
			o.runs = 3
		}
	}
	o.works, o.systems = command.List(works), command.List(systems)
	if o.out == "" {
		o.out = whole
		if len(o.works) > 0 || len(o.systems) > 0 || o.n > 0 || o.payload > 0 {
			o.out = part
		}
	}
	return o, nil
}

// describeRun adds to the server's settings what the figures depend on besides.
func describeRun(settings map[string]string, o options) {
	settings["form"] = "full"
	if o.short {
		settings["form"] = "short"
	}
	if o.n > 0 {
		settings["n"] = strconv.Itoa(o.n)
	}
	if o.payload > 0 {
		settings["payload"] = strconv.Itoa(o.payload)
	}
	settings["seed"] = strconv.Itoa(engine.Seed)
	settings["go"] = strings.TrimPrefix(runtime.Version(), "go")
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			if name := versions[m.Path]; name != "" {
				settings[name] = strings.TrimPrefix(m.Version, "v")
			}
		}
	}
}

// versions are the modules whose versions matter, and what they are called.
var versions = map[string]string{
	"github.com/jackc/pgx/v5":                   "pgx",
	"github.com/riverqueue/river":               "river",
	"github.com/ThreeDotsLabs/watermill-sql/v4": "watermill-sql",
}
