package redisstream

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/test/env/redis"
)

func TestCheckURL(t *testing.T) {
	for url, want := range map[string]string{
		"redis://host":                                                "",
		"redis://user:p%2Fw@host:6379/3":                              "",
		"rediss://:pw@[::1]:6379":                                     "",
		"valkey://host:6379/0":                                        "",
		"  redis://host\n":                                            "", // a Secret often ends with a newline
		"redis+sentinel://a,b:26380,c/main":                           "",
		"rediss+sentinel://u:p@a:1/main/2":                            "",
		"redis+sentinel://a/main?sentinel_user=u&sentinel_password=p": "",
		"redis+cluster://u:p@a:6379,b:6379":                           "",
		"redis+cluster://a/0":                                         "",
		"":                                                            "it has no scheme; write redis://",
		"host:6379":                                                   "it has no scheme",
		"http://host":                                                 "its scheme is unknown; write redis or, for TLS, rediss",
		"redis+cloud://host":                                          "its scheme is unknown",
		"redis://":                                                    "what stands for a host is none",
		"redis://host:port":                                           "what stands for a host is none",
		"redis://u:se/cret@host":                                      "write redis://user:password@host:6379/0, and in a password %2F for /",
		"redis://u:%zz@host":                                          "write %25 for %",
		"redis://a,b":                                                 "it names 2 hosts, which only Sentinels and Clusters have",
		"redis://host/one":                                            "its database is not a number",
		"redis://host/1/2":                                            "its database is not a number",
		"redis+sentinel://a,b":                                        "it does not say what the Sentinels call the server",
		"redis+cluster://a/1":                                         "a Cluster has only database 0",
		"redis://host?db=1":                                           "it has a parameter that is unknown",
	} {
		err := CheckURL(url)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v; want %q", url, err, want)
		}
		if err != nil && (strings.Contains(err.Error(), "cret") || !IsUnusable(err)) {
			t.Errorf("%q: %v", url, err)
		}
	}
}

// The Sentinels know the server. When it dies they make another one of its replica, and reading goes on there.
func TestSentinelsLeadToTheServerThatIsMaster(t *testing.T) {
	t.Parallel()
	s := redis.NewSentinels(t, redis.Options{Password: "secret"})
	f := fixtureAt(t, s.URL())
	m := f.member("a")
	f.add(2)
	if err := m.Ack(f.ctx, m.term(), ids(f.read(m, 2))); err != nil {
		t.Fatal(err)
	}
	if n, err := f.client.Do(f.ctx, f.client.B().Wait().Numreplicas(1).Timeout(5000).Build()).AsInt64(); err != nil || n != 1 {
		t.Fatalf("%d replicas have the data, %v", n, err)
	}
	if err := s.Servers[0].Kill(); err != nil {
		t.Fatal(err)
	}
	added := false
	for deadline := time.Now().Add(patience); ; {
		if !added {
			added = f.client.Do(f.ctx, f.client.B().Xadd().Key(f.stream).Id("*").FieldValue().FieldValue("n", "after").Build()).Error() == nil
		}
		entries, _, err := m.Read(f.ctx, 10, 10*time.Millisecond)
		if err == nil && len(entries) == 1 && entries[0].Fields[0].Value == "after" {
			break
		}
		if len(entries) > 0 || time.Now().After(deadline) {
			t.Fatalf("read %v, %v", ids(entries), err)
		}
	}
}

// Streams of one Cluster are on different nodes, and one client reads them all. A node that comes back is read again.
func TestOneClientReadsStreamsOnEveryNodeOfACluster(t *testing.T) {
	t.Parallel()
	c := redis.NewCluster(t, 3, redis.Options{Persist: true, Password: "secret"})
	f := fixtureAt(t, c.URL())
	slots := map[int64]bool{}
	for i := range 6 {
		f.stream = fmt.Sprintf("stream-%d", i)
		slot, err := f.client.Do(f.ctx, f.client.B().ClusterKeyslot().Key(f.stream).Build()).AsInt64()
		if err != nil {
			t.Fatal(err)
		}
		slots[slot*3/16384] = true
		m := f.member("a")
		f.add(3)
		if err := m.Ack(f.ctx, m.term(), ids(f.read(m, 1))); err != nil {
			t.Fatal(err)
		}
		if n, err := m.Release(f.ctx); err != nil || n != 0 {
			t.Fatal(n, err)
		}
		f.read(f.member("b"), 2)
	}
	if len(slots) != 3 {
		t.Fatalf("the streams are on %d nodes", len(slots))
	}
	m := f.member("c", func(c *Config) { c.ReclaimAfter = time.Hour })
	for _, n := range c.Nodes {
		if err := n.Restart(f.ctx); err != nil {
			t.Fatal(err)
		}
	}
	for deadline := time.Now().Add(patience); ; {
		_, _, err := m.Read(f.ctx, 10, 10*time.Millisecond)
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// A URL that does not fit the server says what to write.
func TestConnectExplainsAURLOfTheWrongKind(t *testing.T) {
	t.Parallel()
	c := redis.NewCluster(t, 3, redis.Options{})
	s := redis.NewSentinels(t, redis.Options{})
	plain := redis.Shared(t)
	for url, want := range map[string]string{
		c.Nodes[0].URL():     "write redis+cluster://",
		s.Sentinels[0].URL(): "write redis+sentinel://",
		strings.Replace(s.URL(), "/main/", "/other/", 1):            "No such master with that name",
		strings.Replace(plain.URL(), "redis:", "redis+cluster:", 1): "belongs to no Cluster; write redis://",
	} {
		_, _, err := connect(t.Context(), Endpoint{URL: config.Fixed("URL", url)})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
}

// A password is rotated while a member reads: the file has the new one, and connections made from then on use it. The
// user is one of the ACL with no more rights than a member needs.
func TestAPasswordIsRotatedWithoutRestart(t *testing.T) {
	t.Parallel()
	s := redis.New(t)
	f := fixtureAt(t, s.URL())
	rights := []string{"ACL", "SETUSER", "reader", "reset", "on", ">first", "~s:*", "+@stream", "+@connection", "+@scripting", "+info"}
	f.do(rights...)
	file := filepath.Join(t.TempDir(), "url")
	write := func(password string) {
		if err := os.WriteFile(file, []byte(fmt.Sprintf("redis://reader:%s@%s/0\n", password, s.Addr())), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("first")
	client, _, err := connect(f.ctx, Endpoint{URL: config.FromFile("URL", file)})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	m := NewMember(client, Config{Stream: f.stream, Group: "g", Consumer: "a", ReclaimAfter: time.Hour})
	if err := m.Join(f.ctx); err != nil {
		t.Fatal(err)
	}
	f.add(1)
	f.read(m, 1)
	f.do("ACL", "SETUSER", "reader", "resetpass", ">second")
	f.do("CLIENT", "KILL", "USER", "reader")
	// The file is late, as a Secret's volume is. The old password is refused until it comes.
	for deadline := time.Now().Add(patience); ; {
		if _, _, err := m.Read(f.ctx, 1, 10*time.Millisecond); IsConfiguration(err) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the old password is still good")
		}
	}
	write("second")
	f.add(1)
	for deadline := time.Now().Add(patience); ; {
		entries, _, err := m.Read(f.ctx, 1, 10*time.Millisecond)
		if len(entries) == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the new password is not used: %v", err)
		}
	}
}

func (f *fixture) do(words ...string) {
	f.t.Helper()
	if err := f.client.Do(f.ctx, f.client.B().Arbitrary(words...).Build()).Error(); err != nil {
		f.t.Fatal(err)
	}
}

func TestTLSWithClientCertificates(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	cert, key := ca.issue(t, "127.0.0.1")
	s := redis.NewServer(t, redis.Options{Password: "secret", TLS: &redis.TLS{CA: ca.pem, Cert: cert, Key: key, Clients: true}})
	url := "rediss://:secret@" + s.TLSAddr() + "/0"
	dir := t.TempDir()
	write := func(name string, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	open := func(url string) error {
		client, _, err := connect(t.Context(), Endpoint{URL: config.Fixed("URL", url), TLSDir: dir})
		if err == nil {
			client.Close()
		}
		return err
	}
	for _, step := range []struct {
		name    string
		prepare func()
		want    string // in the error; empty: none
	}{
		{"an unknown authority is refused", func() {}, "certificate"},
		// It says so, or hangs up first.
		{"the server asks for a client certificate", func() { write(fileCA, ca.pem) }, "connect to Redis"},
		{"a client certificate opens", func() { c, k := ca.issue(t, "client"); write(fileCert, c); write(fileKey, k) }, ""},
		{"an authority that is none is reported", func() { write(fileCA, []byte("nothing")) }, "holds no certificate"},
	} {
		step.prepare()
		err := open(url)
		if (err == nil) != (step.want == "") || err != nil && !strings.Contains(err.Error(), step.want) {
			t.Errorf("%s: %v; want %q", step.name, err, step.want)
		}
	}
	if err := open(s.URL()); err == nil || !strings.Contains(err.Error(), "write rediss instead of redis") {
		t.Errorf("certificates without TLS: %v", err)
	}
	// A certificate for another host is refused, although its authority is known.
	write(fileCA, ca.pem)
	cert, key = ca.issue(t, "other.example")
	other := redis.NewServer(t, redis.Options{TLS: &redis.TLS{CA: ca.pem, Cert: cert, Key: key}})
	for _, scheme := range []string{"rediss://", "rediss+cluster://"} {
		err := open(scheme + other.TLSAddr())
		if err == nil || !strings.Contains(err.Error(), "127.0.0.1") || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("%s to another host: %v", scheme, err)
		}
	}
}

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{key: key, cert: &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}}
	a.pem = a.sign(t, a.cert, key)
	return a
}

// issue returns a certificate and its key in PEM, for an address or a name.
func (a *authority) issue(t *testing.T, host string) (cert, private []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: host},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if ip := net.ParseIP(host); ip != nil {
		c.IPAddresses = []net.IP{ip}
	} else {
		c.DNSNames = []string{host}
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return a.sign(t, c, key), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func (a *authority) sign(t *testing.T, c *x509.Certificate, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
