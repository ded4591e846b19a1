package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
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

// metricsURL finds a Service by the variables that Kubernetes sets in the pods of its namespace, so that no DNS is needed.
func metricsURL(service string) (string, error) {
	variable := strings.ToUpper(strings.ReplaceAll(service, "-", "_")) + "_SERVICE_"
	host, port := os.Getenv(variable+"HOST"), os.Getenv(variable+"PORT")
	if host == "" || port == "" {
		return "", fmt.Errorf("there is no variable %sHOST: write the name of a Service in the namespace of this pod that is older than the pod", variable)
	}
	return "https://" + net.JoinHostPort(host, port) + "/metrics", nil
}

// checkCommand is "manager check".
func checkCommand(args []string, out, problems io.Writer) error {
	o := installation.Options{LeaseName: leaseName, DatabaseURL: strings.TrimSpace(os.Getenv(envDatabaseURL))}
	var namespaces, service string
	var timeout time.Duration
	f := flag.NewFlagSet("check", flag.ContinueOnError)
	f.SetOutput(problems)
	f.Usage = func() {
		fmt.Fprint(problems, checkUsage)
		f.PrintDefaults()
	}
	f.StringVar(&namespaces, "namespaces", "", "comma-separated namespaces that the manager looks after; default: all")
	f.StringVar(&o.LeaseNamespace, "leader-election-namespace", "", "namespace of the Kubernetes Lease")
	f.StringVar(&service, "metrics-service", "", "the Service of the manager's metrics, in the namespace of this pod; default: not looked at")
	f.DurationVar(&timeout, "timeout", time.Minute, "how long everything may take, for a manager that has just been installed")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("unknown argument %q\n\n%s", f.Arg(0), checkUsage)
	}
	o.Namespaces = names(namespaces)
	if service != "" {
		var err error
		if o.MetricsURL, err = metricsURL(service); err != nil {
			return err
		}
	}
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
