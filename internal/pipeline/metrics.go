package pipeline

import (
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// Metrics of one pipeline. No label depends on a message or a key, so their number is fixed by the configuration.
type Metrics struct {
	registry *prometheus.Registry

	entries       *prometheus.CounterVec // by result
	branchEntries *prometheus.CounterVec // by branch and result
	read          prometheus.Counter
	mismatches    prometheus.Counter
	copied        prometheus.Counter
	copyReplays   prometheus.Counter
	batchLimit    prometheus.Gauge
	undecodable   prometheus.Counter
	deadLetters   prometheus.Counter
	batchRows     prometheus.Histogram
	batchBytes    prometheus.Histogram
	writeSeconds  prometheus.Histogram
	endToEnd      prometheus.Histogram
	bisects       prometheus.Counter
	sinkErrors    *prometheus.CounterVec // by class
	sourceErrors  prometheus.Counter
	settleErrors  prometheus.Counter
	responses     *prometheus.CounterVec // of the HTTP sink, by class of status
	unsettled     prometheus.Gauge       // items written and not yet settled
	reclaimed     *prometheus.GaugeVec
	trimmed       *prometheus.GaugeVec
	stolen        *prometheus.GaugeVec
	fenced        *prometheus.GaugeVec
	incarnation   *prometheus.GaugeVec
	owner         *prometheus.GaugeVec
	lag           *prometheus.GaugeVec
	pending       *prometheus.GaugeVec
	oldest        *prometheus.GaugeVec
	released      prometheus.Counter
}

// NewMetrics returns metrics in a registry of their own.
func NewMetrics() *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry()}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: "millrace", Subsystem: "processor", Name: name, Help: help})
		m.registry.MustRegister(c)
		return c
	}
	counters := func(name, help, label string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "millrace", Subsystem: "processor", Name: name, Help: help}, []string{label})
		m.registry.MustRegister(c)
		return c
	}
	gauges := func(name, help string) *prometheus.GaugeVec {
		g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "millrace", Subsystem: "processor", Name: name, Help: help}, []string{"stream"})
		m.registry.MustRegister(g)
		return g
	}
	histogram := func(name, help string, buckets []float64) prometheus.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: "millrace", Subsystem: "processor", Name: name, Help: help, Buckets: buckets})
		m.registry.MustRegister(h)
		return h
	}
	seconds := []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300}
	m.entries = counters("entries_total", "Entries by what became of them: written, duplicate, rejected, retry, fenced, filtered or dead_letter.", "result")
	for r := range numResults {
		m.entries.WithLabelValues(r.String())
	}
	m.branchEntries = prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "millrace", Subsystem: "processor", Name: "branch_entries_total",
		Help: "Entries by branch of a fan-out and what became of them there, repeated attempts included."}, []string{"branch", "result"})
	m.registry.MustRegister(m.branchEntries)
	m.read = counter("entries_read_total", "Entries that the source handed out, redeliveries included.")
	m.mismatches = counter("duplicate_mismatch_total", "Duplicates whose row has other content; with conflict.detectMismatch.")
	m.copied = counter("copied_rows_total", "Rows that went into their table by COPY; the others were inserted.")
	m.copyReplays = counter("copy_replays_total", "Batches that were inserted after a COPY had failed, mostly because a key was there already.")
	m.batchLimit = prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "millrace", Subsystem: "processor", Name: "batch_limit_rows",
		Help: "Rows of a write at most, at present; between a part of batch.maxRows and all of it."})
	m.registry.MustRegister(m.batchLimit)
	m.undecodable = counter("undecodable_total", "Entries that could not be decoded, redeliveries included.")
	m.deadLetters = counter("dead_letters_total", "Entries set aside as dead letters.")
	m.batchRows = histogram("batch_rows", "Rows per write.", []float64{1, 5, 10, 50, 100, 250, 500, 1000, 2500, 5000, 10000})
	m.batchBytes = histogram("batch_bytes", "Bytes of the entries per write.", prometheus.ExponentialBuckets(256, 4, 10))
	m.writeSeconds = histogram("write_seconds", "Time of one successful write.", seconds)
	m.endToEnd = histogram("end_to_end_seconds", "Age of an entry, by its source's clock, when its row was durable.", seconds)
	m.bisects = counter("bisects_total", "Batches that were halved to find a row that cannot be written.")
	m.sinkErrors = counters("sink_errors_total", "Failed writes by class of error.", "class")
	for c := ClassTransient; c <= ClassFenced; c++ {
		m.sinkErrors.WithLabelValues(c.String())
	}
	m.sourceErrors = counter("source_errors_total", "Failed reads.")
	m.responses = counters("http_responses_total", "Requests of the HTTP sink by the class of the answer's status; none: there was no answer.", "status")
	for _, status := range []string{"2xx", "3xx", "4xx", "5xx", noAnswer} {
		m.responses.WithLabelValues(status)
	}
	m.settleErrors = counter("settle_errors_total", "Failed attempts to settle, each tried again.")
	m.unsettled = prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "millrace", Subsystem: "processor", Name: "ack_backlog_entries",
		Help: "Entries with an outcome that the source does not know yet."})
	m.registry.MustRegister(m.unsettled)
	m.reclaimed = gauges("reclaimed_entries", "Entries taken over from members that stopped refreshing them, since the start.")
	m.trimmed = gauges("trimmed_entries", "Pending entries that Redis had deleted before they were settled, since the start.")
	m.stolen = gauges("stolen_entries", "Held entries that another member took over, since the start.")
	m.fenced = gauges("fenced_entries", "Outcomes that came too late to be acknowledged, because the entries were no longer this member's, since the start.")
	m.incarnation = gauges("stream_incarnation", "How often the Redis stream is known to have begun anew, with its ids.")
	m.owner = gauges("stream_owner", "1 while this processor owns the Redis stream, with ownership Exclusive.")
	m.lag = gauges("lag_entries", "Entries not yet delivered to the group; -1 when the source cannot tell.")
	m.pending = gauges("pending_entries", "Entries delivered to any member of the group and not settled.")
	m.oldest = gauges("oldest_pending_seconds", "Age of the oldest pending entry.")
	m.released = counter("released_entries_total", "Entries given back on drain.")
	return m
}

// noAnswer is the class of status of a request that got none.
const noAnswer = "none"

// Gatherer returns what the metrics endpoint serves.
func (m *Metrics) Gatherer() prometheus.Gatherer { return m.registry }

// Register adds collectors of the process that is around the pipeline.
func (m *Metrics) Register(c ...prometheus.Collector) { m.registry.MustRegister(c...) }

// observe adds gauges that are read when they are asked for.
func (m *Metrics) observe(p *Pipeline) {
	gauge := func(name, help string, read func() float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: "millrace", Subsystem: "processor", Name: name, Help: help}, read))
	}
	gauge("in_flight_entries", "Entries read and not settled.", func() float64 {
		n, _ := p.permits.inFlight()
		return float64(n)
	})
	gauge("in_flight_bytes", "Bytes of entries read and not settled.", func() float64 {
		_, n := p.permits.inFlight()
		return float64(n)
	})
	gauge("breaker_open", "1 while writing is stopped because too many rows fail.", func() float64 { return number(p.breaker.isOpen()) })
	gauge("ready", "1 while the processor is ready.", func() float64 {
		ready, _ := p.health.Ready()
		return number(ready)
	})
	if p.state == nil {
		return
	}
	gauge("state_keys", "Keys whose latest record is remembered.", func() float64 {
		n, _ := p.state.Size()
		return float64(n)
	})
	gauge("state_evicted_keys", "Keys forgotten because there were too many, since the start.", func() float64 {
		_, n := p.state.Size()
		return float64(n)
	})
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// Totals returns how many entries were read, and what became of how many, by result, so far.
func (m *Metrics) Totals() (read float64, results map[string]float64) {
	results = map[string]float64{}
	for r := range numResults {
		results[r.String()] = total(m.entries.WithLabelValues(r.String()))
	}
	return total(m.read), results
}

func total(c prometheus.Counter) float64 {
	var value dto.Metric
	if err := c.Write(&value); err != nil {
		return 0
	}
	return value.GetCounter().GetValue()
}
