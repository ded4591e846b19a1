package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

const schemaUsage = `usage: manager schema <verb> [flags]

  print    write the SQL that an empty database gets, for review or for other tools
  apply    bring a database to this version: --runtime-role <role> may publish and consume, and change nothing else;
           --policy create makes the schema where there is none and leaves others, none only looks (default: create-or-update)
  serve    do what the manager does for a database without Kubernetes, until it is stopped: retention, delayed
           messages, wake-ups

apply and serve take the database from MILLRACE_DATABASE_URL. The command millrace migrate does the same as print and apply, and more.
`

// schemaCommand is for databases without Kubernetes, and for those whose owner applies SQL by other means.
func schemaCommand(args []string, out, problems io.Writer) error {
	verb := ""
	if len(args) > 0 {
		verb, args = args[0], args[1:]
	}
	flags := flag.NewFlagSet("schema "+verb, flag.ContinueOnError)
	flags.SetOutput(problems)
	flags.Usage = func() { fmt.Fprint(problems, schemaUsage) }
	role := flags.String("runtime-role", "", "")
	policy := flags.String("policy", string(schema.CreateOrUpdate), "")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unknown argument %q\n\n%s", flags.Arg(0), schemaUsage)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch verb {
	case "print":
		_, err := io.WriteString(out, schema.SQL())
		return err
	case "apply":
		return applySchema(ctx, *policy, *role, out)
	case "serve":
		return serveSchema(ctx, problems)
	case "-h", "-help", "--help", "help":
		fmt.Fprint(problems, schemaUsage)
		return nil
	default:
		return fmt.Errorf("there is no verb %q\n\n%s", verb, schemaUsage)
	}
}

func schemaURL() (string, error) {
	url := os.Getenv(envDatabaseURL)
	if url == "" {
		return "", errors.New(envDatabaseURL + " is empty: set it to the database's connection string, like postgres://user:password@host/database")
	}
	return url, database.Check(url)
}

func applySchema(ctx context.Context, policyName, role string, out io.Writer) error {
	policy, err := schema.ParsePolicy(policyName)
	if err != nil {
		return err
	}
	url, err := schemaURL()
	if err != nil {
		return err
	}
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return fmt.Errorf("connect: %w", err) // pgx leaves the password out
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	before, _, err := schema.Apply(ctx, conn, policy, "", schema.Options{RuntimeRole: role})
	if err != nil {
		return err
	}
	if policy == schema.None && !before.Current() {
		return errors.New(before.String())
	}
	_, err = fmt.Fprintln(out, schema.Report(before, policy))
	return err
}

func serveSchema(ctx context.Context, problems io.Writer) error {
	url, err := schemaURL()
	if err != nil {
		return err
	}
	pool, err := pgxpool.New(ctx, url)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer pool.Close()
	if err := schema.Check(ctx, pool); err != nil {
		return err
	}
	var told sync.Mutex
	report := func(err error) {
		told.Lock()
		defer told.Unlock()
		_, _ = fmt.Fprintf(problems, "%s %v\n", time.Now().Format(time.RFC3339), err)
	}
	var running sync.WaitGroup
	running.Go(func() { pgstream.RunMaintenance(ctx, pool, 10*time.Second, report) })
	running.Go(func() { pgstream.RunScout(ctx, pool, pgstream.ScoutConfig{}, report) })
	running.Wait()
	return nil
}
