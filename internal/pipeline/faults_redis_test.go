package pipeline_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/rueidis"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/test/env/postgres"
	"github.com/millrace-dev/millrace/test/env/redis"
)

// Streams of a Cluster lie on different nodes. One of them restarts under load.
func TestFault_NodeOfAClusterRestarts(t *testing.T) {
	t.Parallel()
	cluster := redis.NewCluster(t, 3, redis.Options{Persist: true, Password: "secret"})
	w := newWorldAt(t, postgres.NewDatabase(t), cluster.URL())
	streams := []string{w.stream, w.stream + ":b", w.stream + ":c", w.stream + ":d", w.stream + ":e"}
	p := w.start("one", w.configText(`["`+w.stream+`"]`, `["`+strings.Join(streams, `", "`)+`"]`))
	p.ready()
	l := seeded(t, &load{total: 30_000, duplicates: 0.05})
	w.spread(l, streams, func(done int) {
		if done == l.total/2 {
			if err := cluster.Nodes[1].Restart(w.ctx); err != nil {
				t.Fatal(err)
			}
		}
	})
	for _, stream := range streams {
		one := *w
		one.stream = stream
		one.settled(time.Minute)
	}
	w.balanced(l)
}

// spread produces a load onto several streams, a key always onto the same one, and tries again what fails.
func (w *world) spread(l *load, streams []string, progress func(done int)) {
	w.t.Helper()
	for n := range l.total {
		payload := l.position(n)
		cmd := func() rueidis.Completed {
			return w.redis.B().Xadd().Key(streams[n%l.devices%len(streams)]).Id("*").FieldValue().FieldValue("payload", payload).Build()
		}
		for w.redis.Do(w.ctx, cmd()).Error() != nil { // a repetition that was not needed is a duplicate
			if w.ctx.Err() != nil {
				w.t.Fatal(w.ctx.Err())
			}
		}
		l.valid.Add(1)
		progress(n + 1)
	}
}

// The server dies and the Sentinels make another of its replica.
func TestFault_SentinelsFailOver(t *testing.T) {
	t.Parallel()
	s := redis.NewSentinels(t, redis.Options{Password: "secret"})
	w := newWorldAt(t, postgres.NewDatabase(t), s.URL())
	l := seeded(t, &load{total: 10_000})
	p := w.start("one", w.configText())
	p.ready()
	w.spread(l, []string{w.stream}, func(done int) {
		if done != l.total/2 {
			return
		}
		// Replication does not wait for the replica; the test does, because it is about the processor.
		w.do(w.redis.B().Wait().Numreplicas(1).Timeout(10_000).Build())
		if err := s.Servers[0].Kill(); err != nil {
			t.Fatal(err)
		}
	})
	w.balanced(l)
}

// The password is rotated and every connection cut, with TLS and client certificates; the processor goes on.
func TestFault_PasswordRotatedUnderTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certificates := selfSigned(t)
	write := func(name string, data []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	write("ca.crt", certificates.CA)
	write("tls.crt", certificates.Cert)
	write("tls.key", certificates.Key)
	server := redis.NewServer(t, redis.Options{TLS: certificates})
	w := newWorldAt(t, postgres.NewDatabase(t), server.URL())
	acl := func(words ...string) { w.do(w.redis.B().Arbitrary("ACL", "SETUSER").Args(words...).Build()) }
	acl("mill", "on", ">first", "~*", "+@all")
	file := write("url", []byte("rediss://mill:first@"+server.TLSAddr()+"/0"))
	w.redisURL = ""
	p := w.start("one", w.configText(), config.EnvRedisURL+"_FILE="+file, config.EnvRedisTLSDir+"="+dir)
	p.ready()
	l := seeded(t, &load{total: 10_000, duplicates: 0.05})
	w.produce(l)
	acl("mill", "resetpass", ">second")
	w.do(w.redis.B().Arbitrary("CLIENT", "KILL", "USER", "mill").Build())
	write("url", []byte("rediss://mill:second@"+server.TLSAddr()+"/0"))
	w.balanced(l)
	for _, secret := range []string{"first", "second"} {
		if strings.Contains(p.tail(1<<30), "mill:"+secret) {
			t.Errorf("the log holds a password")
		}
	}
}

// selfSigned is a certificate that is its own authority, for server and client.
func selfSigned(t *testing.T) *redis.TLS {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return &redis.TLS{CA: cert, Cert: cert, Key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), Clients: true}
}

// What is acknowledged is deleted, or trimmed, and nothing before that: the table has every row while processors are
// killed.
func TestFault_KilledWhileAcknowledgedEntriesAreRemoved(t *testing.T) {
	for _, after := range []string{"Delete", "Trim"} {
		t.Run(after, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			configuration := w.configText("reclaimAfter: 1s", "reclaimAfter: 1s, afterAck: "+after)
			l := seeded(t, &load{total: 40_000, duplicates: 0.05, undecodable: 0.002})
			producing := make(chan error, 1)
			p := w.start("one", configuration)
			p.ready()
			go func() { producing <- l.produce(w.ctx, w.redis, w.stream) }()
			for n := 1; n <= 3; n++ {
				eventually(t, func() (bool, string) { rows := w.rows(); return rows > n*8000, fmt.Sprint(rows, " rows") })
				p.kill()
				p = w.start("one", configuration)
			}
			if err := <-producing; err != nil {
				t.Fatal(err)
			}
			w.balanced(l)
			becomes(t, "entries in the stream", 0, w.length)
		})
	}
}

func (w *world) length() int {
	w.t.Helper()
	n, err := w.redis.Do(w.ctx, w.redis.B().Xlen().Key(w.stream).Build()).AsInt64()
	if err != nil {
		w.t.Fatal(err)
	}
	return int(n)
}

// Redis loses its data and gives the same ids again. Rows are told apart by @id, and none of the new ones is taken for an
// old one, although no processor was there to see it happen.
func TestFault_IDsStartOver(t *testing.T) {
	t.Parallel()
	server := redis.NewServer(t, redis.Options{})
	w := newWorldAt(t, postgres.NewDatabase(t), server.URL())
	configuration := w.configText("key: [device_id, ts]", "key: [source_id]", `path: "@id", type: text`, `path: "@id", type: text, required: true`)
	p := w.start("one", configuration)
	add := func(first, n int) {
		for i := range n {
			w.do(w.redis.B().Xadd().Key(w.stream).Id(fmt.Sprintf("7-%d", i+1)).FieldValue().FieldValue("payload", position(first+i, 1)).Build())
		}
	}
	p.ready()
	add(0, 100)
	becomes(t, "rows", 100, w.rows)
	becomes(t, "pending entries", 0, w.pending)
	restart := func() {
		if err := server.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := server.Restart(w.ctx); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() (bool, string) {
			err := w.redis.Do(w.ctx, w.redis.B().Ping().Build()).Error()
			return err == nil, fmt.Sprint(err)
		})
	}
	restart() // it sees it
	add(100, 50)
	becomes(t, "rows", 150, w.rows)
	p.signal(syscall.SIGTERM)
	if code := p.exited(patience); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	restart() // nobody sees it
	add(150, 30)
	w.start("two", configuration).ready()
	becomes(t, "rows", 180, w.rows)
	becomes(t, "pending entries", 0, w.pending)
	t.Logf("ids: %d, r1-: %d, r2-: %d", w.count("select count(*) from positions where source_id like '7-%'"),
		w.count("select count(*) from positions where source_id like 'r1-%'"), w.count("select count(*) from positions where source_id like 'r2-%'"))
}

// owned is a configuration that keeps the last position of every device, of several streams with owners.
func (w *world) owned(streams []string, lease, action string) string {
	w.t.Helper()
	return w.configText(`["`+w.stream+`"]`, `["`+strings.Join(streams, `", "`)+`"]`,
		"reclaimAfter: 1s", "reclaimAfter: "+lease+", ownership: Exclusive",
		"key: [device_id, ts]", "key: [device_id], conflict: {action: "+action+"}")
}

// Streams change their owners in an orderly way, again and again: no row is ever overwritten by an older one.
func TestFault_OwnersComeAndGo(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.lastPositions()
	var streams []string
	for i := range 5 {
		streams = append(streams, fmt.Sprintf("%s:%d", w.stream, i))
	}
	// A lease that nobody loses, however busy the machine is: with Update, a lost one may let a row go back for a moment.
	configuration := w.owned(streams, "30s", "Update")
	var running []*processor
	l := seeded(t, &load{total: 30_000})
	l.devices = 50
	join := func() {
		p := w.start(fmt.Sprintf("pod-%d-%d", len(running), time.Now().UnixNano()), configuration)
		p.ready()
		running = append(running, p)
	}
	join()
	w.spread(l, streams, func(done int) {
		switch done {
		case 5_000, 10_000, 15_000:
			join()
		case 20_000, 25_000:
			running[0].signal(syscall.SIGTERM)
			if code := running[0].exited(patience); code != 0 {
				t.Errorf("exit code %d", code)
			}
			running = running[1:]
		}
	})
	w.lastOfEvery(l, streams)
	if n := w.count("select count(*) from regressions"); n != 0 {
		t.Errorf("%d rows were overwritten by older ones", n)
	}
}

// lastPositions makes a table for the last position of every device, which records when it goes back.
func (w *world) lastPositions() {
	w.t.Helper()
	_, err := w.db.Exec(w.ctx, `
		create table positions (device_id text primary key, ts timestamptz, latitude float8, longitude float8, odometer bigint, attributes jsonb, source_id text);
		create table regressions (device_id text, was timestamptz, became timestamptz);
		create function record() returns trigger language plpgsql as $$
		begin
			insert into regressions values (new.device_id, old.ts, new.ts);
			return null;
		end $$;
		create trigger record after update on positions for each row when (new.ts < old.ts) execute function record()`)
	if err != nil {
		w.t.Fatal(err)
	}
}

// lastOfEvery waits until everything is settled, and checks that every device has its last position.
func (w *world) lastOfEvery(l *load, streams []string) {
	w.t.Helper()
	for _, stream := range streams {
		one := *w
		one.stream = stream
		one.settled(time.Minute)
	}
	wrong := w.count(`select count(*) from generate_series(0, $2 - 1) d left join positions p on p.device_id = 'device-' || lpad(d::text, 4, '0')
		where p.ts is distinct from timestamptz '2026-01-01Z' + (($1 - 1 - d) / $2) * interval '1 s'`, l.total, l.devices)
	w.t.Logf("produced %d for %d devices; rows %d, without their last position %d, regressions %d",
		l.total, l.devices, w.rows(), wrong, w.count("select count(*) from regressions"))
	if wrong != 0 {
		w.t.Errorf("%d devices have not their last position", wrong)
	}
}

// Owners are killed, and one stands still past its lease and wakes up: nothing is lost, and every device has its last
// position in the end. R8.
func TestFault_OwnersDieAndWakeUp(t *testing.T) {
	for name, action := range map[string]string{"Update": "Update", "UpdateIfNewer": "UpdateIfNewer, newer: ts"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.lastPositions()
			var streams []string
			for i := range 4 {
				streams = append(streams, fmt.Sprintf("%s:%d", w.stream, i))
			}
			configuration := w.owned(streams, "500ms", action)
			l := seeded(t, &load{total: 24_000})
			l.devices = 40
			zombie := w.start("a", configuration)
			zombie.ready()
			second := w.start("b", configuration)
			second.ready()
			var third *processor
			w.spread(l, streams, func(done int) {
				switch done {
				case 6_000:
					zombie.signal(syscall.SIGSTOP)
				case 12_000:
					second.kill()
					third = w.start("c", configuration)
					third.ready()
				case 18_000:
					eventually(t, func() (bool, string) {
						owned := 0.0
						for name, value := range third.metrics() {
							if strings.HasPrefix(name, "millrace_processor_stream_owner{") {
								owned += value
							}
						}
						return owned == 4, fmt.Sprint(owned, " streams owned")
					})
					zombie.signal(syscall.SIGCONT)
				}
			})
			w.lastOfEvery(l, streams)
			if n := w.count("select count(*) from regressions"); n != 0 && action != "Update" {
				t.Errorf("%d rows were overwritten by older ones", n)
			}
		})
	}
}
