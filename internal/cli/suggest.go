package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// stream returns the settings of a stream; the error for one that does not exist names those that do.
func (d *database) info(ctx context.Context, stream string) (pgstream.StreamInfo, error) {
	info, err := pgstream.StreamSettings(ctx, d, stream)
	if errors.Is(err, pgstream.ErrNotFound) {
		names, listErr := pgstream.StreamNames(ctx, d)
		if listErr != nil {
			return info, explain(err)
		}
		return info, missing("stream "+strconv.Quote(stream), "streams", stream, names, "A Stream in Kubernetes makes one, or select millrace.create_stream(name)")
	}
	return info, explain(err)
}

// group is info for a consumer group.
func (d *database) group(ctx context.Context, stream, group string) (pgstream.GroupInfo, error) {
	if _, err := d.info(ctx, stream); err != nil {
		return pgstream.GroupInfo{}, err
	}
	info, err := pgstream.DescribeGroup(ctx, d, stream, group)
	if errors.Is(err, pgstream.ErrNotFound) {
		names, listErr := pgstream.GroupNames(ctx, d, stream)
		if listErr != nil {
			return info, explain(err)
		}
		return info, missing(fmt.Sprintf("consumer group %q of stream %q", group, stream), "groups", group, names,
			"A ConsumerGroup in Kubernetes makes one, or select millrace.create_group(stream, name)")
	}
	return info, explain(err)
}

// missing is the error for something that does not exist among those that do. first says how the first one is made.
func missing(what, those, name string, names []string, first string) error {
	text := what + " does not exist."
	if near := nearest(name, names); near != "" {
		text += fmt.Sprintf(" Did you mean %q?", near)
	}
	const shown = 10
	switch n := len(names); {
	case n == 0:
		text += strings.TrimSuffix(" There are no "+those+". "+first, " ")
	case n <= shown:
		text += fmt.Sprintf(" There are these %s: %s", those, strings.Join(names, ", "))
	default:
		text += fmt.Sprintf(" There are these %s: %s, and %d more", those, strings.Join(names[:shown], ", "), n-shown)
	}
	return errors.New(text)
}

// nearest returns the name that is written most like another, if one is; - and _ are the same, as in the names of resources.
func nearest(name string, names []string) string {
	plain := func(s string) string { return strings.ReplaceAll(strings.ToLower(s), "-", "_") }
	best, least := "", max(2, len(name)/3)+1
	for _, n := range names {
		if d := distance(plain(name), plain(n)); d < least {
			best, least = n, d
		}
	}
	return best
}

// distance is how many letters have to be inserted, removed or changed to make one word another (Levenshtein).
func distance(from, to string) int {
	a, b := []rune(from), []rune(to)
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i, x := range a {
		diagonal := row[0]
		row[0] = i + 1
		for j, y := range b {
			change := diagonal
			if x != y {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// named are the names that a command's arguments begin with: STREAM, which --stream replaces, and perhaps GROUP.
type named struct {
	stream, group string
	rest          []string // the other arguments
}

// arguments takes apart what follows a command. wants is "STREAM" or "STREAM GROUP"; more is how many other arguments there may be.
func (a *app) arguments(wants string, more int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		need := strings.Fields(wants)
		if a.connection.stream != "" {
			need = need[1:]
		}
		switch {
		case len(args) < len(need):
			return usage(cmd, "%s is missing", need[len(args)])
		case len(args) > len(need)+more:
			return usage(cmd, "%q is one argument too many", args[len(need)+more])
		}
		return nil
	}
}

// split gives the arguments that a.arguments has seen their names.
func (a *app) split(d *database, wants string, args []string) named {
	if a.connection.stream != "" {
		args = slices.Insert(slices.Clone(args), 0, d.stream)
	}
	n := named{stream: args[0], rest: args[1:]}
	if strings.HasSuffix(wants, "GROUP") {
		n.group, n.rest = args[1], args[2:]
	}
	return n
}

// complete offers the names of streams and groups to the shell.
func (a *app) complete(wants string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		place := len(args)
		if a.connection.stream != "" {
			place++
		}
		if place >= len(strings.Fields(wants)) {
			return nil, cobra.ShellCompDirectiveDefault
		}
		d, err := a.connect(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer d.Close()
		var names []string
		if place == 0 {
			names, _ = pgstream.StreamNames(cmd.Context(), d)
		} else {
			stream := d.stream
			if stream == "" {
				stream = args[0]
			}
			names, _ = pgstream.GroupNames(cmd.Context(), d, stream)
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}
