package scenario

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// Diagnose collects what a person would look at after a failure: resources, events, and logs of the manager and of pods.
func (s *Scenario) Diagnose(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	var b strings.Builder
	show := func(args ...string) {
		out, err := s.Cluster.Kubectl(ctx, args...)
		if err != nil {
			out += err.Error()
		}
		fmt.Fprintf(&b, "$ kubectl %s\n%s\n", strings.Join(args, " "), strings.TrimSpace(out))
	}
	show("get", "pods", "-A", "-o", "wide")
	show("-n", SystemNamespace, "logs", "-l", "app.kubernetes.io/name=millrace", "--tail=60", "--prefix")
	for _, ns := range s.Namespaces() {
		show("-n", ns.Name, "get", "millrace", "-o", "wide")
		show("-n", ns.Name, "describe", "millrace")
		show("-n", ns.Name, "get", "events", "--sort-by=.lastTimestamp")
		show("-n", ns.Name, "logs", "-l", "app.kubernetes.io/name=millrace-processor", "--tail=40", "--prefix", "--ignore-errors")
	}
	if s.Postgres != nil {
		fmt.Fprintf(&b, "PostgreSQL's log ends with:\n%s\n", tail(s.Postgres.Log(), 3000))
	}
	b.WriteString(s.Cluster.Logs())
	return b.String()
}

func tail(text string, size int) string {
	return text[max(0, len(text)-size):]
}
