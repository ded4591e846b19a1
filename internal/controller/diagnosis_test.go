package controller_test

import (
	"fmt"
	"net/url"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// These are the mistakes that people make most. Each test reads what a person would: kubectl describe has to say what is
// wrong and what to do, and no password.

// describe runs kubectl describe until it contains every text: the conditions and the event arrive one after the other.
func (w *world) describe(resource string, texts ...string) {
	w.Helper()
	var out string
	w.eventually("kubectl describe "+resource, func() error {
		out = w.kubectl("describe", resource)
		// Describe wraps nothing, but YAML-like output folds runs of spaces.
		flat := strings.Join(strings.Fields(out), " ")
		for _, text := range texts {
			if !strings.Contains(flat, text) {
				return fmt.Errorf("it lacks %q:\n%s", text, out)
			}
		}
		return nil
	})
	w.Logf("kubectl describe %s\n%s", resource, out)
}

func TestDescribeOfAMissingSecret(t *testing.T) {
	w := newWorld(t)
	s := newStream("orders")
	w.create(s)
	w.wantNotReady(s, v1alpha1.ReasonSecretMissing)
	w.describe("stm/orders", `Secret "app-db" does not exist in namespace`, "kubectl -n "+w.namespace+" create secret generic app-db --from-literal=dsn=",
		"Warning SecretMissing")
}

func TestDescribeOfAMissingSecretKey(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, "password", "hunter2-hunter2")
	s := newStream("orders")
	w.create(s)
	w.wantNotReady(s, v1alpha1.ReasonSecretKeyMissing)
	w.describe("stm/orders", `Secret "app-db" has no key "dsn"; it has "password". Add the key`, "Warning SecretKeyMissing")
	w.wantNoLeak("hunter2-hunter2")
}

func TestDescribeOfASecretThatIsNoConnectionString(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, "postgres://app:pass:word/%zz@host")
	s := newStream("orders")
	w.create(s)
	w.wantNotReady(s, v1alpha1.ReasonSecretInvalid)
	w.describe("stm/orders", "not a PostgreSQL connection string; write postgres://user:password@host:5432/database", "Warning SecretInvalid")
	w.wantNoLeak("pass:word", "%zz")
}

func TestDescribeOfAWrongPassword(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	const wrong = "not-the-password-0815"
	w.secret(appDB.Name, appDB.Key, withPassword(t, dsn, wrong))
	s := newStream("orders")
	w.create(s)
	w.wantNotReady(s, v1alpha1.ReasonAuthenticationFailed)
	w.want(s, v1alpha1.ConditionStalled, metav1.ConditionTrue, v1alpha1.ReasonAuthenticationFailed)
	u, _ := url.Parse(dsn)
	w.describe("stm/orders", "refuses user", u.User.Username(), u.Host, "Correct user and password in the Secret", "Warning AuthenticationFailed")
	w.wantNoLeak(wrong, password(t, dsn))

	w.secret(appDB.Name, appDB.Key, dsn)
	w.wantReady(s)
}

func TestDescribeOfAMissingDatabase(t *testing.T) {
	w := newWorld(t)
	u, err := url.Parse(postgres.NewDatabase(t))
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/nowhere"
	w.secret(appDB.Name, appDB.Key, u.String())
	s := newStream("orders")
	w.create(s)
	w.wantNotReady(s, v1alpha1.ReasonDatabaseNotFound)
	w.describe("stm/orders", `has no database "nowhere"`, "Create it", "Warning DatabaseNotFound")
}

func TestDescribeOfAMissingPrivilege(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	conn := w.sql(dsn)
	role := "weak_" + strings.ReplaceAll(w.namespace, "-", "_")
	w.exec(conn, "create role "+role+" login password 'weak-weak-weak'")
	t.Cleanup(func() {
		c := postgresCleanup(t, dsn)
		_, _ = c.Exec(cleanupContext(), "drop owned by "+role)
		_, _ = c.Exec(cleanupContext(), "drop role "+role)
		_ = c.Close(cleanupContext())
	})
	u, _ := url.Parse(dsn)
	u.User = url.UserPassword(role, "weak-weak-weak")
	w.secret(appDB.Name, appDB.Key, u.String())
	s := newStream("orders")
	w.create(s)
	w.wantNotReady(s, v1alpha1.ReasonPermissionDenied)
	w.describe("stm/orders", "lacks a privilege", "GRANT CREATE, CONNECT ON DATABASE", "Warning PermissionDenied")
	w.wantNoLeak("weak-weak-weak")
}

func TestDescribeOfAnUnreachableDatabase(t *testing.T) {
	w := newWorld(t)
	server := postgres.NewServer(t, postgres.Options{})
	dsn := server.DSN("postgres")
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders")
	w.create(s)
	w.wantNotReady(s, v1alpha1.ReasonDatabaseUnreachable)
	w.describe("stm/orders", `cannot reach database "postgres"`, "connection refused", "Check that the server runs", "Warning DatabaseUnreachable")
	w.wantNoLeak(password(t, dsn))

	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.wantReady(s) // and nobody touched it
}

func TestDescribeOfLoweredPartitions(t *testing.T) {
	t.Run("in spec", func(t *testing.T) {
		w := newWorld(t)
		w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
		s := newStream("orders", partitions(8))
		w.create(s)
		w.wantReady(s)
		s.Spec.Partitions = 4
		err := suite.client.Update(t.Context(), s)
		if err == nil || !strings.Contains(err.Error(), "partitions only grow") || !strings.Contains(err.Error(), "create another Stream") {
			t.Errorf("the API server says: %v", err)
		}
	})
	t.Run("against a database that has more", func(t *testing.T) {
		w := newWorld(t)
		w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
		first := newStream("orders", partitions(8))
		w.create(first)
		w.wantReady(first)
		if err := suite.client.Delete(t.Context(), first); err != nil {
			t.Fatal(err)
		}
		w.wantGone(first)
		s := newStream("orders", partitions(4))
		w.create(s)
		w.wantNotReady(s, v1alpha1.ReasonPartitionsLowered)
		w.want(s, v1alpha1.ConditionSchemaApplied, metav1.ConditionFalse, v1alpha1.ReasonPartitionsLowered)
		w.describe("stm/orders", "has 8 partitions", "Set spec.partitions to 8 or more", "Warning PartitionsLowered")
		update(w, s, func(s *v1alpha1.Stream) { s.Spec.Partitions = 8 })
		w.wantReady(s)
	})
}

func TestDescribeOfABadMapping(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.secret("telemetry-redis", "url", redisURL)
	p := newProcessor("telemetry", "", fromRedis, func(p *v1alpha1.ProcessorSpec) {
		p.Mapping.Columns[1].Type = "floot"
		p.Sink.Table.Key = []string{"order_nr"}
	})
	w.create(p)
	w.wantNotReady(p, v1alpha1.ReasonInvalidConfiguration)
	w.want(p, v1alpha1.ConditionStalled, metav1.ConditionTrue, v1alpha1.ReasonInvalidConfiguration)
	// Every problem at once, each with its place in spec.
	w.describe("prc/telemetry", `spec.mapping.columns[1].type: "floot" is not allowed; write one of`, `spec.sink.table.key[0]: "order_nr" is not a mapped column`,
		"Warning InvalidConfiguration")
	w.readyDeployments()
	update(w, p, func(p *v1alpha1.Processor) {
		p.Spec.Mapping.Columns[1].Type = "numeric"
		p.Spec.Sink.Table.Key = []string{"order_id"}
	})
	w.wantReady(p)
}
