// Command manager runs the controllers of Millrace. "manager schema" is for databases without Kubernetes, "manager check" looks at an
// installation.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/go-logr/logr"
	_ "golang.org/x/crypto/x509roots/fallback" // the public authorities: the image holds this program and nothing else
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/metrics/filters"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/millrace-dev/millrace/internal/controller"
	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/controller/installation"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

// commands are what the program does besides running the controllers.
var commands = map[string]func(args []string, out, problems io.Writer) error{"schema": schemaCommand, "check": checkCommand}

func main() {
	if len(os.Args) > 1 {
		if command := commands[os.Args[1]]; command != nil {
			if err := command(os.Args[2:], os.Stdout, os.Stderr); err != nil && !errors.Is(err, flag.ErrHelp) {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			return
		}
	}
	o, err := parse(os.Args[1:], os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	if err := run(ctrl.SetupSignalHandler(), o); err != nil {
		slog.Error("the manager stops", "error", err.Error())
		os.Exit(1)
	}
}

func run(ctx context.Context, o *options) error {
	if err := setupLog(o.logLevel); err != nil {
		return err
	}
	defaultDatabase, err := o.databaseURL()
	if err != nil {
		return err
	}
	if defaultDatabase != "" {
		if err := database.Check(defaultDatabase); err != nil {
			return fmt.Errorf("the default database: %w", err)
		}
	}
	cfg, err := ctrl.GetConfig()
	if err != nil {
		return fmt.Errorf("find the Kubernetes API: %w", err)
	}
	// The API server's priority and fairness is the limit; a second one here would only hide it.
	cfg.QPS = -1

	if err := awaitAPI(ctx, cfg, o.probeAddress); err != nil {
		return fmt.Errorf("wait for the API server: %w", err)
	}
	settings := managerOptions(o)
	lock, err := podLock(cfg, o)
	if err != nil {
		return err
	}
	if lock != nil {
		settings.LeaderElectionResourceLockInterface = lock
	}
	mgr, err := ctrl.NewManager(cfg, settings)
	if err != nil {
		return fmt.Errorf("create the manager: %w", err)
	}
	if lock != nil {
		lock.LockConfig.EventRecorder = mgr.GetEventRecorderFor("millrace") //nolint:staticcheck // it takes no recorder of the new kind yet
	}
	if err := mgr.AddHealthzCheck("ping", healthz.Ping); err != nil {
		return err
	}
	if err := mgr.AddReadyzCheck("ping", healthz.Ping); err != nil {
		return err
	}
	cluster, err := clusterID(ctx, cfg, o)
	if err != nil {
		return err
	}
	warnOfOldDefinitions(ctx, cfg)
	if err := controller.Setup(ctx, mgr, controller.Options{
		Cluster: cluster, DefaultDatabase: defaultDatabase,
		ProcessorImage: o.processorImage, ProcessorImagePullPolicy: o.pullPolicy, ProcessorImagePullSecrets: o.pullSecrets,
		VerifyInterval: o.verifyInterval, LagInterval: o.lagInterval, DeletionPatience: o.deletionPatience, Workers: o.workers,
		Database: database.Options{Migration: schema.Policy(o.migration)},
	}); err != nil {
		return err
	}
	return mgr.Start(ctx)
}

// warnOfOldDefinitions says when the CRDs were not upgraded with the manager: the API server drops what it does not know.
func warnOfOldDefinitions(ctx context.Context, cfg *rest.Config) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if missing, err := installation.MissingFields(ctx, cfg); err == nil && len(missing) > 0 {
		slog.Warn("the CRDs are older than the manager and drop fields; upgrade them", "missing", missing)
	}
}

func managerOptions(o *options) ctrl.Options {
	metrics := metricsserver.Options{BindAddress: o.metricsAddress, SecureServing: o.metricsSecure, CertDir: o.metricsCertDir}
	if o.metricsSecure {
		metrics.FilterProvider = filters.WithAuthenticationAndAuthorization
	}
	grace := 20 * time.Second
	return ctrl.Options{
		Scheme:                  controller.Scheme(),
		Cache:                   controller.CacheOptions(o.namespaces),
		Metrics:                 metrics,
		HealthProbeBindAddress:  o.probeAddress,
		LeaderElection:          o.leaderElect,
		LeaderElectionID:        leaseName,
		LeaderElectionNamespace: o.leaderElectionNamespace,
		// The process ends when the manager does, so the next leader need not wait for the Lease to expire.
		LeaderElectionReleaseOnCancel: true,
		GracefulShutdownTimeout:       &grace,
	}
}

// clusterID returns the id from the options or asks the API server for it.
func clusterID(ctx context.Context, cfg *rest.Config, o *options) (string, error) {
	if o.clusterID != "" {
		return o.clusterID, nil
	}
	live, err := client.New(cfg, client.Options{Scheme: controller.Scheme()})
	if err != nil {
		return "", fmt.Errorf("create a client: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return controller.ClusterID(ctx, live)
}

// setupLog writes JSON lines to standard error.
func setupLog(level string) error {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return fmt.Errorf("--log-level is %q: write debug, info, warn or error", level)
	}
	handler := slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: l})
	slog.SetDefault(slog.New(handler))
	log := logr.FromSlogHandler(handler)
	ctrl.SetLogger(log)
	klog.SetLogger(log)
	return nil
}
