package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

// Streams are what a command reads from and writes to.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// app is what the commands share.
type app struct {
	Streams
	connection connection
	output     string // of -o
}

// Main runs the program and returns its exit code. args begins with the program's own name; ctx ends with the first signal.
func Main(ctx context.Context, args []string, version string, std Streams) int {
	root := newRoot(filepath.Base(args[0]), version, std)
	root.SetArgs(args[1:])
	return finish(ctx, root, root.ExecuteContext(ctx), std.Err)
}

// Run is the program, with this process's arguments and streams. version is empty where the build does not say one.
func Run(version string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	go func() {
		<-ctx.Done()
		stop() // a second signal ends it at once
	}()
	return Main(ctx, os.Args, orBuild(version), Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr})
}

// orBuild is a version, or the commit as far as the build knows it.
func orBuild(version string) string {
	info, ok := debug.ReadBuildInfo()
	if version != "" || !ok {
		return version
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return s.Value[:12]
		}
	}
	return info.Main.Version
}

func newRoot(program, version string, std Streams) *cobra.Command {
	a := &app{Streams: std}
	root := &cobra.Command{
		Use:   "millrace",
		Short: "Streams and consumer groups in PostgreSQL",
		Long: `Streams and consumer groups in PostgreSQL.

The database is the one of --database-url, of a Kubernetes Stream (--stream), of the variable MILLRACE_DATABASE_URL, or of the variables
that psql knows, such as PGHOST and PGDATABASE. With --stream the argument STREAM is left out.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the schema is not this program's (migrate run --policy none), 4 no message came in
time (tail, receive), 130 interrupted before the end.`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	if strings.HasPrefix(program, "kubectl-") {
		root.Annotations = map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl millrace"}
	}
	root.SetIn(std.In)
	root.SetOut(std.Out)
	root.SetErr(std.Err)
	root.SetVersionTemplate(fmt.Sprintf("millrace %s, schema version %d\n", version, schema.Version()))
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		var value *pflag.InvalidValueError
		if errors.As(err, &value) && value.GetFlag().Value.Type() == "duration" {
			return usage(cmd, "--%s %q is no duration: write a number with a unit, as in 90s, 15m or 24h", value.GetFlag().Name, value.GetValue())
		}
		return &usageError{cmd, err}
	})
	setHelp(root, std)
	a.connection.flags(root)
	root.PersistentFlags().StringVarP(&a.output, "output", "o", "table", "how results are printed: table, wide or json (an object in each line)")
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		switch a.output {
		case "table", "wide", "json":
			return nil
		}
		return usage(cmd, "there is no output %q: write table, wide or json", a.output)
	}
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "wide", "json"}, cobra.ShellCompDirectiveNoFileComp))

	root.AddGroup(
		&cobra.Group{ID: "messages", Title: "Messages:"},
		&cobra.Group{ID: "operate", Title: "Look and operate:"},
		&cobra.Group{ID: "setup", Title: "Set up:"},
	)
	for group, commands := range map[string][]*cobra.Command{
		"messages": {newPublish(a), newTail(a), newReceive(a)},
		"operate":  {newLag(a), newInspect(a), newRedrive(a), newReset(a), newTrim(a)},
		"setup":    {newMigrate(a)},
	} {
		for _, c := range commands {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	root.SetCompletionCommandGroupID("setup")
	root.SetHelpCommandGroupID("setup")
	return root
}

// json says whether results are printed as JSON.
func (a *app) json() bool { return a.output == "json" }

// wide says whether tables have all their columns.
func (a *app) wide() bool { return a.output == "wide" }

// note tells a person something that is no result.
func (a *app) note(format string, args ...any) { fmt.Fprintf(a.Err, format+"\n", args...) }
