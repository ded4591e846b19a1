package controller_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

func withPlan(s *v1alpha1.StreamSpec) { s.ChangePolicy = v1alpha1.ChangePlan }

// waiting waits until a plan of a Stream waits for approval that is another than before, and returns it.
func (w *world) waiting(s *v1alpha1.Stream, before string) *v1alpha1.PlannedChange {
	w.Helper()
	w.eventually("a plan of "+s.Name, func() error {
		if err := suite.client.Get(w.Context(), key(s), s); err != nil {
			return err
		}
		if p := s.Status.Plan; p == nil || p.Hash == before || s.Status.ObservedGeneration != s.Generation {
			return fmt.Errorf("the plan is %+v for generation %d of %d, %+v", p, s.Status.ObservedGeneration, s.Generation, s.Status.Conditions)
		}
		return nil
	})
	return s.Status.Plan
}

func (w *world) approve(resource, hash string) {
	w.Helper()
	w.kubectl("annotate", resource, v1alpha1.AnnotationApprovePlan+"="+hash, "--overwrite")
}

// S5: with Plan not even the engine is installed before somebody has approved it, and then all of it is made at once.
func TestAPlannedStreamIsMadeWhenApproved(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders", withPlan, partitions(4), streamDeletion(v1alpha1.DeletionDelete))
	w.create(s)
	plan := w.waiting(s, "")
	if len(plan.Steps) != 2 || !strings.Contains(plan.Steps[0], "install the schemas") || !strings.Contains(plan.Steps[1], `create stream "orders" with 4 partitions`) {
		t.Errorf("the steps are %q", plan.Steps)
	}
	if len(plan.Statements) != 2 || !strings.Contains(plan.Statements[1], `select millrace_engine.apply_stream('{`) || !strings.Contains(plan.Statements[1], `"partitions":4`) || len(plan.Destroys) > 0 {
		t.Errorf("the plan is %+v", plan)
	}
	// As kstatus reads it this is progress, not failure, and the message is all that is needed to go on.
	command := "kubectl -n " + w.namespace + " annotate stream orders millrace.dev/approve-plan=" + plan.Hash
	w.wantNotReady(s, v1alpha1.ReasonApprovalPending, plan.Hash, "create stream", command)
	w.want(s, v1alpha1.ConditionReconciling, metav1.ConditionTrue, v1alpha1.ReasonApprovalPending)
	w.want(s, v1alpha1.ConditionSchemaApplied, metav1.ConditionFalse, v1alpha1.ReasonApprovalPending)
	w.wantEvent(s, v1alpha1.ReasonApprovalPending, command)
	w.describe("stm/orders", "Normal ApprovalPending")
	if table := w.kubectl("get", "stm", "-o", "wide"); !strings.Contains(table, "ApprovalPending") || !strings.Contains(table, plan.Hash) {
		t.Errorf("kubectl get says\n%s", table)
	}
	// Nor does anything else of the manager, such as its poller and its upkeep, make something there: all of them have had their turn by then.
	<-time.After(verifyInterval * 3 / 2)
	conn := w.sql(dsn)
	if n := scalar[int](w, conn, "select count(*) from pg_namespace where nspname like 'millrace%'"); n > 0 || len(s.Finalizers) > 0 {
		t.Errorf("%d schemas before the approval, finalizers %v", n, s.Finalizers)
	}

	w.approve("stm/orders", "0123456789abcdef")
	w.wantNotReady(s, v1alpha1.ReasonApprovalOutdated, "approves 0123456789abcdef", command)
	w.approve("stm/orders", plan.Hash)
	w.wantReady(s)
	if s.Status.Plan != nil || s.Status.ApprovedPlan != plan.Hash || *s.Status.Partitions != 4 || len(s.Finalizers) != 1 {
		t.Errorf("status is %+v, finalizers %v", s.Status, s.Finalizers)
	}
	w.wantEvent(s, v1alpha1.EventPlanApplied, plan.Hash)
	if n := scalar[int](w, conn, "select partitions from millrace_engine.stream"); n != 4 {
		t.Errorf("%d partitions", n)
	}
}

// S5, A1, A2: a change waits with what it does and destroys; the plan is another one when spec or the database is; and an approval holds once.
func TestAPlannedChangeWaitsForItsOwnApproval(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s, g := newStream("orders", partitions(4)), newGroup("sink", "orders")
	w.create(s)
	w.create(g)
	w.wantReady(s)
	w.wantReady(g)
	conn := w.sql(dsn)
	w.fill(conn)

	update(w, s, func(s *v1alpha1.Stream) {
		s.Spec.ChangePolicy, s.Spec.Partitions, s.Spec.Retention.MaxMessages = v1alpha1.ChangePlan, 8, ptr.To[int64](10)
	})
	first := w.waiting(s, "")
	w.wantNotReady(s, v1alpha1.ReasonApprovalPending, "change partitions from 4 to 8", "It destroys up to 200 messages")
	if len(first.Destroys) != 1 || !strings.Contains(first.Destroys[0], "2 segments") || len(first.Statements) != 1 {
		t.Errorf("the plan is %+v", first)
	}
	// What exists can be worked with while a change of it waits.
	update(w, g, func(g *v1alpha1.ConsumerGroup) { g.Spec.MaxAttempts = ptr.To[int32](3) })
	w.wantReady(g)
	if *s.Status.Partitions != 4 || s.Status.Name != "orders" {
		t.Errorf("status is %+v", s.Status)
	}

	// Another spec.
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.Retention.MaxMessages = nil })
	second := w.waiting(s, first.Hash)
	if len(second.Destroys) > 0 {
		t.Errorf("without a lower limit it destroys %q", second.Destroys)
	}
	// Another database: someone dropped an index, and that is not repaired without approval either.
	id := scalar[int](w, conn, "select id from millrace_engine.stream where name = 'orders'")
	w.exec(conn, fmt.Sprintf("drop index millrace_engine.segment_%d_0_position_idx", id))
	third := w.waiting(s, second.Hash)
	if !strings.Contains(strings.Join(third.Steps, "; "), "index the positions of segment 1") {
		t.Errorf("the steps are %q", third.Steps)
	}
	w.want(s, v1alpha1.ConditionDrifted, metav1.ConditionTrue, v1alpha1.ReasonDriftFound)
	for _, old := range []string{first.Hash, second.Hash} {
		w.approve("stm/orders", old)
		w.wantNotReady(s, v1alpha1.ReasonApprovalOutdated, "approves "+old, third.Hash)
	}
	if n := scalar[int](w, conn, "select partitions from millrace_engine.stream"); n != 4 {
		t.Errorf("an approval of another plan made %d partitions", n)
	}
	w.approve("stm/orders", third.Hash)
	w.wantReady(s)
	if n := scalar[int](w, conn, "select partitions from millrace_engine.stream"); n != 8 {
		t.Errorf("there are %d partitions", n)
	}

	// The same damage again is a plan of its own.
	drop := fmt.Sprintf("drop index millrace_engine.segment_%d_0_position_idx", id)
	w.exec(conn, drop)
	fourth := w.waiting(s, "")
	w.wantNotReady(s, v1alpha1.ReasonApprovalPending)
	w.approve("stm/orders", fourth.Hash)
	w.wantReady(s)
	w.exec(conn, drop)
	fifth := w.waiting(s, "")
	if fifth.Hash == fourth.Hash {
		t.Error("an approval that was used holds again")
	}
	w.wantNotReady(s, v1alpha1.ReasonApprovalPending)

	// And without the policy nobody is asked.
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.ChangePolicy = v1alpha1.ChangeApply })
	w.wantReady(s)
	if s.Status.Plan != nil {
		t.Errorf("a plan is left: %+v", s.Status.Plan)
	}
}

// fill puts a hundred messages into each of three segments of the stream orders.
func (w *world) fill(conn *pgx.Conn) {
	w.Helper()
	id := scalar[int](w, conn, "select id from millrace_engine.stream where name = 'orders'")
	for segment := range 3 {
		w.exec(conn, "select millrace_engine.set_state($1, $2, null)", id, segment)
		w.exec(conn, `select millrace.publish('orders', to_jsonb(i)) from generate_series(1, 100) i`)
	}
}

// A Stream that may take over an orphan says so first, and what is in it stays untouched until then.
func TestAPlannedAdoptionWaits(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders")
	w.create(s)
	w.wantReady(s)
	conn := w.sql(dsn)
	owner := scalar[pgstream.Owner](w, conn, "select owner from millrace_engine.stream")
	if err := suite.client.Delete(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	w.wantGone(s)
	again := newStream("orders", withPlan, streamDeletion(v1alpha1.DeletionDelete))
	w.create(again)
	plan := w.waiting(again, "")
	if len(plan.Steps) != 1 || !strings.Contains(plan.Steps[0], "become the owner after "+w.namespace+"/orders") {
		t.Errorf("the steps are %q", plan.Steps)
	}
	if now := scalar[pgstream.Owner](w, conn, "select owner from millrace_engine.stream"); now != owner {
		t.Errorf("the owner is %+v, and was %+v", now, owner)
	}
	// Who has taken over nothing has nothing to drop.
	if err := suite.client.Delete(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	w.wantGone(again)
	third := newStream("orders", withPlan)
	w.create(third)
	w.approve("stm/orders", w.waiting(third, "").Hash)
	w.wantReady(third)
	w.wantEvent(third, v1alpha1.EventAdopted, w.namespace+"/orders")
}

// G5: the same for groups, which say when the change would make them lapse.
func TestAPlannedGroupWaitsForApproval(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders")
	g := newGroup("sink", "orders", func(g *v1alpha1.ConsumerGroupSpec) { g.ChangePolicy = v1alpha1.ChangePlan })
	w.create(s)
	w.create(g)
	waiting := func(before string) *v1alpha1.PlannedChange {
		t.Helper()
		w.eventually("a plan of the group", func() error {
			if err := suite.client.Get(t.Context(), key(g), g); err != nil {
				return err
			}
			if p := g.Status.Plan; p == nil || p.Hash == before || g.Status.ObservedGeneration != g.Generation {
				return fmt.Errorf("the plan is %+v", p)
			}
			return nil
		})
		return g.Status.Plan
	}
	plan := waiting("")
	if len(plan.Steps) != 1 || !strings.Contains(plan.Steps[0], `create Shared consumer group "sink"`) {
		t.Errorf("the steps are %q", plan.Steps)
	}
	conn := w.sql(dsn)
	if n := scalar[int](w, conn, "select count(*) from millrace_engine.consumer_group"); n > 0 {
		t.Error("the group was made before the approval")
	}
	command := "kubectl -n " + w.namespace + " annotate consumergroup sink millrace.dev/approve-plan=" + plan.Hash
	w.wantNotReady(g, v1alpha1.ReasonApprovalPending, command)
	w.approve("cg/sink", plan.Hash)
	w.wantReady(g)

	w.exec(conn, `select millrace.publish('orders', to_jsonb(i)) from generate_series(1, 11) i`)
	update(w, g, func(g *v1alpha1.ConsumerGroup) { g.Spec.Lapse = &v1alpha1.Lapse{Lag: ptr.To[int64](10)} })
	plan = waiting("")
	if len(plan.Destroys) != 1 || !strings.Contains(plan.Destroys[0], "it may lapse at once, because 11 messages wait") {
		t.Errorf("it destroys %q", plan.Destroys)
	}
	w.wantNotReady(g, v1alpha1.ReasonApprovalPending, "change lapse lag from 0 to 10")
	w.approve("cg/sink", plan.Hash)
	w.wantNotReady(g, v1alpha1.ReasonLapsed)
}

// A3: what changes the database between the approval and the change makes it another plan, also at the last moment.
func TestAnApprovalIsForTheDatabaseAsItIsAtTheLastMoment(t *testing.T) {
	w := newWorld(t)
	dsn := postgres.NewDatabase(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders", partitions(4))
	w.create(s)
	w.wantReady(s)
	update(w, s, func(s *v1alpha1.Stream) { s.Spec.ChangePolicy, s.Spec.Partitions = v1alpha1.ChangePlan, 8 })
	plan := w.waiting(s, "")

	// The manager has read the database and the approval, and waits for the lock to change it.
	conn, other := w.sql(dsn), w.sql(dsn)
	w.exec(other, "begin")
	w.exec(other, "select pg_advisory_xact_lock(1836019570, 1)")
	w.approve("stm/orders", plan.Hash)
	w.eventually("the manager waits for the lock", func() error {
		if scalar[int](w, conn, "select count(*) from pg_locks where locktype = 'advisory' and not granted") == 0 {
			return fmt.Errorf("it does not")
		}
		return nil
	})
	w.exec(other, "update millrace_engine.stream set max_messages = 5")
	w.exec(other, "commit")
	w.wantNotReady(s, v1alpha1.ReasonApprovalOutdated, plan.Hash, "change max messages from 5 to 0")
	if n := scalar[int](w, conn, "select partitions from millrace_engine.stream"); n != 4 {
		t.Errorf("there are %d partitions", n)
	}
	w.approve("stm/orders", w.waiting(s, plan.Hash).Hash)
	w.wantReady(s)
}

// The page for users: its manifest is applied, and its commands are run as they stand there.
func TestThePageOnChangesIsTrue(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "changes.md"))
	if err != nil {
		t.Fatal(err)
	}
	manifests, commands := blocks(page, "yaml"), blocks(page, "sh")
	if len(manifests) != 1 || len(commands) != 2 {
		t.Fatalf("the page has %d manifests and %d blocks of commands", len(manifests), len(commands))
	}
	w.shell("kubectl apply -f - <<'END'\n" + manifests[0] + "END\n")
	s := newStream("orders")
	s.Namespace = w.namespace
	plan := w.waiting(s, "")
	if text := w.shell(commands[0]); !strings.Contains(text, plan.Hash) || !strings.Contains(text, "create stream") {
		t.Errorf("the plan is shown as %s", text)
	}
	w.shell(commands[1])
	w.wantReady(s)
}

// blocks are the texts of a page in fences of a language.
func blocks(page []byte, language string) []string {
	var found []string
	for _, b := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllSubmatch(page, -1) {
		found = append(found, string(b[1]))
	}
	return found
}

// shell runs commands in which kubectl works in the test's namespace, and returns what they print.
func (w *world) shell(commands string) string {
	w.Helper()
	cmd := exec.CommandContext(w.Context(), "bash", "-euc", "kubectl() { "+suite.kubectlPath+" --kubeconfig "+suite.kubeconfig+" --namespace "+w.namespace+` "$@"; }`+"\n"+commands)
	text, err := cmd.CombinedOutput()
	if err != nil {
		w.Fatalf("%s: %v\n%s", commands, err, text)
	}
	return string(text)
}
