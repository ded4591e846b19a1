package client

import (
	"context"
	"errors"
	"testing"

	"go.opentelemetry.io/otel/trace"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// untraced is what tracing does for a message that is published and handled when nobody traces.
func untraced(ctx context.Context, w *worker, claimed *pgstream.Claim, d *Delivery) error {
	var t *tracing
	publishing, span := t.publishing(ctx, "orders", 1, "k")
	headers, err := writeHeaders(nil, contextOf(publishing))
	span.published(1, err)
	handling, own := t.processing(ctx, w, d, t.receiving(w, claimed))
	processed(own, "acked", nil)
	if headers != nil || handling != ctx || publishing != ctx {
		return errors.New("something was traced")
	}
	return err
}

// Tracing that is off allocates nothing.
func TestWithoutATracerNothingIsAllocated(t *testing.T) {
	ctx, w, claimed, d := t.Context(), &worker{}, &pgstream.Claim{Messages: make([]pgstream.Message, 1)}, &Delivery{}
	allocated := testing.AllocsPerRun(1000, func() {
		if err := untraced(ctx, w, claimed, d); err != nil {
			t.Fatal(err)
		}
	})
	if allocated != 0 {
		t.Errorf("%v allocations for a message", allocated)
	}
}

func BenchmarkWithoutATracer(b *testing.B) {
	ctx, w, claimed, d := b.Context(), &worker{}, &pgstream.Claim{Messages: make([]pgstream.Message, 1)}, &Delivery{}
	b.ReportAllocs()
	for b.Loop() {
		if err := untraced(ctx, w, claimed, d); err != nil {
			b.Fatal(err)
		}
	}
}

// A program that traces by itself, and gave the client no tracer, has its context handed on all the same.
func TestAContextIsHandedOnWithoutATracer(t *testing.T) {
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	var off *tracing
	ctx, _ := off.processing(t.Context(), &worker{}, &Delivery{Message: Message{Headers: Headers{"traceparent": parent, "tracestate": "vendor=1"}}}, trace.SpanContext{})
	headers, err := writeHeaders(Headers{"type": "x"}, contextOf(ctx))
	if want := `{"traceparent":"` + parent + `","tracestate":"vendor=1","type":"x"}`; string(headers) != want || err != nil {
		t.Errorf("%s %v, want %s", headers, err, want)
	}
	for _, own := range []Headers{{"traceparent": "mine"}, {"traceparent": parent}} {
		headers, err := writeHeaders(own, traceContext{parent: "another"})
		if want := `{"traceparent":"` + own.Text("traceparent") + `"}`; string(headers) != want || err != nil {
			t.Errorf("%s %v, want %s", headers, err, want)
		}
	}
	if got := extract(t.Context(), Headers{"traceparent": "nonsense"}); trace.SpanContextFromContext(got).IsValid() {
		t.Error("nonsense is a context")
	}
}
