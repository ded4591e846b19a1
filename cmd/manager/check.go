package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	ctrl "sigs.k8s.io/controller-runtime"

	"github.com/millrace-dev/millrace/internal/controller/installation"
)

const checkUsage = `usage: manager check [flags]

Looks at an installation from inside the cluster, with the manager's service account, and says what is wrong with it. helm test runs it.
The variable ` + envDatabaseURL + ` holds the connection string of the default database, if there is one.

`

// checkCommand is "manager check".
func checkCommand(args []string, out, problems io.Writer) error {
	o := installation.Options{LeaseName: leaseName, DatabaseURL: strings.TrimSpace(os.Getenv(envDatabaseURL))}
	var namespaces string
	var timeout time.Duration
	f := flag.NewFlagSet("check", flag.ContinueOnError)
	f.SetOutput(problems)
	f.Usage = func() {
		fmt.Fprint(problems, checkUsage)
		f.PrintDefaults()
	}
	f.StringVar(&namespaces, "namespaces", "", "comma-separated namespaces that the manager looks after; default: all")
	f.StringVar(&o.LeaseNamespace, "leader-election-namespace", "", "namespace of the Kubernetes Lease")
	f.StringVar(&o.MetricsURL, "metrics-url", "", "where the manager serves its metrics; default: not looked at")
	f.DurationVar(&timeout, "timeout", time.Minute, "how long everything may take, for a manager that has just been installed")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("unknown argument %q\n\n%s", f.Arg(0), checkUsage)
	}
	o.Namespaces = names(namespaces)
	cfg, err := ctrl.GetConfig()
	if err != nil {
		return fmt.Errorf("find the Kubernetes API: %w", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return installation.Check(ctx, cfg, o, out)
}
