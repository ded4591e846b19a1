package pipeline_test

import (
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// Every metric of the processor is in docs/metrics.md, and every one there exists.
func TestMetricsAreDocumented(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(millrace_processor_[a-z_]+)").FindAllStringSubmatch(string(page), -1) {
		documented[m[1]] = true
	}
	w := newWorld(t)
	p := w.start("one", w.configText())
	p.ready()
	w.add(position(1, 1))
	// What is known of a stream comes with the first look at its progress.
	var families []string
	eventually(t, func() (bool, string) {
		_, text := p.get("/metrics")
		families = nil
		for _, m := range regexp.MustCompile(`(?m)^# TYPE (millrace_processor_\w+)`).FindAllStringSubmatch(text, -1) {
			families = append(families, m[1])
		}
		return slices.Contains(families, "millrace_processor_lag_entries") && slices.Contains(families, "millrace_processor_oldest_pending_seconds"), strings.Join(families, " ")
	})
	for _, name := range families {
		if !documented[name] {
			t.Errorf("%s is not in docs/metrics.md", name)
		}
	}
	// Those with a label that only some pipelines have do not show before they have a value.
	sometimes := []string{"millrace_processor_branch_entries_total", "millrace_processor_stream_owner", "millrace_processor_stream_incarnation"}
	for name := range documented {
		if !slices.Contains(families, name) && !slices.Contains(sometimes, name) {
			t.Errorf("docs/metrics.md has %s, and the processor does not", name)
		}
	}
}

// What an HTTP receiver answers is counted, and so is an attempt that it put off.
func TestMetricsOfTheHTTPSink(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeShared)
	answers := make(chan int, 4)
	for _, status := range []int{503, 200, 404, 404} {
		answers <- status
	}
	r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request, _ []cloudEvent) { w.WriteHeader(<-answers) })
	p := w.start("one", deliver(r.URL, "Shared", "Single"), config.EnvSourceDatabaseURL+"="+w.dsn, config.EnvSinkDatabaseURL+"=")
	p.ready()
	for n := range 2 { // the second is refused, delivered again, and set aside
		w.order("k", orders(n, n+1)...)
		becomes(t, "unsettled", 0, func() int { unsettled, _ := w.backlog(); return unsettled })
	}
	want := map[string]float64{
		`millrace_processor_http_responses_total{status="2xx"}`:   1,
		`millrace_processor_http_responses_total{status="4xx"}`:   2,
		`millrace_processor_http_responses_total{status="5xx"}`:   1,
		`millrace_processor_http_responses_total{status="none"}`:  0,
		`millrace_processor_sink_errors_total{class="transient"}`: 1,
		`millrace_processor_entries_total{result="written"}`:      1,
		`millrace_processor_entries_total{result="rejected"}`:     2,
		"millrace_processor_dead_letters_total":                   1,
		"millrace_processor_in_flight_entries":                    0,
	}
	eventually(t, func() (bool, string) {
		got := p.metrics()
		for name, value := range want {
			if got[name] != value {
				return false, fmt.Sprintf("%s is %v, want %v", name, got[name], value)
			}
		}
		return true, ""
	})
}
