// Command processor runs one pipeline: it reads entries of Redis streams or messages of a consumer group and writes them
// into a table, a stream or a statement of PostgreSQL, to a web server, or to several of these.
//
//	processor run --config /etc/millrace/processor.yaml
//	processor run --config processor.yaml --dry-run
//	processor validate -f processor.yaml
//	processor redrive --config /etc/millrace/processor.yaml
//
// Connection strings and other secrets come from the environment: MILLRACE_REDIS_URL, MILLRACE_SOURCE_DATABASE_URL,
// MILLRACE_SINK_DATABASE_URL, MILLRACE_SOURCE_LISTEN_URL and MILLRACE_HTTP_*. Each may have _FILE appended, and then names a file.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	_ "golang.org/x/crypto/x509roots/fallback" // the public authorities: the image holds this program and nothing else

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1 // it could not start, broke, or did not drain in time
	exitUsage  = 2 // the command line or the configuration is wrong
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	if len(args) > 0 {
		switch args[0] {
		case "validate":
			return validate(args[1:])
		case "redrive":
			return redrive(args[1:])
		case "run": // what is done without a command as well
			args = args[1:]
		}
	}
	o, err := parseOptions(args)
	if err != nil {
		return exitUsage
	}
	log := o.logger()
	c, err := readConfig(o.config)
	if err != nil && o.dryRun {
		printProblems(o.config, err)
		return exitUsage
	}
	if err != nil {
		log.Error("the configuration is not valid", "file", o.config, "error", err)
		return exitUsage
	}
	if o.dryRun {
		return runDry(o, c)
	}
	log = log.With("processor", c.Name)
	defer func() {
		// A panic outside the pipeline's stages, which have their own guard: say where, and do not exit as if all were well.
		if r := recover(); r != nil {
			log.Error("the processor panicked", "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
			os.Exit(exitFailed)
		}
	}()
	log.Info("processor starting", "version", version(), "member", o.member)

	ctx, stop := untilSignal(log, backstop(c))
	defer stop()
	p := newProcess(o, c, log)
	err = p.run(ctx)
	switch {
	case err == nil, errors.Is(err, context.Canceled) && ctx.Err() != nil:
		log.Info("processor stopped")
		return exitOK
	default:
		log.Error("processor failed", "error", err)
		return exitFailed
	}
}

// backstop ends the process after a signal when the drain's own limits did not.
func backstop(c *config.Config) time.Duration { return time.Duration(c.Drain.Timeout) + 10*time.Second }

// runDry is a dry run for a person: what it says is text, and its problems too.
func runDry(o options, c *config.Config) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := dryRun(ctx, o, c, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitFailed
	}
	return exitOK
}

// untilSignal returns a context that the first SIGTERM or SIGINT ends. A second signal exits at once, and so does the
// first one's deadline.
func untilSignal(log *slog.Logger, deadline time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		s := <-signals
		log.Info("stopping", "signal", s.String())
		cancel()
		select {
		case s = <-signals:
			log.Warn("exiting at once", "signal", s.String())
		case <-time.After(deadline):
			log.Error("exiting because stopping took too long", "after", deadline.String())
		}
		os.Exit(exitFailed)
	}()
	return ctx, cancel
}

// version is the module's version or commit, as far as the build knows it.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return s.Value[:12]
		}
	}
	return info.Main.Version
}
