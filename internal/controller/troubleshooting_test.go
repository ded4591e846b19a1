package controller_test

import (
	"fmt"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// docs/troubleshooting.md shows what kubectl prints when something is wrong. Each of its sections has a test here that makes the failure and runs the
// commands of the section: what they print is compared with the page. MILLRACE_UPDATE=1 writes it into the page; look at the difference before it is committed.
const troubleshooting = "../../docs/troubleshooting.md"

func TestTroubleshootingAWrongPassword(t *testing.T) {
	w, dsn := newShop(t)
	w.secret(appDB.Name, appDB.Key, withPassword(t, dsn, "not-the-password-0815"))
	s, g, p := newStream("orders"), newGroup("billing", "orders"), newProcessor("billing", "billing")
	for _, o := range []object{s, g, p} {
		w.create(o)
	}
	w.wantNotReady(s, v1alpha1.ReasonAuthenticationFailed)
	w.wantNotReady(g, v1alpha1.ReasonStreamNotReady, "refuses user")
	w.wantNotReady(p, v1alpha1.ReasonConsumerGroupNotReady)
	w.wantEvent(s, v1alpha1.ReasonAuthenticationFailed)
	w.transcripts("The database refuses the password")
	w.secret(appDB.Name, appDB.Key, dsn)
	w.readyDeployments()
	w.wantReady(p)
}

func TestTroubleshootingABadMapping(t *testing.T) {
	w, dsn := newShop(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	w.secret("telemetry-redis", "url", redisURL)
	p := newProcessor("telemetry", "", fromRedis, func(p *v1alpha1.ProcessorSpec) {
		p.Mapping.Columns[1].Type = "money"
		p.Sink.Table.Key = []string{"order_nr"}
	})
	w.create(p)
	w.wantNotReady(p, v1alpha1.ReasonInvalidConfiguration)
	w.wantEvent(p, v1alpha1.ReasonInvalidConfiguration)
	w.transcripts("The mapping does not fit")
}

func TestTroubleshootingAPoisonMessage(t *testing.T) {
	w, dsn := newShop(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders", partitions(4))
	shared := newGroup("billing", "orders", func(g *v1alpha1.ConsumerGroupSpec) { g.MaxAttempts = ptr.To[int32](5) })
	ordered := newGroup("audit", "orders", func(g *v1alpha1.ConsumerGroupSpec) { g.Mode = v1alpha1.ModeOrdered })
	for _, o := range []object{s, shared, ordered} {
		w.create(o)
		w.wantReady(o)
	}
	w.wantMeasured(shared, ordered)
	db := w.sql(dsn)
	w.exec(db, `select millrace.publish('orders', to_jsonb(i), 'customer-' || i) from generate_series(1, 8) i`)
	for range 3 {
		w.exec(db, `select millrace.dead_letter(claim, array[position], 'column "amount" is null') from millrace.receive('orders', 'billing', 'billing-1', 1)`)
	}
	for range 5 {
		w.exec(db, `select millrace.nack(claim, array[position], 0, 'exit status 1') from millrace.receive('orders', 'audit', 'audit-1', 1)`)
	}
	w.want(ordered, v1alpha1.ConditionConsuming, metav1.ConditionFalse, v1alpha1.ReasonMessageFails)
	w.wantEvent(ordered, v1alpha1.ReasonMessageFails)
	w.wantEvent(shared, v1alpha1.EventDeadLetters)
	w.want(shared, v1alpha1.ConditionConsuming, metav1.ConditionFalse, v1alpha1.ReasonNobodyReceives) // the rest waits: nothing moves any more
	w.wantEvent(shared, v1alpha1.ReasonNobodyReceives)
	w.transcripts("A message fails again and again")
}

func TestTroubleshootingNobodyConsumes(t *testing.T) {
	w, dsn := newShop(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s, g := newStream("orders"), newGroup("billing", "orders")
	p := newProcessor("billing", "billing", func(p *v1alpha1.ProcessorSpec) { p.Replicas = ptr.To[int32](0) })
	w.readyDeployments()
	for _, o := range []object{s, g} {
		w.create(o)
		w.wantReady(o)
	}
	w.wantMeasured(g)
	w.create(p)
	w.exec(w.sql(dsn), `select millrace.publish('orders', to_jsonb(i)) from generate_series(1, 20) i`)
	w.want(p, v1alpha1.ConditionReady, metav1.ConditionTrue, v1alpha1.ReasonScaledToZero)
	w.want(g, v1alpha1.ConditionConsuming, metav1.ConditionFalse, v1alpha1.ReasonNobodyReceives)
	w.wantEvent(g, v1alpha1.ReasonNobodyReceives)
	w.eventually("the rates come to rest, and the Processor shows the lag", func() error {
		for _, o := range []client.Object{g, p} {
			if err := suite.client.Get(t.Context(), key(o), o); err != nil {
				return err
			}
		}
		if r := g.Status.PublishedPerMinute; r == nil || *r != 0 || p.Status.Lag == nil || *p.Status.Lag != 20 {
			return fmt.Errorf("%+v", g.Status)
		}
		return nil
	})
	w.transcripts("Nobody consumes, and the lag grows")
}

func TestTroubleshootingAHeldHorizon(t *testing.T) {
	w, dsn := newShop(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	s := newStream("orders")
	w.create(s)
	w.wantReady(s)
	db := w.sql(dsn)
	w.exec(db, `begin`)
	w.exec(db, `select millrace.publish('orders', '{"order_id": 1}')`)
	w.exec(w.sql(dsn), `select millrace.publish('orders', '{"order_id": 2}')`)
	w.want(s, v1alpha1.ConditionHorizonHeld, metav1.ConditionTrue, v1alpha1.ReasonOpenTransaction)
	w.wantEvent(s, v1alpha1.ReasonOpenTransaction)
	w.transcripts("Published, and nothing arrives")
	w.exec(db, `rollback`)
}

// Pods need a node, which this API server does not have: the test writes what a kubelet says of an image that is not there. test/e2e has pods that fail on
// a real node.
func TestTroubleshootingAPodThatDoesNotStart(t *testing.T) {
	w, dsn := newShop(t)
	w.secret(appDB.Name, appDB.Key, dsn)
	w.secret("telemetry-redis", "url", redisURL)
	const image = "registry.example.com/millrace/processor:v9.9"
	p := newProcessor("telemetry", "", fromRedis, func(p *v1alpha1.ProcessorSpec) { p.Image, p.Replicas = image, ptr.To[int32](1) })
	w.create(p)
	w.wantNotReady(p, v1alpha1.ReasonRollingOut)
	var d appsv1.Deployment
	if err := suite.client.Get(t.Context(), client.ObjectKey{Namespace: w.namespace, Name: "telemetry-processor"}, &d); err != nil {
		t.Fatal(err)
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: d.Name + "-6d5f7b9c4-x2x7q", Namespace: w.namespace, Labels: d.Spec.Template.Labels}}
	pod.Spec.Containers = []corev1.Container{{Name: "processor", Image: image}}
	w.create(pod)
	d.Status = appsv1.DeploymentStatus{ObservedGeneration: d.Generation, Replicas: 1, UpdatedReplicas: 1, UnavailableReplicas: 1}
	if err := suite.client.Status().Update(t.Context(), &d); err != nil {
		t.Fatal(err)
	}
	w.wantNotReady(p, v1alpha1.ReasonRollingOut, "1 have the newest configuration") // or it may hear of the pod first
	pod.Status.Phase = corev1.PodPending
	pod.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "processor", Image: image, State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{
		Reason:  "ImagePullBackOff",
		Message: `Back-off pulling image "` + image + `": ErrImagePull: failed to resolve reference "` + image + `": not found`,
	}}}}
	if err := suite.client.Status().Update(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	w.wantNotReady(p, v1alpha1.ReasonPodsFailing, "ImagePullBackOff")
	w.wantEvent(p, v1alpha1.ReasonPodsFailing)
	w.transcripts("A pod does not start")
}

// wantMeasured waits for the first figures of groups: what happens before them is no rate.
func (w *world) wantMeasured(groups ...*v1alpha1.ConsumerGroup) {
	w.Helper()
	for _, g := range groups {
		w.want(g, v1alpha1.ConditionLagKnown, metav1.ConditionTrue, v1alpha1.ReasonMeasured)
	}
}

// newShop makes a world and a database for it.
func newShop(t *testing.T) (*world, string) {
	t.Helper()
	return newWorld(t), postgres.NewDatabase(t)
}

// transcripts runs the commands of a section of the page, and compares what they print.
func (w *world) transcripts(section string) {
	w.Helper()
	page, err := os.ReadFile(troubleshooting)
	if err != nil {
		w.Fatal(err)
	}
	_, text, found := strings.Cut(string(page), "\n## "+section+"\n")
	if !found {
		w.Fatalf("%s has no section %q", troubleshooting, section)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	blocks := regexp.MustCompile("(?ms)^```console\n\\$ kubectl ([^\n]+)\n(.*?)^```$").FindAllStringSubmatch(text, -1)
	if len(blocks) == 0 {
		w.Fatalf("section %q has no transcript", section)
	}
	for _, b := range blocks {
		command, shown := b[1], b[2]
		var printed string
		if os.Getenv("MILLRACE_UPDATE") != "" {
			printed = w.normalised(command)
			w.rewrite(b[0], "```console\n$ kubectl "+command+"\n"+printed+"```")
			continue
		}
		// Figures arrive one after the other, so what is shown may need a moment.
		w.eventually("kubectl "+command, func() error {
			if printed = w.normalised(command); printed != shown {
				return fmt.Errorf("it prints\n%s\nand the page shows\n%s\nMILLRACE_UPDATE=1 writes it into the page", printed, shown)
			}
			return nil
		})
	}
}

// pages keeps the tests, which run side by side, from writing over each other.
var pages = make(chan struct{}, 1)

func (w *world) rewrite(old, text string) {
	w.Helper()
	pages <- struct{}{}
	defer func() { <-pages }()
	page, err := os.ReadFile(troubleshooting)
	if err != nil {
		w.Fatal(err)
	}
	if err := os.WriteFile(troubleshooting, []byte(strings.Replace(string(page), old, text, 1)), 0o644); err != nil {
		w.Fatal(err)
	}
}

// normalised runs kubectl and replaces what differs each time: names of this test's namespace and database, addresses, times and ages. Of describe it keeps status
// and events, and of the conditions those that say something: three dots stand for the rest.
func (w *world) normalised(command string) string {
	w.Helper()
	out := w.kubectl(strings.Fields(command)...)
	if strings.HasPrefix(command, "describe ") {
		out = remarkable(out)
	}
	var secret corev1.Secret
	if err := suite.client.Get(w.Context(), client.ObjectKey{Namespace: w.namespace, Name: appDB.Name}, &secret); err != nil {
		w.Fatal(err)
	}
	u, err := url.Parse(string(secret.Data[appDB.Key]))
	if err != nil {
		w.Fatal(err)
	}
	out = strings.NewReplacer(w.namespace, "shop", u.Host, "db.example.com:5432", strings.TrimPrefix(u.Path, "/"), "app",
		`user "`+u.User.Username()+`"`, `user "app"`).Replace(out)
	for _, r := range [][2]string{
		{`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`, "2026-11-21T09:00:00Z"},
		{`(?m)^  Bytes:( +)\d+$`, "  Bytes:${1}81920"},
		{`(?m)^  Normal +RollingOut .*\n`, ""}, // what it says first depends on how fast the Deployment is
		{`\bpid \d+`, "pid 4711"}, {`pg_terminate_backend\(\d+\)`, "pg_terminate_backend(4711)"},
		{`(?m)^(  \w+ +\w+ +)(?:\S+|\S+ \(x\d+ over \S+\))( +millrace )`, "${1}5m $2"}, // the age of an event
	} {
		out = regexp.MustCompile(r[0]).ReplaceAllString(out, r[1])
	}
	return aligned(out)
}

// remarkable keeps of kubectl describe what a person would read.
func remarkable(out string) string {
	_, status, _ := strings.Cut(out, "\nStatus:\n")
	lines := strings.Split(status, "\n")
	kept := []string{"...", "Status:"}
	const condition = "    Last Transition Time:"
	for i := 0; i < len(lines); {
		if !strings.HasPrefix(lines[i], condition) {
			kept = append(kept, strings.TrimRight(lines[i], " "))
			i++
			continue
		}
		j := i + 1
		for j < len(lines) && strings.HasPrefix(lines[j], "    ") && !strings.HasPrefix(lines[j], condition) {
			j++
		}
		// A condition without a message says that all is well.
		said := slices.ContainsFunc(lines[i:j], func(l string) bool {
			return strings.HasPrefix(l, "    Message: ") && strings.TrimSpace(l) != "Message:"
		})
		switch {
		case said:
			for _, l := range lines[i:j] {
				kept = append(kept, strings.TrimRight(l, " "))
			}
		case kept[len(kept)-1] != "    ...":
			kept = append(kept, "    ...")
		}
		i = j
	}
	return strings.Join(kept, "\n")
}

// aligned gives every table the widths that its own words need, with the same ages each time.
func aligned(out string) string {
	lines := strings.Split(strings.TrimRight(out, "\n"), "\n")
	for i := 0; i < len(lines); i++ {
		header := regexp.MustCompile(`\S+(?: \S+)*`).FindAllStringIndex(lines[i], -1)
		isTable := strings.HasPrefix(lines[i], "NAME ") || regexp.MustCompile(`^  Type +Reason +Age`).MatchString(lines[i])
		if !isTable {
			continue
		}
		end := i
		for end < len(lines) && strings.TrimSpace(lines[end]) != "" {
			end++
		}
		indent := lines[i][:header[0][0]]
		var rows [][]string
		for n, line := range lines[i:end] {
			cells := splitCells(line, header)
			if strings.HasPrefix(lines[i], "  Type") { // an event's columns were moved by its age
				cells = regexp.MustCompile(` {2,}`).Split(strings.TrimSpace(line), -1)
			}
			if len(cells) != len(header) { // the second line of a message
				cells = nil
			}
			for c := range cells {
				name := strings.TrimSpace(lines[i][header[min(c, len(header)-1)][0]:header[min(c, len(header)-1)][1]])
				if n > 0 && slices.Contains([]string{"AGE", "OLDEST"}, name) && cells[c] != "" && cells[c] != "<none>" {
					cells[c] = "5m"
				}
			}
			rows = append(rows, cells)
		}
		widths := make([]int, len(header))
		for _, r := range rows {
			for c := range r {
				widths[c] = max(widths[c], len(r[c]))
			}
		}
		for n, r := range rows {
			if r == nil {
				continue
			}
			var b strings.Builder
			for c := range r {
				fmt.Fprintf(&b, "%-*s   ", widths[c], r[c])
			}
			lines[i+n] = strings.TrimRight(indent+b.String(), " ")
		}
		i = end
	}
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return strings.Join(lines, "\n") + "\n"
}

// splitCells cuts a line where the columns of its header begin.
func splitCells(line string, header [][]int) []string {
	var cells []string
	for c := range header {
		from, to := min(header[c][0], len(line)), len(line)
		if c+1 < len(header) {
			to = min(header[c+1][0], len(line))
		}
		cells = append(cells, strings.TrimSpace(line[from:to]))
	}
	return cells
}
