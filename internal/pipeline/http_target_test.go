package pipeline

import (
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// What a receiver says may repeat the request. Of an address that is a secret, the path is one too.
func TestAReceiversWordsHoldNoSecret(t *testing.T) {
	t.Setenv(config.EnvHTTPURL, "https://hooks.example.org/services/T00%2F1/path-secret?key=query-secret")
	t.Setenv(config.EnvHTTPAuthorization, "Bearer token-secret")
	target, err := newHTTPTarget(&config.HTTPSink{})
	if err != nil {
		t.Fatal(err)
	}
	to, err := target.now()
	if err != nil {
		t.Fatal(err)
	}
	for _, said := range []string{
		`{"error": "nothing at /services/T00%2F1/path-secret?key=query-secret"}`,
		`{"error": "nothing at /services/T00/1/path-secret"}`,
		`{"title": "forbidden", "detail": "Bearer token-secret"}`,
	} {
		if got := to.explanation([]byte(said)); strings.Contains(got, "secret") || got == "" {
			t.Errorf("%s is shown as %q", said, got)
		}
	}
}

// With two receivers it is not known whose a secret of the environment is, and the other must not get it.
func TestASecretHasOneReceiver(t *testing.T) {
	parse := func(branches string) *config.Config {
		c, err := config.Parse([]byte(`
name: two
source: {consumerGroup: {stream: orders, group: two}}
sink:
  fanOut:
` + branches + `
errors: {policy: Pending}
`))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	one := `  - {name: a, http: {url: "https://a.example.org/"}}`
	two := one + "\n" + `  - {name: b, http: {url: "https://b.example.org/"}}`
	open := func(c *config.Config) error {
		_, err := NewFanOut(t.Context(), SinkOptions{Config: c, Metrics: NewMetrics()})
		return err
	}
	if err := open(parse(two)); err != nil {
		t.Errorf("without secrets: %v", err)
	}
	t.Setenv(config.EnvHTTPSigningKey, "key")
	if err := open(parse(one)); err != nil {
		t.Errorf("with one receiver: %v", err)
	}
	err := open(parse(two))
	if err == nil || Classify(err) != ClassConfiguration || !strings.Contains(err.Error(), config.EnvHTTPSigningKey+" is set, and the branches a, b would all use it") {
		t.Errorf("with two: %v", err)
	}
}

func TestNoBranchSaysWhichThereAre(t *testing.T) {
	c := &config.Config{Sink: config.Sink{FanOut: []config.Branch{{Name: "rows"}, {Name: "hook"}}}}
	if err := noBranch(c, "nope"); !strings.Contains(err.Error(), `no branch "nope"; write one of rows, hook`) {
		t.Error(err)
	}
	if err := noBranch(&config.Config{}, "nope"); !strings.Contains(err.Error(), "leave the branch out") {
		t.Error(err)
	}
}
