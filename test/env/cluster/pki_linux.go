package cluster

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// pki is the certificate authority of one cluster, made for it and gone with it.
type pki struct {
	dir  string
	cert *x509.Certificate
	key  crypto.Signer
	der  []byte
}

// certificateLife is longer than any cluster of tests.
const certificateLife = 30 * 24 * time.Hour

func newPKI(dir string) (*pki, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "millrace-test"}, SerialNumber: big.NewInt(1),
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(certificateLife),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	p := &pki{dir: dir, cert: cert, key: key, der: der}
	// Service account tokens are signed with a key of their own.
	signing, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return p, errors.Join(p.write("ca.crt", "CERTIFICATE", der), p.writeKey("service-accounts.key", signing))
}

// issue makes a certificate and its key, for a client (no addresses) or a server.
func (p *pki) issue(file, name string, groups []string, addresses ...string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: name, Organization: groups}, SerialNumber: serial,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(certificateLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, address := range addresses {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		if ip := net.ParseIP(address); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, address)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, p.cert, key.Public(), p.key)
	if err != nil {
		return err
	}
	return errors.Join(p.write(file+".crt", "CERTIFICATE", der), p.writeKey(file+".key", key))
}

func (p *pki) writeKey(file string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return p.write(file, "EC PRIVATE KEY", der)
}

func (p *pki) write(file, kind string, der []byte) error {
	return os.WriteFile(filepath.Join(p.dir, file), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// kubeconfig writes a kubeconfig that holds everything it needs, so it can be copied.
func (p *pki) kubeconfig(path, server, user string, groups []string) error {
	if err := p.issue("client-"+filepath.Base(path), user, groups); err != nil {
		return err
	}
	var data []any
	for _, file := range []string{"ca.crt", "client-" + filepath.Base(path) + ".crt", "client-" + filepath.Base(path) + ".key"} {
		content, err := os.ReadFile(filepath.Join(p.dir, file))
		if err != nil {
			return err
		}
		data = append(data, base64.StdEncoding.EncodeToString(content))
	}
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: millrace
clusters:
- name: millrace
  cluster: {server: "%s", certificate-authority-data: %s}
users:
- name: millrace
  user: {client-certificate-data: %s, client-key-data: %s}
contexts:
- name: millrace
  context: {cluster: millrace, user: millrace}
`, append([]any{server}, data...)...)
	return os.WriteFile(path, []byte(text), 0o600)
}
