package cli

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// redriveBatch is how many dead letters one call moves.
const redriveBatch = 1000

// shownDeadLetters is how many of them a dry run shows.
const shownDeadLetters = 10

type redriveOptions struct {
	keys, headers        []string
	deadAfter, deadUntil string
	filter               pgstream.DeadLetterFilter
	limit                int64
	rate                 float64
	to                   string
	dryRun               bool
}

func newRedrive(a *app) *cobra.Command {
	var o redriveOptions
	cmd := &cobra.Command{
		Use:   "redrive STREAM GROUP",
		Short: "Move dead letters back to their group, or to another stream",
		Long: `Move dead letters back to their group, or to another stream. Back in their group they are delivered again, with attempts from zero and
their history kept. Of an Ordered group those of one key keep their order.

It moves what is dead when it begins: a message that fails again stays a dead letter. With --rate so many are moved in a second, and it ends
when the last is moved. When it is interrupted, what is not moved yet stays as it is, and it can be run again.`,
		Example: `  millrace redrive orders billing --dry-run
  millrace redrive orders billing --reason timeout --rate 50
  millrace redrive orders billing --to repair`,
		Args: a.arguments("STREAM GROUP", 0),
		RunE: func(cmd *cobra.Command, args []string) error { return a.redrive(cmd, args, o) },
	}
	f := cmd.Flags()
	f.StringArrayVar(&o.keys, "key", nil, "only those with this key; repeat it for more")
	f.StringArrayVarP(&o.headers, "header", "H", nil, "only those with this header, as name=value; repeat it for more")
	f.StringVar(&o.filter.Reason, "reason", "", "only those whose reason contains this")
	f.Int64Var(&o.filter.From, "from-position", 0, "only those at this position or later")
	f.Int64Var(&o.filter.To, "to-position", 0, "only those at this position or earlier")
	f.StringVar(&o.deadAfter, "dead-after", "", "only those that died at this time or later: 2026-01-31T08:00:00Z, or how long ago as in 90m")
	f.StringVar(&o.deadUntil, "dead-before", "", "only those that died earlier")
	f.Int64Var(&o.limit, "limit", 0, "at most so many; 0: all")
	f.Float64Var(&o.rate, "rate", 0, "so many in a second; 0: as fast as it goes")
	f.StringVar(&o.to, "to", "", "publish them to this stream instead, as new messages")
	f.BoolVar(&o.dryRun, "dry-run", false, "show what would be moved, and move nothing")
	cmd.ValidArgsFunction = a.complete("STREAM GROUP")
	return cmd
}

// prepare reads the options that are text. now is the database's.
func (o *redriveOptions) prepare(cmd *cobra.Command, now time.Time) (err error) {
	o.filter.Keys = o.keys
	if o.filter.Headers, err = parseHeaders(o.headers); err != nil {
		return usage(cmd, "%w", err)
	}
	if o.deadAfter != "" {
		if o.filter.DeadAfter, err = parseTime(o.deadAfter, now); err != nil {
			return usage(cmd, "--dead-after: %w", err)
		}
	}
	// What dies while this runs is not moved again.
	o.filter.DeadUntil = now
	if o.deadUntil != "" {
		until, err := parseTime(o.deadUntil, now)
		if err != nil {
			return usage(cmd, "--dead-before: %w", err)
		}
		if until.Before(now) {
			o.filter.DeadUntil = until
		}
	}
	if o.limit < 0 || o.rate < 0 || o.filter.From < 0 || o.filter.To < 0 {
		return usage(cmd, "--limit, --rate and positions are not negative")
	}
	return nil
}

// redrivenJSON is what redrive prints with -o json.
type redrivenJSON struct {
	Stream string `json:"stream"`
	Group  string `json:"group"`
	To     string `json:"to,omitempty"`
	Moved  int64  `json:"moved"`
	Of     int64  `json:"of"`
	DryRun bool   `json:"dry_run,omitempty"`
}

func (a *app) redrive(cmd *cobra.Command, args []string, o redriveOptions) error {
	ctx := cmd.Context()
	d, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer d.Close()
	now, err := d.now(ctx)
	if err != nil {
		return err
	}
	if err := o.prepare(cmd, now); err != nil {
		return err
	}
	n := a.split(d, "STREAM GROUP", args)
	if _, err := d.group(ctx, n.stream, n.group); err != nil {
		return err
	}
	if o.to != "" {
		if _, err := d.info(ctx, o.to); err != nil {
			return err
		}
	}
	total, err := pgstream.CountDeadLetters(ctx, d, n.stream, n.group, o.filter)
	if err != nil {
		return explain(err)
	}
	if o.limit > 0 {
		total = min(total, o.limit)
	}
	if o.dryRun {
		return a.dryRedrive(ctx, d, n, o, total)
	}
	moved, err := a.moveDeadLetters(ctx, d, n, o, total)
	if printErr := a.printRedriven(n, o, moved, total); printErr != nil {
		return printErr
	}
	return err
}

// moveDeadLetters moves them in calls of a size that can be told of and ended.
func (a *app) moveDeadLetters(ctx context.Context, d *database, n named, o redriveOptions, total int64) (moved int64, err error) {
	tell := a.progress()
	defer tell.clear()
	batch := int64(redriveBatch)
	if o.rate > 0 {
		batch = min(batch, max(1, int64(o.rate))) // about a second's worth
	}
	began := time.Now()
	for moved < total {
		size := min(batch, total-moved)
		if o.rate > 0 {
			// Each call waits until those before it have had their time.
			select {
			case <-ctx.Done():
			case <-time.After(time.Until(began.Add(time.Duration(float64(moved) / o.rate * float64(time.Second))))):
			}
		}
		if ctx.Err() != nil {
			return moved, &exitError{code: ExitInterrupted, err: errors.New("interrupted: the others stay dead letters, and the same command goes on with them")}
		}
		// A call that has begun is not given up: what it has done would not be known.
		calling, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		done, err := pgstream.Redrive(calling, d, n.stream, n.group, pgstream.RedriveOptions{Filter: o.filter, Max: size, Rate: o.rate, To: o.to})
		cancel()
		if err != nil {
			return moved, explain(err)
		}
		if done == 0 {
			return moved, nil // somebody else has moved the rest
		}
		moved += done
		tell.tell("%s of %s moved", number(moved), number(total))
	}
	return moved, nil
}

func (a *app) printRedriven(n named, o redriveOptions, moved, total int64) error {
	if a.json() {
		return printJSON(a.Out, redrivenJSON{Stream: n.stream, Group: n.group, To: o.to, Moved: moved, Of: total})
	}
	where := fmt.Sprintf("back to group %q of stream %q", n.group, n.stream)
	if o.to != "" {
		where = fmt.Sprintf("from group %q to stream %q", n.group, o.to)
	}
	text := count(moved, "dead letter") + " moved " + where
	if moved < total {
		text = fmt.Sprintf("%s of %s moved %s", number(moved), count(total, "dead letter"), where)
	}
	_, err := fmt.Fprintln(a.Out, text)
	return err
}

// dryRedrive shows the first of what would be moved.
func (a *app) dryRedrive(ctx context.Context, d *database, n named, o redriveOptions, total int64) error {
	if a.json() {
		return printJSON(a.Out, redrivenJSON{Stream: n.stream, Group: n.group, To: o.to, Of: total, DryRun: true})
	}
	shown, err := pgstream.DeadLetters(ctx, d, n.stream, n.group, o.filter, int(min(max(total, 1), shownDeadLetters)))
	if err != nil {
		return explain(err)
	}
	if len(shown) > 0 {
		if err := deadLetterTable(shown, o.filter.DeadUntil).print(a.Out); err != nil {
			return err
		}
	}
	if more := total - int64(len(shown)); more > 0 {
		fmt.Fprintf(a.Out, "… and %s more\n", number(more))
	}
	where := "back to the group"
	if o.to != "" {
		where = fmt.Sprintf("to stream %q", o.to)
	}
	_, err = fmt.Fprintf(a.Out, "%s would be moved %s\n", count(total, "dead letter"), where)
	return err
}

// deadLetterTable shows dead letters, and how long they have been that.
func deadLetterTable(letters []pgstream.DeadLetter, now time.Time) table {
	t := table{{"POSITION", "KEY", "ATTEMPTS", "DEAD", "REASON"}}
	for _, l := range letters {
		t.row(strconv.FormatInt(l.Position, 10), keyText(l.Key), strconv.Itoa(l.Attempt), ageSince(l.DeadAt, now), cut(plain(l.Reason), 80))
	}
	return t
}
