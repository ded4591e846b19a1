package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

func newMigrate(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "migrate",
		Short: "Bring a database to this version, or print how",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage(cmd, "there is no command %q", args[0])
			}
			return usage(cmd, "a command is missing")
		},
		RunE: func(*cobra.Command, []string) error { return nil }, // Args has said what is missing
	}
	cmd.AddCommand(newMigrateRun(a), newMigrateSQL(a))
	return cmd
}

// migrationJSON is what migrate run prints with -o json.
type migrationJSON struct {
	Version int      `json:"version"` // of the database now; 0: it has no schema
	Before  int      `json:"before"`  // before the command
	Wanted  int      `json:"wanted"`  // this program's
	Missing []string `json:"missing"` // migrations that the database still lacks
	Current bool     `json:"current"` // nothing is left to do
}

func newMigrateRun(a *app) *cobra.Command {
	var policyName, confirm, role string
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Bring a database to this version",
		Long: `Bring a database to this version, in one transaction.

Policies:
  create-or-update  make the schema, or bring it to this version
  create            make it where there is none, and leave any other as it is
  none              change nothing; exit code 3 when the schema is not this program's
  recreate          remove everything, with all messages, and make it anew. It has to be
                    confirmed with the name of the database, and Streams of Kubernetes
                    forbid it`,
		Example: `  millrace migrate run --runtime-role app_messages
  millrace migrate run --policy none
  millrace migrate run --dry-run >upgrade.sql`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			policy, err := parsePolicy(policyName)
			if err != nil {
				return usage(cmd, "%w", err)
			}
			return a.migrate(cmd.Context(), policy, confirm, role, dryRun)
		},
	}
	f := cmd.Flags()
	f.StringVar(&policyName, "policy", string(schema.CreateOrUpdate), "what may be done: create-or-update, create, none or recreate")
	f.StringVar(&confirm, "confirm", "", "the name of the database, to confirm --policy recreate")
	f.StringVar(&role, "runtime-role", "", "an existing role that may publish and consume, and change nothing else (default: the one named last)")
	f.BoolVar(&dryRun, "dry-run", false, "print the SQL that would be run, and run nothing")
	_ = cmd.RegisterFlagCompletionFunc("policy", cobra.FixedCompletions(
		[]string{string(schema.CreateOrUpdate), string(schema.Create), string(schema.None), string(schema.Recreate)}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage(cmd, "%q is one argument too many", args[0])
	}
	return nil
}

// parsePolicy knows the one policy that loses data, too, because only this command has it.
func parsePolicy(name string) (schema.Policy, error) {
	if name == string(schema.Recreate) {
		return schema.Recreate, nil
	}
	policy, err := schema.ParsePolicy(name)
	if err != nil {
		return "", fmt.Errorf("there is no policy %q: write %s, %s, %s or %s", name, schema.CreateOrUpdate, schema.Create, schema.None, schema.Recreate)
	}
	return policy, nil
}

func (a *app) migrate(ctx context.Context, policy schema.Policy, confirm, role string, dryRun bool) error {
	d, err := a.open(ctx)
	if err != nil {
		return err
	}
	defer d.Close()
	conn, err := d.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	opts := schema.Options{RuntimeRole: role}
	if dryRun {
		state, err := schema.Compare(ctx, conn, opts)
		if err != nil {
			return explain(err)
		}
		return a.dryMigrate(state, policy)
	}
	before, _, err := schema.Apply(ctx, conn.Conn(), policy, confirm, opts)
	if errors.Is(err, schema.ErrGuarded) {
		return fmt.Errorf("%w. See --confirm", err)
	}
	if err != nil {
		return explain(err)
	}
	after, err := schema.Compare(ctx, conn, opts)
	if err != nil {
		return explain(err)
	}
	if a.json() {
		if after.Missing == nil {
			after.Missing = []string{}
		}
		err = printJSON(a.Out, migrationJSON{Version: after.Version, Before: before.Version, Wanted: schema.Version(), Missing: after.Missing, Current: after.Current()})
	} else {
		_, err = fmt.Fprintln(a.Out, schema.Report(before, policy))
	}
	if err == nil && policy == schema.None && !after.Current() {
		return &exitError{code: ExitDiffers}
	}
	return err
}

// dryMigrate prints what a policy would run.
func (a *app) dryMigrate(state schema.State, policy schema.Policy) error {
	sql := state.SQL()
	switch {
	case state.Version > schema.Version():
		return fmt.Errorf("%s; run a newer Millrace", state)
	case policy == schema.Recreate:
		sql = "drop schema if exists millrace cascade;\ndrop schema if exists millrace_engine cascade;\n" + state.Anew().SQL()
	case policy == schema.None, policy == schema.Create && state.Version > 0:
		sql = ""
	}
	if sql == "" {
		a.note("%s; --policy %s would run nothing", state, policy)
		return nil
	}
	_, err := fmt.Fprint(a.Out, "begin;\n", strings.TrimRight(sql, "\n"), "\ncommit;\n")
	return err
}

func newMigrateSQL(a *app) *cobra.Command {
	var from int
	var role string
	cmd := &cobra.Command{
		Use:   "sql",
		Short: "Print the SQL of the schema, for review or for other tools",
		Long: `Print the SQL that an empty database gets, for review or for other tools. It needs no database. With --from it is the
SQL that a database of that version gets; what one database lacks is printed by migrate run --dry-run.

Run it in one transaction, as psql --single-transaction does.`,
		Example: `  millrace migrate sql --runtime-role app_messages | psql --single-transaction --file -`,
		Args:    noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			state, err := schema.StateOf(from, schema.Options{RuntimeRole: role})
			if err != nil {
				return usage(cmd, "--from: %w", err)
			}
			_, err = fmt.Fprint(a.Out, state.SQL())
			return err
		},
	}
	cmd.Flags().IntVar(&from, "from", 0, "the version that the database has; 0: none. Name its --runtime-role, too, if it has one")
	cmd.Flags().StringVar(&role, "runtime-role", "", "an existing role that may publish and consume, and change nothing else")
	return cmd
}
