package pipeline_test

import (
	"testing"
	"time"
)

// A Position published to telemetry:t is a row in positions within seconds.
func TestSeed_T12_PositionBecomesARow(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.stream = "telemetry:t"
	p := w.start("one", w.configText())
	p.ready()
	began := time.Now()
	w.add(position(1, 1))
	becomes(t, 5*time.Second, "rows", 1, w.rows)
	t.Logf("a row after %s", time.Since(began))
	becomes(t, 5*time.Second, "pending entries", 0, w.pending)
}
