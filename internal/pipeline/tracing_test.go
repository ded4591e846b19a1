package pipeline_test

import (
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// spanCollector is an OTLP/HTTP collector.
type spanCollector struct {
	*httptest.Server
	t testing.TB

	mu        sync.Mutex
	spans     []*tracev1.Span
	resources string
}

func newSpanCollector(t testing.TB) *spanCollector {
	c := &spanCollector{t: t}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		var request collector.ExportTraceServiceRequest
		if err := proto.Unmarshal(body, &request); err != nil || r.URL.Path != "/v1/traces" || r.Header.Get("X-Tenant") != "fleet" {
			t.Errorf("%s %s: %v", r.Method, r.URL, err)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, rs := range request.ResourceSpans {
			c.resources += fmt.Sprint(rs.Resource)
			for _, ss := range rs.ScopeSpans {
				c.spans = append(c.spans, ss.Spans...)
			}
		}
		w.Header().Set("Content-Type", "application/x-protobuf")
	}))
	t.Cleanup(c.Close)
	return c
}

// env points a processor to the collector.
func (c *spanCollector) env(more ...string) []string {
	return append([]string{"OTEL_EXPORTER_OTLP_ENDPOINT=" + c.URL, "OTEL_EXPORTER_OTLP_HEADERS=X-Tenant=fleet", "OTEL_BSP_SCHEDULE_DELAY=50",
		"OTEL_RESOURCE_ATTRIBUTES=deployment.environment.name=test"}, more...)
}

// find waits for a span that fits.
func (c *spanCollector) find(what string, fits func(*tracev1.Span) bool) *tracev1.Span {
	c.t.Helper()
	var found *tracev1.Span
	eventually(c.t, func() (bool, string) {
		c.mu.Lock()
		defer c.mu.Unlock()
		names := map[string]int{}
		for _, s := range c.spans {
			if names[s.Name]++; fits(s) {
				found = s
				return true, ""
			}
		}
		return false, fmt.Sprintf("no span %s among %v", what, names)
	})
	return found
}

// child waits for a child of a span with the given name.
func (c *spanCollector) child(name string, of *tracev1.Span) *tracev1.Span {
	c.t.Helper()
	return c.find(name+" below "+of.Name, func(s *tracev1.Span) bool {
		return s.Name == name && string(s.ParentSpanId) == string(of.SpanId) && string(s.TraceId) == string(of.TraceId)
	})
}

func linked(s, to *tracev1.Span) bool {
	for _, l := range s.Links {
		if string(l.SpanId) == string(to.SpanId) && string(l.TraceId) == string(to.TraceId) {
			return true
		}
	}
	return false
}

func attributeOf(s *tracev1.Span, key string) string {
	for _, a := range s.Attributes {
		if a.Key == key {
			if text := a.Value.GetStringValue(); text != "" {
				return text
			}
			return fmt.Sprint(a.Value.GetIntValue())
		}
	}
	return ""
}

// traceOf makes a trace context whose trace and span have the given digits.
func traceOf(trace, span int, flags string) string {
	return fmt.Sprintf("00-%032x-%016x-%s", trace, span, flags)
}

func hasContext(s *tracev1.Span, context string) bool {
	parts := strings.Split(context, "-")
	return hex.EncodeToString(s.TraceId) == parts[1] && hex.EncodeToString(s.ParentSpanId) == parts[2]
}

// An entry that comes with a trace context is followed to its row; the batches around it are spans too.
func TestTraceFromARedisEntryToItsRow(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := newSpanCollector(t)
	w.createPositions("check (odometer >= 0)")
	p := w.start("one", w.configText(), c.env()...)
	p.ready()
	sent, dropped, refused := traceOf(0xabc1, 0x11, "01"), traceOf(0xabc2, 0x22, "00"), traceOf(0xabc3, 0x33, "01")
	add := func(context, payload string) {
		w.do(w.redis.B().Xadd().Key(w.stream).Id("*").FieldValue().FieldValue("traceparent", context).FieldValue("payload", payload).Build())
	}
	before := time.Now()
	add(dropped, position(2, 2))
	add(sent, position(1, 1))
	add(refused, `{"device_id":"x","timestamp":"2026-01-01T00:00:00Z","odometer":-1}`)
	w.add(position(3, 3))

	entry := c.find("of the entry", func(s *tracev1.Span) bool { return hasContext(s, sent) })
	if entry.Name != "process "+w.stream || attributeOf(entry, "millrace.result") != "written" || attributeOf(entry, "messaging.consumer.group.name") != "positions" {
		t.Errorf("%v", entry)
	}
	if entry.Kind != tracev1.Span_SPAN_KIND_CONSUMER || entry.StartTimeUnixNano < uint64(before.UnixNano()) || entry.EndTimeUnixNano > uint64(time.Now().UnixNano()) {
		t.Errorf("%v", entry)
	}
	write := c.find("that writes it", func(s *tracev1.Span) bool {
		return s.Name == "write table" && linked(s, entry) && (s.Status == nil || s.Status.Code != tracev1.Status_STATUS_CODE_ERROR)
	})
	if write.StartTimeUnixNano < entry.StartTimeUnixNano || write.EndTimeUnixNano > entry.EndTimeUnixNano {
		t.Errorf("written from %d to %d, outside the entry's %d to %d", write.StartTimeUnixNano, write.EndTimeUnixNano, entry.StartTimeUnixNano, entry.EndTimeUnixNano)
	}
	receive := c.find("that received it", func(s *tracev1.Span) bool { return string(s.SpanId) == string(write.ParentSpanId) })
	if receive.Name != "receive "+w.stream || !linked(entry, receive) {
		t.Errorf("%v", receive)
	}
	c.child("settle "+w.stream, receive)
	failed := c.find("of the refused entry", func(s *tracev1.Span) bool { return hasContext(s, refused) })
	if attributeOf(failed, "millrace.result") != "rejected" || !strings.Contains(failed.Status.GetMessage(), "rule") {
		t.Errorf("%v", failed)
	}
	p.signal(15)
	if code := p.exited(patience); code != 0 {
		t.Errorf("exit code %d", code)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.spans {
		if hasContext(s, dropped) {
			t.Error("an entry whose trace is not sampled has a span")
		}
	}
	for _, want := range []string{"millrace-processor", "deployment.environment.name", "one"} {
		if !strings.Contains(c.resources, want) {
			t.Errorf("the resource %s has no %s", c.resources, want)
		}
	}
}

// orderTraced publishes one order with headers.
func (w *world) orderTraced(headers string, n int) {
	w.t.Helper()
	key := "k"
	m := pgstream.NewMessage{Key: &key, Payload: []byte(orders(n, n+1)[0])}
	if headers != "" {
		m.Headers = []byte(headers)
	}
	if _, err := pgstream.Publish(w.ctx, w.db, "orders", m); err != nil {
		w.t.Fatal(err)
	}
}

// The HTTP sink hands the trace on: in the request, whose span is in the trace, and in the event.
func TestTraceThroughTheHTTPSink(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"Single", "Batch"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.newOrders(pgstream.ModeShared)
			c, r := newSpanCollector(t), newReceiver(t, nil)
			w.start("one", deliver(r.URL, "Shared", mode), c.env(config.EnvSourceDatabaseURL+"="+w.dsn, config.EnvSinkDatabaseURL+"=")...).ready()
			sent := traceOf(0xdef1, 0x44, "01")
			w.orderTraced(`{"traceparent":"`+sent+`","tracestate":"vendor=1"}`, 1)
			message := c.find("of the message", func(s *tracev1.Span) bool { return hasContext(s, sent) })
			write := c.find("that writes it", func(s *tracev1.Span) bool { return s.Name == "write http" && linked(s, message) })
			parent := message
			if mode == "Batch" {
				parent = write
			}
			post := c.child("POST", parent)
			if post.Kind != tracev1.Span_SPAN_KIND_CLIENT || attributeOf(post, "http.response.status_code") != "200" {
				t.Errorf("%v", post)
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			if want := fmt.Sprintf("00-%x-%x-01", post.TraceId, post.SpanId); r.heads[0].Get("Traceparent") != want {
				t.Errorf("the request has %q, want %q", r.heads[0].Get("Traceparent"), want)
			}
			if want := fmt.Sprintf("00-%x-%x-01", message.TraceId, message.SpanId); r.events[0].TraceParent != want || !strings.Contains(r.bodies[0], `"tracestate":"vendor=1"`) {
				t.Errorf("the event is %s, want %q in it", r.bodies[0], want)
			}
		})
	}
}

// Without an exporter no spans are made, and the context that came is handed on as it is.
func TestTraceIsHandedOnWithoutAnExporter(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeShared)
	c, r := newSpanCollector(t), newReceiver(t, nil)
	w.start("one", deliver(r.URL, "Shared", "Single"), c.env(config.EnvSourceDatabaseURL+"="+w.dsn, config.EnvSinkDatabaseURL+"=", "OTEL_SDK_DISABLED=true")...).ready()
	sent := traceOf(0xdef2, 0x55, "01")
	w.orderTraced(`{"traceparent":"`+sent+`"}`, 1)
	w.orderTraced(`{"traceparent":"nonsense"}`, 2)
	w.orderTraced("", 3)
	becomes(t, "requests", 3, r.requests)
	r.mu.Lock()
	defer r.mu.Unlock()
	handedOn := 0
	for i, h := range r.heads {
		if got := h.Get("Traceparent"); got != r.events[i].TraceParent || got != "" && got != sent {
			t.Errorf("%q and %q, want %q or none", got, r.events[i].TraceParent, sent)
		} else if got == sent {
			handedOn++
		}
	}
	if handedOn != 1 || len(c.spans) != 0 {
		t.Errorf("%d requests have the context, %d spans", handedOn, len(c.spans))
	}
}

// A processor that is told to export in a way it does not know says so and does not start.
func TestTraceProtocolIsExplained(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("one", w.configText(), "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL=grpc")
	if code := p.exited(patience); code != 1 || !strings.Contains(p.tail(2000), "http/protobuf") {
		t.Errorf("exit code %d: %s", code, p.tail(2000))
	}
}

// The stream sink hands the trace on in the headers of the message.
func TestTraceThroughTheStreamSink(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeShared)
	plan, err := pgstream.PlanStream(w.ctx, w.db, pgstream.StreamSpec{Name: "invoices", Partitions: 2, PayloadType: pgstream.PayloadJSON})
	if err != nil {
		t.Fatal(err)
	}
	if err := pgstream.ApplyStream(w.ctx, w.db, plan); err != nil {
		t.Fatal(err)
	}
	c := newSpanCollector(t)
	text := strings.NewReplacer("MODE", "Shared", "sink: {table: {name: orders, create: IfMissing}}", "sink: {stream: {stream: invoices}}").Replace(ordersConfig)
	w.start("one", text, c.env(config.EnvSourceDatabaseURL+"="+w.dsn)...).ready()
	sent := traceOf(0xdef3, 0x66, "01")
	w.orderTraced(`{"traceparent":"`+sent+`"}`, 1)
	message := c.find("of the message", func(s *tracev1.Span) bool { return hasContext(s, sent) })
	becomes(t, "messages with the context", 1, func() int {
		return w.count("select count(*) from millrace.invoices where headers ->> 'traceparent' = $1", fmt.Sprintf("00-%x-%x-01", message.TraceId, message.SpanId))
	})
}
