package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/rest"
)

// How often the API server is asked, and how long one question may take.
const (
	apiPause   = time.Second
	apiTimeout = 5 * time.Second
)

// awaitAPI waits until the API server answers. It answers probes meanwhile: a manager that waits is alive, and not ready. If it
// ended instead, it would be started again later each time, and the API server might be back for minutes before it is.
func awaitAPI(ctx context.Context, cfg *rest.Config, probes string) error {
	cfg = rest.CopyConfig(cfg)
	cfg.Timeout = apiTimeout
	client, err := discovery.NewDiscoveryClientForConfig(cfg)
	if err != nil {
		return fmt.Errorf("create a client: %w", err)
	}
	ask := func() error {
		_, err := client.RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
			return nil // it answers; what else we may not do is told by what we do
		}
		return err
	}
	if err = ask(); err == nil {
		return nil
	}
	stop, listenErr := answerProbes(probes)
	if listenErr != nil {
		return listenErr
	}
	defer stop()
	slog.Warn("waiting for the API server", "server", cfg.Host, "error", err.Error())
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(apiPause):
		}
		if err := ask(); err == nil {
			slog.Info("the API server answers")
			return nil
		}
	}
}

// answerProbes answers as the manager does before it is ready, until stop is called. 0 or nothing is no address to answer at.
func answerProbes(address string) (stop func(), err error) {
	if address == "" || address == "0" {
		return func() {}, nil
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen for probes: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "waiting for the API server", http.StatusServiceUnavailable)
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: apiTimeout}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			slog.Error("probes can no longer be answered", "error", err.Error())
		}
	}()
	return func() {
		_ = server.Close()
		<-done
	}, nil
}
