package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// server answers probes and scrapes.
type server struct {
	http *http.Server
	done chan struct{}

	sampling     sync.WaitGroup
	stopSampling context.CancelFunc
}

// serve starts before anything else, so that a probe can tell a processor that waits for a server from one that is gone.
func (p *process) serve() (*server, error) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		// Alive as long as it answers: waiting for a server that is down is no reason to be restarted.
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		ready, text := p.health.Ready()
		if !ready {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		fmt.Fprintln(w, text)
	})
	mux.HandleFunc("GET /debug", p.debug)
	mux.Handle("GET /metrics", promhttp.HandlerFor(p.metrics.Gatherer(), promhttp.HandlerOpts{}))
	listener, err := net.Listen("tcp", p.options.listen)
	if err != nil {
		return nil, fmt.Errorf("listen for probes: %w", err)
	}
	s := &server{
		http: &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second},
		done: make(chan struct{}),
	}
	sampling, stop := context.WithCancel(context.Background())
	s.stopSampling = stop
	s.sampling.Go(func() { p.rates.run(sampling) })
	go func() {
		defer close(s.done)
		if err := s.http.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			p.log.Error("probes can no longer be answered", "error", err)
		}
	}()
	p.log.Debug("listening", "address", listener.Addr().String())
	return s, nil
}

func (s *server) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		_ = s.http.Close()
	}
	<-s.done
	s.stopSampling()
	s.sampling.Wait()
}
