package main

import (
	"bytes"
	_ "embed"
	"fmt"
	"html/template"
	"math"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/millrace-dev/millrace/internal/pipeline"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

//go:embed debug.html
var debugHTML string

var debugPage = template.Must(template.New("debug").Parse(debugHTML))

// shortRate and longRate are the windows of the page's rates.
const (
	shortRate = 10 * time.Second
	longRate  = rateWindow
)

// page is what the status page shows. It has no secret, and nothing of any entry.
type page struct {
	Name, Version, Member string
	Up                    string
	Ready                 bool
	Problems              []string
	Every                 int // seconds between reloads; 0: none
	Started               bool
	Stages                []stage
	Streams               []streamRow
	Results               []resultRow
	Times                 []timeRow
	Config                string
	Environment           []variable
}

// stage is one box of the pipeline, with what is said of it.
type stage struct {
	Name, What string
	Facts      []fact
	Alarm      string // what is wrong there; empty when nothing is
}

type fact struct{ Name, Value string }

type streamRow struct{ Stream, Lag, Pending, Oldest, Reclaimed, Trimmed, Stolen string }

type resultRow struct{ Result, Short, Long, Total string }

type timeRow struct{ Name, P50, P95, P99, Count string }

type variable struct{ Name, From string }

// debug serves the status page. ?every=5 reloads it every five seconds.
func (p *process) debug(w http.ResponseWriter, r *http.Request) {
	view, err := p.page()
	if err != nil {
		http.Error(w, "the figures cannot be read: "+err.Error(), http.StatusInternalServerError)
		return
	}
	if n, err := strconv.Atoi(r.URL.Query().Get("every")); err == nil && n >= 1 && n <= 3600 {
		view.Every = n
	}
	var buf bytes.Buffer
	if err := debugPage.Execute(&buf, view); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	_, _ = buf.WriteTo(w)
}

func (p *process) page() (*page, error) {
	f, err := p.figures()
	if err != nil {
		return nil, err
	}
	v := &page{Name: p.config.Name, Version: version(), Member: p.options.member, Up: duration(time.Since(p.started).Seconds())}
	ready, text := p.health.Ready()
	if v.Ready = ready; !ready {
		v.Problems = strings.Split(text, "\n")
	}
	if line := p.line.Load(); line != nil {
		v.Started = true
		v.Stages = p.stages(f, line.Status())
		v.Streams = streams(f, line.Status().Readers)
	}
	_, short := p.rates.over(shortRate)
	_, long := p.rates.over(longRate)
	_, totals := p.metrics.Totals()
	for _, name := range pipeline.ResultNames() {
		v.Results = append(v.Results, resultRow{name, rate(short[name]), rate(long[name]), number(totals[name])})
	}
	for _, t := range []struct{ name, metric string }{
		{"one write", "write_seconds"}, {"an entry, from its source's clock to durable", "end_to_end_seconds"},
	} {
		h := f.histograms[prefix+t.metric]
		v.Times = append(v.Times, timeRow{t.name, quantile(h, 0.5), quantile(h, 0.95), quantile(h, 0.99), number(float64(h.GetSampleCount()))})
	}
	file, err := withoutSecrets(p.config).Marshal()
	if err != nil {
		return nil, err
	}
	v.Config = string(file)
	v.Environment = environment()
	return v, nil
}

func (p *process) stages(f *figures, s pipeline.Status) []stage {
	read, _ := p.rates.over(shortRate)
	from := "Redis group " + strconv.Quote(groupOf(p.config))
	if p.config.Source.ConsumerGroup != nil {
		from = "consumer group " + strconv.Quote(groupOf(p.config))
	}
	waiting := 0
	for _, n := range s.Writers {
		waiting += n
	}
	stages := []stage{
		{Name: "read", What: from, Facts: []fact{
			{"per second", rate(read)}, {"since the start", f.count("entries_read_total")}, {"failed reads", f.count("source_errors_total")},
			{"entries in flight", number(float64(s.InFlight))}, {"of at most", number(float64(s.MaxInFlight))},
			{"bytes in flight", size(float64(s.InFlightBytes))}, {"of at most", size(float64(s.MaxInFlightBytes))},
		}},
		{Name: "decode", What: "codec " + string(p.config.Codec.Type), Facts: []fact{{"undecodable", f.count("undecodable_total")}}},
	}
	if s.InFlight >= s.MaxInFlight || s.InFlightBytes >= s.MaxInFlightBytes {
		stages[0].Alarm = "reading waits until the sink has taken what was read"
	}
	if p.config.State != nil {
		stages = append(stages, stage{Name: "state", What: "by " + p.config.State.Key, Facts: []fact{
			{"keys", f.count("state_keys") + " of " + number(float64(p.config.State.MaxKeys))}, {"evicted", f.count("state_evicted_keys")},
		}})
	}
	write := stage{Name: "write", What: strconv.Itoa(len(s.Writers)) + " writers to " + sinkOf(&p.config.Sink), Facts: []fact{
		{"batches waiting", number(float64(waiting))}, {"rows per write", mean(f.histograms[prefix+"batch_rows"])},
		{"of at most", f.count("batch_limit_rows")}, {"batches halved", f.count("bisects_total")},
	}}
	for _, class := range []string{"transient", "row", "configuration", "fenced"} {
		if n := f.values[prefix+"sink_errors_total{"+class+"}"]; n > 0 {
			write.Facts = append(write.Facts, fact{"failed writes, " + class, number(n)})
		}
	}
	if s.BreakerOpen {
		write.Alarm = "writing is stopped because too many rows fail"
	}
	return append(stages, write, stage{Name: "settle", What: "tell the source", Facts: []fact{
		{"batches waiting", number(float64(s.Settling))}, {"entries not told yet", f.count("ack_backlog_entries")},
		{"failed attempts", f.count("settle_errors_total")}, {"dead letters", f.count("dead_letters_total")},
	}})
}

func groupOf(c *config.Config) string {
	if c.Source.Redis != nil {
		return c.Source.Redis.Group
	}
	return c.Source.ConsumerGroup.Group
}

// sinkOf names a sink as a person would.
func sinkOf(s *config.Sink) string {
	switch {
	case s.Table != nil:
		return "table " + s.Table.Schema + "." + s.Table.Name
	case s.Stream != nil && s.Stream.Stream != "":
		return "stream " + s.Stream.Stream
	case s.Stream != nil:
		return "streams by route"
	case s.SQL != nil:
		return "a SQL statement"
	case s.HTTP != nil:
		return "an HTTP receiver"
	}
	var names []string
	for _, b := range s.FanOut {
		names = append(names, b.Name)
	}
	return "the branches " + strings.Join(names, ", ")
}

func streams(f *figures, names []string) []streamRow {
	var rows []streamRow
	for _, name := range names {
		of := func(metric string) string {
			n, ok := f.values[prefix+metric+"{"+name+"}"]
			if !ok || n < 0 {
				return "not known"
			}
			return number(n)
		}
		oldest := "–"
		if n, ok := f.values[prefix+"oldest_pending_seconds{"+name+"}"]; ok {
			oldest = duration(n)
		}
		rows = append(rows, streamRow{name, of("lag_entries"), of("pending_entries"), oldest, of("reclaimed_entries"), of("trimmed_entries"), of("stolen_entries")})
	}
	return rows
}

// environment lists which settings of the environment there are, and never what they hold.
func environment() []variable {
	var all []variable
	for _, name := range []string{
		config.EnvRedisURL, config.EnvRedisTLSDir, config.EnvSourceDatabaseURL, config.EnvSourceListenURL, config.EnvSinkDatabaseURL,
		config.EnvHTTPURL, config.EnvHTTPAuthorization, config.EnvHTTPSigningKey,
	} {
		switch {
		case os.Getenv(name) != "":
			all = append(all, variable{name, "set"})
		case os.Getenv(name+"_FILE") != "":
			all = append(all, variable{name, "from a file, read again when it is needed"})
		}
	}
	return all
}

// withoutSecrets is the configuration as it may be shown: without what people put into addresses and headers, although they
// should not, and without the bulk of a descriptor set.
func withoutSecrets(c *config.Config) *config.Config {
	shown := *c
	shown.Sink.HTTP = withoutSecretsHTTP(c.Sink.HTTP)
	shown.Sink.FanOut = slices.Clone(c.Sink.FanOut)
	for i := range shown.Sink.FanOut {
		shown.Sink.FanOut[i].HTTP = withoutSecretsHTTP(shown.Sink.FanOut[i].HTTP)
	}
	if p := c.Codec.Protobuf; p != nil && p.DescriptorSet != "" {
		brief := *p
		brief.DescriptorSet = fmt.Sprintf("%d bytes", len(p.DescriptorSet))
		shown.Codec.Protobuf = &brief
	}
	return &shown
}

const hidden = "(hidden)"

func withoutSecretsHTTP(h *config.HTTPSink) *config.HTTPSink {
	if h == nil {
		return nil
	}
	shown := *h
	shown.URL = h.Place()
	shown.Headers = map[string]string{}
	for name := range h.Headers {
		shown.Headers[name] = hidden
	}
	return &shown
}

// prefix of the processor's metrics.
const prefix = "millrace_processor_"

// figures are the metrics at one moment, by name, with a label's value in braces.
type figures struct {
	values     map[string]float64
	histograms map[string]*dto.Histogram
}

func (p *process) figures() (*figures, error) {
	families, err := p.metrics.Gatherer().Gather()
	if err != nil {
		return nil, err
	}
	f := &figures{values: map[string]float64{}, histograms: map[string]*dto.Histogram{}}
	for _, family := range families {
		for _, m := range family.Metric {
			name := family.GetName()
			for _, l := range m.Label {
				name += "{" + l.GetValue() + "}"
			}
			switch {
			case m.Counter != nil:
				f.values[name] = m.Counter.GetValue()
			case m.Gauge != nil:
				f.values[name] = m.Gauge.GetValue()
			case m.Histogram != nil:
				f.histograms[name] = m.Histogram
			}
		}
	}
	return f, nil
}

func (f *figures) count(metric string) string { return number(f.values[prefix+metric]) }

// quantile estimates a quantile of a time, as Prometheus does: by its place in its bucket.
func quantile(h *dto.Histogram, q float64) string {
	if h.GetSampleCount() == 0 {
		return "–"
	}
	rank, below, from := q*float64(h.GetSampleCount()), 0.0, 0.0
	for _, b := range h.Bucket {
		if n := float64(b.GetCumulativeCount()); n >= rank {
			if math.IsInf(b.GetUpperBound(), 1) {
				break
			}
			return duration(from + (b.GetUpperBound()-from)*(rank-below)/(n-below))
		} else {
			below, from = n, b.GetUpperBound()
		}
	}
	return "above " + duration(from)
}

func mean(h *dto.Histogram) string {
	if h.GetSampleCount() == 0 {
		return "–"
	}
	return number(math.Round(h.GetSampleSum() / float64(h.GetSampleCount())))
}

// number writes a number with its thousands apart.
func number(n float64) string {
	text := strconv.FormatFloat(math.Abs(math.Round(n)), 'f', 0, 64)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "\u202f" + text[i:] // where no line is broken
	}
	if n < 0 {
		return "−" + text
	}
	return text
}

// rate writes a number per second: small ones with a digit more.
func rate(n float64) string {
	if n > 0 && n < 10 {
		return strconv.FormatFloat(n, 'f', 1, 64)
	}
	return number(n)
}

func size(bytes float64) string {
	units := []string{"B", "KiB", "MiB", "GiB"}
	for bytes >= 1024 && len(units) > 1 {
		bytes, units = bytes/1024, units[1:]
	}
	return rate(bytes) + "\u00a0" + units[0]
}

func duration(seconds float64) string {
	switch d := time.Duration(seconds * float64(time.Second)); {
	case d < time.Millisecond:
		return d.Round(time.Microsecond).String()
	case d < time.Second:
		return d.Round(100 * time.Microsecond).String()
	case d < time.Minute:
		return d.Round(100 * time.Millisecond).String()
	default:
		return d.Round(time.Second).String()
	}
}
