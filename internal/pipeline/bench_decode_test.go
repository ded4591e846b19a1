package pipeline

import (
	"strings"
	"testing"
)

// seedEntry is about what a device of the seed sends.
const seedEntry = `{"device_id":"device-0417","timestamp":"2026-03-01T12:00:00.123Z","latitude":52.520008,"longitude":13.404954,"altitude":34.5,"angle":271,"speed":12.5,"satellites":11,"odometer":123456789,"attributes":{"ignition":true,"voltage":12.71,"io":[1,2,3]}}`

const seedColumns = `
mapping:
  FILTER
  columns:
  - {name: device_id, path: PREFIXdevice_id, type: text, required: true}
  - {name: ts, path: PREFIXtimestamp, type: timestamptz, required: true}
  - {name: latitude, path: PREFIXlatitude, type: double precision}
  - {name: longitude, path: PREFIXlongitude, type: double precision}
  - {name: odometer, path: PREFIXodometer, type: bigint}
`

const (
	seedAttributes = "  - {name: attributes, path: PREFIXattributes, type: jsonb, default: '{}'}\n"
	seedSink       = "sink: {table: {name: t, key: [device_id, ts]}}\n"
)

// BenchmarkDecode is the decoding of one core. The target is half a million entries a second for paths alone.
func BenchmarkDecode(b *testing.B) {
	event := []string{"ce_specversion", "1.0", "ce_id", "1", "ce_source", "/s", "ce_type", "position", "payload", seedEntry}
	message := position(b, `device: "device-0417" at: {seconds: 1700000000} latitude: 52.520008 speed: 12.5 odometer: 123456789 serial: 11 labels: {key: "a" value: "b"}`)
	all := seedColumns + seedAttributes
	for _, bc := range []struct {
		name, config string
		item         *Item
	}{
		{"paths", all, entry("payload", seedEntry)},
		{"paths and state", all + "state: {key: device_id, time: ts}\n", entry("payload", seedEntry)},
		{"a filter", replaced(all, "FILTER", "filter: doc.speed > 0"), entry("payload", seedEntry)},
		{"a computed column", all + "  - {name: kmh, expression: doc.speed * 3.6, type: numeric}\n", entry("payload", seedEntry)},
		{"CloudEvents", replaced(all, "PREFIX", "data.") + "codec: {type: CloudEvents}\n", entry(event...)},
	} {
		b.Run(bc.name, func(b *testing.B) {
			tr, _, _ := pipelineOf(b, fromRedis+replaced(bc.config, "FILTER", "", "PREFIX", "")+seedSink)
			benchmarkDecode(b, tr, bc.item)
		})
	}
	b.Run("protobuf", func(b *testing.B) {
		tr, _ := protobufOf(b, "  - {name: device, path: device, type: text}\n  - {name: ts, path: at, type: timestamptz}\n  - {name: latitude, path: latitude, type: double precision}\n"+
			"  - {name: speed, path: speed, type: real}\n  - {name: odometer, path: odometer, type: bigint}")
		benchmarkDecode(b, tr, entry("payload", message))
	})
}

func benchmarkDecode(b *testing.B, tr *Transform, it *Item) {
	it.Deliveries = 1
	it.Row = make([]Value, len(tr.columns))
	b.ReportAllocs()
	for b.Loop() {
		clear(it.Row)
		if err := tr.Decode(it); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "entries/s")
}

// replaced replaces pairs of texts.
func replaced(text string, pairs ...string) string {
	return strings.NewReplacer(pairs...).Replace(text)
}
