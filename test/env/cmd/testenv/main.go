// Command testenv is the test environment on the command line. The Makefile calls it; people may too.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/millrace-dev/millrace/test/env/cluster"
	"github.com/millrace-dev/millrace/test/env/tools"
)

const usage = `usage: testenv <command>
  assets   print the directory of kube-apiserver, etcd and kubectl, after building them if needed
  tools    print the directory of every program of the test cluster, after building them if needed
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "testenv:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("no command\n%s", usage)
	}
	switch args[0] {
	case "assets":
		return print(cluster.Assets(ctx))
	case "tools":
		return print(tools.Ensure(ctx, os.Stderr, tools.All()...))
	default:
		return fmt.Errorf("no command %q\n%s", args[0], usage)
	}
}

func print(dir string, err error) error {
	if err == nil {
		fmt.Println(dir)
	}
	return err
}
