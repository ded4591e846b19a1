package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"testing"

	"github.com/millrace-dev/millrace/test/env/cluster"
	"github.com/millrace-dev/millrace/test/scenario"
)

var (
	// running ends at SIGINT; every test works under it, so that TestMain gets to clean up.
	running context.Context
	// world is the installation that the tests share.
	world *scenario.Scenario
)

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.list").Value.String() != "" {
		os.Exit(m.Run()) // for names, no cluster is needed
	}
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	running = ctx
	c, err := cluster.Up(ctx, cluster.Options{})
	if err != nil {
		return 1, err
	}
	defer func() {
		if downErr := c.Down(context.WithoutCancel(ctx)); err == nil {
			err = downErr
		}
	}()
	world, err = scenario.Start(ctx, c, scenario.Options{})
	if err != nil {
		return 1, fmt.Errorf("%w\n%s", err, c.Logs())
	}
	defer func() {
		if stopErr := world.Stop(context.WithoutCancel(ctx)); err == nil {
			err = stopErr
		}
	}()
	return m.Run(), nil
}
