package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

type lagOptions struct {
	watch    bool
	interval time.Duration
}

func newLag(a *app) *cobra.Command {
	var o lagOptions
	cmd := &cobra.Command{
		Use:   "lag [STREAM [GROUP]]",
		Short: "Show how far consumer groups are",
		Long: `Show how far consumer groups are: what they have not been given (LAG), what members hold (IN-FLIGHT), what waits for another
delivery (RETRY), what they gave up on (DEAD), and how long the oldest message that is not settled has been there.

LAG is counted in positions: it is a little high where transactions rolled back. With --watch there are rates, too.`,
		Example: `  millrace lag
  millrace lag orders --watch
  millrace lag orders billing -o json`,
		Args: func(cmd *cobra.Command, args []string) error {
			most := 2
			if a.connection.stream != "" {
				most = 1
			}
			if len(args) > most {
				return usage(cmd, "%q is one argument too many", args[most])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return a.lag(cmd, args, o) },
	}
	cmd.Flags().BoolVarP(&o.watch, "watch", "w", false, "show it again and again, until it is interrupted")
	cmd.Flags().DurationVar(&o.interval, "interval", 2*time.Second, "with --watch: the pause between two looks")
	cmd.ValidArgsFunction = a.complete("STREAM GROUP")
	return cmd
}

// lagJSON is a group as lag prints it with -o json. The fields are columns of millrace.stats.
type lagJSON struct {
	Stream      string               `json:"stream"`
	Group       string               `json:"group"`
	Mode        pgstream.Mode        `json:"mode"`
	Lag         int64                `json:"lag"`
	InFlight    int64                `json:"in_flight"`
	Retrying    int64                `json:"retrying"`
	Queued      int64                `json:"queued"` // messages that wait for a delivery, the first or another
	Active      int64                `json:"active"` // messages that members hold
	Deliveries  int                  `json:"deliveries,omitempty"`
	DeadLetters int64                `json:"dead_letters"`
	OldestAge   float64              `json:"oldest_age_seconds"`
	AckFloor    int64                `json:"ack_floor"`
	Paused      bool                 `json:"paused"`
	Lapsed      string               `json:"lapsed,omitempty"`
	Members     []string             `json:"members,omitempty"`
	Holders     []pgstream.Holder    `json:"holders,omitempty"`
	Error       string               `json:"error,omitempty"`
	ErrorAt     *time.Time           `json:"error_at,omitempty"`
	Published   *float64             `json:"published_per_second,omitempty"` // with --watch, from the second look on
	Settled     *float64             `json:"settled_per_second,omitempty"`
	report      pgstream.GroupReport // what it was made of
}

func newLagJSON(r pgstream.GroupReport) lagJSON {
	out := lagJSON{Stream: r.Stream, Group: r.Group, Mode: r.Mode, Lag: r.Lag, InFlight: r.InFlight, Retrying: r.Retrying, Queued: r.Queued, Active: r.Active, Deliveries: r.Deliveries, DeadLetters: r.DeadLetters,
		OldestAge: r.OldestAge.Seconds(), AckFloor: r.AckFloor, Paused: r.Paused, Lapsed: r.Lapsed, Holders: r.Holders, Error: r.Error, report: r}
	for _, m := range r.Members {
		out.Members = append(out.Members, m.Name)
	}
	if !r.ErrorAt.IsZero() {
		out.ErrorAt = &r.ErrorAt
	}
	return out
}

// state is how a group fares, in a word.
func (l lagJSON) state() string {
	switch {
	case l.Lapsed != "":
		return "Lapsed"
	case l.Paused:
		return "Paused"
	}
	return "Active"
}

func (a *app) lag(cmd *cobra.Command, args []string, o lagOptions) error {
	ctx := cmd.Context()
	if o.interval <= 0 {
		return usage(cmd, "--interval %s: write more than 0s", o.interval)
	}
	d, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer d.Close()
	if a.connection.stream != "" {
		args = append([]string{d.stream}, args...)
	}
	var stream, group string
	switch len(args) {
	case 2:
		stream, group = args[0], args[1]
		_, err = d.group(ctx, stream, group)
	case 1:
		stream = args[0]
		_, err = d.info(ctx, stream)
	}
	if err != nil {
		return err
	}
	var before []lagJSON
	var beforeAt time.Time
	for {
		now, at := []lagJSON{}, time.Now()
		reports, err := pgstream.GroupReports(ctx, d)
		if err != nil {
			if ctx.Err() != nil && o.watch {
				return nil
			}
			return explain(err)
		}
		for _, r := range reports {
			if (stream == "" || r.Stream == stream) && (group == "" || r.Group == group) {
				now = append(now, newLagJSON(r))
			}
		}
		addRates(now, before, at.Sub(beforeAt))
		if err := a.printLag(now, o.watch); err != nil {
			return err
		}
		if !o.watch {
			return nil
		}
		before, beforeAt = now, at
		select {
		case <-ctx.Done():
			return nil // a signal is how it ends
		case <-time.After(o.interval):
		}
	}
}

// addRates compares two looks.
func addRates(now, before []lagJSON, pause time.Duration) {
	last := map[[2]string]pgstream.GroupReport{}
	for _, old := range before {
		last[[2]string{old.Stream, old.Group}] = old.report
	}
	for i := range now {
		if old, ok := last[[2]string{now[i].Stream, now[i].Group}]; ok {
			published := max(float64(now[i].report.LastPosition-old.LastPosition), 0) / pause.Seconds()
			settled := max(float64(now[i].report.Settled()-old.Settled()), 0) / pause.Seconds()
			now[i].Published, now[i].Settled = &published, &settled
		}
	}
}

func (a *app) printLag(groups []lagJSON, watch bool) error {
	if a.json() {
		for _, g := range groups {
			if err := printJSON(a.Out, g); err != nil {
				return err
			}
		}
		return nil
	}
	if len(groups) == 0 && !watch {
		a.note("there are no consumer groups")
		return nil
	}
	if _, is := terminal(a.Out); is && watch {
		fmt.Fprint(a.Out, "\x1b[H\x1b[2J")
	}
	return lagTable(groups, watch, a.wide()).print(a.Out)
}

func lagTable(groups []lagJSON, watch, wide bool) table {
	header := []string{"STREAM", "GROUP", "LAG", "IN-FLIGHT", "RETRY", "DEAD", "OLDEST", "STATE"}
	if watch {
		header = append(header, "PUBLISHED/S", "SETTLED/S")
	}
	if wide {
		header = append(header, "MODE", "ACK-FLOOR", "MEMBERS", "HOLDERS", "ERROR")
	}
	t := table{header}
	for _, g := range groups {
		oldest := none
		if g.OldestAge > 0 {
			oldest = age(g.report.OldestAge)
		}
		row := []string{g.Stream, g.Group, number(g.Lag), number(g.InFlight), number(g.Retrying), number(g.DeadLetters), oldest, g.state()}
		if watch {
			row = append(row, rate(g.Published), rate(g.Settled))
		}
		if wide {
			row = append(row, string(g.Mode), strconv.FormatInt(g.AckFloor, 10), list(g.Members), holdersText(g.Holders), orNone(plain(cut(g.Error, 60))))
		}
		t.row(row...)
	}
	return t
}

func rate(r *float64) string {
	if r == nil {
		return "-"
	}
	return strconv.FormatFloat(*r, 'f', 1, 64)
}

func holdersText(holders []pgstream.Holder) string {
	var all []string
	for _, h := range holders {
		all = append(all, fmt.Sprintf("%s (%s)", plain(h.Name), number(h.Messages)))
	}
	return strings.TrimSpace(list(all))
}

// groupsOf returns the reports of a stream's groups.
func groupsOf(ctx context.Context, d *database, stream string) ([]lagJSON, error) {
	reports, err := pgstream.GroupReports(ctx, d)
	if err != nil {
		return nil, explain(err)
	}
	groups := []lagJSON{}
	for _, r := range reports {
		if r.Stream == stream {
			groups = append(groups, newLagJSON(r))
		}
	}
	return groups, nil
}
