// Command testenv is the test environment on the command line. The Makefile calls it; people may too.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/millrace-dev/millrace/test/env/cluster"
	"github.com/millrace-dev/millrace/test/env/dirs"
	"github.com/millrace-dev/millrace/test/env/image"
	"github.com/millrace-dev/millrace/test/env/tools"
)

// command is one verb of this program.
type command struct {
	name, args, help string
	run              func(ctx context.Context, args []string) error
}

var commands = []command{
	{"assets", "", "print the directory of kube-apiserver, etcd and kubectl, after building them if needed", assets},
	{"tools", "", "print the directory of every program of the test cluster, after building them if needed", allTools},
	{"program", "<name>", "print the path of one of them, such as helm, after building it if needed", program},
	{"up", "", "start a cluster that goes on after this command", up},
	{"down", "", "end it, and remove what crashed clusters left", down},
	{"load", "<archive>...", "load image archives into it", load},
	{"images", "<tag>", "build the images as archives in bin/images", images},
	{"clean-cache", "", "remove the cache of built programs and downloaded servers", cleanCache},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "testenv:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	var usage strings.Builder
	for _, c := range commands {
		if len(args) > 0 && args[0] == c.name {
			return c.run(ctx, args[1:])
		}
		fmt.Fprintf(&usage, "  %-18s %s\n", strings.TrimSpace(c.name+" "+c.args), c.help)
	}
	return fmt.Errorf("which command?\n%s", usage.String())
}

func assets(ctx context.Context, _ []string) error { return show(cluster.Assets(ctx)) }

func allTools(ctx context.Context, _ []string) error {
	return show(tools.Ensure(ctx, os.Stderr, tools.All()...))
}

func program(ctx context.Context, args []string) error {
	if len(args) != 1 || !slices.Contains(tools.All(), args[0]) {
		return fmt.Errorf("which program? One of: %s", strings.Join(tools.All(), " "))
	}
	dir, err := tools.Ensure(ctx, os.Stderr, args[0])
	return show(filepath.Join(dir, args[0]), err)
}

func show(dir string, err error) error {
	if err == nil {
		fmt.Println(dir)
	}
	return err
}

func up(ctx context.Context, _ []string) error {
	c, err := cluster.Up(ctx, cluster.Options{Keep: true})
	if err != nil {
		return err
	}
	fmt.Printf("\nexport KUBECONFIG=%s\nexport PATH=%s:$PATH\n\n", c.Kubeconfig(), filepath.Dir(c.Program("kubectl")))
	fmt.Printf("Pods reach servers of this machine at %s. Use it in tests with CLUSTER=up; end it with make cluster-down.\n", c.HostIP())
	return nil
}

func down(ctx context.Context, _ []string) error {
	ended, err := cluster.Down(ctx)
	if err == nil && ended > 0 {
		fmt.Println("the cluster is down")
	}
	return err
}

func load(ctx context.Context, archives []string) error {
	if os.Getenv("CLUSTER") == "" {
		if err := os.Setenv("CLUSTER", "up"); err != nil {
			return err
		}
	}
	c, err := cluster.Up(ctx, cluster.Options{})
	if err != nil {
		return err
	}
	for _, archive := range archives {
		if err := c.LoadImage(ctx, archive); err != nil {
			return err
		}
	}
	return nil
}

func images(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("images takes one argument, the tag; such as: testenv images dev")
	}
	archives, err := image.BuildAll(ctx, args[0], filepath.Join("bin", "images"))
	for _, archive := range archives {
		fmt.Println(archive)
	}
	return err
}

func cleanCache(context.Context, []string) error {
	for _, part := range []string{"tools", "initdb", "postgres-15", "postgres-16", "postgres-17", "postgres-18"} {
		dir, err := dirs.Cache(part)
		if err != nil {
			return err
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}
