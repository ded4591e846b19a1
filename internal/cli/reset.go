package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func newReset(a *app) *cobra.Command {
	var to string
	var yes, dryRun bool
	cmd := &cobra.Command{
		Use:   "reset STREAM GROUP --to PLACE",
		Short: "Move a consumer group to another place of its stream",
		Long: `Move a consumer group to another place of its stream: back to deliver again, or forward to pass over. A PLACE is ` + placeHelp + `.

Every claim that is open ends, and retries and parked messages are removed; dead letters stay. A group that has lapsed lives again. It is
shown what would change, and asked whether to do it.`,
		Example: `  millrace reset orders billing --to 2h --dry-run
  millrace reset orders billing --to earliest --yes`,
		Args: a.arguments("STREAM GROUP", 0),
		RunE: func(cmd *cobra.Command, args []string) error {
			if to == "" {
				return usage(cmd, "--to is missing: write %s", placeHelp)
			}
			return a.reset(cmd, args, to, yes, dryRun)
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "where the group goes on: "+placeHelp)
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do it without being asked")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "show what would change, and change nothing")
	cmd.ValidArgsFunction = a.complete("STREAM GROUP")
	return cmd
}

// resetJSON is what reset prints with -o json.
type resetJSON struct {
	Stream  string `json:"stream"`
	Group   string `json:"group"`
	Before  int64  `json:"next_before"` // the first position that is not settled
	After   int64  `json:"next"`
	Claims  int64  `json:"in_flight"` // messages whose claims end
	Removed int64  `json:"removed"`   // retries and parked messages
	DryRun  bool   `json:"dry_run,omitempty"`
}

func (a *app) reset(cmd *cobra.Command, args []string, to string, yes, dryRun bool) error {
	ctx := cmd.Context()
	d, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer d.Close()
	n := a.split(d, "STREAM GROUP", args)
	group, err := d.group(ctx, n.stream, n.group)
	if err != nil {
		return err
	}
	now, err := d.now(ctx)
	if err != nil {
		return err
	}
	place, err := parsePlace(to, now)
	if err != nil {
		return usage(cmd, "--to: %w", err)
	}
	plan, text, err := planReset(ctx, d, n, group, place)
	if err != nil {
		return explain(err)
	}
	a.noteOwner("ConsumerGroup", group.Spec.Owner, "The resource stays as it is and does not move the group back; its start is for a new group only.")
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
	if err := a.confirm(ctx, yes, fmt.Sprintf("Reset group %q of stream %q?", n.group, n.stream)); err != nil {
		return err
	}
	if plan.Removed, err = pgstream.ResetGroup(ctx, d, n.stream, n.group, place); err != nil {
		return explain(err)
	}
	if a.json() {
		return printJSON(a.Out, plan)
	}
	_, err = fmt.Fprintf(a.Out, "group %q of stream %q goes on at position %d; %s removed\n", n.group, n.stream, plan.After, retriesText(plan.Removed))
	return err
}

func retriesText(n int64) string {
	if n == 1 {
		return "1 retry"
	}
	return number(n) + " retries"
}

// planReset says what a reset would change.
func planReset(ctx context.Context, d *database, n named, group pgstream.GroupInfo, place pgstream.Place) (plan resetJSON, text string, err error) {
	info, err := pgstream.DescribeStream(ctx, d, n.stream)
	if err != nil {
		return plan, "", err
	}
	groups, err := groupsOf(ctx, d, n.stream)
	if err != nil {
		return plan, "", err
	}
	plan = resetJSON{Stream: n.stream, Group: n.group}
	for _, g := range groups {
		if g.Group == n.group {
			plan.Before, plan.Claims, plan.Removed = g.AckFloor+1, g.InFlight, g.Retrying
		}
	}
	switch place.From {
	case pgstream.StartLatest:
		plan.After = info.Horizon + 1
	case pgstream.StartPosition:
		plan.After = place.Position
		if place.Position < info.FirstPosition {
			return plan, "", fmt.Errorf("position %d of stream %q has been removed. The first that is left is %d", place.Position, n.stream, info.FirstPosition)
		}
		if place.Position > info.LastPosition+1 {
			return plan, "", fmt.Errorf("position %d of stream %q does not exist: the last is %d. To pass over everything, write latest", place.Position, n.stream, info.LastPosition)
		}
	case pgstream.StartTime:
		if plan.After, err = pgstream.PositionAt(ctx, d, n.stream, place.Time); err != nil {
			return plan, "", err
		}
	default:
		plan.After = info.FirstPosition
	}
	var b strings.Builder
	fmt.Fprintf(&b, "Group %q of stream %q goes on at position %d instead of %d.\n", n.group, n.stream, plan.After, plan.Before)
	switch {
	case plan.After < plan.Before:
		fmt.Fprintf(&b, "  Delivered again: up to %s\n", count(plan.Before-plan.After, "message"))
	case plan.After > plan.Before:
		fmt.Fprintf(&b, "  Passed over: up to %s\n", count(plan.After-plan.Before, "message"))
	}
	if plan.Claims > 0 {
		fmt.Fprintf(&b, "  In flight: %s, whose claims end: what is being done cannot be acked\n", count(plan.Claims, "message"))
	}
	if plan.Removed > 0 {
		fmt.Fprintf(&b, "  Removed: %s, parked messages among them\n", retriesText(plan.Removed))
	}
	if info.Spec.Priorities > 1 {
		fmt.Fprintf(&b, "  The positions are those of priority 0; the other priorities move, too.\n")
	}
	if !group.LapsedAt.IsZero() {
		fmt.Fprintf(&b, "  The group lapsed %s ago, and lives again.\n", age(time.Since(group.LapsedAt)))
	}
	if group.Spec.Paused {
		fmt.Fprintf(&b, "  The group is paused, and stays so.\n")
	}
	return plan, b.String(), nil
}
