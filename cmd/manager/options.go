package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

// envDatabaseURL is the variable that holds the connection string of the default database.
const envDatabaseURL = "MILLRACE_DATABASE_URL"

const usage = `manager runs the controllers of Millrace in a Kubernetes cluster.

  manager [flags]           run them
  manager schema <verb>     bring a database to this version, or keep house in one, without Kubernetes
  manager check [flags]     look at an installation from inside the cluster, as helm test does

Flags:
`

// options of the manager. The help text of each flag is its documentation.
type options struct {
	metricsAddress, metricsCertDir string
	metricsSecure                  bool
	probeAddress                   string
	leaderElect                    bool
	leaderElectionNamespace        string
	namespaces                     []string
	clusterID                      string
	databaseURLFile                string
	processorImage, pullPolicy     string
	pullSecrets                    []string
	verifyInterval, lagInterval    time.Duration
	deletionPatience               time.Duration
	migration                      string
	workers                        int
	logLevel                       string
}

// parse reads the command line. usage goes to output.
func parse(args []string, output io.Writer) (*options, error) {
	o := &options{}
	var namespaces, pullSecrets string
	f := flag.NewFlagSet("manager", flag.ContinueOnError)
	f.SetOutput(output)
	f.Usage = func() {
		fmt.Fprint(output, usage)
		f.PrintDefaults()
	}
	f.StringVar(&o.metricsAddress, "metrics-bind-address", ":8443", "address of the metrics; 0 serves none")
	f.BoolVar(&o.metricsSecure, "metrics-secure", true, "serve metrics over TLS, to clients that Kubernetes authenticates and authorises")
	f.StringVar(&o.metricsCertDir, "metrics-cert-dir", "", "directory of tls.crt and tls.key for the metrics; default: a self-signed certificate")
	f.StringVar(&o.probeAddress, "health-probe-bind-address", ":8081", "address of /healthz and /readyz")
	f.BoolVar(&o.leaderElect, "leader-elect", false, "let one manager of several work, the others stand by")
	f.StringVar(&o.leaderElectionNamespace, "leader-election-namespace", "", "namespace of the Kubernetes Lease; default: that of the pod")
	f.StringVar(&namespaces, "namespaces", "", "comma-separated namespaces to look after; default: all")
	f.StringVar(&o.clusterID, "cluster-id", "", "id of this cluster in the databases; default: the UID of namespace kube-system")
	f.StringVar(&o.databaseURLFile, "database-url-file", "", "file with the connection string of the default database; default: the variable "+envDatabaseURL)
	f.StringVar(&o.processorImage, "processor-image", os.Getenv("MILLRACE_PROCESSOR_IMAGE"), "image of Processor pods; default: the variable MILLRACE_PROCESSOR_IMAGE")
	f.StringVar(&o.pullPolicy, "processor-image-pull-policy", "", "pull policy of Processor pods: Always, IfNotPresent or Never; default: Kubernetes' own")
	f.StringVar(&pullSecrets, "processor-image-pull-secrets", "", "comma-separated names of the Secrets for pulling the image of Processor pods, in their namespaces")
	f.DurationVar(&o.verifyInterval, "verify-interval", 5*time.Minute, "time between two comparisons of a resource with its database; longer where there are more than 300 resources of a kind")
	f.DurationVar(&o.lagInterval, "lag-interval", 10*time.Second, "time between two readings of lag")
	f.DurationVar(&o.deletionPatience, "deletion-patience", 5*time.Minute, "how long a deletion waits for its database before it says that a person has to act")
	f.StringVar(&o.migration, "migration-policy", string(schema.CreateOrUpdate),
		"what may be done to the schema millrace of databases: create-or-update, create (only where there is none) or none (others bring it, for example millrace migrate run)")
	f.IntVar(&o.workers, "workers", 16, "resources of a kind that are worked on at the same time")
	f.StringVar(&o.logLevel, "log-level", "info", "debug, info, warn or error")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	o.namespaces, o.pullSecrets = names(namespaces), names(pullSecrets)
	return o, o.validate(f.Args())
}

// names are the parts of a comma-separated list.
func names(list string) []string {
	var parts []string
	for n := range strings.SplitSeq(list, ",") {
		if n = strings.TrimSpace(n); n != "" {
			parts = append(parts, n)
		}
	}
	return parts
}

func (o *options) validate(rest []string) error {
	var errs []error
	if len(rest) > 0 {
		errs = append(errs, fmt.Errorf("unknown arguments %q: write flags only, or schema or check first; see manager --help", rest))
	}
	if o.processorImage == "" {
		errs = append(errs, errors.New("--processor-image is empty: write the image of Processor pods"))
	}
	switch o.pullPolicy {
	case "", "Always", "IfNotPresent", "Never":
	default:
		errs = append(errs, fmt.Errorf("--processor-image-pull-policy is %q: write Always, IfNotPresent or Never", o.pullPolicy))
	}
	for name, d := range map[string]time.Duration{
		"--verify-interval": o.verifyInterval, "--lag-interval": o.lagInterval, "--deletion-patience": o.deletionPatience,
	} {
		if d < time.Second {
			errs = append(errs, fmt.Errorf("%s is %s: write 1s or more", name, d))
		}
	}
	if _, err := schema.ParsePolicy(o.migration); err != nil {
		errs = append(errs, fmt.Errorf("--migration-policy: %w", err))
	}
	if o.workers < 1 {
		errs = append(errs, fmt.Errorf("--workers is %d: write 1 or more", o.workers))
	}
	return errors.Join(errs...)
}

// databaseURL returns the connection string of the default database, empty when there is none.
func (o *options) databaseURL() (string, error) {
	if o.databaseURLFile == "" {
		return strings.TrimSpace(os.Getenv(envDatabaseURL)), nil
	}
	text, err := os.ReadFile(o.databaseURLFile)
	if err != nil {
		return "", fmt.Errorf("read the connection string of the default database: %w", err)
	}
	return strings.TrimSpace(string(text)), nil
}
