package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/millrace-dev/millrace/test/scenario"
)

// observation is what the cluster shows at one moment.
type observation struct {
	resources []resource
	pods      []pod
}

// resource is a Stream, a ConsumerGroup or a Processor.
type resource struct {
	name       string // kind/name, as kubectl takes it
	conditions []condition
}

// condition is the part of a condition that the demo shows.
type condition struct {
	Type, Status, Reason, Message string
}

type pod struct {
	name, phase string
	ready       bool
	restarts    int
}

// observe asks kubectl, because that is what people use.
func observe(ctx context.Context, ns *scenario.Namespace) (*observation, error) {
	text, err := ns.Kubectl(ctx, "get", "streams,consumergroups,processors,pods", "-o", "json")
	if err != nil {
		return nil, err
	}
	return parseObservation([]byte(text))
}

func parseObservation(text []byte) (*observation, error) {
	var list struct {
		Items []struct {
			Kind     string
			Metadata struct {
				Name              string
				DeletionTimestamp string
			}
			Status struct {
				Phase             string
				Conditions        []condition
				ContainerStatuses []struct{ RestartCount int }
			}
		}
	}
	if err := json.Unmarshal(text, &list); err != nil {
		return nil, fmt.Errorf("read the answer of kubectl: %w", err)
	}
	o := &observation{}
	for _, item := range list.Items {
		if item.Kind != "Pod" {
			o.resources = append(o.resources, resource{name: strings.ToLower(item.Kind) + "/" + item.Metadata.Name, conditions: item.Status.Conditions})
			continue
		}
		p := pod{name: item.Metadata.Name, phase: item.Status.Phase, ready: find(item.Status.Conditions, "Ready").Status == "True"}
		if item.Metadata.DeletionTimestamp != "" {
			p.phase = "Terminating"
		}
		for _, container := range item.Status.ContainerStatuses {
			p.restarts += container.RestartCount
		}
		o.pods = append(o.pods, p)
	}
	return o, nil
}

func find(conditions []condition, kind string) condition {
	if i := slices.IndexFunc(conditions, func(c condition) bool { return c.Type == kind }); i >= 0 {
		return conditions[i]
	}
	return condition{Type: kind, Status: "Unknown", Reason: "NotReported", Message: "it has no such condition yet"}
}

func (r resource) ready() bool { return find(r.conditions, "Ready").Status == "True" }

func (r resource) message() string {
	c := find(r.conditions, "Ready")
	return c.Reason + ": " + c.Message
}

// others lists the conditions beside Ready that hold, and with a mark those that are unknown.
func (r resource) others() string {
	var words []string
	for _, c := range r.conditions {
		switch {
		case c.Type == "Ready" || c.Status == "False":
		case c.Status == "True":
			words = append(words, c.Type)
		default:
			words = append(words, c.Type+"?")
		}
	}
	return strings.Join(words, " ")
}

func (o *observation) resourceTable() string {
	return table(func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "RESOURCE\tREADY\tREASON\tCONDITIONS")
		for _, r := range o.resources {
			c := find(r.conditions, "Ready")
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", r.name, c.Status, c.Reason, r.others())
		}
	})
}

func (o *observation) podTable() string {
	return table(func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "POD\tREADY\tSTATUS\tRESTARTS")
		for _, p := range o.pods {
			fmt.Fprintf(w, "%s\t%t\t%s\t%d\n", p.name, p.ready, p.phase, p.restarts)
		}
	})
}

func table(rows func(*tabwriter.Writer)) string {
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 8, 2, ' ', 0)
	rows(w)
	_ = w.Flush() // writing to memory does not fail
	return text.String()
}
