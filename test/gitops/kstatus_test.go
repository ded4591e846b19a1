package gitops

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
)

// TestKstatus gives the same objects to the library that Flux and helm --wait decide by. It has no word for a resource that waits for a
// person but is not broken: what is suspended after it was ready is Current, and what waits for an approval is InProgress.
func TestKstatus(t *testing.T) {
	t.Parallel()
	want := map[string]status.Status{
		"new": status.InProgressStatus, "behind": status.InProgressStatus, "ready": status.CurrentStatus,
		// Without a status nothing speaks against it, says kstatus; the CRDs give every new resource one, observedGeneration -1.
		"no_status": status.CurrentStatus,
		"suspended": status.CurrentStatus, "suspended_when_new": status.InProgressStatus, "suspended_while_stalled": status.FailedStatus,
		"approval_pending":     status.InProgressStatus,
		"database_unreachable": status.InProgressStatus, "partitions_lowered": status.FailedStatus,
		"stream_missing": status.InProgressStatus, "lapsed": status.FailedStatus, "paused": status.CurrentStatus, "paused_and_lapsed": status.FailedStatus,
		"rolling_out": status.InProgressStatus, "pods_failing": status.InProgressStatus, "rollout_stands_still": status.FailedStatus,
		"invalid_configuration": status.FailedStatus, "scaled_to_zero": status.CurrentStatus,
	}
	for _, kind := range kinds {
		for _, path := range glob(t, filepath.Join(customizations, kind, "testdata", "*.yaml")) {
			name := strings.TrimSuffix(filepath.Base(path), ".yaml")
			t.Run(kind+"/"+name, func(t *testing.T) {
				t.Parallel()
				expected, known := want[name]
				if !known {
					t.Fatal("say what kstatus makes of it")
				}
				got, err := status.Compute(object(t, path))
				if err != nil {
					t.Fatal(err)
				}
				if got.Status != expected {
					t.Errorf("%s (%s), want %s", got.Status, got.Message, expected)
				}
			})
		}
	}
}
