package pipeline_test

import (
	"fmt"
	unescape "html"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

var tags = regexp.MustCompile(`(?s)<style>.*?</style>|<[^>]*>`)

// debug reads the status page as a person does: without tags, and white space as one blank.
func (p *processor) debug() (html, text string) {
	p.t.Helper()
	code, html := p.get("/debug")
	if code != http.StatusOK {
		p.t.Fatalf("%d: %s", code, html)
	}
	return html, strings.Join(strings.Fields(unescape.UnescapeString(tags.ReplaceAllString(html, " "))), " ")
}

// The status page shows what goes on: before the start, at work, and when something is wrong.
func TestDebugPage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	shows := func(p *processor, wanted ...string) {
		t.Helper()
		eventually(t, func() (bool, string) {
			_, text := p.debug()
			for _, want := range wanted {
				if !strings.Contains(text, want) {
					return false, fmt.Sprintf("no %q in %s", want, text)
				}
			}
			return true, ""
		})
	}
	down := *w
	down.redisURL = "redis://127.0.0.1:1/0"
	shows(down.start("early", w.configText()), "Not ready.", "start: waiting for Redis", "The pipeline has not started yet.", "codec: type: JSON")

	p := w.start("one", w.configText())
	p.ready()
	l := seeded(t, &load{total: 3000, duplicates: 0.05, undecodable: 0.01})
	w.produce(l)
	w.balanced(l)
	shows(p, "Ready.", "read Redis group \"positions\"", "2 writers to table public.positions", "dead letters "+fmt.Sprint(l.broken.Load()), w.stream, "MILLRACE_SINK_DATABASE_URL set", "half within")
	_, text := p.debug()
	if !regexp.MustCompile(`written [1-9][0-9 ]*(\.\d)? [1-9]`).MatchString(text) {
		t.Errorf("no rate of written entries in %s", text)
	}
	w.exec("drop table positions")
	w.add(position(1, 1_000_000))
	shows(p, "Not ready.", "sink: ", "failed writes, configuration")
	if html, _ := p.debug(); strings.Contains(html, "http-equiv") {
		t.Error("it is loaded again without being asked")
	}
	if _, html := p.get("/debug?every=7"); !strings.Contains(html, `<meta http-equiv="refresh" content="7">`) {
		t.Error("it is not loaded again")
	}
}

// The page holds no script and no secret, wherever people have put one, and what comes from outside is text.
func TestDebugPageHoldsNoSecret(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeShared)
	r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request, _ []cloudEvent) {
		w.WriteHeader(http.StatusInternalServerError)
		fmt.Fprint(w, `{"error":"<script>alert(1)</script>"}`)
	})
	text := strings.Replace(deliver(r.URL+"/in?token=url-secret", "Shared", "Single"), "timeout: 1s", "headers: {X-Api-Key: header-secret}, timeout: 1s", 1)
	p := w.start("one", text, config.EnvSourceDatabaseURL+"="+w.dsn, config.EnvSinkDatabaseURL+"=",
		config.EnvHTTPAuthorization+"=Bearer authorization-secret", config.EnvHTTPSigningKey+"=signing-secret")
	p.ready()
	w.order("k", orders(0, 1)...)
	eventually(t, func() (bool, string) {
		html, _ := p.debug()
		return strings.Contains(html, "&lt;script&gt;alert"), html
	})
	html, _ := p.debug()
	if strings.Contains(html, "<script") || strings.Contains(html, "-secret") || strings.Contains(html, w.db.Config().ConnConfig.Password) {
		t.Errorf("a script or a secret in\n%s", html)
	}
	for _, want := range []string{"an HTTP receiver", "(hidden)", config.EnvHTTPSigningKey} {
		if !strings.Contains(html, want) {
			t.Errorf("no %q in\n%s", want, html)
		}
	}
}
