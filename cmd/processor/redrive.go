package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline"
)

// redrive gives the dead letters of a processor to its pipeline again. It runs beside the processor or without it.
func redrive(args []string) int {
	o, filter, err := parseRedrive(args)
	if err != nil {
		return exitUsage
	}
	log := o.logger()
	c, err := readConfig(o.config)
	if err != nil {
		log.Error("the configuration is not valid", "file", o.config, "error", err)
		return exitUsage
	}
	log = log.With("processor", c.Name)
	ctx, stop := untilSignal(log, backstop(c))
	defer stop()
	p := newProcess(o, c, log)
	redriven, failed, returned, err := p.redrive(ctx, filter)
	if redriven+failed > 0 || returned == 0 {
		fmt.Printf("%d dead letters redriven, %d refused again\n", redriven, failed)
	}
	if returned > 0 {
		fmt.Printf("%d dead letters given back to group %s, whose processors write them\n", returned, p.config.Source.ConsumerGroup.Group)
	}
	if err != nil {
		log.Error("not everything was redriven", "error", err)
	}
	if err != nil || failed > 0 {
		return exitFailed
	}
	return exitOK
}

func parseRedrive(args []string) (o options, filter pipeline.DeadLetterFilter, err error) {
	flags := flag.NewFlagSet("processor redrive", flag.ContinueOnError)
	flags.StringVar(&o.config, "config", "/etc/millrace/processor.yaml", "`file` with the pipeline's configuration")
	flags.StringVar(&o.config, "f", "/etc/millrace/processor.yaml", "the same as --config")
	flags.StringVar(&filter.Stream, "stream", "", "only those of this `stream` of the source")
	flags.StringVar(&filter.Branch, "branch", "", "only those of this `branch` of a fan-out")
	flags.StringVar(&filter.Reason, "reason", "", "only those whose reason contains this `text`")
	flags.IntVar(&filter.Max, "max", 0, "at most this `number`; 0: all")
	flags.TextVar(&o.logLevel, "log-level", slog.LevelInfo, "least `level` of what is logged: debug, info, warn or error")
	flags.StringVar(&o.logFormat, "log-format", "json", "`format` of the log: json or text")
	if err := flags.Parse(args); err != nil {
		return o, filter, err
	}
	problem := ""
	switch {
	case flags.NArg() > 0:
		problem = fmt.Sprintf("%q is one word too many; write flags only", flags.Arg(0))
	case filter.Max < 0:
		problem = fmt.Sprintf("--max %d is out of range; write 1 or more, or 0 for all", filter.Max)
	case o.logFormat != "json" && o.logFormat != "text":
		problem = fmt.Sprintf("--log-format %q is unknown; write json or text", o.logFormat)
	}
	if problem != "" {
		fmt.Fprintln(flags.Output(), problem)
		return o, filter, errors.New("usage")
	}
	return o, filter, nil
}

// redrive runs the pipeline from the dead letters until each is written or refused again. Those that the engine keeps for a
// consumer group go back to the group, whose processors read them.
func (p *process) redrive(ctx context.Context, filter pipeline.DeadLetterFilter) (redriven, failed, returned int, err error) {
	defer p.close()
	if err := p.connectPostgres(ctx); err != nil {
		return 0, 0, 0, err
	}
	if pipeline.NeedsSinkDatabase(p.config) && (p.config.Source.Redis != nil || len(p.config.Sink.FanOut) > 0) {
		if redriven, failed, err = p.redrivePipeline(ctx, filter); err != nil {
			return redriven, failed, 0, err
		}
	}
	if g := p.config.Source.ConsumerGroup; g != nil && filter.Branch == "" && (filter.Stream == "" || filter.Stream == g.Stream) {
		left := int64(0)
		if filter.Max > 0 {
			if left = int64(filter.Max - redriven - failed); left <= 0 {
				return redriven, failed, 0, nil
			}
		}
		n, err := pgstream.Redrive(ctx, p.sourcePool, g.Stream, g.Group, pgstream.RedriveOptions{
			Filter: pgstream.DeadLetterFilter{Reason: filter.Reason}, Max: left,
		})
		p.log.Info("dead letters given back to their group", "group", g.Group, "n", n)
		return redriven, failed, int(n), err
	}
	return redriven, failed, 0, nil
}

func (p *process) redrivePipeline(ctx context.Context, filter pipeline.DeadLetterFilter) (redriven, failed int, err error) {
	if err := p.migrate(ctx); err != nil {
		return 0, 0, err
	}
	sink, err := p.newSink(ctx)
	if err != nil {
		return 0, 0, err
	}
	var source *pipeline.DeadLetterSource
	err = p.patiently(ctx, "dead letters", func(ctx context.Context) error {
		source, err = pipeline.NewDeadLetterSource(ctx, p.sinkPool, p.config, filter, p.metrics, p.log)
		return err
	})
	if err != nil {
		return 0, 0, err
	}
	if _, err := pipeline.SettleTogether(ctx, p.config, source, p.sinkPool, sink, p.sinkPool); err != nil {
		return 0, 0, err
	}
	line, err := pipeline.New(pipeline.Options{
		Config: p.config, Source: source, Sink: sink, State: pipeline.NewState(p.config),
		Metrics: p.metrics, Health: p.health, Logger: p.log,
	})
	if err != nil {
		return 0, 0, err
	}
	running, end := context.WithCancel(ctx)
	defer end()
	go func() {
		select {
		case <-source.Done():
			end()
		case <-running.Done():
		}
	}()
	err = line.Run(running)
	if err == nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	redriven, failed = source.Counts()
	return redriven, failed, err
}
