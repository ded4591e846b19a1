package e2e

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/redis/rueidis"

	"github.com/millrace-dev/millrace/test/env/postgres"
	"github.com/millrace-dev/millrace/test/env/redis"
	"github.com/millrace-dev/millrace/test/scenario"
)

// The tests of this file hurt servers of their own, so they run at the same time.

// TestPostgresFailsOver: the primary is killed, and its synchronous standby is promoted. Both ways to find the new primary are
// in use: orders name both hosts and ask for the one that takes writes, positions name a Service whose endpoint is moved.
func TestPostgresFailsOver(t *testing.T) {
	t.Parallel()
	primary, err := postgres.Start(running, postgres.Options{Listen: world.Cluster.HostIP()})
	must(t, err)
	t.Cleanup(func() { stopped(t, primary.Stop) })
	standby, err := primary.Standby(running)
	must(t, err)
	t.Cleanup(func() { stopped(t, standby.Stop) })

	servers := world.Servers()
	servers.Own = true
	servers.DSN = func(database string) string { return postgres.PrimaryDSN(database, primary, standby) }
	ctx, ns := beginOn(t, "failover", servers)
	execute(ctx, t, ns.DSN, ordersTable)
	must(t, ns.Apply(ctx, service(world.Cluster.HostIP(), primary.Port())))
	address, err := ns.Kubectl(ctx, "get", "service", "postgres", "-o", "jsonpath={.spec.clusterIP}")
	must(t, err)
	must(t, ns.Secret(ctx, "by-service", "dsn", change(t, primary.DSN(ns.Name), func(u *url.URL) { u.Host = address + ":5432" })))
	must(t, ns.Apply(ctx, strings.Replace(pipelines(t), "databaseSecretRef: {name: app-db, key: dsn}\n      name: positions",
		"databaseSecretRef: {name: by-service, key: dsn}\n      name: positions", 1)+"---\n"+streamManifest("by-service", "by-service", 1)))
	must(t, ns.WaitReady(ctx, 2*time.Minute))
	all := append([]string{"stream/by-service"}, everything...)
	before := pods(ctx, t, ns, processors)

	f := newSteady(ns, 1000)
	f.start(ctx, t)
	f.goOn(ctx, t, 3*time.Second)
	must(t, primary.Kill())
	tells(ctx, t, ns, "DatabaseUnreachable", noticed, "stream/by-service", "stream/orders", "consumergroup/orders-sink")
	must(t, standby.Promote(ctx))
	must(t, ns.Apply(ctx, service(world.Cluster.HostIP(), standby.Port())))
	began := time.Now()
	f.arrive(ctx, t, repaired)
	tells(ctx, t, ns, "Ready", repaired, all...)
	t.Logf("everything is Ready %.1f s after the standby was promoted", time.Since(began).Seconds())
	f.goOn(ctx, t, time.Second)
	f.settle(ctx, t)
	untouched(ctx, t, ns, processors, before)
}

// service is a Service for a server outside of the cluster, and the endpoint that it leads to.
func service(host string, port int) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: postgres}
spec: {ports: [{name: postgres, port: 5432}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: postgres, labels: {kubernetes.io/service-name: postgres}}
addressType: IPv4
ports: [{name: postgres, port: %d}]
endpoints: [{addresses: [%s]}]
`, port, host)
}

// TestRedisRestarts: Redis with an append-only file is killed and comes back, twice.
func TestRedisRestarts(t *testing.T) {
	t.Parallel()
	server, err := redis.Start(running, redis.Options{Listen: world.Cluster.HostIP(), Password: "scenario", Persist: true})
	must(t, err)
	t.Cleanup(func() { stopped(t, server.Stop) })
	servers := world.Servers()
	servers.Own = true
	servers.RedisURL = server.URL()
	ctx, ns := beginOn(t, "redis", servers)
	execute(ctx, t, ns.DSN, ordersTable)
	must(t, ns.Apply(ctx, pipelines(t)))
	must(t, ns.WaitReady(ctx, 2*time.Minute))
	before := pods(ctx, t, ns, processors)

	f := newSteady(ns, 1000)
	f.start(ctx, t)
	f.goOn(ctx, t, 2*time.Second)
	must(t, server.Kill())
	tells(ctx, t, ns, "PodsFailing", noticed, "processor/telemetry")
	f.produces(ctx, t, f.orders, 500) // they do not need Redis
	must(t, server.Restart(ctx))
	tells(ctx, t, ns, "Ready", repaired, everything...)
	f.goOn(ctx, t, time.Second)
	must(t, server.Kill())
	must(t, server.Restart(ctx))
	f.goOn(ctx, t, time.Second)
	f.settle(ctx, t)
	tells(ctx, t, ns, "Ready", repaired, everything...)
	untouched(ctx, t, ns, processors, before)
}

// TestPasswordsAreRotated: first the password of PostgreSQL that one pipeline uses, then that of Redis, which the other does.
// No pod starts again, neither of the pipeline whose password it is nor of the other.
func TestPasswordsAreRotated(t *testing.T) {
	t.Parallel()
	ctx, ns := begin(t, "passwords")
	const role = "rotated"
	as := func(address, password string) string {
		return change(t, address, func(u *url.URL) { u.User = url.UserPassword(role, password) })
	}
	// Each pipeline has a user of its own. Positions write as the superuser, and producers are others.
	execute(ctx, t, ns.DSN, fmt.Sprintf(`create role %[1]s login password 'first'; alter database %[2]q owner to %[1]s`, role, ns.Name))
	execute(ctx, t, as(ns.DSN, "first"), ordersTable)
	inRedis(ctx, t, ns, "ACL", "SETUSER", role, "on", ">first", "~*", "&*", "+@all")
	must(t, ns.Secret(ctx, "orders-db", "dsn", as(ns.DSN, "first")))
	must(t, ns.Secret(ctx, "telemetry-redis", "url", as(ns.RedisURL, "first")))
	must(t, ns.Apply(ctx, strings.Replace(pipelines(t), "spec:\n  databaseSecretRef: {name: app-db, key: dsn}", "spec:\n  databaseSecretRef: {name: orders-db, key: dsn}", 1)))
	must(t, ns.WaitReady(ctx, 2*time.Minute))
	before := pods(ctx, t, ns, processors)

	f := newSteady(ns, 1000)
	f.start(ctx, t)
	f.goOn(ctx, t, time.Second)
	// With their connections, everybody loses what the old password was good for.
	execute(ctx, t, ns.DSN, fmt.Sprintf(`alter role %[1]s password 'second'; select pg_terminate_backend(pid) from pg_stat_activity where usename = '%[1]s'`, role))
	tells(ctx, t, ns, "AuthenticationFailed", noticed, "stream/orders", "consumergroup/orders-sink")
	must(t, ns.Secret(ctx, "orders-db", "dsn", as(ns.DSN, "second")))
	tells(ctx, t, ns, "Ready", repaired, "stream/orders", "consumergroup/orders-sink")
	inRedis(ctx, t, ns, "ACL", "SETUSER", role, "resetpass", ">second")
	inRedis(ctx, t, ns, "CLIENT", "KILL", "USER", role)
	must(t, ns.Secret(ctx, "telemetry-redis", "url", as(ns.RedisURL, "second")))
	// The kubelet brings a Secret to its pods within a sync period, ten seconds in this cluster.
	f.arrive(ctx, t, rolledOut)
	tells(ctx, t, ns, "Ready", rolledOut, everything...)
	f.goOn(ctx, t, time.Second)
	f.settle(ctx, t)
	untouched(ctx, t, ns, processors, before)
}

// inRedis runs a command as the administrator of Redis.
func inRedis(ctx context.Context, t *testing.T, ns *scenario.Namespace, command ...string) {
	t.Helper()
	options, err := rueidis.ParseURL(ns.RedisURL)
	must(t, err)
	options.DisableCache = true
	client, err := rueidis.NewClient(options)
	must(t, err)
	defer client.Close()
	must(t, client.Do(ctx, client.B().Arbitrary(command...).Build()).Error())
}

// stopped stops a server after its test.
func stopped(t *testing.T, stop func(context.Context) error) {
	t.Helper()
	if err := stop(context.Background()); err != nil {
		t.Error(err)
	}
}
