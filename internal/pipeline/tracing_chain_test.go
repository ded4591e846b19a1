package pipeline_test

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/millrace-dev/millrace/client"
	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// What the programs of TestSeed_A06 are told by their environment.
const (
	tracePartEnv = "MILLRACE_TEST_TRACE_PART"
	traceDSNEnv  = "MILLRACE_TEST_TRACE_DSN"
)

// A06: one trace over the whole way. Five processes: a publisher, a processor that writes to another stream, a consumer whose handler fails once and then publishes,
// and two processors that write to a web server and to a table. Everything that an OTLP receiver is told of the message is one trace, whose spans hang together as the
// message travelled.
func TestSeed_A06_OneTraceOverTheWholeWay(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeShared)
	for _, sql := range []string{
		"select millrace.create_stream('invoices')", "select millrace.create_group('invoices', 'mailer')",
		"select millrace.create_stream('mails')", "select millrace.create_group('mails', 'orders_sink')", "select millrace.create_group('mails', 'archive')",
	} {
		if _, err := w.db.Exec(w.ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	c, r := newSpanCollector(t), newReceiver(t, nil)
	env := c.env(config.EnvSourceDatabaseURL + "=" + w.dsn)
	toStream := strings.NewReplacer("MODE", "Shared", "sink: {table: {name: orders, create: IfMissing}}", "sink: {stream: {stream: invoices}}").Replace(ordersConfig)
	toTable := strings.NewReplacer("MODE", "Shared", "stream: orders", "stream: mails", "group: orders_sink", "group: archive").Replace(ordersConfig)
	toWeb := strings.ReplaceAll(deliver(r.URL, "Shared", "Single"), "stream: orders", "stream: mails")
	for member, text := range map[string]string{"forwarder": toStream, "archiver": toTable} {
		w.start(member, text, env...).ready()
	}
	w.start("caller", toWeb, append(env, config.EnvSinkDatabaseURL+"=")...).ready()

	w.tracePart(c, "consume")
	if code := w.tracePart(c, "publish").exited(patience); code != 0 {
		t.Fatalf("the publisher exited with %d", code)
	}
	becomes(t, "rows", 1, func() int { return w.count("select count(*) from orders") })

	// As the message travelled: each span below the one before.
	checkout := c.find("of the application", func(s *tracev1.Span) bool { return s.Name == "checkout" })
	published := c.child("publish orders", checkout)
	forwarded := c.child("process orders", published)
	attempts := map[string]*tracev1.Span{}
	for _, attempt := range []string{"1", "2"} {
		attempts[attempt] = c.find("of attempt "+attempt, func(s *tracev1.Span) bool {
			return s.Name == "process invoices" && string(s.ParentSpanId) == string(forwarded.SpanId) && attributeOf(s, "millrace.message.attempt") == attempt
		})
	}
	mailed := c.child("publish mails", attempts["2"])
	var archived, called *tracev1.Span
	for _, group := range []string{"archive", "orders_sink"} {
		s := c.find("of group "+group, func(s *tracev1.Span) bool {
			return s.Name == "process mails" && string(s.ParentSpanId) == string(mailed.SpanId) && attributeOf(s, "messaging.consumer.group.name") == group
		})
		if group == "archive" {
			archived = s
		} else {
			called = s
		}
	}
	post := c.child("POST", called)
	all := []*tracev1.Span{checkout, published, forwarded, attempts["1"], attempts["2"], mailed, archived, called, post}
	for _, s := range all {
		if string(s.TraceId) != string(checkout.TraceId) {
			t.Errorf("%s is in another trace", s.Name)
		}
	}
	for _, want := range []struct {
		span   *tracev1.Span
		kind   tracev1.Span_SpanKind
		failed bool
		values string // attributes, as name=value
	}{
		{published, tracev1.Span_SPAN_KIND_PRODUCER, false, "messaging.system=millrace messaging.operation.type=send messaging.destination.name=orders messaging.message.id=1"},
		{forwarded, tracev1.Span_SPAN_KIND_CONSUMER, false, "messaging.operation.type=process messaging.message.id=1 millrace.message.attempt=1 millrace.result=written millrace.sink=stream"},
		{attempts["1"], tracev1.Span_SPAN_KIND_CONSUMER, true, "messaging.destination.name=invoices messaging.consumer.group.name=mailer messaging.message.id=1 millrace.result=nacked"},
		{attempts["2"], tracev1.Span_SPAN_KIND_CONSUMER, false, "messaging.operation.type=process messaging.client.id=mailer-1 messaging.message.id=1 millrace.result=acked"},
		{archived, tracev1.Span_SPAN_KIND_CONSUMER, false, "millrace.result=written millrace.sink=table"},
		{post, tracev1.Span_SPAN_KIND_CLIENT, false, "http.response.status_code=200"},
	} {
		if failed := want.span.Status.GetCode() == tracev1.Status_STATUS_CODE_ERROR; want.span.Kind != want.kind || failed != want.failed {
			t.Errorf("%s has kind %s and status %v", want.span.Name, want.span.Kind, want.span.Status)
		}
		for value := range strings.SplitSeq(want.values, " ") {
			if name, text, _ := strings.Cut(value, "="); attributeOf(want.span, name) != text {
				t.Errorf("%s has %s %q, want %q", want.span.Name, name, attributeOf(want.span, name), text)
			}
		}
	}
	// What belongs to a batch is a trace of its own, linked both ways.
	for name, s := range map[string]*tracev1.Span{"receive orders": forwarded, "receive invoices": attempts["1"], "receive mails": archived} {
		received := c.find(name, func(x *tracev1.Span) bool { return x.Name == name && linked(s, x) })
		if !c.linkedToContext(received, s.TraceId, s.ParentSpanId) {
			t.Errorf("%s is not linked to the context of what it received", name)
		}
	}
	c.find("that writes the row", func(s *tracev1.Span) bool { return s.Name == "write table" && linked(s, archived) })
	r.mu.Lock()
	defer r.mu.Unlock()
	if want := fmt.Sprintf("00-%x-%x-01", post.TraceId, post.SpanId); r.heads[0].Get("Traceparent") != want {
		t.Errorf("the web server was told %q, want %q", r.heads[0].Get("Traceparent"), want)
	}
	if got := hex.EncodeToString(checkout.TraceId); w.count("select count(*) from millrace.mails where headers ->> 'traceparent' like '00-' || $1 || '-%'", got) != 1 {
		t.Error("the last message does not carry the trace")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, who := range []string{"shop", "mailer", "millrace-processor"} {
		if !strings.Contains(c.resources, who) {
			t.Errorf("no span comes from %s", who)
		}
	}
}

func (c *spanCollector) linkedToContext(s *tracev1.Span, trace, span []byte) bool {
	for _, l := range s.Links {
		if string(l.TraceId) == string(trace) && string(l.SpanId) == string(span) {
			return true
		}
	}
	return false
}

// tracePart starts a program of the test, which is this binary.
func (w *world) tracePart(c *spanCollector, part string) *processor {
	w.t.Helper()
	p := &processor{t: w.t, exit: make(chan struct{})}
	p.cmd = exec.Command(os.Args[0])
	p.cmd.Env = append(c.env(), tracePartEnv+"="+part, traceDSNEnv+"="+w.dsn)
	out, err := p.cmd.StderrPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	go p.follow(out)
	w.t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.exit
		if w.t.Failed() {
			w.t.Logf("%s says:\n%s", part, p.tail(6000))
		}
	})
	return p
}

// tracePart is a program that traces as applications do, with the SDK and its exporter.
func tracePart(part string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := traceProgram(ctx, part); err != nil {
		slog.Error("failed", "error", err)
		return 1
	}
	return 0
}

func traceProgram(ctx context.Context, part string) error {
	for name, value := range map[string]string{"publish": "shop", "consume": "mailer"} {
		if part == name {
			_ = os.Setenv("OTEL_SERVICE_NAME", value)
		}
	}
	exporter, err := otlptracehttp.New(ctx)
	if err != nil {
		return err
	}
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter))
	defer func() { _ = provider.Shutdown(context.WithoutCancel(ctx)) }()
	c, err := client.Open(ctx, os.Getenv(traceDSNEnv), client.Options{TracerProvider: provider})
	if err != nil {
		return err
	}
	defer c.Close()
	if part == "publish" {
		ctx, span := provider.Tracer("shop").Start(ctx, "checkout")
		defer span.End()
		_, err := c.Publish(ctx, "orders", client.NewMessage{Key: "k", Payload: []byte(orders(1, 2)[0])})
		return err
	}
	return c.Consume(ctx, "invoices", "mailer", func(ctx context.Context, d *client.Delivery) error {
		if d.Attempt == 1 {
			return client.RetryAfter(errors.New("the mail server is away"), 10*time.Millisecond)
		}
		tx, err := d.Tx(ctx)
		if err != nil {
			return err
		}
		_, err = c.In(tx).Publish(ctx, "mails", client.NewMessage{Key: d.Key, Payload: d.Payload})
		return err
	}, client.ConsumeOptions{Member: "mailer-1"})
}
