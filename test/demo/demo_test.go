package main

import (
	"strings"
	"testing"
	"time"
)

func TestReadSettings(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, seconds, hold string
		want                settings
		wrong               bool
	}{
		{"a minute unless told otherwise", "", "", settings{length: time.Minute}, false},
		{"as many seconds as told", "20", "", settings{length: 20 * time.Second}, false},
		{"stays when told", "", "1", settings{length: time.Minute, hold: true}, false},
		{"refuses words", "soon", "", settings{}, true},
		{"refuses nothing at all", "0", "", settings{}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			got, err := readSettings(func(name string) string {
				return map[string]string{"DEMO_SECONDS": c.seconds, "DEMO_HOLD": c.hold}[name]
			})
			if (err != nil) != c.wrong || !c.wrong && got != c.want {
				t.Fatalf("got %+v, error %v", got, err)
			}
		})
	}
}

const answer = `{"items": [
  {"kind": "Stream", "metadata": {"name": "orders"}, "status": {"conditions": [
    {"type": "Ready", "status": "True", "reason": "Reconciled"}, {"type": "SchemaApplied", "status": "True"},
    {"type": "Stalled", "status": "False"}, {"type": "LagKnown", "status": "Unknown"}]}},
  {"kind": "Processor", "metadata": {"name": "telemetry"}, "status": {"conditions": [
    {"type": "Ready", "status": "False", "reason": "SecretMissing", "message": "create it"}]}},
  {"kind": "ConsumerGroup", "metadata": {"name": "new"}, "status": {}},
  {"kind": "Pod", "metadata": {"name": "telemetry-1"}, "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
    "containerStatuses": [{"restartCount": 2}]}},
  {"kind": "Pod", "metadata": {"name": "telemetry-2", "deletionTimestamp": "2026-01-01T00:00:00Z"}, "status": {"phase": "Running"}}
]}`

func TestObservation(t *testing.T) {
	t.Parallel()
	o, err := parseObservation([]byte(answer))
	if err != nil {
		t.Fatal(err)
	}
	want := "RESOURCE           READY    REASON         CONDITIONS\n" +
		"stream/orders        True     Reconciled     SchemaApplied LagKnown?\n" +
		"processor/telemetry  False    SecretMissing  \n" +
		"consumergroup/new    Unknown  NotReported    \n"
	if got := o.resourceTable(); strings.Join(strings.Fields(got), " ") != strings.Join(strings.Fields(want), " ") {
		t.Errorf("resources:\n%s", got)
	}
	if got := o.resources[1].message(); got != "SecretMissing: create it" {
		t.Errorf("message of a broken one: %q", got)
	}
	want = "POD READY STATUS RESTARTS telemetry-1 true Running 2 telemetry-2 false Terminating 0"
	if got := o.podTable(); strings.Join(strings.Fields(got), " ") != want {
		t.Errorf("pods:\n%s", got)
	}
}

func TestAFrameIsDrawnOverTheLastOne(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	s := &screen{out: &out, size: func() (int, int) { return 5, 4 }}
	s.draw("one\ntwo\nthree, which is too wide\nfour, which is one too many\n")
	if got, want := out.String(), "\rone\x1b[K\n\rtwo\x1b[K\n\rthree\x1b[K\n\x1b[J"; got != want {
		t.Errorf("first frame %q, want %q", got, want)
	}
	out.Reset()
	s.draw("1\n")
	if got, want := out.String(), "\x1b[3A\r1\x1b[K\n\x1b[J"; got != want {
		t.Errorf("second frame %q, want %q", got, want)
	}
}

func TestThousands(t *testing.T) {
	t.Parallel()
	for n, want := range map[int64]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567", -123: "-123", -1234: "-1,234"} {
		if got := thousands(n); got != want {
			t.Errorf("%d is written %s, want %s", n, got, want)
		}
	}
}
