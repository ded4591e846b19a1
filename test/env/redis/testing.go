package redis

import (
	"context"
	"fmt"
	"os"
	"testing"
)

// shared is the server of the running test package, set by Main before any test runs.
var shared *Server

// Main runs the tests of a package with one shared server, which Shared returns, and returns the exit code. Tests that
// share it use keys of their own.
func Main(m *testing.M, o Options) int {
	s, err := Start(context.Background(), o)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() {
		if err := s.Stop(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}()
	shared = s
	return m.Run()
}

// Shared is the server that Main started.
func Shared(tb testing.TB) *Server {
	tb.Helper()
	if shared == nil {
		tb.Fatal("no shared server: add  func TestMain(m *testing.M) { os.Exit(redis.Main(m, redis.Options{})) }  to this package")
	}
	return shared
}

// New starts a server of the test's own with the zero Options.
func New(tb testing.TB) *Server {
	tb.Helper()
	return NewServer(tb, Options{})
}

// NewServer starts a server of the test's own. It is stopped when the test ends; a failed test shows its log.
func NewServer(tb testing.TB, o Options) *Server {
	tb.Helper()
	s, err := Start(context.Background(), o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if tb.Failed() {
			tb.Logf("Redis's log ends with:\n%s", s.Log())
		}
		if err := s.Stop(context.Background()); err != nil {
			tb.Error(err)
		}
	})
	return s
}
