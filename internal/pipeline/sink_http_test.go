package pipeline_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// cloudEvent is an event as a receiver reads it.
type cloudEvent struct {
	SpecVersion     string          `json:"specversion"`
	ID              string          `json:"id"`
	Source          string          `json:"source"`
	Type            string          `json:"type"`
	Time            time.Time       `json:"time"`
	PartitionKey    string          `json:"partitionkey"`
	DataContentType string          `json:"datacontenttype"`
	Data            json.RawMessage `json:"data"`
	TraceParent     string          `json:"traceparent"`
}

// receiver is a web server that takes events. Its answer decides about each request.
type receiver struct {
	*httptest.Server
	t testing.TB

	mu     sync.Mutex
	events []cloudEvent // of every request, in the order of arrival
	heads  []http.Header
	bodies []string
}

// newReceiver starts a receiver. answer may be nil: then everything is taken.
func newReceiver(t testing.TB, answer func(w http.ResponseWriter, r *http.Request, events []cloudEvent)) *receiver {
	r := &receiver{t: t}
	r.Server = httptest.NewServer(r.handler(answer))
	t.Cleanup(r.Close)
	return r
}

func (rec *receiver) handler(answer func(http.ResponseWriter, *http.Request, []cloudEvent)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return // the sender was cut off
		}
		var events []cloudEvent
		switch kind := r.Header.Get("Content-Type"); kind {
		case "application/cloudevents+json":
			events = make([]cloudEvent, 1)
			err = json.Unmarshal(body, &events[0])
		case "application/cloudevents-batch+json":
			err = json.Unmarshal(body, &events)
		default:
			err = fmt.Errorf("content type %q", kind)
		}
		if err != nil || r.Method != http.MethodPost {
			rec.t.Errorf("%s %s: %v in %s", r.Method, r.URL, err, body)
		}
		rec.mu.Lock()
		rec.events = append(rec.events, events...)
		rec.heads, rec.bodies = append(rec.heads, r.Header), append(rec.bodies, string(body))
		rec.mu.Unlock()
		if answer != nil {
			answer(w, r, events)
		}
	})
}

// got returns what arrived.
func (rec *receiver) got() []cloudEvent {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	return slices.Clone(rec.events)
}

func (rec *receiver) requests() int {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	return len(rec.bodies)
}

const httpConfig = `
name: bill
source: {consumerGroup: {stream: orders, group: g}}
mapping:
  columns:
  - {name: n, path: n, type: bigint}
  - {name: note, path: note, type: text}
sink: {http: {url: "URL", mode: MODE, OPTIONS}}
`

func httpSink(t testing.TB, url, mode string, options ...string) *pipeline.HTTPSink {
	t.Helper()
	if options == nil {
		options = []string{"timeout: 5s"}
	}
	c, err := config.Parse([]byte(strings.NewReplacer("URL", url, "MODE", mode, "OPTIONS", strings.Join(options, ", ")).Replace(httpConfig)))
	if err != nil {
		t.Fatal(err)
	}
	s, err := pipeline.NewHTTPSink(c, pipeline.NewMetrics())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// event is an item with the given position and key.
func event(position int64, key string) *pipeline.Item {
	it := &pipeline.Item{
		ID: fmt.Sprint(position), Position: position, Stream: "orders", Created: time.Date(2026, 1, 2, 3, 4, 5, 678901000, time.UTC),
		Row: []pipeline.Value{{N: position, Valid: true}, {}},
	}
	if key != "" {
		it.Key = &key
	}
	return it
}

func events(n int) *pipeline.Batch {
	b := &pipeline.Batch{}
	for i := range n {
		b.Items = append(b.Items, event(int64(i), ""))
	}
	return b
}

func results(os []pipeline.Outcome) string {
	var text []string
	for _, o := range os {
		text = append(text, o.Result.String())
	}
	return strings.Join(text, " ")
}

func TestHTTPSinkSendsCloudEvents(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"Single", "Batch"} {
		r := newReceiver(t, nil)
		s := httpSink(t, r.URL+"/in?x=y", mode, "type: com.example.order", "headers: {X-Team: billing}")
		it := event(9007199254740993, "Zoë \"7\"")
		it.Stream = "telemetry:a.b/c"
		for range 2 { // the second is a redelivery
			os, err := s.Write(t.Context(), &pipeline.Batch{Items: []*pipeline.Item{it}})
			if err != nil || results(os) != "written" {
				t.Fatalf("%v, %v", os, err)
			}
		}
		const id = "bill/telemetry:a%2Eb%2Fc/9007199254740993"
		want := `{"specversion":"1.0","id":"` + id + `","source":"/streams/telemetry:a%2Eb%2Fc","type":"com.example.order","time":"2026-01-02T03:04:05.678901Z",` +
			`"partitionkey":"Zoë \"7\"","datacontenttype":"application/json","data":{"n":9007199254740993,"note":null}}`
		if mode == "Batch" {
			want = "[" + want + "]"
		}
		if r.bodies[0] != want || r.bodies[1] != want {
			t.Errorf("%s\nwant\n%s", r.bodies, want)
		}
		h := r.heads[0]
		if h.Get("X-Team") != "billing" || h.Get("Idempotency-Key") == "" || h.Get("Idempotency-Key") != r.heads[1].Get("Idempotency-Key") || h.Get("Webhook-Signature") != "" {
			t.Errorf("headers %v", h)
		}
		if mode == "Single" && h.Get("Idempotency-Key") != id {
			t.Errorf("idempotency key %q", h.Get("Idempotency-Key"))
		}
	}
}

// Every status in both modes, for a batch of one: what an item comes to, or the class of the error of the whole.
func TestHTTPSinkJudgesStatuses(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]string{
		200: "written", 201: "written", 202: "written", 204: "written",
		400: "rejected", 401: "rejected", 403: "rejected", 404: "rejected", 409: "rejected", 410: "rejected", 413: "rejected", 422: "rejected", 451: "rejected",
		408: "retry", 429: "retry", 500: "retry", 501: "retry", 502: "retry", 503: "retry", 504: "retry", 599: "retry",
		301: "configuration", 302: "configuration", 303: "configuration", 304: "configuration",
	} {
		for _, mode := range []string{"Single", "Batch"} {
			t.Run(fmt.Sprint(mode, " ", status), func(t *testing.T) {
				t.Parallel()
				r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request, _ []cloudEvent) {
					w.Header().Set("Location", "/elsewhere")
					w.Header().Set("Content-Type", "application/json")
					w.WriteHeader(status)
					if status >= 400 {
						fmt.Fprint(w, `{"error":"because"}`)
					}
				})
				os, err := httpSink(t, r.URL, mode).Write(t.Context(), events(1))
				got := results(os)
				if err != nil {
					got = map[pipeline.Class]string{pipeline.ClassRow: "rejected", pipeline.ClassTransient: "retry", pipeline.ClassConfiguration: "configuration"}[pipeline.Classify(err)]
					os = []pipeline.Outcome{{Reason: err.Error()}}
				}
				if got != want {
					t.Fatalf("%s, want %s (%v)", got, want, err)
				}
				if status >= 400 && (!strings.Contains(os[0].Reason, fmt.Sprint(status)) || !strings.Contains(os[0].Reason, "because")) {
					t.Errorf("reason %q", os[0].Reason)
				}
				if r.requests() != 1 {
					t.Errorf("%d requests", r.requests())
				}
			})
		}
	}
}

// A redirect is followed where it keeps method and host. No event reaches a host that nobody configured.
func TestHTTPSinkFollowsNoForeignRedirect(t *testing.T) {
	t.Parallel()
	foreign := newReceiver(t, nil)
	for to, want := range map[string]string{
		"/moved":                "written",
		foreign.URL + "/events": "configuration",
		"//" + strings.Replace(strings.TrimPrefix(foreign.URL, "http://"), "127.0.0.1", "localhost", 1): "configuration",
		"https://127.0.0.1/x": "configuration",
		"/loop":               "configuration",
	} {
		r := newReceiver(t, func(w http.ResponseWriter, r *http.Request, _ []cloudEvent) {
			if r.URL.Path != "/moved" {
				http.Redirect(w, r, to, http.StatusTemporaryRedirect)
			}
		})
		os, err := httpSink(t, r.URL+"/in", "Single").Write(t.Context(), events(1))
		got := results(os)
		if err != nil && pipeline.Classify(err) == pipeline.ClassConfiguration {
			got = "configuration"
		}
		if got != want {
			t.Errorf("%s: %s, want %s (%v)", to, got, want, err)
		}
		if want == "written" && (len(r.got()) != 2 || r.got()[1].ID != "bill/orders/0") {
			t.Errorf("the event did not follow: %v", r.got())
		}
	}
	if n := foreign.requests(); n != 0 {
		t.Errorf("%d requests reached a foreign host", n)
	}
}

// What the network does is no event's fault.
func TestHTTPSinkTriesAgainAfterTroubleOfTheNetwork(t *testing.T) {
	t.Parallel()
	block := make(chan struct{})
	slow := newReceiver(t, func(_ http.ResponseWriter, r *http.Request, _ []cloudEvent) {
		select {
		case <-block:
		case <-r.Context().Done():
		}
	})
	t.Cleanup(func() { close(block) })
	cut := func(w http.ResponseWriter, begin string) {
		conn, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = rw.WriteString(begin)
		_ = rw.Flush()
		_ = conn.Close()
	}
	broken := newReceiver(t, func(w http.ResponseWriter, _ *http.Request, _ []cloudEvent) { cut(w, "") })
	short := newReceiver(t, func(w http.ResponseWriter, _ *http.Request, _ []cloudEvent) {
		cut(w, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"results\": [")
	})
	gone := newReceiver(t, nil)
	gone.Close()
	for name, url := range map[string]string{
		"no answer in time": slow.URL, "cut off": broken.URL, "nobody listens": gone.URL, "no such host": "http://host.invalid", "cut off in the results": short.URL,
	} {
		for _, mode := range []string{"Single", "Batch"} {
			if url == short.URL && mode == "Single" {
				continue // the status says it all
			}
			t.Run(name+" "+mode, func(t *testing.T) {
				t.Parallel()
				os, err := httpSink(t, url+"/?token=very-secret", mode, "timeout: 300ms").Write(t.Context(), events(2))
				var text string
				switch {
				case mode == "Batch":
					if err == nil || pipeline.Classify(err) != pipeline.ClassTransient {
						t.Fatalf("%v, %v", os, err)
					}
					text = err.Error()
				case err != nil || results(os) != "retry retry":
					t.Fatalf("%v, %v", os, err)
				default:
					text = os[0].Reason
				}
				if text == "" || strings.Contains(text, "secret") {
					t.Errorf("reason %q", text)
				}
			})
		}
	}
}

// A receiver that asks for a pause gets it, and nothing else is sent meanwhile.
func TestHTTPSinkWaitsAsLongAsItIsAsked(t *testing.T) {
	t.Parallel()
	var first atomic.Int64
	r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request, _ []cloudEvent) {
		if first.CompareAndSwap(0, time.Now().UnixNano()) {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusTooManyRequests)
			return
		}
		if waited := time.Since(time.Unix(0, first.Load())); waited < time.Second {
			t.Errorf("asked again after %s", waited)
		}
	})
	s := httpSink(t, r.URL, "Single", "maxConcurrent: 1")
	os, err := s.Write(t.Context(), events(3))
	if err != nil || results(os) != "retry retry retry" || !strings.Contains(os[1].Reason, "429") {
		t.Fatalf("%v, %v", os, err)
	}
	if os, err = s.Write(t.Context(), events(3)); err != nil || results(os) != "written written written" {
		t.Fatalf("%v, %v", os, err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	first.Store(0)
	_, _ = s.Write(t.Context(), events(1))
	if _, err = s.Write(ended, events(1)); err == nil {
		t.Error("a write whose context has ended waited")
	}
}

// A batch that is taken in part.
func TestHTTPSinkReadsResults(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		reply, want string
		ordered     bool
	}{
		"by id":                     {`{"results":[{"id":"bill/orders/2","status":422,"error":"no such customer"},{"id":"bill/orders/0","status":200},{"id":"bill/orders/1","status":503}]}`, "written retry rejected", false},
		"by place":                  {`{"results":[{"status":200},{"status":429},{"status":204}]}`, "written retry written", false},
		"one is missing":            {`{"results":[{"id":"bill/orders/0","status":200},{"id":"bill/orders/2","status":200}]}`, "written retry written", false},
		"of other events":           {`{"results":[{"id":"bill/orders/77","status":200},{"id":"bill/orders/78","status":400}]}`, "retry retry retry", false},
		"more than events":          {`{"results":[{"status":200},{"status":200},{"status":200},{"status":400}]}`, "written written written", false},
		"none":                      {`{"results":null}`, "written written written", false},
		"empty":                     {`{"results":[]}`, "retry retry retry", false},
		"a text":                    {`thank you`, "written written written", false},
		"nothing":                   {``, "written written written", false},
		"another object":            {`{"ok":true}`, "written written written", false},
		"unreadable":                {`{"results":{"bill/orders/0":200}}`, "configuration", false},
		"in order, one fails":       {`{"results":[{"status":200},{"status":422},{"status":200}]}`, "written rejected retry", true},
		"in order, one not now":     {`{"results":[{"status":200},{"status":500},{"status":200}]}`, "written retry retry", true},
		"in order, the rest is out": {`{"results":[{"status":200}]}`, "written retry retry", true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request, _ []cloudEvent) { fmt.Fprint(w, tc.reply) })
			b := events(3)
			b.InOrder = tc.ordered
			os, err := httpSink(t, r.URL, "Batch").Write(t.Context(), b)
			got := results(os)
			if err != nil {
				got = pipeline.Classify(err).String()
			}
			if got != tc.want {
				t.Errorf("%s, want %s (%v)", got, tc.want, err)
			}
			if name == "by id" && !strings.Contains(os[2].Reason, "no such customer") {
				t.Errorf("reason %q", os[2].Reason)
			}
		})
	}
}

// A reply without an end costs neither memory nor a batch that was taken.
func TestHTTPSinkBoundsReplies(t *testing.T) {
	t.Parallel()
	var sent atomic.Int64
	r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request, _ []cloudEvent) {
		page := []byte(strings.Repeat(" ", 1<<16))
		for range 1000 {
			n, err := w.Write(page)
			if sent.Add(int64(n)); err != nil {
				return
			}
		}
	})
	if os, err := httpSink(t, r.URL, "Single").Write(t.Context(), events(1)); err != nil || results(os) != "written" {
		t.Errorf("%v, %v", os, err)
	}
	if _, err := httpSink(t, r.URL, "Batch").Write(t.Context(), events(1)); pipeline.Classify(err) != pipeline.ClassConfiguration || !strings.Contains(fmt.Sprint(err), "more than") {
		t.Errorf("%v", err)
	}
	if n := sent.Load(); n > 60<<20 {
		t.Errorf("%d bytes were read", n)
	}
}

// In an ordered batch nothing is sent after an event that was not taken; otherwise events of one key keep their order.
func TestHTTPSinkKeepsOrder(t *testing.T) {
	t.Parallel()
	refuse := func(id string, status int) func(http.ResponseWriter, *http.Request, []cloudEvent) {
		return func(w http.ResponseWriter, _ *http.Request, events []cloudEvent) {
			if events[0].ID == id {
				w.WriteHeader(status)
			}
		}
	}
	for status, want := range map[int]string{400: "written written rejected retry retry", 500: "written written retry retry retry"} {
		r := newReceiver(t, refuse("bill/orders/2", status))
		b := events(5)
		b.InOrder = true
		os, err := httpSink(t, r.URL, "Single").Write(t.Context(), b)
		if err != nil || results(os) != want {
			t.Errorf("%d: %s, %v", status, results(os), err)
		}
		if n := r.requests(); n != 3 {
			t.Errorf("%d requests", n)
		}
	}
	r := newReceiver(t, nil)
	b := &pipeline.Batch{}
	for n := range 200 {
		b.Items = append(b.Items, event(int64(n), fmt.Sprint("key-", n%7)))
	}
	if os, err := httpSink(t, r.URL, "Single").Write(t.Context(), b); err != nil || strings.Count(results(os), "written") != 200 {
		t.Errorf("%v", err)
	}
	checkOrder(t, r.got())
}

// checkOrder checks that the events of each key came in the order of their positions, repetitions apart.
func checkOrder(t *testing.T, all []cloudEvent) {
	t.Helper()
	last, seen := map[string]int64{}, map[string]bool{}
	for _, e := range all {
		var position int64
		if _, err := fmt.Sscanf(e.ID, "bill/orders/%d", &position); err != nil {
			t.Fatal(err)
		}
		if position < last[e.PartitionKey] && !seen[e.ID] {
			t.Errorf("%s came after position %d of key %s", e.ID, last[e.PartitionKey], e.PartitionKey)
		}
		last[e.PartitionKey], seen[e.ID] = max(last[e.PartitionKey], position), true
	}
}

func TestHTTPSinkLimitsRequestsAtOnce(t *testing.T) {
	t.Parallel()
	const limit = 3
	var now, most atomic.Int64
	full, once := make(chan struct{}), sync.Once{}
	r := newReceiver(t, func(_ http.ResponseWriter, r *http.Request, _ []cloudEvent) {
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			continue
		}
		if n == limit {
			once.Do(func() { close(full) })
		}
		select {
		case <-full: // the first ones wait until there are so many
		case <-r.Context().Done():
		}
	})
	s := httpSink(t, r.URL, "Single", fmt.Sprint("maxConcurrent: ", limit))
	var wg sync.WaitGroup
	for range 4 { // writers
		wg.Go(func() {
			if os, err := s.Write(t.Context(), events(50)); err != nil || strings.Count(results(os), "written") != 50 {
				t.Errorf("%v %v", os, err)
			}
		})
	}
	wg.Wait()
	if most.Load() != limit {
		t.Errorf("%d requests at once, want %d", most.Load(), limit)
	}
}

// A few events that always fail for the receiver's reasons do not keep the others from being sent.
func TestHTTPSinkSendsOthersBesideThoseThatFail(t *testing.T) {
	t.Parallel()
	r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request, events []cloudEvent) {
		if len(events[0].ID) == len("bill/orders/0") { // ten of them
			w.WriteHeader(http.StatusInternalServerError)
		}
	})
	s := httpSink(t, r.URL, "Single", "maxConcurrent: 2")
	b := events(100)
	for range 200 {
		os, err := s.Write(t.Context(), b)
		if err != nil {
			t.Fatal(err)
		}
		var left []*pipeline.Item
		for i, o := range os {
			if o.Result == pipeline.Retry {
				left = append(left, b.Items[i])
			}
		}
		b.Items = left
		if len(left) == 10 {
			return
		}
	}
	t.Errorf("%d events are left, of which 10 fail", len(b.Items))
}

// What an event carries: an expression's value, the columns, or the document, to the digit.
func TestHTTPSinkSendsWhatItIsAskedFor(t *testing.T) {
	t.Parallel()
	const document = `{ "n": 9007199254740993, "price": 1.10, "tags": ["a","b"] }`
	for options, want := range map[string]string{
		`data: "{'total': row.n, 'price': doc.price, 'key': key, 'attempt': deliveries}"`: `{"attempt":3,"key":"k","price":1.1,"total":9007199254740993}`,
		`data: "doc.tags"`:    `["a","b"]`,
		`data: "doc.missing"`: "",
		`timeout: 5s`:         `{"n":9007199254740993,"note":null}`,
		``:                    document,
	} {
		for _, mode := range []string{"Single", "Batch"} {
			r := newReceiver(t, nil)
			text := strings.NewReplacer("URL", r.URL, "MODE", mode, "OPTIONS", options).Replace(httpConfig)
			if options == "" {
				before, rest, _ := strings.Cut(text, "mapping:")
				_, sink, _ := strings.Cut(rest, "sink:")
				text = before + "sink:" + sink
			}
			c, err := config.Parse([]byte(text))
			if err != nil {
				t.Fatal(err)
			}
			s, err := pipeline.NewHTTPSink(c, pipeline.NewMetrics())
			if err != nil {
				t.Fatal(err)
			}
			transform, err := pipeline.NewTransform(c)
			if err != nil {
				t.Fatal(err)
			}
			it := event(1, "k")
			it.Payload, it.Deliveries, it.Row = document, 3, make([]pipeline.Value, len(c.Mapping.Columns))
			if err := transform.Decode(it); err != nil {
				t.Fatal(err)
			}
			os, err := s.Write(t.Context(), &pipeline.Batch{Items: []*pipeline.Item{it}})
			switch {
			case err != nil:
				t.Errorf("%s: %v", options, err)
			case want == "" && (results(os) != "rejected" || !strings.Contains(os[0].Reason, "missing") || len(r.got()) != 0):
				t.Errorf("%s: %v", options, os)
			case want != "" && (results(os) != "written" || len(r.got()) != 1 || string(r.got()[0].Data) != want):
				t.Errorf("%s: %v, %s", options, os, r.bodies)
			}
		}
	}
}
