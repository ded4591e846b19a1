package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

// dryRunTimeout bounds reading what is shown. A server that does not answer is an error here, and not something to wait for.
const dryRunTimeout = 30 * time.Second

// errRejected says that a dry run found items that cannot be processed.
var errRejected = errors.New("some of what was read cannot be processed")

// dryRun reads what comes next, as no member of the group, and prints what the pipeline would write, one line of JSON for each item and branch.
// It connects to the source alone, and changes nothing there. errRejected when there is something that cannot be processed.
func dryRun(ctx context.Context, o options, c *config.Config, out, summary io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, dryRunTimeout)
	defer cancel()
	preview, err := pipeline.NewPreview(c)
	if err != nil {
		return err
	}
	items, err := peek(ctx, o, c)
	if err != nil {
		return err
	}
	counts := map[string]int{}
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	for _, it := range items {
		for _, r := range preview.Of(it) {
			counts[r.Outcome]++
			if err := enc.Encode(r); err != nil {
				return fmt.Errorf("print: %w", err)
			}
		}
	}
	fmt.Fprintf(summary, "%d read; %d to write, %d left out by filters, %d rejected. Nothing was written, claimed or acknowledged.\n",
		len(items), counts[pipeline.PreviewWrite], counts[pipeline.PreviewFiltered], counts[pipeline.PreviewRejected])
	if len(items) == 0 && !o.fromStart {
		fmt.Fprintln(summary, "The group has read everything; --from-start shows what is there.")
	}
	if counts[pipeline.PreviewRejected] > 0 {
		return errRejected
	}
	return nil
}

// peek reads from the source.
func peek(ctx context.Context, o options, c *config.Config) ([]*pipeline.Item, error) {
	if c.Source.Redis != nil {
		endpoint, err := redisEndpoint()
		if err != nil {
			return nil, err
		}
		client, _, err := endpoint.Connect(ctx, "millrace/"+c.Name+"/dry-run")
		if err != nil {
			return nil, err
		}
		defer client.Close()
		return pipeline.PeekRedis(ctx, client, c, o.fromStart, o.limit)
	}
	dsn, err := config.FromEnvironment(config.EnvSourceDatabaseURL)
	if err != nil {
		return nil, err
	}
	pool, err := pipeline.OpenPool(ctx, dsn, c.Name+"/dry-run", 1)
	if err != nil {
		return nil, err
	}
	defer pool.Close()
	return pipeline.PeekGroup(ctx, pool, c, o.fromStart, o.limit)
}

// redisEndpoint is how the environment says to reach Redis.
func redisEndpoint() (redisstream.Endpoint, error) {
	url, err := config.FromEnvironment(config.EnvRedisURL)
	if err == nil && !url.IsSet() {
		err = fmt.Errorf("%s is not set; write redis://user:password@host:6379/0, or the name of a file that holds it into %[1]s_FILE", config.EnvRedisURL)
	}
	return redisstream.Endpoint{URL: url, TLSDir: os.Getenv(config.EnvRedisTLSDir)}, err
}
