package pipeline_test

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// deliverConfig sends orders to the receiver at URL.
const deliverConfig = `
name: bill
source: {consumerGroup: {stream: orders, group: orders_sink, mode: GROUP}}
mapping:
  columns:
  - {name: order_id, path: order_id, type: text, required: true}
  - {name: amount, path: amount, type: numeric}
sink: {http: {url: "URL", mode: REQUEST, timeout: 1s}}
errors: {maxDeliveries: 2}
`

func deliver(url, group, request string) string {
	return strings.NewReplacer("URL", url, "GROUP", group, "REQUEST", request).Replace(deliverConfig)
}

// taken is what a receiver has said 2xx to, by event id, and how often.
type taken struct {
	mu     sync.Mutex
	counts map[string]int
	order  []cloudEvent
}

func (tk *taken) take(events ...cloudEvent) {
	tk.mu.Lock()
	defer tk.mu.Unlock()
	if tk.counts == nil {
		tk.counts = map[string]int{}
	}
	for _, e := range events {
		tk.counts[e.ID]++
		tk.order = append(tk.order, e)
	}
}

func (tk *taken) distinct() int {
	tk.mu.Lock()
	defer tk.mu.Unlock()
	return len(tk.counts)
}

// restart ends a receiver with everything that is under way, and starts it at the same address again.
func (rec *receiver) restart(answer func(http.ResponseWriter, *http.Request, []cloudEvent), meanwhile func()) {
	rec.t.Helper()
	address := rec.Listener.Addr().String()
	rec.Listener.Close()
	rec.CloseClientConnections()
	rec.Close()
	meanwhile()
	rec.Server = httptest.NewUnstartedServer(rec.handler(answer))
	rec.Server.Listener.Close()
	var err error
	if rec.Server.Listener, err = net.Listen("tcp", address); err != nil {
		rec.t.Fatal(err)
	}
	rec.Start()
}

// A receiver that fails in every way it can, and is killed twice with requests under way: every message reaches it, and in an Ordered group each
// key's in order. Answers that get lost bring an event again, under the same id.
func TestHTTPSink_ReceiverKilledTwice(t *testing.T) {
	for _, group := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		for _, request := range []string{"Single", "Batch"} {
			t.Run(fmt.Sprintf("from a group in mode %s with requests in mode %s", group, request), func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				w.newOrders(group)
				seed := rand.Uint64()
				t.Logf("seed %d", seed)
				var mu sync.Mutex
				random := rand.New(rand.NewPCG(seed, 1))
				tk := &taken{}
				answer := func(w http.ResponseWriter, _ *http.Request, events []cloudEvent) {
					mu.Lock()
					n := random.IntN(40)
					mu.Unlock()
					switch n {
					case 0:
						w.WriteHeader(http.StatusInternalServerError)
						return
					case 1:
						w.WriteHeader(http.StatusServiceUnavailable)
						return
					case 2, 3: // cut off before or after the events are taken
						if n == 3 {
							tk.take(events...)
						}
						conn, _, err := w.(http.Hijacker).Hijack()
						if err == nil {
							conn.Close()
						}
						return
					case 4: // half of them
						if request == "Batch" {
							tk.take(events[:len(events)/2]...)
							var results []string
							for i := range events {
								results = append(results, fmt.Sprintf(`{"id":%q,"status":%d}`, events[i].ID, map[bool]int{true: 200, false: 503}[i < len(events)/2]))
							}
							fmt.Fprintf(w, `{"results":[%s]}`, strings.Join(results, ","))
							return
						}
					}
					tk.take(events...)
				}
				r := newReceiver(t, answer)
				const total = 2000
				p := w.start("one", deliver(r.URL, string(group), request)+"batch: {maxRows: 20}\n", config.EnvSourceDatabaseURL+"="+w.dsn, config.EnvSinkDatabaseURL+"=")
				p.ready()
				produced := make(chan error, 1)
				go func() {
					for n := range total {
						key := fmt.Sprint("customer-", n%17)
						m := pgstream.NewMessage{Key: &key, Payload: []byte(fmt.Sprintf(`{"order_id":"o-%d","amount":1}`, n))}
						if _, err := pgstream.Publish(w.ctx, w.db, "orders", m); err != nil {
							produced <- err
							return
						}
					}
					produced <- nil
				}()
				for n := 1; n <= 2; n++ {
					eventually(t, func() (bool, string) { d := tk.distinct(); return d > n*total/4, fmt.Sprint(d, " events") })
					r.restart(answer, func() {
						eventually(t, func() (bool, string) {
							code, text := p.get("/readyz")
							return code == http.StatusServiceUnavailable, text
						})
					})
				}
				if err := <-produced; err != nil {
					t.Fatal(err)
				}
				becomes(t, "events", total, tk.distinct)
				eventually(t, func() (bool, string) {
					unsettled, dead := w.backlog()
					return unsettled+dead == 0, fmt.Sprintf("%d unsettled, %d dead letters", unsettled, dead)
				})
				tk.mu.Lock()
				defer tk.mu.Unlock()
				repeated := 0
				for _, n := range tk.counts {
					repeated += n - 1
				}
				t.Logf("produced %d: taken %d, repeated %d, unsettled 0, dead letters 0", total, len(tk.counts), repeated)
				if group == pgstream.ModeOrdered {
					checkOrder(t, tk.order)
				}
			})
		}
	}
}

// What a receiver refuses becomes a dead letter with the receiver's reason; the others are taken.
func TestHTTPSink_PoisonBecomesDeadLetters(t *testing.T) {
	for _, request := range []string{"Single", "Batch", "Batch, as a whole"} {
		t.Run(request, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			tk := &taken{}
			bad := func(e cloudEvent) bool { return strings.Contains(string(e.Data), `"odometer":-1`) }
			r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request, events []cloudEvent) {
				if !slices.ContainsFunc(events, bad) {
					tk.take(events...)
					return
				}
				if request != "Batch" {
					w.WriteHeader(http.StatusUnprocessableEntity)
					fmt.Fprint(w, `{"title":"no such device","detail":"ask the fleet"}`)
					return
				}
				var results []string
				for _, e := range events {
					if bad(e) {
						results = append(results, `{"status":404,"error":"no such device: ask the fleet"}`)
						continue
					}
					tk.take(e)
					results = append(results, `{"status":201}`)
				}
				fmt.Fprintf(w, `{"results":[%s]}`, strings.Join(results, ","))
			})
			l := seeded(t, &load{total: 1500, poison: 0.02, undecodable: 0.01})
			mode, _, _ := strings.Cut(request, ",")
			configuration := w.configText("\n  table: {name: positions, key: [device_id, ts], create: IfMissing}", fmt.Sprintf(" {http: {url: %q, mode: %s}}", r.URL, mode))
			p := w.start("one", configuration)
			p.ready()
			w.produce(l)
			eventually(t, func() (bool, string) {
				taken, undelivered, pending, letters := tk.distinct(), w.undelivered(), w.pending(), w.deadLetters()
				return taken == int(l.valid.Load()) && undelivered == 0 && pending == 0 && letters == int(l.broken.Load()+l.poisoned.Load()),
					fmt.Sprintf("taken %d of %d, undelivered %d, pending %d, dead letters %d of %d + %d", taken, l.valid.Load(), undelivered, pending, letters, l.broken.Load(), l.poisoned.Load())
			})
			t.Logf("produced %d = %d taken + %d refused + %d undecodable; pending 0", l.total, tk.distinct(), l.poisoned.Load(), l.broken.Load())
			if n := w.count("select count(*) from millrace_dead_letter where reason like 'the receiver answered 4%no such device: ask the fleet'"); n != int(l.poisoned.Load()) {
				t.Errorf("%d dead letters have the receiver's reason", n)
			}
		})
	}
}

// verify checks a signature as https://www.standardwebhooks.com says.
func verify(h http.Header, body string, key []byte) bool {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(h.Get("webhook-id") + "." + h.Get("webhook-timestamp") + "." + body))
	want := "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))
	at, err := strconv.ParseInt(h.Get("webhook-timestamp"), 10, 64)
	if err != nil || time.Since(time.Unix(at, 0)).Abs() > time.Minute {
		return false
	}
	return slices.Contains(strings.Fields(h.Get("webhook-signature")), want)
}

// Keys, Authorization and address come from files, are read again, and are in no log.
func TestHTTPSink_SecretsAreRotated(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.newOrders(pgstream.ModeShared)
	r := newReceiver(t, func(w http.ResponseWriter, r *http.Request, _ []cloudEvent) {
		if strings.HasPrefix(r.Header.Get("Authorization"), "Bearer expired") {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintf(w, `{"error": "%s is not known here"}`, r.Header.Get("Authorization"))
		}
	})
	dir := t.TempDir()
	put := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path+".new", []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
		return path
	}
	oldKey, newKey := "first-signing-secret", "second-signing-secret"
	encoded := "whsec_" + base64.StdEncoding.EncodeToString([]byte(newKey))
	p := w.start("one", strings.ReplaceAll(deliver("", "Shared", "Single"), `url: "", `, ""), config.EnvSourceDatabaseURL+"="+w.dsn, config.EnvSinkDatabaseURL+"=",
		config.EnvHTTPURL+"_FILE="+put("url", r.URL+"/hook?token=url-secret"),
		config.EnvHTTPAuthorization+"_FILE="+put("authorization", "Bearer expired-secret"),
		config.EnvHTTPSigningKey+"_FILE="+put("key", oldKey))
	p.ready()
	w.order("k", orders(0, 1)...)
	// Until the token is good nothing is taken, and what the receiver says of it is not repeated.
	eventually(t, func() (bool, string) {
		code, text := p.get("/readyz")
		return code == http.StatusServiceUnavailable && strings.Contains(text, "is not known here"), text
	})
	put("authorization", "Bearer good-secret")
	settled := func() int { unsettled, _ := w.backlog(); return unsettled }
	becomes(t, "unsettled", 0, settled)

	last := func() (http.Header, string) {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.heads[len(r.heads)-1], r.bodies[len(r.bodies)-1]
	}
	// signed publishes one order after another until one is signed with exactly these keys.
	signed := func(n int, keys ...string) {
		t.Helper()
		eventually(t, func() (bool, string) {
			w.order("k", orders(n, n+1)...)
			becomes(t, "unsettled", 0, settled)
			h, body := last()
			for _, key := range keys {
				if !verify(h, body, []byte(key)) {
					return false, fmt.Sprint("not signed with ", keys)
				}
			}
			return len(strings.Fields(h.Get("Webhook-Signature"))) == len(keys), "signed with more"
		})
	}
	signed(1, oldKey)
	if h, _ := last(); h.Get("Webhook-Id") != h.Get("Idempotency-Key") || h.Get("Authorization") != "Bearer good-secret" {
		t.Errorf("headers %v", h)
	}
	put("key", oldKey+"\n"+encoded)
	signed(2, oldKey, newKey)
	put("key", encoded)
	signed(3, newKey)
	if h, body := last(); verify(h, body, []byte(oldKey)) || verify(h, body+" ", []byte(newKey)) {
		t.Error("a signature of the old key, or of another body")
	}
	if log := p.tail(1 << 20); strings.Contains(log, "-secret") {
		t.Errorf("the log holds a secret:\n%s", log)
	}
	if _, text := p.get("/metrics"); strings.Contains(text, "-secret") {
		t.Error("the metrics hold a secret")
	}
}

// Beside a table in a fan-out: what the receiver takes becomes a row too, what it refuses becomes a dead letter of its branch and a row, and a receiver
// that is away for a while loses nothing.
func TestHTTPSink_BesideATable(t *testing.T) {
	for _, request := range []string{"Single", "Batch"} {
		t.Run(request, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			tk := &taken{}
			var requests atomic.Int64
			r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request, events []cloudEvent) {
				if requests.Add(1)%7 == 3 {
					w.WriteHeader(http.StatusServiceUnavailable)
					return
				}
				if slices.ContainsFunc(events, func(e cloudEvent) bool { return strings.Contains(string(e.Data), `"odometer":-1`) }) {
					w.WriteHeader(http.StatusUnprocessableEntity)
					return
				}
				tk.take(events...)
			})
			l := seeded(t, &load{total: 600, poison: 0.01})
			text := w.configText("\n  table: {name: positions, key: [device_id, ts], create: IfMissing}", fmt.Sprintf(`
  fanOut:
  - {name: rows, table: {name: positions, key: [device_id, ts], create: IfMissing}}
  - {name: hook, http: {url: %q, mode: %s}}`, r.URL, request))
			w.start("one", text).ready()
			w.produce(l)
			valid, poisoned := int(l.valid.Load()), int(l.poisoned.Load())
			eventually(t, func() (bool, string) {
				taken, rows, undelivered, pending, letters := tk.distinct(), w.rows(), w.undelivered(), w.pending(), w.deadLetters()
				return taken == valid && rows == valid+poisoned && undelivered == 0 && pending == 0 && letters == poisoned,
					fmt.Sprintf("taken %d of %d, rows %d, undelivered %d, pending %d, dead letters %d of %d", taken, valid, rows, undelivered, pending, letters, poisoned)
			})
			t.Logf("produced %d: taken %d, rows %d, refused by the receiver and set aside %d, pending 0", l.total, tk.distinct(), w.rows(), poisoned)
		})
	}
}
