package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func newTrim(a *app) *cobra.Command {
	var before, keep int64
	var older time.Duration
	var approximate, yes, dryRun bool
	cmd := &cobra.Command{
		Use:   "trim STREAM",
		Short: "Remove the oldest messages of a stream now",
		Long: `Remove the oldest messages of a stream now, whatever its retention and whatever groups still want. What an open transaction has
published stays; retries and dead letters keep their copies.

It is shown what would be removed, and which groups have not got it, and asked whether to do it.`,
		Example: `  millrace trim orders --older-than 720h --dry-run
  millrace trim orders --keep 1000000 --approximate --yes`,
		Args: a.arguments("STREAM", 0),
		RunE: func(cmd *cobra.Command, args []string) error {
			limits := pgstream.TrimLimits{Approximate: approximate}
			f := cmd.Flags()
			if f.Changed("before") {
				limits.Before = &before
			}
			if f.Changed("keep") {
				limits.MaxMessages = &keep
			}
			if f.Changed("older-than") {
				limits.MaxAge = &older
			}
			switch {
			case limits.Before == nil && limits.MaxMessages == nil && limits.MaxAge == nil:
				return usage(cmd, "what to trim is missing: write --before, --keep or --older-than")
			case limits.Before != nil && before < 1:
				return usage(cmd, "--before %d: positions begin with 1", before)
			case keep < 0 || older < 0:
				return usage(cmd, "--keep and --older-than are not negative")
			}
			return a.trim(cmd, args, limits, yes, dryRun)
		},
	}
	f := cmd.Flags()
	f.Int64Var(&before, "before", 0, "remove what is before this position")
	f.Int64Var(&keep, "keep", 0, "remove all but so many of the newest messages")
	f.DurationVar(&older, "older-than", 0, "remove what is older, as in 720h")
	f.BoolVar(&approximate, "approximate", false, "remove only what frees whole segments: more may be left, and the disk is freed at once")
	f.BoolVarP(&yes, "yes", "y", false, "do it without being asked")
	f.BoolVar(&dryRun, "dry-run", false, "show what would be removed, and remove nothing")
	cmd.ValidArgsFunction = a.complete("STREAM")
	return cmd
}

// trimJSON is what trim prints with -o json.
type trimJSON struct {
	Stream  string   `json:"stream"`
	Before  int64    `json:"first_before"`   // the first position before
	First   int64    `json:"first_position"` // and afterwards
	Removed int64    `json:"messages"`       // of all priorities; a little high where transactions rolled back
	Behind  []string `json:"groups_behind"`  // groups that have not settled all of it
	DryRun  bool     `json:"dry_run,omitempty"`
}

func (a *app) trim(cmd *cobra.Command, args []string, limits pgstream.TrimLimits, yes, dryRun bool) error {
	ctx := cmd.Context()
	d, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer d.Close()
	stream := a.split(d, "STREAM", args).stream
	info, err := d.info(ctx, stream)
	if err != nil {
		return err
	}
	plan, text, err := planTrim(ctx, d, stream, limits)
	if err != nil {
		return explain(err)
	}
	a.noteOwner("Stream", info.Spec.Owner, "The resource and its retention stay as they are; what is trimmed does not come back.")
	if dryRun && a.json() {
		plan.DryRun = true
		return printJSON(a.Out, plan)
	}
	if dryRun {
		_, err := fmt.Fprint(a.Out, text)
		return err
	}
	if !yes {
		fmt.Fprint(a.Err, text)
	}
	if err := a.confirm(ctx, yes, fmt.Sprintf("Trim stream %q?", stream)); err != nil {
		return err
	}
	if plan.First, err = pgstream.Trim(ctx, d, stream, limits); err != nil {
		return explain(err)
	}
	if a.json() {
		return printJSON(a.Out, plan)
	}
	_, err = fmt.Fprintf(a.Out, "the first position of stream %q is %d\n", stream, plan.First)
	return err
}

// positions names a range.
func positions(first, last int64) string {
	if first == last {
		return fmt.Sprintf("position %d", first)
	}
	return fmt.Sprintf("positions %d to %d", first, last)
}

// planTrim says what a trim would remove.
func planTrim(ctx context.Context, d *database, stream string, limits pgstream.TrimLimits) (plan trimJSON, text string, err error) {
	lanes, err := pgstream.PlanTrim(ctx, d, stream, limits)
	if err != nil {
		return plan, "", err
	}
	plan = trimJSON{Stream: stream, Before: lanes[0].First, First: lanes[0].Mark, Behind: []string{}}
	most := ""
	if limits.Approximate {
		most = "at most "
	}
	var b strings.Builder
	for _, l := range lanes {
		plan.Removed += l.Messages()
		if l.Messages() > 0 {
			fmt.Fprintf(&b, "Stream %q loses %s%s, up to %s.\n", l.Stream, most, positions(l.First, l.Mark-1), count(l.Messages(), "message"))
		}
	}
	if plan.Removed == 0 {
		return plan, fmt.Sprintf("Stream %q loses nothing: its first position is %d.\n", stream, plan.Before), nil
	}
	groups, err := groupsOf(ctx, d, stream)
	if err != nil {
		return plan, "", err
	}
	for _, g := range groups {
		if behind := plan.First - 1 - max(g.AckFloor, plan.Before-1); behind > 0 {
			plan.Behind = append(plan.Behind, g.Group)
			fmt.Fprintf(&b, "  Group %q has not settled up to %s of them.\n", g.Group, number(behind))
		}
	}
	return plan, b.String(), nil
}
