package pipeline

import (
	"context"
	"os"
	"strings"

	"github.com/tidwall/gjson"
	otel "go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// tracerName is the scope of the pipeline's spans.
const tracerName = "github.com/millrace-dev/millrace/internal/pipeline"

// maxLinks of one span. A batch has more items; those of the others find the batch by its time.
const maxLinks = 128

// Tracer makes OpenTelemetry spans of what happens between source and sink. A nil Tracer makes none and costs nothing.
//
//	receive   a batch, from the read until it is decoded
//	process   an item that came with a W3C trace context, as that context's child, from the read until its outcome
//	write     a batch given to the sink, as a child of the receive of its first item, linked to its items' spans
//	settle    its outcomes, told to the source
//
// Items without a trace context have no span of their own: there are too many of them. An item hands on the context of its
// span, or else that of the batch it was received with.
type Tracer struct {
	tracer   trace.Tracer
	provider *sdktrace.TracerProvider
	codec    *config.Codec
	common   []otel.KeyValue // what every span of the source says
	sink     string
}

// NewTracer returns a tracer that the standard OTEL_* variables of the environment configure, or nil when they name no
// endpoint or switch it off. Spans are exported by OTLP over HTTP.
func NewTracer(ctx context.Context, c *config.Config, member string) (*Tracer, error) {
	endpoint := os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") + os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT")
	if endpoint == "" || strings.EqualFold(os.Getenv("OTEL_SDK_DISABLED"), "true") || os.Getenv("OTEL_TRACES_EXPORTER") == "none" {
		return nil, nil
	}
	protocol := os.Getenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
	if protocol == "" {
		protocol = os.Getenv("OTEL_EXPORTER_OTLP_PROTOCOL")
	}
	if protocol != "" && protocol != "http/protobuf" {
		return nil, NewConfigurationError("OTEL_EXPORTER_OTLP_PROTOCOL is %q; write http/protobuf, and the collector's port for it, often 4318", protocol)
	}
	exporter, err := otlptracehttp.New(ctx)
	if err != nil {
		return nil, NewConfigurationError("the OTEL_EXPORTER_OTLP variables cannot be used: %v", err)
	}
	who, err := resource.New(ctx, resource.WithTelemetrySDK(), resource.WithAttributes(
		otel.String("service.name", "millrace-processor"), otel.String("service.instance.id", member),
	), resource.WithFromEnv())
	if err != nil {
		return nil, NewConfigurationError("OTEL_RESOURCE_ATTRIBUTES cannot be used: %v", err)
	}
	t := &Tracer{provider: sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(who)), codec: &c.Codec, sink: sinkKind(c)}
	t.tracer = t.provider.Tracer(tracerName)
	system, group := "redis", ""
	if c.Source.Redis != nil {
		group = c.Source.Redis.Group
	} else {
		system, group = "millrace", c.Source.ConsumerGroup.Group
	}
	t.common = []otel.KeyValue{
		otel.String("messaging.system", system), otel.String("messaging.consumer.group.name", group), otel.String("millrace.processor", c.Name),
	}
	return t, nil
}

func sinkKind(c *config.Config) string {
	switch s := c.Sink; {
	case s.Table != nil:
		return "table"
	case s.Stream != nil:
		return "stream"
	case s.SQL != nil:
		return "sql"
	case s.HTTP != nil:
		return "http"
	}
	return "fanOut"
}

// Shutdown exports what is left.
func (t *Tracer) Shutdown(ctx context.Context) error {
	if t == nil {
		return nil
	}
	return t.provider.Shutdown(ctx)
}

// itemTrace is what an item knows of its trace.
type itemTrace struct {
	context trace.SpanContext // what it hands on
	batch   trace.SpanContext // of the batch it was received with
	span    trace.Span        // its own; nil when it came without a context
}

var nothing = func() {}

// received starts the spans of a batch that was read. The function that it returns ends the batch's own.
func (t *Tracer) received(b *Batch) (decoded func()) {
	if t == nil || len(b.Items) == 0 {
		return nothing
	}
	stream := b.Items[0].Stream
	_, span := t.tracer.Start(context.Background(), "receive "+stream, trace.WithTimestamp(b.Items[0].Received), trace.WithSpanKind(trace.SpanKindClient),
		trace.WithAttributes(t.common...), trace.WithAttributes(otel.String("messaging.operation.name", "receive"), otel.String("messaging.operation.type", "receive"),
			otel.String("messaging.destination.name", stream), otel.Int("messaging.batch.message_count", len(b.Items))))
	batch := span.SpanContext()
	shared := &itemTrace{context: batch, batch: batch}
	links := 0
	for _, it := range b.Items {
		parent := incomingTrace(it, t.codec)
		if !parent.IsValid() {
			it.trace = shared
			continue
		}
		_, own := t.tracer.Start(trace.ContextWithRemoteSpanContext(context.Background(), parent), "process "+it.Stream,
			trace.WithTimestamp(it.Received), trace.WithSpanKind(trace.SpanKindConsumer), trace.WithLinks(trace.Link{SpanContext: batch}),
			trace.WithAttributes(t.common...), trace.WithAttributes(otel.String("messaging.operation.name", "process"), otel.String("messaging.operation.type", "process"),
				otel.String("messaging.destination.name", it.Stream), otel.String("messaging.message.id", it.ID),
				otel.Int("millrace.message.attempt", it.Deliveries), otel.String("millrace.sink", t.sink)))
		if links++; links <= maxLinks {
			span.AddLink(trace.Link{SpanContext: parent})
		}
		it.trace = &itemTrace{context: own.SpanContext(), batch: batch, span: own}
	}
	return func() { span.End() }
}

// finished ends the spans of items whose outcome is known.
func (t *Tracer) finished(b *Batch, os []Outcome) {
	if t == nil {
		return
	}
	for i, it := range b.Items {
		if it.trace == nil || it.trace.span == nil {
			continue
		}
		it.trace.span.SetAttributes(otel.String("millrace.result", os[i].Result.String()))
		if os[i].Result == Rejected || os[i].Result == DeadLettered {
			it.trace.span.SetStatus(codes.Error, os[i].Reason)
		}
		it.trace.span.End()
	}
}

// lost ends the spans of items that are given back without an outcome.
func (t *Tracer) lost(b *Batch) {
	if t != nil {
		t.finished(b, outcomes(len(b.Items), Outcome{Result: Retry}))
	}
}

// writing starts the span of one attempt to write. The context that it returns belongs to the span.
func (t *Tracer) writing(ctx context.Context, b *Batch) (context.Context, func([]Outcome, error)) {
	if t == nil {
		return ctx, notWriting
	}
	ctx, span := t.of(ctx, "write "+t.sink, trace.SpanKindClient, b)
	return ctx, func(os []Outcome, err error) {
		var counts [numResults]int
		for _, o := range os {
			counts[o.Result]++
		}
		for r, n := range counts {
			if n > 0 {
				span.SetAttributes(otel.Int("millrace.items."+Result(r).String(), n))
			}
		}
		fail(span, err)
		span.End()
	}
}

func notWriting([]Outcome, error) {}

// settling starts the span of telling the source. Its parts are attempts.
func (t *Tracer) settling(ctx context.Context, b *Batch) (context.Context, func(error)) {
	if t == nil {
		return ctx, notSettling
	}
	ctx, span := t.of(ctx, "settle "+b.Items[0].Stream, trace.SpanKindClient, b)
	return ctx, func(err error) {
		fail(span, err)
		span.End()
	}
}

func notSettling(error) {}

// of starts a span about a batch of items, which may have been received in several.
func (t *Tracer) of(ctx context.Context, name string, kind trace.SpanKind, b *Batch) (context.Context, trace.Span) {
	var parent trace.SpanContext
	var links []trace.Link
	var last trace.SpanContext
	for _, it := range b.Items {
		if it.trace == nil {
			continue
		}
		if !parent.IsValid() {
			parent, last = it.trace.batch, it.trace.batch
		}
		if len(links) < maxLinks && !it.trace.batch.Equal(last) {
			last = it.trace.batch
			links = append(links, trace.Link{SpanContext: last})
		}
		if len(links) < maxLinks && it.trace.span != nil {
			links = append(links, trace.Link{SpanContext: it.trace.context})
		}
	}
	return t.tracer.Start(trace.ContextWithSpanContext(ctx, parent), name, trace.WithSpanKind(kind), trace.WithLinks(links...),
		trace.WithAttributes(t.common...), trace.WithAttributes(otel.Int("messaging.batch.message_count", len(b.Items))))
}

// fail says what went wrong, in the words that logs may have.
func fail(span trace.Span, err error) {
	if err != nil {
		span.SetStatus(codes.Error, reason(err))
		span.SetAttributes(otel.String("error.type", Classify(err).String()))
	}
}

// requestSpan starts the span of an HTTP request for one item, or for a batch when it is nil. It makes spans only inside one
// of a Tracer.
func requestSpan(ctx context.Context, it *Item, to *destination) (context.Context, trace.Span) {
	tracer := trace.SpanFromContext(ctx).TracerProvider().Tracer(tracerName)
	if it != nil && it.trace != nil {
		ctx = trace.ContextWithSpanContext(ctx, it.trace.context)
	}
	return tracer.Start(ctx, "POST", trace.WithSpanKind(trace.SpanKindClient), trace.WithAttributes(
		otel.String("http.request.method", "POST"), otel.String("server.address", to.url.Hostname()), otel.String("server.port", to.url.Port())))
}

// incomingTrace is the W3C trace context that came with an item: in a message's headers, in the fields of a Redis entry, or in
// a CloudEvent.
func incomingTrace(it *Item, codec *config.Codec) trace.SpanContext {
	var parent, state string
	for _, f := range it.Fields {
		switch strings.TrimPrefix(strings.TrimPrefix(f.Field, "ce_"), "ce-") {
		case "traceparent":
			parent = f.Value
		case "tracestate":
			state = f.Value
		}
	}
	if it.Headers != nil {
		for _, prefix := range []string{"", "ce-", "ce_"} {
			if parent == "" {
				parent = gjson.GetBytes(it.Headers, prefix+"traceparent").Str
				state = gjson.GetBytes(it.Headers, prefix+"tracestate").Str
			}
		}
	}
	if parent == "" && codec.Type == config.CodecCloudEvents {
		document := it.Payload
		if codec.Field != "" {
			document, _ = fieldOf(it, codec.Field)
		}
		parent, state = gjson.Get(document, "traceparent").Str, gjson.Get(document, "tracestate").Str
	}
	if parent == "" {
		return trace.SpanContext{}
	}
	carrier := propagation.MapCarrier{"traceparent": parent, "tracestate": state}
	return trace.SpanContextFromContext(propagation.TraceContext{}.Extract(context.Background(), carrier))
}

// outgoingTrace is the W3C trace context that an item hands on: that of its own span, or, when no spans are made, the one that came with
// it. Both are empty when there is none.
func outgoingTrace(it *Item, codec *config.Codec) (parent, state string) {
	var sc trace.SpanContext
	if it.trace != nil {
		sc = it.trace.context
	} else {
		sc = incomingTrace(it, codec)
	}
	return traceHeaders(sc)
}

func traceHeaders(sc trace.SpanContext) (parent, state string) {
	if !sc.IsValid() {
		return "", ""
	}
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(trace.ContextWithSpanContext(context.Background(), sc), carrier)
	return carrier["traceparent"], carrier["tracestate"]
}

// handOnTrace adds the trace context of an item to a message's headers, a JSON object or nil, unless they have one.
func handOnTrace(headers []byte, it *Item, codec *config.Codec) []byte {
	parent, state := outgoingTrace(it, codec)
	if parent == "" || gjson.GetBytes(headers, "traceparent").Exists() {
		return headers
	}
	added := appendString([]byte(`{"traceparent":`), parent)
	if state != "" {
		added = appendString(append(added, `,"tracestate":`...), state)
	}
	if rest := strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(asString(headers)), "{")); rest != "" && rest != "}" {
		return append(append(added, ','), rest...)
	}
	return append(added, '}')
}
