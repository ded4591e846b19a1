package main

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/redis/rueidis"
	"go.opentelemetry.io/otel"

	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

// connectTimeout bounds one attempt to reach a server at the start.
const connectTimeout = 5 * time.Second

// process is one running processor.
type process struct {
	options options
	config  *config.Config
	log     *slog.Logger
	health  *pipeline.Health
	metrics *pipeline.Metrics
	started time.Time
	rates   *rates
	line    atomic.Pointer[pipeline.Pipeline] // nil until it has started

	sinkPool, sourcePool *pgxpool.Pool
	sourceDSN            config.Setting
	redis                rueidis.Client
	redisVersion         redisstream.Version
}

func newProcess(o options, c *config.Config, log *slog.Logger) *process {
	p := &process{options: o, config: c, log: log, health: pipeline.NewHealth(), metrics: pipeline.NewMetrics(), started: time.Now()}
	p.rates = &rates{metrics: p.metrics}
	return p
}

// run starts everything in order, works until ctx ends, and stops everything. The order is: database, migrations, Redis,
// state, sink, source, pipeline. A server that is down is waited for; what only a person can repair ends the process.
func (p *process) run(ctx context.Context) error {
	p.metrics.Register(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	server, err := p.serve()
	if err != nil {
		return err
	}
	defer server.stop()
	defer p.close()

	if err := p.connectPostgres(ctx); err != nil {
		return err
	}
	if err := p.migrate(ctx); err != nil {
		return err
	}
	if err := p.connectRedis(ctx); err != nil {
		return err
	}
	tracer, err := p.newTracer(ctx)
	if err != nil {
		return err
	}
	defer p.stopTracer(tracer)
	state := pipeline.NewState(p.config)
	sink, err := p.newSink(ctx)
	if err != nil {
		return err
	}
	source, err := p.newSource(ctx, sink)
	if err != nil {
		return err
	}
	line, err := pipeline.New(pipeline.Options{
		Config: p.config, Source: source, Sink: sink, State: state,
		Metrics: p.metrics, Tracer: tracer, Health: p.health, Logger: p.log,
	})
	if err != nil {
		return err
	}
	p.line.Store(line)
	p.health.Clear("start")
	p.log.Info("processor ready")
	return line.Run(ctx)
}

// newTracer returns the tracer that the OTEL_* variables ask for, or nil. What its exporter cannot deliver is logged once a minute.
func (p *process) newTracer(ctx context.Context) (*pipeline.Tracer, error) {
	tracer, err := pipeline.NewTracer(ctx, p.config, p.options.member)
	if err != nil || tracer == nil {
		return nil, err
	}
	var mu sync.Mutex
	var said time.Time
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if time.Since(said) > time.Minute {
			said = time.Now()
			p.log.Warn("traces are not delivered", "error", err)
		}
	}))
	p.log.Info("traces are exported")
	return tracer, nil
}

func (p *process) stopTracer(tracer *pipeline.Tracer) {
	ctx, cancel := context.WithTimeout(context.Background(), connectTimeout)
	defer cancel()
	if err := tracer.Shutdown(ctx); err != nil {
		p.log.Warn("the last traces are not delivered", "error", err)
	}
}

func (p *process) connectPostgres(ctx context.Context) error {
	sink, err := config.FromEnvironment(config.EnvSinkDatabaseURL)
	if err != nil {
		return err
	}
	if p.sourceDSN, err = config.FromEnvironment(config.EnvSourceDatabaseURL); err != nil {
		return err
	}
	fromGroup := p.config.Source.ConsumerGroup != nil
	if fromGroup && !sink.IsSet() {
		sink = p.sourceDSN
	}
	if pipeline.NeedsSinkDatabase(p.config) {
		if p.sinkPool, err = p.pool(ctx, sink); err != nil {
			return err
		}
	}
	if fromGroup {
		if p.sourcePool = p.sinkPool; p.sinkPool == nil || !p.sourceDSN.Same(sink) {
			if p.sourcePool, err = p.pool(ctx, p.sourceDSN); err != nil {
				return err
			}
		}
	}
	if p.sinkPool == nil && p.sourcePool == nil {
		return nil
	}
	p.log.Info("Postgres connected")
	return nil
}

// pool opens a pool and waits until it reaches its server.
func (p *process) pool(ctx context.Context, dsn config.Setting) (*pgxpool.Pool, error) {
	pool, err := pipeline.OpenPool(ctx, dsn, p.config.Name, p.config.PoolConnections())
	if err != nil {
		return nil, err
	}
	err = p.patiently(ctx, "Postgres", func(ctx context.Context) error { return pool.Ping(ctx) })
	if err != nil {
		pool.Close()
		return nil, err
	}
	return pool, nil
}

func (p *process) migrate(ctx context.Context) error {
	if p.sinkPool == nil {
		return nil
	}
	err := p.patiently(ctx, "migrations", func(ctx context.Context) error {
		return pipeline.Migrate(ctx, p.sinkPool, p.config)
	})
	if err == nil {
		p.log.Info("migrations applied")
	}
	return err
}

func (p *process) connectRedis(ctx context.Context) error {
	if p.config.Source.Redis == nil {
		return nil
	}
	endpoint, err := redisEndpoint()
	if err != nil {
		return err
	}
	err = p.patiently(ctx, "Redis", func(ctx context.Context) (err error) {
		p.redis, p.redisVersion, err = endpoint.Connect(ctx, "millrace/"+p.config.Name)
		return err
	})
	if err == nil {
		p.log.Info("Redis connected", "version", p.redisVersion.String())
	}
	return err
}

func (p *process) newSink(ctx context.Context) (sink pipeline.Sink, err error) {
	err = p.patiently(ctx, "sink", func(ctx context.Context) error {
		sink, err = pipeline.NewSink(ctx, pipeline.SinkOptions{Config: p.config, Pool: p.sinkPool, Metrics: p.metrics, Logger: p.log})
		return err
	})
	return sink, err
}

func (p *process) newSource(ctx context.Context, sink pipeline.Sink) (source pipeline.Source, err error) {
	err = p.patiently(ctx, "source", func(ctx context.Context) error {
		if p.config.Source.Redis != nil {
			redis := pipeline.NewRedisSource(pipeline.RedisOptions{
				Client: p.redis, Version: p.redisVersion, Consumer: p.options.member, Config: p.config, Pool: p.sinkPool,
				Metrics: p.metrics, Logger: p.log,
			})
			source = redis
			return redis.Join(ctx)
		}
		source, err = p.newStreamSource(ctx, sink)
		return err
	})
	return source, err
}

func (p *process) newStreamSource(ctx context.Context, sink pipeline.Sink) (pipeline.Source, error) {
	dsn, err := config.FromEnvironment(config.EnvSourceListenURL)
	if err != nil {
		return nil, err
	}
	if !dsn.IsSet() {
		dsn = p.sourceDSN
	}
	listen, err := pipeline.ListenConfig(dsn, p.config.Name)
	if err != nil {
		return nil, err
	}
	source, err := pipeline.NewStreamSource(ctx, p.sourcePool, listen, p.options.member, p.config, p.metrics, p.log)
	if err != nil {
		return nil, err
	}
	once, err := pipeline.SettleTogether(ctx, p.config, source, p.sourcePool, sink, p.sinkPool)
	if err != nil {
		return nil, err
	}
	p.log.Info("delivery", "exactly_once", once)
	return source, nil
}

// patiently does one step of the start again and again until it succeeds, fails for good, or ctx ends.
func (p *process) patiently(ctx context.Context, what string, step func(context.Context) error) error {
	for attempt := 1; ; attempt++ {
		err := p.once(ctx, step)
		if err == nil {
			p.health.Set("start", "starting")
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if pipeline.Classify(err) == pipeline.ClassConfiguration || redisstream.IsUnusable(err) {
			return fmt.Errorf("%s: %w", what, err)
		}
		p.health.Set("start", fmt.Sprintf("waiting for %s: %v", what, err))
		p.log.Warn("waiting for "+what, "attempt", attempt, "error", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(time.Duration(attempt)*200*time.Millisecond, connectTimeout)):
		}
	}
}

func (p *process) once(ctx context.Context, step func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	return step(ctx)
}

// close closes what was opened, in reverse.
func (p *process) close() {
	if p.redis != nil {
		p.redis.Close()
	}
	if p.sourcePool != nil && p.sourcePool != p.sinkPool {
		p.sourcePool.Close()
	}
	if p.sinkPool != nil {
		p.sinkPool.Close()
	}
}
