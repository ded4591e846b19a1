package main

import (
	"testing"

	dto "github.com/prometheus/client_model/go"
)

func TestFiguresForPeople(t *testing.T) {
	for got, want := range map[string]string{
		number(0): "0", number(999): "999", number(1234567): "1\u202f234\u202f567", number(-1): "−1", number(999.6): "1\u202f000",
		rate(0): "0", rate(0.04): "0.0", rate(3.14): "3.1", rate(1234): "1\u202f234",
		size(0): "0\u00a0B", size(1023): "1\u202f023\u00a0B", size(1536): "1.5\u00a0KiB", size(16 << 20): "16\u00a0MiB", size(3 << 40): "3\u202f072\u00a0GiB",
		duration(0.0000004): "0s", duration(0.0015): "1.5ms", duration(12.34): "12.3s", duration(3661.4): "1h1m1s",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// A quantile is looked for in its bucket, as Prometheus does it; beyond the last bound nothing is known.
func TestQuantile(t *testing.T) {
	bucket := func(bound float64, n uint64) *dto.Bucket {
		return &dto.Bucket{UpperBound: &bound, CumulativeCount: &n}
	}
	count := uint64(100)
	h := &dto.Histogram{SampleCount: &count, Bucket: []*dto.Bucket{bucket(1, 50), bucket(2, 90), bucket(4, 98)}}
	for q, want := range map[float64]string{0.25: "500ms", 0.5: "1s", 0.7: "1.5s", 0.95: "3.3s", 0.99: "above 4s"} {
		if got := quantile(h, q); got != want {
			t.Errorf("quantile %g is %s, want %s", q, got, want)
		}
	}
	if got := quantile(nil, 0.5); got != "–" {
		t.Errorf("of nothing: %s", got)
	}
}
