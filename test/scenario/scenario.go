package scenario

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/test/env/cluster"
	"github.com/millrace-dev/millrace/test/env/postgres"
	"github.com/millrace-dev/millrace/test/env/redis"
)

// Options says how to start.
type Options struct {
	// Out gets a line for each step; default standard error.
	Out io.Writer
}

// Scenario is Millrace in a cluster, with PostgreSQL and Redis on this machine.
type Scenario struct {
	Cluster  *cluster.Cluster
	Postgres *postgres.Server
	Redis    *redis.Server

	out       io.Writer
	installed bool

	mu         sync.Mutex
	namespaces []*Namespace
}

// Start brings up the servers where the cluster's pods reach them, and installs Millrace. When it fails, it leaves nothing.
func Start(ctx context.Context, c *cluster.Cluster, o Options) (_ *Scenario, err error) {
	s := &Scenario{Cluster: c, out: o.Out}
	if s.out == nil {
		s.out = os.Stderr
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start the scenario: %w", err), s.Stop(context.WithoutCancel(ctx)))
		}
	}()
	if err := s.refuseOccupied(ctx); err != nil {
		return nil, err
	}
	err = s.step("PostgreSQL and Redis", func() error {
		if s.Postgres, err = postgres.Start(ctx, postgres.Options{Listen: c.HostIP()}); err != nil {
			return err
		}
		s.Redis, err = redis.Start(ctx, redis.Options{Listen: c.HostIP(), Password: "scenario", Persist: true})
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := s.step("images", func() error { return s.LoadImages(ctx, tag) }); err != nil {
		return nil, err
	}
	if err := s.step("helm install millrace", func() error { return s.Install(ctx) }); err != nil {
		return nil, err
	}
	return s, nil
}

// Stop removes everything that Start and Namespace made, and stops the servers. Repeating it does nothing.
func (s *Scenario) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	var errs []error
	for _, ns := range s.Namespaces() {
		errs = append(errs, ns.Remove(ctx))
	}
	s.mu.Lock()
	s.namespaces = nil
	s.mu.Unlock()
	if s.installed {
		errs = append(errs, s.Uninstall(ctx), s.removeInstallation(ctx))
	}
	if s.Redis != nil {
		errs = append(errs, s.Redis.Stop(ctx))
		s.Redis = nil
	}
	if s.Postgres != nil {
		errs = append(errs, s.Postgres.Stop(ctx))
		s.Postgres = nil
	}
	return errors.Join(errs...)
}

// Namespaces are those that were made.
func (s *Scenario) Namespaces() []*Namespace {
	s.mu.Lock()
	defer s.mu.Unlock()
	var made []*Namespace
	for _, ns := range s.namespaces {
		if ns.made.Load() {
			made = append(made, ns)
		}
	}
	return made
}

// step says what is being done and how long it took.
func (s *Scenario) step(what string, do func() error) error {
	began := time.Now()
	if err := do(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	fmt.Fprintf(s.out, "%-28s %5.1fs\n", what, time.Since(began).Seconds())
	return nil
}

// Namespace is a namespace of the cluster with a database and a Redis of its own, and the Secrets that config/samples names:
// app-db with key dsn, telemetry-redis with key url.
type Namespace struct {
	Name string
	// DSN of the database, and RedisURL of the Redis database. Both hold passwords.
	DSN, RedisURL string

	scenario *Scenario
	made     atomic.Bool // there is a namespace to remove
}

// redisDatabases is how many logical databases a Redis server has unless it is told otherwise.
const redisDatabases = 16

// Servers are what a namespace stands on.
type Servers struct {
	// DSN is a connection string of the superuser for a database.
	DSN func(database string) string
	// RedisURL is that of a server, with any database.
	RedisURL string
	// Own says that these servers end before the scenario does.
	Own bool
}

// Servers are PostgreSQL and Redis of this scenario.
func (s *Scenario) Servers() Servers { return Servers{DSN: s.Postgres.DSN, RedisURL: s.Redis.URL()} }

// Namespace makes a namespace on the servers of this scenario. Stop removes it.
func (s *Scenario) Namespace(ctx context.Context, name string) (*Namespace, error) {
	return s.NamespaceOn(ctx, name, s.Servers())
}

// NamespaceOn is Namespace on other servers, which the cluster's pods have to reach.
func (s *Scenario) NamespaceOn(ctx context.Context, name string, on Servers) (*Namespace, error) {
	ns := &Namespace{Name: name, DSN: on.DSN(name), scenario: s}
	s.mu.Lock()
	number := len(s.namespaces)
	s.namespaces = append(s.namespaces, ns)
	s.mu.Unlock()
	if number >= redisDatabases {
		return nil, fmt.Errorf("make namespace %s: Redis has %d databases, and all are taken", name, redisDatabases)
	}
	u, err := url.Parse(on.RedisURL)
	if err != nil {
		return nil, errors.New("the URL of Redis cannot be read") // its own error would repeat the password
	}
	u.Path = "/" + strconv.Itoa(number)
	ns.RedisURL = u.String()
	// Not apply: what Stop removes must not be a namespace that was there before.
	if _, err := s.Cluster.Kubectl(ctx, "create", "namespace", name); err != nil {
		return nil, err
	}
	ns.made.Store(true)
	if err := administer(ctx, on.DSN("postgres"), "create database "+pgx.Identifier{name}.Sanitize()); err != nil {
		return nil, fmt.Errorf("make namespace %s: %w", name, err)
	}
	secrets := secret(name, "app-db", "dsn", ns.DSN) + "---\n" + secret(name, "telemetry-redis", "url", ns.RedisURL)
	if err := s.Cluster.Apply(ctx, secrets); err != nil {
		return nil, fmt.Errorf("make namespace %s: %w", name, err)
	}
	return ns, nil
}

func administer(ctx context.Context, dsn, sql string) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	_, err = conn.Exec(ctx, sql)
	return err
}

// secret is the manifest of a Secret with one key.
func secret(namespace, name, key, value string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: %s, namespace: %s}\nstringData: {%s: %q}\n", name, namespace, key, value)
}
