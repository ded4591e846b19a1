package pipeline

import (
	"testing"
)

// seedEntry is about what a device of the benchmark sends.
const seedEntry = `{"device_id":"device-0417","timestamp":"2026-03-01T12:00:00.123Z","latitude":52.520008,"longitude":13.404954,"altitude":34.5,"angle":271,"speed":12.5,"satellites":11,"odometer":123456789,"attributes":{"ignition":true,"voltage":12.71,"io":[1,2,3]}}`

// BenchmarkDecode is the decoding of one core; the target is half a million entries a second for paths alone.
func BenchmarkDecode(b *testing.B) {
	for _, bc := range []struct {
		name    string
		codec   string
		columns []string
	}{
		{"paths", "JSON", []string{"name: device_id, path: device_id, type: text, required: true", "name: ts, path: timestamp, type: timestamptz, required: true",
			"name: latitude, path: latitude, type: double precision", "name: longitude, path: longitude, type: double precision",
			"name: odometer, path: odometer, type: bigint", `name: attributes, path: attributes, type: jsonb, default: "{}"`}},
	} {
		b.Run(bc.name, func(b *testing.B) {
			tr, _ := transformOf(b, bc.codec, bc.columns...)
			it := entry("payload", seedEntry)
			it.Row = make([]Value, len(tr.columns))
			b.ReportAllocs()
			for b.Loop() {
				clear(it.Row)
				if err := tr.Decode(it); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "entries/s")
		})
	}
}
