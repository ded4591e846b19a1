package controller_test

import (
	"encoding/json"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// Helm, Flux and Argo CD go on when the status of a new generation is Ready, and give up when it is Stalled. Neither may be what the rollout
// before it came to: no status that the manager ever wrote says so.
func TestAProcessorIsNotJudgedByItsLastRollout(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.secret("telemetry-redis", "url", redisURL)
	p := newProcessor("telemetry", "", fromRedis)
	w.create(p)
	markReady(t.Context(), w.deployment(p))
	w.wantReady(p)

	update(w, p, func(p *v1alpha1.Processor) { p.Spec.Errors.MaxDeliveries = 7 })
	w.wantNotReady(p, v1alpha1.ReasonRollingOut, "1 of 1 pods are ready")
	afterReady := p.Generation

	w.eventually("the rollout stands still", func() error {
		d := w.deployment(p)
		d.Status.ObservedGeneration, d.Status.UpdatedReplicas = d.Generation, 0
		d.Status.Conditions = []appsv1.DeploymentCondition{{
			Type: appsv1.DeploymentProgressing, Status: corev1.ConditionFalse, Reason: "ProgressDeadlineExceeded", Message: "timed out progressing",
		}}
		return suite.client.Status().Update(t.Context(), d)
	})
	w.wantNotReady(p, v1alpha1.ReasonPodsFailing, "timed out progressing")
	update(w, p, func(p *v1alpha1.Processor) { p.Spec.Errors.MaxDeliveries = 8 })
	w.wantNotReady(p, v1alpha1.ReasonRollingOut, "1 of 1 pods are ready")
	afterStall := p.Generation

	seen := map[int64]bool{}
	for _, write := range suite.writes.in(w.namespace) {
		if !strings.HasSuffix(write.path, "/processors/telemetry/status") {
			continue
		}
		var written v1alpha1.Processor
		if err := json.Unmarshal([]byte(write.body), &written); err != nil {
			t.Fatal(err)
		}
		status := written.Status
		seen[status.ObservedGeneration] = true
		if status.ObservedGeneration == afterReady && meta.IsStatusConditionTrue(status.Conditions, v1alpha1.ConditionReady) {
			t.Errorf("generation %d was Ready before its pods were: %s", afterReady, write.body)
		}
		if status.ObservedGeneration == afterStall && meta.IsStatusConditionTrue(status.Conditions, v1alpha1.ConditionStalled) {
			t.Errorf("generation %d was Stalled by the rollout before it: %s", afterStall, write.body)
		}
	}
	if !seen[afterReady] || !seen[afterStall] {
		t.Errorf("the status of generations %d and %d was not written; seen %v", afterReady, afterStall, seen)
	}
}
