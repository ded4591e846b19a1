package controller_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// At rest nothing is written to the API server: no status, no event, no object, although every resource is compared with
// its database on the interval. A consumer that does nothing with a backlog is at rest as well.
func TestNothingIsWrittenAtRest(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	w.secret("telemetry-redis", "url", redisURL)
	w.readyDeployments()
	s, g := newStream("orders", streamDeletion(v1alpha1.DeletionDelete)), newGroup("sink", "orders")
	p, q := newProcessor("sink", "sink"), newProcessor("telemetry", "", fromRedis)
	broken := newStream("broken")
	broken.Spec.DatabaseSecretRef.Name = "missing"
	all := []object{s, g, p, q}
	for _, o := range all {
		w.create(o)
	}
	w.create(broken)
	for _, o := range all {
		w.wantReady(o)
	}
	w.wantNotReady(broken, v1alpha1.ReasonSecretMissing)
	w.exec(w.sql(dsn), `select millrace.publish('orders', to_jsonb(i)) from generate_series(1, 5) i`)

	// Settled: nothing written for longer than two verifications. Then as long again, to be compared.
	quiet := 5 * verifyInterval / 2
	before, since := -1, time.Now()
	w.eventually("the manager comes to rest", func() error {
		if n := len(suite.writes.in(w.namespace)); n != before {
			before, since = n, time.Now()
		}
		if time.Since(since) < quiet {
			list := suite.writes.in(w.namespace)
			return fmt.Errorf("the last write, %s ago: %+v", time.Since(since), list[len(list)-1])
		}
		return nil
	})
	if err := suite.client.Get(t.Context(), key(p), p); err != nil {
		t.Fatal(err)
	}
	if p.Status.Lag == nil || *p.Status.Lag != 5 {
		t.Errorf("it came to rest before it had measured: lag is %v", p.Status.Lag)
	}
	versions := map[string]string{}
	for _, o := range append(all, broken) {
		if err := suite.client.Get(t.Context(), key(o), o); err != nil {
			t.Fatal(err)
		}
		versions[o.GetName()+string(o.GetUID())] = o.GetResourceVersion()
	}
	for end := time.Now().Add(quiet); time.Now().Before(end); {
		if list := suite.writes.in(w.namespace); len(list) != before {
			t.Fatalf("a write at rest: %+v", list[before:])
		}
		<-time.After(100 * time.Millisecond)
	}
	for _, o := range append(all, broken) {
		if err := suite.client.Get(t.Context(), key(o), o); err != nil {
			t.Fatal(err)
		}
		if v := versions[o.GetName()+string(o.GetUID())]; v != o.GetResourceVersion() {
			t.Errorf("the resource version of %s moved from %s to %s", o.GetName(), v, o.GetResourceVersion())
		}
	}
}

// Streams and groups that are made together are written once each: their first status has their figures, which no reading has to bring later.
func TestNewStreamsAndGroupsAreWrittenOnce(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	var all []object
	for i := range 4 {
		s := newStream(fmt.Sprintf("orders-%d", i))
		all = append(all, s, newGroup(fmt.Sprintf("sink-%d", i), s.Name))
	}
	for _, o := range all {
		w.create(o)
	}
	for _, o := range all {
		w.wantReady(o)
		switch o := o.(type) {
		case *v1alpha1.Stream:
			if o.Status.Messages == nil || *o.Status.Messages != 0 || o.Status.Bytes == nil || *o.Status.Bytes == 0 {
				t.Errorf("Stream %s is Ready with %v messages and %v bytes", o.Name, o.Status.Messages, o.Status.Bytes)
			}
		case *v1alpha1.ConsumerGroup:
			if !meta.IsStatusConditionTrue(o.Status.Conditions, v1alpha1.ConditionLagKnown) || o.Status.Lag == nil || *o.Status.Lag != 0 {
				t.Errorf("ConsumerGroup %s is Ready with lag %v", o.Name, o.Status.Lag)
			}
		}
	}
	// As long as readings of groups and of streams need to come, and a verification.
	<-time.After(max(8*lagInterval, 3*verifyInterval/2))
	for _, o := range all {
		n := 0
		for _, write := range suite.writes.in(w.namespace) {
			if strings.HasSuffix(write.path, "/"+o.GetName()+"/status") {
				n++
			}
		}
		if n != 1 {
			t.Errorf("the status of %s was written %d times", o.GetName(), n)
		}
	}
}

// Forty Streams on a database that hangs, which is worse than one that refuses, must not hold up one on another.
func TestADeadDatabaseDelaysNoOther(t *testing.T) {
	w := newWorld(t)
	server := postgres.NewServer(t, postgres.Options{})
	w.secret("dead-db", appDB.Key, server.DSN("postgres"))
	first := newStream("first")
	first.Spec.DatabaseSecretRef.Name = "dead-db"
	w.create(first)
	w.wantReady(first)
	if err := server.Pause(); err != nil {
		t.Fatal(err)
	}
	var dead []*v1alpha1.Stream
	for i := range 40 {
		s := newStream(fmt.Sprintf("dead-%d", i))
		s.Spec.DatabaseSecretRef.Name = "dead-db"
		w.create(s)
		dead = append(dead, s)
	}
	w.wantNotReady(first, v1alpha1.ReasonDatabaseUnreachable)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	start := time.Now()
	alive := newStream("alive")
	w.create(alive)
	w.wantReady(alive)
	// A connection to the dead one takes 2 s to fail and a call 10 s; waiting for one turn behind either would show.
	if d := time.Since(start); d > 8*time.Second {
		t.Errorf("the living one waited %s", d)
	} else {
		t.Logf("the living one was ready after %s", d)
	}
	w.wantNotReady(dead[len(dead)-1], v1alpha1.ReasonDatabaseUnreachable, "no answer in time")
	if err := server.Resume(); err != nil {
		t.Fatal(err)
	}
	w.wantReady(dead[0])
	w.wantReady(first)
}

// A database that is lost after everything was well is noticed within seconds, by the poller, and so is its return.
func TestALostDatabaseIsNoticed(t *testing.T) {
	w := newWorld(t)
	server := postgres.NewServer(t, postgres.Options{})
	w.secret(appDB.Name, appDB.Key, server.DSN("postgres"))
	s, g := newStream("orders"), newGroup("sink", "orders")
	w.create(s)
	w.create(g)
	w.wantReady(g)
	w.want(g, v1alpha1.ConditionLagKnown, "True", v1alpha1.ReasonMeasured)
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	w.wantNotReady(s, v1alpha1.ReasonDatabaseUnreachable)
	w.wantNotReady(g, v1alpha1.ReasonDatabaseUnreachable)
	w.want(g, v1alpha1.ConditionLagKnown, "False", v1alpha1.ReasonDatabaseUnreachable)
	if g.Status.Lag == nil {
		t.Error("the last known lag is gone")
	}
	// What is in the database is not in doubt because it cannot be reached.
	w.want(s, v1alpha1.ConditionSchemaApplied, "True", v1alpha1.ReasonApplied)
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.wantReady(s)
	w.wantReady(g)
	w.want(g, v1alpha1.ConditionLagKnown, "True", v1alpha1.ReasonMeasured)
	for _, note := range w.events(s, v1alpha1.ReasonDatabaseUnreachable) {
		if strings.Contains(note, "postgres://") {
			t.Errorf("an event quotes a connection string: %s", note)
		}
	}
}
