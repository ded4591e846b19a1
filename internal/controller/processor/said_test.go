package processor

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func TestLastWordsOfAPod(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, log, want string }{
		{
			"a line in JSON is reduced to what a person reads",
			`{"time":"2026-11-20T13:38:20Z","level":"INFO","msg":"processor starting","processor":"p"}` + "\n" +
				`{"time":"2026-11-20T13:38:21Z","level":"ERROR","msg":"processor failed","processor":"p","error":"Postgres: no route to host"}` + "\n",
			"processor failed: Postgres: no route to host",
		},
		{"a message without an error stands alone", `{"msg":"processor stopped"}`, "processor stopped"},
		{"other text stays as it is", "panic: I7\nexit status 2", "exit status 2"},
		{"JSON of another kind stays as it is", `{"a":1}`, `{"a":1}`},
		{"a long line is cut", strings.Repeat("x", 2*saidMax), strings.Repeat("x", saidMax) + "…"},
		{"silence is nothing", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if got := said(&corev1.ContainerStateTerminated{Message: c.log}); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}
