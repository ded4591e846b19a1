package pipeline

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	otel "go.opentelemetry.io/otel/attribute"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/expression"
)

// Bounds of the HTTP sink.
const (
	maxReply       = 1 << 20         // bytes of a reply that are read
	maxReplyHeader = 64 << 10        // bytes of a reply's header
	maxRetryAfter  = 5 * time.Minute // longest wait that a receiver can ask for
	maxRedirects   = 3
)

// HTTPSink sends records as CloudEvents 1.0.2 over HTTP, in the JSON format: in mode Single one structured event per request
// (application/cloudevents+json), in mode Batch an array of them (application/cloudevents-batch+json). Structured, because
// then a signature covers the whole event, and a long key meets no limit of header sizes.
//
// An event's id is made of the processor's name (and the branch's), the stream, and the item's id there, so it is the same at
// every delivery, and the request says it in Idempotency-Key too. Delivery is at least once: an answer can get lost.
//
// A receiver answers with a status:
//
//	2xx            it has the events
//	408, 429, 5xx  not now: they are sent again, after Retry-After if the answer has one (no longer than maxRetryAfter)
//	other 4xx      the event is at fault, and the error policy applies; a batch is halved until the events at fault are alone
//	3xx            followed within the same scheme, host and port when it keeps the method (307, 308), and otherwise a problem
//	               of the configuration: an event is not sent to a place that nobody has configured
//
// A batch may also be taken in part. Then the answer is a 2xx with the JSON object
//
//	{"results": [{"id": "bill/orders/7", "status": 200}, {"id": "bill/orders/8", "status": 422, "error": "no such customer"}]}
//
// A result belongs to the event of its id, or without ids to the event in the same place; its status means what an answer's
// does, and error, if any, becomes the reason of the dead letter. An event without a result is sent again. When the source
// is an Ordered group, what follows the first event that was not taken is sent again whatever its result: a receiver that
// keeps the order stops there. Any other 2xx takes the whole batch.
type HTTPSink struct {
	columns []config.Column
	codec   config.Codec
	prefix  string // of the events' ids
	source  string // prefix of the events' source
	http    config.HTTPSink
	data    *expression.Program // nil: the columns or the document
	client  *http.Client
	target  *httpTarget
	metrics *Metrics
	replies bool          // whether the body of a 2xx is read in mode Single, too
	slots   chan struct{} // one value per request under way
	rest    rest
	turn    atomic.Uint64 // where a write begins, so that a few events that always fail do not keep others back
}

// NewHTTPSink returns a sink. It sends nothing yet: a receiver that is down, such as a sidecar that starts beside it, is
// waited for like one that fails later.
func NewHTTPSink(c *config.Config, metrics *Metrics) (*HTTPSink, error) {
	h := *c.Sink.HTTP
	target, err := newHTTPTarget(&h)
	if err != nil {
		return nil, err
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = h.MaxConcurrent
	transport.MaxResponseHeaderBytes = maxReplyHeader
	transport.DisableCompression = true // a small reply may unpack to a large one
	s := &HTTPSink{
		columns: c.Mapping.Columns, codec: c.Codec, source: "/streams/", prefix: strings.ReplaceAll(escape(c.Name), "%2F", "/") + "/", http: h, target: target, metrics: metrics,
		client: &http.Client{Transport: transport, CheckRedirect: checkRedirect},
		slots:  make(chan struct{}, h.MaxConcurrent),
	}
	if c.Source.Redis != nil {
		s.source = "/redis/"
	}
	if h.Data != "" {
		if s.data, err = expression.Compile(h.Data, expression.Value, expression.AfterMapping); err != nil {
			return nil, NewConfigurationError("sink.http.data: %v", err)
		}
	}
	return s, nil
}

// checkRedirect follows what keeps the method and leads to the same place. Everything else is left as the answer.
func checkRedirect(r *http.Request, via []*http.Request) error {
	first := via[0].URL
	keeps := r.Response.StatusCode == http.StatusTemporaryRedirect || r.Response.StatusCode == http.StatusPermanentRedirect
	if !keeps || len(via) > maxRedirects || r.URL.Scheme != first.Scheme || r.URL.Host != first.Host {
		return http.ErrUseLastResponse
	}
	return nil
}

// Write implements Sink.
func (s *HTTPSink) Write(ctx context.Context, b *Batch) ([]Outcome, error) {
	to, err := s.target.now()
	if err != nil {
		return nil, err
	}
	if !s.rest.wait(ctx) {
		return nil, ctx.Err()
	}
	if s.http.Mode == config.HTTPBatch {
		return s.writeBatch(ctx, to, b)
	}
	lanes := lanesOf(b, func(it *Item) *string { return it.Key })
	return s.writeEach(ctx, b, lanes, func(i int) error { return s.sendOne(ctx, to, b.Items[i]) })
}

// writeEach sends one event per request, the items of a lane one after the other, and lanes side by side.
func (s *HTTPSink) writeEach(ctx context.Context, b *Batch, lanes [][]int, send func(i int) error) ([]Outcome, error) {
	os := outcomes(len(b.Items), Outcome{Result: Retry})
	first, next := s.turn.Add(1), atomic.Int64{}
	var failed atomic.Int64
	var mu sync.Mutex
	var why error // of the first failure that is not an event's own
	var wg sync.WaitGroup
	for range min(s.http.MaxConcurrent, len(lanes)) {
		wg.Go(func() {
			for {
				n := next.Add(1) - 1
				if n >= int64(len(lanes)) {
					return
				}
				for _, i := range lanes[(uint64(n)+first)%uint64(len(lanes))] {
					// When as many have failed as are sent at once, the receiver is at fault and not an event.
					if ctx.Err() != nil || failed.Load() >= int64(s.http.MaxConcurrent) || s.rest.asked() {
						return
					}
					err := send(i)
					os[i] = outcomeOf(err)
					if os[i].Result == Retry {
						failed.Add(1)
						mu.Lock()
						if why == nil || Classify(err) > Classify(why) {
							why = err
						}
						mu.Unlock()
						break // what follows keeps its place behind it
					}
					if os[i].Result == Rejected && b.InOrder {
						break
					}
				}
			}
		})
	}
	wg.Wait()
	if why == nil {
		return os, ctx.Err()
	}
	if Classify(why) == ClassConfiguration && !slices.ContainsFunc(os, func(o Outcome) bool { return o.Result != Retry }) {
		return nil, why
	}
	for i := range os {
		if os[i].Result == Retry {
			os[i].Reason = clip(why.Error())
		}
	}
	return os, nil
}

// lanesOf divides a batch into what has to be sent one after the other: what has the same key, and in an ordered batch everything.
func lanesOf(b *Batch, key func(*Item) *string) [][]int {
	if b.InOrder {
		all := make([]int, len(b.Items))
		for i := range all {
			all[i] = i
		}
		return [][]int{all}
	}
	lanes := make([][]int, 0, len(b.Items))
	byKey := map[string]int{}
	for i, it := range b.Items {
		if k := key(it); k != nil {
			if lane, ok := byKey[*k]; ok {
				lanes[lane] = append(lanes[lane], i)
				continue
			}
			byKey[*k] = len(lanes)
		}
		lanes = append(lanes, []int{i})
	}
	return lanes
}

func (s *HTTPSink) sendOne(ctx context.Context, to *destination, it *Item) error {
	event, err := s.appendEvent(nil, it)
	if err != nil {
		return err
	}
	_, err = s.post(ctx, to, it, s.eventID(it), "application/cloudevents+json", event)
	return err
}

func (s *HTTPSink) writeBatch(ctx context.Context, to *destination, b *Batch) ([]Outcome, error) {
	os := outcomes(len(b.Items), Outcome{Result: Retry, Reason: "an event before it was not taken"})
	body := []byte{'['}
	var sent []int
	for i, it := range b.Items {
		before := len(body)
		if len(sent) > 0 {
			body = append(body, ',')
		}
		var err error
		if body, err = s.appendEvent(body, it); err != nil {
			body, os[i] = body[:before], outcomeOf(err)
			if b.InOrder {
				break
			}
			continue
		}
		sent = append(sent, i)
	}
	if len(sent) == 0 {
		return os, nil
	}
	reply, err := s.post(ctx, to, nil, s.batchID(b, sent), "application/cloudevents-batch+json", append(body, ']'))
	if err != nil {
		return nil, err
	}
	results, err := s.resultsOf(reply, b, sent)
	if err != nil {
		return nil, err
	}
	for n, i := range sent {
		os[i] = s.resultOutcome(results[n], to)
		if b.InOrder && os[i].Result != Written {
			break
		}
	}
	return os, nil
}

// batchID identifies a request with these events.
func (s *HTTPSink) batchID(b *Batch, sent []int) string {
	h := sha256.New()
	for _, i := range sent {
		fmt.Fprintln(h, s.eventID(b.Items[i]))
	}
	return "batch/" + base64.RawURLEncoding.EncodeToString(h.Sum(nil)[:18])
}

// eventID identifies an event among all that a receiver gets, also from other processors of the stream and other branches.
// It has no dot, which separates the parts of what is signed.
func (s *HTTPSink) eventID(it *Item) string { return s.prefix + escape(it.Stream) + "/" + it.ID }

func escape(name string) string { return strings.ReplaceAll(url.PathEscape(name), ".", "%2E") }

// appendEvent appends a CloudEvent in its JSON format. Its error is about the item.
func (s *HTTPSink) appendEvent(dst []byte, it *Item) ([]byte, error) {
	data, err := s.payload(it)
	if err != nil {
		return dst, &httpError{ClassRow, "sink.http.data: " + err.Error()}
	}
	return s.appendEnvelope(dst, it, data), nil
}

// appendEnvelope appends the CloudEvent of an item with that data.
func (s *HTTPSink) appendEnvelope(dst []byte, it *Item, data []byte) []byte {
	dst = append(dst, `{"specversion":"1.0","id":`...)
	dst = appendString(dst, s.eventID(it))
	dst = appendString(append(dst, `,"source":`...), s.source+escape(it.Stream))
	dst = appendString(append(dst, `,"type":`...), s.http.Type)
	if !it.Created.IsZero() {
		dst = append(it.Created.UTC().AppendFormat(append(dst, `,"time":"`...), time.RFC3339Nano), '"')
	}
	if it.Key != nil && *it.Key != "" {
		dst = appendString(append(dst, `,"partitionkey":`...), *it.Key)
	}
	if parent, state := outgoingTrace(it, &s.codec); parent != "" {
		dst = appendString(append(dst, `,"traceparent":`...), parent)
		if state != "" {
			dst = appendString(append(dst, `,"tracestate":`...), state)
		}
	}
	dst = append(dst, `,"datacontenttype":"application/json","data":`...)
	return append(append(dst, data...), '}')
}

// payload is what an event carries, as JSON: what the expression gives, the mapped columns, or without columns the document as
// it came.
func (s *HTTPSink) payload(it *Item) ([]byte, error) {
	switch {
	case s.data != nil:
		return s.data.EvalJSON(it.Variables(s.columns))
	case len(s.columns) > 0:
		return appendRow(nil, s.columns, it.Row), nil
	}
	return documentJSON(it, &s.codec)
}

// httpError is a request that did not do its work, or a result that says so.
type httpError struct {
	class   Class
	message string
}

// Error says what happened. It holds neither the address nor anything else that may be secret.
func (e *httpError) Error() string { return e.message }

// post sends one request, about one item or a batch when it is nil, and returns the answer's body. Its errors are httpErrors.
func (s *HTTPSink) post(ctx context.Context, to *destination, it *Item, id, contentType string, body []byte) (reply []byte, err error) {
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return nil, &httpError{ClassTransient, "not sent: " + ctx.Err().Error()}
	}
	ctx, span := requestSpan(ctx, it, to)
	defer func() { fail(span, err); span.End() }()
	ctx, cancel := context.WithTimeout(ctx, time.Duration(s.http.Timeout))
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, to.url.String(), bytes.NewReader(body))
	if err != nil {
		return nil, NewConfigurationError("the address of the HTTP sink cannot be used; write https://host/path")
	}
	for name, value := range s.http.Headers {
		r.Header.Set(name, value)
	}
	r.Header.Set("Content-Type", contentType)
	r.Header.Set("Accept", "application/json")
	r.Header.Set("User-Agent", "millrace")
	r.Header.Set("Idempotency-Key", id)
	setHeader(r.Header, "Authorization", to.authorization)
	parent, state := traceHeaders(span.SpanContext())
	if parent == "" && it != nil {
		parent, state = outgoingTrace(it, &s.codec)
	}
	setHeader(r.Header, "Traceparent", parent)
	setHeader(r.Header, "Tracestate", state)
	to.sign(r.Header, id, body, time.Now())

	answer, err := s.client.Do(r)
	if err != nil {
		s.metrics.responses.WithLabelValues(noAnswer).Inc()
		return nil, &httpError{ClassTransient, "no answer: " + s.networkProblem(ctx, err)}
	}
	defer answer.Body.Close()
	span.SetAttributes(otel.Int("http.response.status_code", answer.StatusCode))
	s.metrics.responses.WithLabelValues(fmt.Sprintf("%dxx", answer.StatusCode/100)).Inc()
	reply, err = io.ReadAll(io.LimitReader(answer.Body, maxReply+1))
	if refused := s.judge(answer); refused != nil {
		if text := to.explanation(reply); text != "" {
			refused.message += ": " + text
		}
		return nil, refused
	}
	switch {
	case s.http.Mode != config.HTTPBatch && !s.replies:
		return nil, nil // the status says it all
	case err != nil:
		return nil, &httpError{ClassTransient, "the answer broke off: " + s.networkProblem(ctx, err)}
	case len(reply) > maxReply:
		return nil, &httpError{ClassConfiguration, fmt.Sprintf("the answer has more than %d bytes; make the receiver answer with results and nothing else", maxReply)}
	}
	return reply, nil
}

func setHeader(h http.Header, name, value string) {
	if value != "" {
		h.Set(name, value)
	}
}

// networkProblem is what may be shown of an error of the client: not the address, which can hold a secret.
func (s *HTTPSink) networkProblem(ctx context.Context, err error) string {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return "nothing within " + s.http.Timeout.String()
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	return err.Error()
}

// judge returns what an answer's status means, nil for 2xx.
func (s *HTTPSink) judge(answer *http.Response) *httpError {
	class, ok := classifyStatus(answer.StatusCode)
	if ok {
		return nil
	}
	text := statusText(answer.StatusCode)
	if class == ClassConfiguration {
		to := "nowhere"
		if u, err := answer.Location(); err == nil {
			to = "host " + u.Host
		}
		text += fmt.Sprintf(" to %s, which is not followed; write the address of the receiver itself", to)
	}
	if class == ClassTransient {
		if wait, ok := retryAfter(answer.Header.Get("Retry-After"), time.Now()); ok {
			s.rest.ask(wait)
			text += ", asking for a pause of " + wait.Round(time.Second).String()
		}
	}
	return &httpError{class, text}
}

func statusText(status int) string {
	return strings.TrimSpace(fmt.Sprintf("the receiver answered %d %s", status, http.StatusText(status)))
}

// classifyStatus says what a status means; ok is true for success.
func classifyStatus(status int) (class Class, ok bool) {
	switch {
	case status >= 200 && status < 300:
		return 0, true
	case status >= 300 && status < 400:
		return ClassConfiguration, false
	case status == http.StatusRequestTimeout, status == http.StatusTooManyRequests:
		return ClassTransient, false
	case status >= 400 && status < 500:
		return ClassRow, false
	}
	return ClassTransient, false
}

// outcomeOf is the outcome of an item whose request came to err.
func outcomeOf(err error) Outcome {
	switch {
	case err == nil:
		return Outcome{Result: Written}
	case Classify(err) == ClassRow:
		return Outcome{Result: Rejected, Reason: clip(err.Error())}
	}
	return Outcome{Result: Retry, Reason: clip(err.Error())}
}

// retryAfter reads a Retry-After header: seconds or a date.
func retryAfter(header string, now time.Time) (time.Duration, bool) {
	var wait time.Duration
	if seconds, err := strconv.Atoi(header); err == nil {
		wait = time.Duration(min(seconds, int(maxRetryAfter/time.Second))) * time.Second
	} else if at, err := http.ParseTime(header); err == nil {
		wait = at.Sub(now)
	} else {
		return 0, false
	}
	return min(max(wait, 0), maxRetryAfter), true
}

// eventResult is what a receiver says of one event of a batch.
type eventResult struct {
	ID     string `json:"id"`
	Status int    `json:"status"`
	Error  string `json:"error"`
}

// resultsOf reads the reply to a batch: one result for each event that was sent. A reply without results takes them all.
func (s *HTTPSink) resultsOf(reply []byte, b *Batch, sent []int) ([]eventResult, error) {
	all := make([]eventResult, len(sent))
	var answer struct {
		Results json.RawMessage `json:"results"`
	}
	if json.Unmarshal(reply, &answer) != nil || len(answer.Results) == 0 || string(answer.Results) == "null" {
		for i := range all {
			all[i].Status = http.StatusOK
		}
		return all, nil
	}
	var results []eventResult
	if err := json.Unmarshal(answer.Results, &results); err != nil {
		return nil, &httpError{ClassConfiguration, `the results of the answer cannot be read; make the receiver answer {"results": [{"id": "…", "status": 200}]}`}
	}
	place := make(map[string]int, len(sent))
	for n, i := range sent {
		place[s.eventID(b.Items[i])] = n
	}
	for n, r := range results {
		if r.ID != "" {
			at, ok := place[r.ID]
			if !ok {
				continue // an event that was not in the batch
			}
			n = at
		}
		if n < len(all) {
			all[n] = r
		}
	}
	return all, nil
}

// resultOutcome is the outcome of one event of a batch that was taken in part.
func (s *HTTPSink) resultOutcome(r eventResult, to *destination) Outcome {
	if r.Status == 0 {
		return Outcome{Result: Retry, Reason: "the answer has no result for the event"}
	}
	class, ok := classifyStatus(r.Status)
	if ok {
		return Outcome{Result: Written}
	}
	err := &httpError{class, statusText(r.Status)}
	if r.Error != "" {
		err.message += ": " + to.scrub(r.Error)
	}
	return outcomeOf(err)
}

// rest is the pause that a receiver has asked for.
type rest struct {
	mu    sync.Mutex
	until time.Time
}

func (r *rest) ask(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if until := time.Now().Add(d); until.After(r.until) {
		r.until = until
	}
}

func (r *rest) left() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return time.Until(r.until)
}

// asked says whether the pause is not over.
func (r *rest) asked() bool { return r.left() > 0 }

// wait waits until it is over, and reports false when ctx ended first.
func (r *rest) wait(ctx context.Context) bool {
	for left := r.left(); left > 0; left = r.left() {
		if !sleep(ctx, left) {
			return false
		}
	}
	return true
}
