package redisstream

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// Endpoint says how to reach Redis.
type Endpoint struct {
	// URL as CheckURL describes it. User and password are read again at every new connection, so that a password that is
	// rotated in a file needs no restart. A change of anything else does.
	URL config.Setting
	// TLSDir holds ca.crt, and tls.crt with tls.key for a client certificate. Each may be absent; they are read again at
	// every new connection. Empty: the system's certificate authorities, and no client certificate.
	TLSDir string
}

// sentinelRefresh is how often the Sentinels are asked for the server, besides listening to what they tell.
const sentinelRefresh = 5 * time.Second

// Connect opens a client for a URL that does not change. Its errors never hold the URL.
func Connect(ctx context.Context, url, name string) (rueidis.Client, Version, error) {
	return Endpoint{URL: config.Fixed("the URL", url)}.Connect(ctx, name)
}

// Connect opens a client and checks the server. name is what CLIENT LIST shows. Its errors never hold a secret.
func (e Endpoint) Connect(ctx context.Context, name string) (rueidis.Client, Version, error) {
	a, err := e.address()
	if err != nil {
		return nil, Version{}, err
	}
	if e.TLSDir != "" && !a.tls {
		return nil, Version{}, badURL("there are certificates for TLS, and its scheme does not ask for TLS; write rediss instead of redis")
	}
	opened := new(atomic.Uint64)
	opt := e.options(a, name, opened)
	// The client's constructor takes no context, so it is waited for beside.
	type result struct {
		client rueidis.Client
		err    error
	}
	opening := make(chan result, 1)
	go func() {
		client, err := rueidis.NewClient(opt)
		opening <- result{client, err}
	}()
	var o result
	select {
	case o = <-opening:
	case <-ctx.Done():
		go func() {
			if o := <-opening; o.client != nil {
				o.client.Close()
			}
		}()
		return nil, Version{}, a.failed(ctx.Err())
	}
	if o.err != nil {
		return nil, Version{}, a.failed(o.err)
	}
	version, err := a.check(ctx, o.client)
	if err != nil {
		o.client.Close()
		return nil, Version{}, a.failed(err)
	}
	return countingClient{o.client, opened}, version, nil
}

// countingClient knows how many connections to servers it has opened.
type countingClient struct {
	rueidis.Client
	opened *atomic.Uint64
}

// connectionsOf returns how many connections a client has opened, if it counts them. It opens them by itself, so that a
// server can restart, without its data, and no command fails.
func connectionsOf(client rueidis.Client) uint64 {
	if c, ok := client.(countingClient); ok {
		return c.opened.Load()
	}
	return 0
}

// address reads the URL as it is now.
func (e Endpoint) address() (address, error) {
	text, err := e.URL.Read()
	if err != nil {
		return address{}, err
	}
	return parseAddress(text)
}

// options are the client's. opened counts its connections to servers.
func (e Endpoint) options(a address, name string, opened *atomic.Uint64) rueidis.ClientOption {
	opt := rueidis.ClientOption{
		InitAddress:  slices.Clone(a.hosts),
		SelectDB:     a.database,
		ClientName:   strings.Map(nameRune, name),
		DisableCache: true,
		// A processor reads on one connection per stream and sends few other commands, so that small buffers are enough.
		PipelineMultiplex:   -1,
		RingScaleEachConn:   8,
		ReadBufferEachConn:  256 << 10,
		WriteBufferEachConn: 64 << 10,
		ConnWriteTimeout:    2 * callTimeout,
		ForceSingleClient:   a.topology == server,
	}
	opt.Dialer.Timeout = callTimeout
	opt.DialCtxFn = func(ctx context.Context, to string, dialer *net.Dialer, _ *tls.Config) (net.Conn, error) {
		conn, err := e.dial(ctx, a, to, dialer)
		switch {
		case err != nil:
		case dialer.FallbackDelay == sentinelMark:
			conn = toSentinel{conn}
		default:
			opened.Add(1)
		}
		return conn, err
	}
	opt.AuthCredentialsFn = func(c rueidis.AuthCredentialsContext) (rueidis.AuthCredentials, error) {
		now, err := e.address()
		if err != nil {
			return rueidis.AuthCredentials{}, err
		}
		if _, ok := c.Address.(sentinelAddr); ok {
			return rueidis.AuthCredentials{Username: now.sentinelUser, Password: now.sentinelPassword}, nil
		}
		return rueidis.AuthCredentials{Username: now.user, Password: now.password}, nil
	}
	if a.topology == sentinel {
		opt.Sentinel = rueidis.SentinelOption{
			MasterSet: a.master, ClientName: opt.ClientName, TopologyRefreshInterval: sentinelRefresh,
			Dialer: net.Dialer{Timeout: callTimeout, FallbackDelay: sentinelMark},
		}
	}
	return opt
}

// The client asks for the credentials of a connection by its address alone, which does not tell a Sentinel from a server.
// Its two dialers do: that of the Sentinels has a delay of its own, and marks its connections.
const sentinelMark = 301 * time.Millisecond // the default is 300

type toSentinel struct{ net.Conn }

func (c toSentinel) RemoteAddr() net.Addr { return sentinelAddr{c.Conn.RemoteAddr()} }

type sentinelAddr struct{ net.Addr }

// failed adds where, which is no secret.
func (a address) failed(err error) error {
	where := strings.Join(a.hosts, ", ")
	if a.topology == sentinel {
		where = fmt.Sprintf("%q by the Sentinels %s", a.master, where)
	}
	return fmt.Errorf("connect to Redis at %s: %w", where, err)
}

// check reads INFO of every node that answers. It returns the lowest version, and an error for a server that the URL does
// not fit or that is too old. A server that refuses INFO is taken for the oldest supported one.
func (a address) check(ctx context.Context, client rueidis.Client) (Version, error) {
	nodes := client.Nodes()
	var lowest *Version
	var failed error
	for _, node := range nodes {
		v, mode, err := serverInfo(ctx, node)
		if err != nil {
			failed = err
			continue
		}
		if mode == cluster.String() && a.topology != cluster {
			return v, badURL("the server belongs to a Cluster; write %s", formCluster)
		}
		if mode == server.String() && a.topology == cluster {
			return v, badURL("the server belongs to no Cluster; write %s", formServer)
		}
		if mode == sentinel.String() {
			return v, badURL("the server is a Sentinel; write %s", formSentinel)
		}
		if lowest == nil || lowest.AtLeast(v) {
			lowest = &v
		}
	}
	if lowest == nil {
		return Version{}, failed
	}
	if !lowest.AtLeast(minVersion) {
		return *lowest, &tooOldError{*lowest}
	}
	return *lowest, nil
}

// nameRune replaces what CLIENT SETNAME refuses.
func nameRune(r rune) rune {
	if r <= ' ' || r > '~' {
		return '-'
	}
	return r
}
