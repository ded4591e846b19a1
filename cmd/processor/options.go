package main

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// options are the command line's.
type options struct {
	config    string
	listen    string
	member    string
	logLevel  slog.Level
	logFormat string
}

func parseOptions(args []string) (options, error) {
	var o options
	host, err := os.Hostname()
	if err != nil {
		host = "processor"
	}
	flags := flag.NewFlagSet("processor", flag.ContinueOnError)
	flags.StringVar(&o.config, "config", "/etc/millrace/processor.yaml", "`file` with the pipeline's configuration")
	flags.StringVar(&o.listen, "listen", ":8080", "`address` of /healthz, /readyz and /metrics")
	flags.StringVar(&o.member, "member", host, "`name` of this process among the readers of its group; no other living process may have it")
	flags.TextVar(&o.logLevel, "log-level", slog.LevelInfo, "least `level` of what is logged: debug, info, warn or error")
	flags.StringVar(&o.logFormat, "log-format", "json", "`format` of the log: json or text")
	flags.Usage = func() {
		fmt.Fprintf(flags.Output(), "processor runs one pipeline.\n\n  processor [flags]\n  processor validate -f file\n  processor redrive [flags]\n\nFlags:\n")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 || (o.logFormat != "json" && o.logFormat != "text") {
		flags.Usage()
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

func readConfig(file string) (*config.Config, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return config.Parse(data)
}

// validate checks a file and says everything that is wrong with it.
func validate(args []string) int {
	flags := flag.NewFlagSet("processor validate", flag.ContinueOnError)
	file := flags.String("f", "", "`file` to check")
	if err := flags.Parse(args); err != nil {
		return exitUsage
	}
	if *file == "" || flags.NArg() > 0 {
		flags.Usage()
		return exitUsage
	}
	_, err := readConfig(*file)
	var problems config.Problems
	switch {
	case errors.As(err, &problems):
		for _, p := range problems {
			fmt.Fprintf(os.Stderr, "%s: %s\n", *file, p)
		}
		return exitFailed
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		return exitFailed
	}
	fmt.Printf("%s: valid\n", *file)
	return exitOK
}
