// Command bench measures Millrace's engine beside plain PostgreSQL and other queues. See bench/README.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
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
	systems, err := system.Named(o.Systems)
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

	samples, err := engine.Run(ctx, server, engine.Options{Works: o.Works, Systems: systems, N: o.N, Payload: o.payload, Runs: o.Runs, Short: o.Short,
		Rival: func(name string) bool { return !strings.HasPrefix(name, "millrace") },
		Log:   command.Progress(progress)})
	if err != nil {
		return fmt.Errorf("nothing is written: %w", err)
	}
	return o.Write(report.Rows(samples, engine.Rivals), settings, out, progress)
}

type options struct {
	command.Selection
	payload int
	dsn     string
}

func parse(args []string, usage io.Writer) (options, error) {
	var o options
	err := o.Parse("bench", args, usage, command.Defaults{File: "engine", Unit: "messages", Full: 5, Short: 3}, func(flags *flag.FlagSet) {
		flags.IntVar(&o.payload, "payload", 0, "`bytes` of a message's payload; default about 250")
		flags.StringVar(&o.dsn, "dsn", "", "use the server with this `URL` (its role creates databases) instead of a private one")
		flags.StringVar(&system.PGMQFile, "pgmq", "", "install pgmq from this `file`, pgmq.sql of its repository, where the server has no such extension")
	}, func() bool { return o.payload > 0 })
	if err == nil && o.payload < 0 {
		err = errors.New("-payload cannot be negative")
	}
	return o, err
}

// describeRun adds to the server's settings what the figures depend on besides.
func describeRun(settings map[string]string, o options) {
	o.Describe(settings, engine.Seed)
	if o.payload > 0 {
		settings["payload"] = strconv.Itoa(o.payload)
	}
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
