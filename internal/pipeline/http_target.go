package pipeline

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// httpTarget is where an HTTP sink sends to, and with which secrets. They are read again while it works, so they can be
// rotated.
type httpTarget struct {
	address, authorization, signingKey config.Setting

	mu     sync.Mutex
	readAt time.Time
	latest *destination
}

// secretAge is how long the secrets of an HTTP sink are taken for granted.
const secretAge = time.Second

// signingPrefix marks a key in base64, as Standard Webhooks writes it.
const signingPrefix = "whsec_"

// oneReceiverOfSecrets fails when several branches post and the environment holds a secret of one: the others would send it
// to their receivers.
func oneReceiverOfSecrets(c *config.Config) error {
	var names []string
	for _, b := range c.Sink.FanOut {
		if b.HTTP != nil {
			names = append(names, b.Name)
		}
	}
	if len(names) < 2 {
		return nil
	}
	for _, variable := range []string{config.EnvHTTPURL, config.EnvHTTPAuthorization, config.EnvHTTPSigningKey} {
		secret, err := config.FromEnvironment(variable)
		if err != nil {
			return NewConfigurationError("%v", err)
		}
		if secret.IsSet() {
			return NewConfigurationError("%s is set, and the branches %s would all use it; give the branch that it belongs to a processor of its own",
				variable, strings.Join(names, ", "))
		}
	}
	return nil
}

func newHTTPTarget(h *config.HTTPSink) (*httpTarget, error) {
	t := &httpTarget{address: config.Fixed("sink.http.url", h.URL)}
	var err error
	if h.URL == "" {
		if t.address, err = config.FromEnvironment(config.EnvHTTPURL); err != nil {
			return nil, NewConfigurationError("%v", err)
		}
	}
	if t.authorization, err = config.FromEnvironment(config.EnvHTTPAuthorization); err != nil {
		return nil, NewConfigurationError("%v", err)
	}
	if t.signingKey, err = config.FromEnvironment(config.EnvHTTPSigningKey); err != nil {
		return nil, NewConfigurationError("%v", err)
	}
	_, err = t.now()
	return t, err
}

// now returns the present destination.
func (t *httpTarget) now() (*destination, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.latest != nil && time.Since(t.readAt) < secretAge {
		return t.latest, nil
	}
	d, err := t.read()
	if err != nil {
		return nil, err
	}
	t.latest, t.readAt = d, time.Now()
	return d, nil
}

func (t *httpTarget) read() (*destination, error) {
	address, err := t.address.Read()
	if err != nil {
		return nil, err
	}
	d := &destination{}
	d.url, err = url.Parse(address)
	if err != nil || d.url.Host == "" || d.url.Scheme != "http" && d.url.Scheme != "https" {
		// The parser's error would repeat the address, and with it a secret.
		return nil, NewConfigurationError("the address of the HTTP sink cannot be read; write https://host/path as sink.http.url, or into %s", config.EnvHTTPURL)
	}
	if d.authorization, err = t.authorization.Read(); err != nil {
		return nil, err
	}
	if strings.ContainsFunc(d.authorization, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return nil, NewConfigurationError("%s holds a line break or another control character; write one line such as Bearer …", config.EnvHTTPAuthorization)
	}
	keys, err := t.signingKey.Read()
	if err != nil {
		return nil, err
	}
	for _, text := range strings.Fields(keys) {
		key := []byte(text)
		if encoded, ok := strings.CutPrefix(text, signingPrefix); ok {
			if key, err = base64.StdEncoding.DecodeString(encoded); err != nil || len(key) == 0 {
				return nil, NewConfigurationError("%s begins with %s and does not go on in base64; write %[2]s and the key in base64, or a key without %[2]s", config.EnvHTTPSigningKey, signingPrefix)
			}
		}
		d.keys = append(d.keys, key)
		d.secrets = append(d.secrets, text)
	}
	d.addSecrets()
	if t.address.Variable() == config.EnvHTTPURL && len(d.url.Path) > 1 {
		// The whole address is a secret, and that of a web hook is often one by its path.
		d.secrets = append(d.secrets, d.url.Path, d.url.EscapedPath())
	}
	return d, nil
}

// destination is a target at one moment.
type destination struct {
	url           *url.URL
	authorization string   // of the header; may be empty
	keys          [][]byte // to sign with; none: requests are not signed
	secrets       []string // what no message may repeat
}

func (d *destination) addSecrets() {
	if d.authorization != "" {
		d.secrets = append(d.secrets, d.authorization)
		if _, token, ok := strings.Cut(d.authorization, " "); ok {
			d.secrets = append(d.secrets, token)
		}
	}
	if password, ok := d.url.User.Password(); ok {
		d.secrets = append(d.secrets, password)
	}
	for _, values := range d.url.Query() {
		d.secrets = append(d.secrets, values...)
	}
}

// sign adds the headers of Standard Webhooks (https://www.standardwebhooks.com): an HMAC-SHA256 of id, time and body. With
// several keys, as while one replaces another, there are as many signatures, and a receiver takes any that it knows.
func (d *destination) sign(h http.Header, id string, body []byte, now time.Time) {
	if len(d.keys) == 0 {
		return
	}
	at := strconv.FormatInt(now.Unix(), 10)
	signatures := make([]string, len(d.keys))
	for i, key := range d.keys {
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(id + "." + at + "."))
		mac.Write(body)
		signatures[i] = "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))
	}
	h.Set("Webhook-Id", id)
	h.Set("Webhook-Timestamp", at)
	h.Set("Webhook-Signature", strings.Join(signatures, " "))
}

// explanation is what an answer that refuses says about it: the text under error, or the title and detail of RFC 9457.
func (d *destination) explanation(reply []byte) string {
	var answer struct {
		Error  string `json:"error"`
		Title  string `json:"title"`
		Detail string `json:"detail"`
	}
	if json.Unmarshal(reply, &answer) != nil {
		return "" // a page of HTML, for example, explains nothing
	}
	text := answer.Error
	for _, more := range []string{answer.Title, answer.Detail} {
		if text != "" && more != "" {
			text += ": "
		}
		text += more
	}
	return d.scrub(text)
}

// scrub makes one line of a receiver's text, and takes out of it what it may have repeated of our secrets.
func (d *destination) scrub(text string) string {
	const least = 4 // shorter ones keep no secret, and are in every other word
	for _, s := range d.secrets {
		if len(s) >= least {
			text = strings.ReplaceAll(text, s, "…")
		}
	}
	const most = 200
	text = strings.Join(strings.Fields(text), " ")
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	return text
}
