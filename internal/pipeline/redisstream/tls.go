package redisstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
)

// Files of Endpoint.TLSDir, named as in a Secret of type kubernetes.io/tls.
const (
	fileCA   = "ca.crt"
	fileCert = "tls.crt"
	fileKey  = "tls.key"
)

// dial connects to a server, a node or a Sentinel.
func (e Endpoint) dial(ctx context.Context, a address, to string, dialer *net.Dialer) (net.Conn, error) {
	if !a.tls {
		return dialer.DialContext(ctx, "tcp", to)
	}
	config, err := e.tls(a, to)
	if err != nil {
		return nil, err
	}
	return (&tls.Dialer{NetDialer: dialer, Config: config}).DialContext(ctx, "tcp", to)
}

// tls makes the settings of one connection.
func (e Endpoint) tls(a address, to string) (*tls.Config, error) {
	host, _, err := net.SplitHostPort(to)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: host}
	if e.TLSDir != "" {
		if config.RootCAs, err = e.authorities(); err != nil {
			return nil, err
		}
		pair, err := tls.LoadX509KeyPair(filepath.Join(e.TLSDir, fileCert), filepath.Join(e.TLSDir, fileKey))
		switch {
		case err == nil:
			config.Certificates = []tls.Certificate{pair}
		case !errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("read the client certificate for Redis: %w", err)
		}
	}
	if a.topology != server {
		// Nodes and Sentinels tell each other's addresses, mostly numbers, which are rarely in certificates. A node's
		// certificate may also be for one of the hosts of the URL, whose names were not learned from the network.
		config.InsecureSkipVerify = true // VerifyConnection verifies
		names := append([]string{host}, hostNames(a.hosts)...)
		config.VerifyConnection = func(s tls.ConnectionState) error { return verify(s, config.RootCAs, names) }
	}
	return config, nil
}

func (e Endpoint) authorities() (*x509.CertPool, error) {
	file := filepath.Join(e.TLSDir, fileCA)
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // the system's
	}
	if err != nil {
		return nil, fmt.Errorf("read the certificate authority of Redis: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("%s holds no certificate; write the certificate authority of Redis in PEM", file)
	}
	return pool, nil
}

// verify checks the chain as crypto/tls does, for one of several names.
func verify(s tls.ConnectionState, roots *x509.CertPool, names []string) error {
	others := x509.NewCertPool()
	for _, c := range s.PeerCertificates[1:] {
		others.AddCert(c)
	}
	var first error
	for _, name := range names {
		_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: others, DNSName: name})
		if err == nil {
			return nil
		}
		if first == nil {
			first = err
		}
	}
	return first
}

func hostNames(hosts []string) []string {
	names := make([]string, 0, len(hosts))
	for _, h := range hosts {
		if name, _, err := net.SplitHostPort(h); err == nil {
			names = append(names, name)
		}
	}
	return names
}
