package redisstream

import (
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// Forms of a Redis URL, for messages.
const (
	formServer   = "redis://user:password@host:6379/0"
	formSentinel = "redis+sentinel://user:password@host1:26379,host2:26379/master/0"
	formCluster  = "redis+cluster://user:password@host1:6379,host2:6379"
)

// topology is what a URL leads to.
type topology uint8

const (
	server   topology = iota // one server
	sentinel                 // Sentinels, which know the server
	cluster                  // some nodes of a Cluster, which know the others
)

// String is what INFO calls it.
func (t topology) String() string { return [...]string{"standalone", "sentinel", "cluster"}[t] }

// address is a parsed Redis URL.
type address struct {
	topology       topology
	tls            bool
	hosts          []string // host:port
	user, password string
	database       int
	// Of Sentinel only: the name it knows the server by, and what the Sentinels themselves ask for.
	master                         string
	sentinelUser, sentinelPassword string
}

// CheckURL says what is wrong with a Redis URL, and what to write instead. It repeats nothing of the URL that can be a
// secret.
//
//	redis://user:password@host:6379/0                                  one server, and one of its databases
//	redis+sentinel://user:password@host1:26379,host2:26379/master/0    what Sentinels call master
//	redis+cluster://user:password@host1:6379,host2:6379                a Cluster
//
// rediss, rediss+sentinel and rediss+cluster use TLS. Special characters in a password are percent-encoded. Sentinels that
// ask for a password of their own get it from ?sentinel_user=…&sentinel_password=….
func CheckURL(text string) error {
	_, err := parseAddress(text)
	return err
}

func parseAddress(text string) (address, error) {
	var a address
	scheme, rest, ok := strings.Cut(strings.TrimSpace(text), "://")
	if !ok {
		return a, badURL("it has no scheme; write %s", formServer)
	}
	defaultPort := "6379"
	base, kind, _ := strings.Cut(scheme, "+")
	switch base {
	case "redis", "valkey":
	case "rediss", "valkeys":
		a.tls = true
	default:
		return a, badURL("its scheme is unknown; write redis or, for TLS, rediss, each alone or followed by +sentinel or +cluster")
	}
	switch kind {
	case "":
	case "sentinel":
		a.topology, defaultPort = sentinel, "26379"
	case "cluster":
		a.topology = cluster
	default:
		return a, badURL("its scheme is unknown; write redis or, for TLS, rediss, each alone or followed by +sentinel or +cluster")
	}

	// net/url reads one host, so hosts are read here and it gets the rest.
	end := strings.IndexAny(rest, "/?#")
	if end < 0 {
		end = len(rest)
	}
	authority, rest := rest[:end], rest[end:]
	hosts := authority
	if at := strings.LastIndexByte(authority, '@'); at >= 0 {
		hosts = authority[at+1:]
		name, secret, _ := strings.Cut(authority[:at], ":")
		var err1, err2 error
		a.user, err1 = url.PathUnescape(name)
		a.password, err2 = url.PathUnescape(secret)
		if err1 != nil || err2 != nil {
			return a, badURL("a %% in its user or password does not begin a two-digit code; write %%25 for %%")
		}
	}
	if err := a.readHosts(hosts, defaultPort); err != nil {
		return a, err
	}
	return a, a.readRest(rest)
}

func (a *address) readHosts(text, defaultPort string) error {
	for host := range strings.SplitSeq(text, ",") {
		name, port, err := net.SplitHostPort(host)
		if err != nil { // no port
			name, port = strings.Trim(host, "[]"), defaultPort
		}
		n, err := strconv.Atoi(port)
		if name == "" || strings.ContainsAny(name, "@ ") || err != nil || n < 1 || n > 65535 {
			return badURL("what stands for a host is none; write %s, and in a password %%2F for /, %%3F for ?, %%23 for #, %%40 for @", a.form())
		}
		a.hosts = append(a.hosts, net.JoinHostPort(name, port))
	}
	if a.topology == server && len(a.hosts) > 1 {
		return badURL("it names %d hosts, which only Sentinels and Clusters have; write %s or %s", len(a.hosts), formSentinel, formCluster)
	}
	return nil
}

// readRest reads what follows the hosts: /database, or /master/database, and the query.
func (a *address) readRest(text string) error {
	u, err := url.Parse(text)
	if err != nil || u.Fragment != "" {
		return badURL("what follows its hosts cannot be read; write %s", a.form())
	}
	var parts []string
	if path := strings.Trim(u.Path, "/"); path != "" {
		parts = strings.Split(path, "/")
	}
	if a.topology == sentinel {
		if len(parts) == 0 {
			return badURL("it does not say what the Sentinels call the server; write %s", formSentinel)
		}
		a.master, parts = parts[0], parts[1:]
	}
	if len(parts) > 0 {
		a.database, err = strconv.Atoi(parts[0])
		if err != nil || a.database < 0 || len(parts) > 1 {
			return badURL("its database is not a number; write %s", a.form())
		}
		if a.topology == cluster && a.database != 0 {
			return badURL("a Cluster has only database 0; write %s", formCluster)
		}
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return badURL("what follows its ? cannot be read; write name=value, with & between several")
	}
	for name := range query {
		if a.topology != sentinel || !slices.Contains([]string{"sentinel_user", "sentinel_password"}, name) {
			return badURL("it has a parameter that is unknown; only Sentinel URLs have some: sentinel_user and sentinel_password")
		}
	}
	a.sentinelUser, a.sentinelPassword = query.Get("sentinel_user"), query.Get("sentinel_password")
	return nil
}

func (a *address) form() string {
	return [...]string{formServer, formSentinel, formCluster}[a.topology]
}

// urlError says what is wrong with a URL.
type urlError struct{ message string }

func (e *urlError) Error() string { return "the Redis URL cannot be used: " + e.message }

func badURL(format string, args ...any) error { return &urlError{fmt.Sprintf(format, args...)} }
