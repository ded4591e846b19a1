package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// managerProcess is a manager in a process of its own, which can be killed, and be started as often as a test likes: the names of controllers are
// unique in a process.
type managerProcess struct {
	*exec.Cmd
	log   bytes.Buffer
	ended chan struct{} // closed when it has; ProcessState says how
}

// competitor are the flags of a manager without leader election, so that nothing but the database keeps two of them apart.
var competitor = []string{"--metrics-bind-address=0", "--health-probe-bind-address=0", "--verify-interval=2s", "--lag-interval=1s"}

// startProcess runs this test binary as the manager.
func startProcess(t *testing.T, kubeconfig string, args ...string) *managerProcess {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &managerProcess{Cmd: exec.Command(self, append([]string{"--processor-image=docker.io/millrace/processor:test"}, args...)...), ended: make(chan struct{})}
	p.Env = append(os.Environ(), "MILLRACE_TEST_MANAGER=1", "KUBECONFIG="+kubeconfig, envDatabaseURL+"=")
	p.Stderr = &p.log
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("manager %d:\n%s", p.Process.Pid, p.log.String())
		}
	})
	return p
}

// kill ends it with SIGKILL: nothing of it gets to tidy up.
func (p *managerProcess) kill() {
	_ = p.Process.Kill()
	<-p.ended
}

// stop asks it to end, as Kubernetes does, and says how it did.
func (p *managerProcess) stop() error {
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.ended:
	case <-time.After(patience):
		return errors.New("it does not stop")
	}
	if !p.ProcessState.Success() {
		return errors.New(p.ProcessState.String())
	}
	return nil
}

// adminKubeconfig writes a kubeconfig of somebody who may do everything.
func adminKubeconfig(t *testing.T, env *envtest.Environment) string {
	t.Helper()
	user, err := env.AddUser(envtest.User{Name: "admin", Groups: []string{"system:masters"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := user.KubeConfig()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func secret(t *testing.T, c client.Client, dsn string) {
	t.Helper()
	s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "app-db"}, StringData: map[string]string{"dsn": dsn}}
	if err := c.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
}

func newStream(name string, segments int32) *v1alpha1.Stream {
	s := &v1alpha1.Stream{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}}
	s.Spec.DatabaseSecretRef = &v1alpha1.SecretKeyReference{Name: "app-db", Key: "dsn"}
	s.Spec.Retention.Segments = segments
	return s
}

type object interface {
	client.Object
	GetConditions() []metav1.Condition
}

// ready waits until a resource is Ready in its present generation.
func ready(t *testing.T, c client.Client, o object) {
	t.Helper()
	eventually(t, func() error {
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(o), o); err != nil {
			return err
		}
		is := meta.FindStatusCondition(o.GetConditions(), v1alpha1.ConditionReady)
		if is == nil || is.Status != metav1.ConditionTrue || is.ObservedGeneration != o.GetGeneration() {
			return fmt.Errorf("%s: %+v", o.GetName(), is)
		}
		return nil
	})
}

func connect(t *testing.T, dsn string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func execute(t *testing.T, conn *pgx.Conn, sql string) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func number(t *testing.T, conn *pgx.Conn, sql string) int {
	t.Helper()
	var n int
	if err := conn.QueryRow(t.Context(), sql).Scan(&n); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return n
}

// waitForWaiter waits until the manager waits for a lock in the database.
func waitForWaiter(t *testing.T, conn *pgx.Conn) {
	t.Helper()
	eventually(t, func() error {
		if number(t, conn, `select count(*) from pg_stat_activity
			where datname = current_database() and application_name = 'millrace-manager' and wait_event_type = 'Lock'`) == 0 {
			return fmt.Errorf("the manager waits for no lock")
		}
		return nil
	})
}

// Rule 10: a manager that is killed in the middle of DDL leaves all of it or nothing, and the next one goes on without anybody's help: while the
// engine is installed, while a stream is made, and while one is changed.
func TestAManagerKilledInTheMiddleOfDDL(t *testing.T) {
	env, admin := start(t)
	kubeconfig := adminKubeconfig(t, env)
	dsn := postgres.NewDatabase(t)
	secret(t, admin, dsn)
	look, block := connect(t, dsn), connect(t, dsn)
	stream := newStream("orders", 4)

	for _, c := range []struct {
		name   string
		lock   string // what the statement in the middle of the DDL waits for
		change func() error
		before string // a query that says how many traces there are; 0 as long as nothing was done
	}{
		{
			"while the engine is installed", "create schema millrace",
			func() error { return admin.Create(t.Context(), stream) },
			"select count(*) from pg_namespace where nspname = 'millrace_engine'",
		},
		{
			"while a stream is made", "create table millrace.more ()",
			func() error { return admin.Create(t.Context(), newStream("more", 4)) },
			"select count(*) from millrace_engine.stream where name = 'more'",
		},
		{
			"while a stream is changed", "lock table millrace.orders in share mode",
			func() error {
				if err := admin.Get(t.Context(), client.ObjectKeyFromObject(stream), stream); err != nil {
					return err
				}
				stream.Spec.Retention.Segments = 8
				return admin.Update(t.Context(), stream)
			},
			"select count(*) from millrace_engine.stream where name = 'orders' and segments = 8",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			execute(t, block, "begin")
			execute(t, block, c.lock)
			if err := c.change(); err != nil {
				t.Fatal(err)
			}
			victim := startProcess(t, kubeconfig, competitor...)
			waitForWaiter(t, look)
			victim.kill()
			if n := number(t, look, c.before); n != 0 {
				t.Errorf("half of the change can be seen: %d", n)
			}
			execute(t, block, "rollback")

			next := startProcess(t, kubeconfig, competitor...)
			var streams v1alpha1.StreamList
			if err := admin.List(t.Context(), &streams); err != nil {
				t.Fatal(err)
			}
			for i := range streams.Items {
				ready(t, admin, &streams.Items[i])
			}
			next.kill()
			if n := number(t, look, c.before); n != 1 {
				t.Errorf("the change is not there: %d", n)
			}
			if n := number(t, look, "select count(*) from millrace_engine.stream s, millrace_engine.stream_repairs(s.id)"); n != 0 {
				t.Errorf("%d repairs are left", n)
			}
		})
	}
	execute(t, look, `select millrace.publish('orders', '1')`)
}

// Rule 10: two managers at once, because leader election is no fence, do everything once, come to rest, and stay there.
func TestTwoManagersAtOnceAreHarmless(t *testing.T) {
	env, admin := start(t)
	kubeconfig := adminKubeconfig(t, env)
	dsn := postgres.NewDatabase(t)
	secret(t, admin, dsn)
	first, second := startProcess(t, kubeconfig, competitor...), startProcess(t, kubeconfig, competitor...)
	conn := connect(t, dsn)

	var all []object
	for i := range 8 {
		s := newStream(fmt.Sprintf("s%d", i), 4)
		s.Spec.DeletionPolicy = v1alpha1.DeletionDelete
		g := &v1alpha1.ConsumerGroup{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("g%d", i)}}
		g.Spec.StreamRef.Name = s.Name
		for _, o := range []object{s, g} {
			if err := admin.Create(t.Context(), o); err != nil {
				t.Fatal(err)
			}
			all = append(all, o)
		}
	}
	for _, o := range all {
		ready(t, admin, o)
	}
	for _, o := range all {
		if s, ok := o.(*v1alpha1.Stream); ok {
			if err := admin.Get(t.Context(), client.ObjectKeyFromObject(s), s); err != nil {
				t.Fatal(err)
			}
			s.Spec.Partitions, s.Spec.Priorities = 16, 2
			eventually(t, func() error {
				fresh := &v1alpha1.Stream{}
				if err := admin.Get(t.Context(), client.ObjectKeyFromObject(s), fresh); err != nil {
					return err
				}
				fresh.Spec = s.Spec
				return admin.Update(t.Context(), fresh)
			})
		}
	}
	for _, o := range all {
		ready(t, admin, o)
	}
	for sql, want := range map[string]int{
		"select count(*) from millrace_engine.stream where parent_id is null and partitions = 16":                   8,
		"select count(*) from millrace_engine.stream where parent_id is not null":                                   8,
		"select count(*) from millrace_engine.consumer_group where parent_id is null":                               8,
		"select count(*) from millrace_engine.stream s, millrace_engine.stream_repairs(s.id)":                       0,
		"select count(*) from millrace_engine.schema_version having max(version) = count(*)":                        number(t, conn, "select max(version) from millrace_engine.schema_version"),
		"select count(*) from millrace_engine.stream where parent_id is null and owner ->> 'namespace' = 'default'": 8,
	} {
		if n := number(t, conn, sql); n != want {
			t.Errorf("%s: %d, want %d", sql, n, want)
		}
	}

	// At rest: after a comparison by each of them nothing is written any more.
	versions := func() string {
		var text strings.Builder
		for _, o := range all {
			if err := admin.Get(t.Context(), client.ObjectKeyFromObject(o), o); err != nil {
				t.Fatal(err)
			}
			text.WriteString(o.GetName() + "=" + o.GetResourceVersion() + " ")
		}
		return text.String()
	}
	last, since := "", time.Now()
	eventually(t, func() error {
		if now := versions(); now != last {
			last, since = now, time.Now()
		}
		if time.Since(since) < 5*time.Second {
			return fmt.Errorf("the last write was %s ago", time.Since(since))
		}
		return nil
	})
	var events eventsv1.EventList
	if err := admin.List(t.Context(), &events, client.InNamespace("default")); err != nil {
		t.Fatal(err)
	}
	for _, e := range events.Items {
		if e.Reason == v1alpha1.EventDriftRepaired || e.Reason == v1alpha1.ReasonConflict || e.Reason == v1alpha1.ReasonFailed {
			t.Errorf("one took the work of the other for damage: %s: %s", e.Reason, e.Note)
		}
	}

	// One of them dies, and both go for the same deletions.
	first.kill()
	for _, o := range all {
		if err := admin.Delete(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() error {
		if n := number(t, conn, "select count(*) from millrace_engine.stream"); n != 0 {
			return fmt.Errorf("%d streams are left", n)
		}
		return nil
	})
	second.kill()
}
