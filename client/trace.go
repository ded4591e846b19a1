package client

import (
	"context"
	"errors"
	"strconv"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// scopeName is the scope of the client's spans.
const scopeName = "github.com/millrace-dev/millrace/client"

// maxLinks of one span. A claim can have more messages; the others find its span by their own link.
const maxLinks = 128

// tracing makes spans by the semantic conventions for messaging. nil makes none.
//
//	publish   one message or a batch; what is published carries its context
//	receive   a claim, linked to the contexts of its messages
//	process   one attempt to handle a message, as a child of the context that the message carries, linked to the receive
//
// Every attempt is a span of its own in the message's trace.
type tracing struct{ tracer trace.Tracer }

func newTracing(provider trace.TracerProvider) *tracing {
	if provider == nil {
		return nil
	}
	return &tracing{provider.Tracer(scopeName)}
}

// traceContext is a W3C trace context as headers have it.
type traceContext struct{ parent, state string }

// contextOf returns the trace context of ctx, empty when it has none.
func contextOf(ctx context.Context) traceContext {
	if !trace.SpanContextFromContext(ctx).IsValid() {
		return traceContext{}
	}
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	return traceContext{carrier["traceparent"], carrier["tracestate"]}
}

// extract returns ctx with the trace context that a message carries, as the remote one, and ctx itself when it carries none.
func extract(ctx context.Context, h Headers) context.Context {
	parent := h.Text("traceparent")
	if parent == "" {
		return ctx
	}
	return propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier{"traceparent": parent, "tracestate": h.Text("tracestate")})
}

// publishSpan is the span of a publish; its zero value is none.
type publishSpan struct{ span trace.Span }

func (t *tracing) publishing(ctx context.Context, stream string, n int, key string) (context.Context, publishSpan) {
	if t == nil {
		return ctx, publishSpan{}
	}
	attributes := []attribute.KeyValue{
		attribute.String("messaging.system", "millrace"), attribute.String("messaging.operation.name", "publish"),
		attribute.String("messaging.operation.type", "send"), attribute.String("messaging.destination.name", stream),
	}
	if n > 1 {
		attributes = append(attributes, attribute.Int("messaging.batch.message_count", n))
	}
	if key != "" {
		attributes = append(attributes, attribute.String("millrace.message.key", key))
	}
	ctx, span := t.tracer.Start(ctx, "publish "+stream, trace.WithSpanKind(trace.SpanKindProducer), trace.WithAttributes(attributes...))
	return ctx, publishSpan{span}
}

func (p publishSpan) published(position int64, err error) {
	if p.span == nil {
		return
	}
	if position > 0 {
		p.span.SetAttributes(attribute.String("messaging.message.id", strconv.FormatInt(position, 10)))
	}
	fail(p.span, err)
	p.span.End()
}

// receiving makes the span of a claim that was received, and returns its context, for the links of what is handled.
func (t *tracing) receiving(w *worker, c *pgstream.Claim) trace.SpanContext {
	if t == nil {
		return trace.SpanContext{}
	}
	var links []trace.Link
	for i := range c.Messages {
		headers, _ := readHeaders(c.Messages[i].Headers) // what cannot be read is told when it is handled
		carried := trace.SpanContextFromContext(extract(context.Background(), headers))
		if carried.IsValid() && len(links) < maxLinks {
			links = append(links, trace.Link{SpanContext: carried})
		}
	}
	_, span := t.tracer.Start(context.Background(), "receive "+w.stream, trace.WithSpanKind(trace.SpanKindClient), trace.WithLinks(links...),
		trace.WithAttributes(w.attributes("receive", "receive")...), trace.WithAttributes(attribute.Int("messaging.batch.message_count", len(c.Messages))))
	span.End()
	return span.SpanContext()
}

// processing starts the span of one attempt to handle a message. The context that it returns has at least the trace context that the message carries.
func (t *tracing) processing(ctx context.Context, w *worker, d *Delivery, received trace.SpanContext) (context.Context, trace.Span) {
	ctx = extract(ctx, d.Headers)
	if t == nil {
		return ctx, nil
	}
	attributes := append(w.attributes("process", "process"), attribute.String("messaging.message.id", strconv.FormatInt(d.Position, 10)), attribute.Int("millrace.message.attempt", d.Attempt))
	if d.Key != "" {
		attributes = append(attributes, attribute.String("millrace.message.key", d.Key))
	}
	return t.tracer.Start(ctx, "process "+w.stream, trace.WithSpanKind(trace.SpanKindConsumer), trace.WithLinks(trace.Link{SpanContext: received}),
		trace.WithAttributes(attributes...))
}

func (w *worker) attributes(name, kind string) []attribute.KeyValue {
	return []attribute.KeyValue{
		attribute.String("messaging.system", "millrace"), attribute.String("messaging.operation.name", name), attribute.String("messaging.operation.type", kind),
		attribute.String("messaging.destination.name", w.stream), attribute.String("messaging.consumer.group.name", w.group),
		attribute.String("messaging.client.id", w.engine.Member()),
	}
}

// processed ends the span of an attempt. result is what became of the message: acked, nacked, dead_lettered, released or lost.
func processed(span trace.Span, result string, err error) {
	if span == nil {
		return
	}
	span.SetAttributes(attribute.String("millrace.result", result))
	fail(span, err)
	span.End()
}

func fail(span trace.Span, err error) {
	if err == nil {
		return
	}
	span.SetStatus(codes.Error, err.Error())
	span.SetAttributes(attribute.String("error.type", errorType(err)))
}

// errorType is a class with few values, as the conventions ask for.
func errorType(err error) string {
	var panicked *panicError
	var permanent *permanentError
	switch {
	case errors.As(err, &panicked):
		return "panic"
	case errors.As(err, &permanent):
		return "permanent"
	case errors.Is(err, ErrClaimLost):
		return "claim_lost"
	case errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	case errors.Is(err, ErrNotFound):
		return "not_found"
	case errors.Is(err, ErrRefused):
		return "refused"
	case IsTransient(err):
		return "transient"
	}
	return "_OTHER"
}
