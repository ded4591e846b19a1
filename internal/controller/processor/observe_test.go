package processor

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

func TestDiagnose(t *testing.T) {
	now := time.Unix(1000, 0)
	running := func(since time.Duration, ready bool) corev1.ContainerStatus {
		return corev1.ContainerStatus{Ready: ready, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(now.Add(-since))}}}
	}
	waiting := func(reason, message string) corev1.ContainerStatus {
		return corev1.ContainerStatus{State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}}
	}
	died := func(c corev1.ContainerStatus, code int32, message string) corev1.ContainerStatus {
		c.LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ExitCode: code, Message: message}
		return c
	}
	pod := func(c ...corev1.ContainerStatus) corev1.Pod {
		return corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Status: corev1.PodStatus{ContainerStatuses: c}}
	}
	unschedulable := pod()
	unschedulable.Status.Conditions = []corev1.PodCondition{{
		Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: corev1.PodReasonUnschedulable, Message: "0/1 nodes are available",
	}}
	leaving := pod(waiting("CrashLoopBackOff", ""))
	leaving.DeletionTimestamp = &metav1.Time{Time: now}
	beside := pod(waiting("PodInitializing", ""))
	beside.Status.InitContainerStatuses = []corev1.ContainerStatus{waiting("ImagePullBackOff", "not found")}
	beside.Status.InitContainerStatuses[0].Name = "sidecar"
	unready := func(since, started time.Duration) corev1.Pod {
		p := pod(running(started, false))
		p.Status.Conditions = []corev1.PodCondition{{
			Type: corev1.PodReady, Status: corev1.ConditionFalse, LastTransitionTime: metav1.NewTime(now.Add(-since)),
		}}
		return p
	}
	for _, c := range []struct {
		name string
		pod  corev1.Pod
		want string // empty: no trouble
	}{
		{"a pod that is being created needs time", pod(waiting("ContainerCreating", "")), ""},
		{"one that just started, too", pod(running(time.Second, false)), ""},
		{"one that is ready has no trouble", pod(running(time.Hour, true)), ""},
		{"one that was killed once and is ready has none either", pod(died(running(time.Hour, true), 137, "")), ""},
		{"a pod that is leaving is not asked", leaving, ""},
		{"an image that cannot be pulled", pod(waiting("ImagePullBackOff", "not found")), "Pod p: ImagePullBackOff: not found"},
		{"a crash loop says the last line of the log", pod(died(waiting("CrashLoopBackOff", "back-off"), 1, "one\ntwo\n")), "Pod p: CrashLoopBackOff; it said: two"},
		{"a pod that restarts after a crash", pod(died(running(time.Second, false), 1, "bad config")), "exit code 1; it said: bad config"},
		{"a pod that never becomes ready", pod(running(time.Hour, false)), "kubectl logs tells why"},
		{"a pod that started and was not ready yet needs time", unready(12*time.Second, 10*time.Second), ""},
		{"a pod that was ready and is no more", unready(2*time.Second, 10*time.Second), "was ready until 1970-01-01T00:16:38Z and is no more; kubectl logs tells why"},
		{"a sidecar that does not start", beside, "Pod p, container sidecar: ImagePullBackOff: not found"},
		{"a pod without a node", unschedulable, "cannot be scheduled: 0/1 nodes are available"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := ""
			if t := diagnose([]corev1.Pod{c.pod}, now); t != nil {
				got = t.String()
			}
			if c.want == "" && got != "" || !strings.Contains(got, c.want) {
				t.Errorf("%q", got)
			}
		})
	}
}

// A pod that runs and is not ready says why itself. Nothing else it may answer gets into status.
func TestReadinessIsAskedOfThePod(t *testing.T) {
	for _, c := range []struct {
		name    string
		status  int
		body    string
		want    string
		refused bool
	}{
		{"what stands against it", 503, "sink: connect to db: connection refused\n", "sink: connect to db: connection refused", false},
		{"ready meanwhile", 200, "ready\n", "", false},
		{"another program", 404, "not found", "", true},
		{"one that leads elsewhere", 302, "", "", true},
		{"a long story", 503, strings.Repeat("x", 2*saidMax), strings.Repeat("x", saidMax) + "…", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			pod := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/readyz" {
					t.Errorf("asked for %s", r.URL.Path)
				}
				w.Header().Set("Location", "http://169.254.169.254/")
				w.WriteHeader(c.status)
				fmt.Fprint(w, c.body)
			}))
			defer pod.Close()
			got, err := readiness(t.Context(), pod.Listener.Addr().String())
			if got != c.want || (err != nil) != c.refused {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

// The last error stays when pods have recovered; said again it is no news, unless the container stopped once more.
func TestTheLastErrorIsRemembered(t *testing.T) {
	start := time.Unix(1000, 0)
	p := &v1alpha1.Processor{}
	for _, step := range []struct {
		name string
		t    trouble
		now  time.Duration
		want v1alpha1.PodError
	}{
		{"the first", trouble{pod: "a", what: ": it said: ", said: "no"}, 0, v1alpha1.PodError{Time: metav1.NewTime(start), Pod: "a", Message: "no"}},
		{"said again", trouble{pod: "a", what: ": it said: ", said: "no"}, time.Minute, v1alpha1.PodError{Time: metav1.NewTime(start), Pod: "a", Message: "no"}},
		{"stopped once more", trouble{pod: "a", what: ": it said: ", said: "no", at: start.Add(time.Hour)}, 2 * time.Hour,
			v1alpha1.PodError{Time: metav1.NewTime(start.Add(time.Hour)), Pod: "a", Message: "no"}},
		{"no words", trouble{pod: "b", what: ": InvalidImageName"}, 3 * time.Hour,
			v1alpha1.PodError{Time: metav1.NewTime(start.Add(3 * time.Hour)), Pod: "b", Message: "InvalidImageName"}},
	} {
		remember(p, &step.t, start.Add(step.now))
		if *p.Status.LastError != step.want {
			t.Errorf("%s: %+v, want %+v", step.name, *p.Status.LastError, step.want)
		}
	}
}
