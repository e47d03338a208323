// Package pki makes the service's own certificates: one CA and the leaves for
// the API and for etcd (server, peer, client). ECDSA P-256, PEM. It writes
// nothing; who keeps them (a folder, Secrets) is the caller's affair.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"slices"
	"time"
)

// Pair is a certificate with its private key, both PEM. Key is SEC 1.
type Pair struct{ Cert, Key []byte }

const (
	caLife   = 10 * 365 * 24 * time.Hour
	leafLife = 397 * 24 * time.Hour // what browsers and macOS accept at most, with a day to spare
)

// NewCA makes a self-signed CA that may sign leaves only.
func NewCA(name string, now time.Time) (Pair, error) {
	t := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(caLife),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
	}
	return sign(t, nil)
}

// StorageName is the common name of the members of a store, by which they know
// each other.
const StorageName = "storage"

// Usage says what a leaf is for.
type Usage int

// Server leaves answer, Client leaves ask, Peer leaves do both (etcd members).
const (
	Server Usage = iota
	Client
	Peer
)

// Issue makes a leaf signed by ca. hosts are DNS names and IP addresses.
func Issue(ca Pair, name string, use Usage, hosts []string, now time.Time) (Pair, error) {
	t := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(leafLife),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
	}
	switch use {
	case Server:
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	case Client:
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	case Peer:
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, h)
		}
	}
	return sign(t, &ca)
}

func sign(t *x509.Certificate, ca *Pair) (Pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Pair{}, err
	}
	if t.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)); err != nil {
		return Pair{}, err
	}
	parent, signer := t, any(key)
	if ca != nil {
		c, err := tls.X509KeyPair(ca.Cert, ca.Key)
		if err != nil {
			return Pair{}, fmt.Errorf("read CA: %w", err)
		}
		parent, signer = c.Leaf, c.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), signer)
	if err != nil {
		return Pair{}, fmt.Errorf("sign certificate %q: %w", t.Subject.CommonName, err)
	}
	kb, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return Pair{}, err
	}
	return Pair{
		Cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		Key:  pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: kb}),
	}, nil
}

// Hosts lists the DNS names and addresses of a certificate in PEM.
func Hosts(cert []byte) ([]string, error) {
	b, _ := pem.Decode(cert)
	if b == nil {
		return nil, errors.New("it is no PEM")
	}
	c, err := x509.ParseCertificate(b.Bytes)
	if err != nil {
		return nil, err
	}
	hosts := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		hosts = append(hosts, ip.String())
	}
	return hosts, nil
}

// Valid checks that a leaf parses, fits its key, is signed by the CA, has the
// hosts and lives for at least margin from now on.
func Valid(ca []byte, leaf Pair, hosts []string, now time.Time, margin time.Duration) error {
	c, err := tls.X509KeyPair(leaf.Cert, leaf.Key)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return errors.New("no certificate in the CA's PEM")
	}
	if _, err := c.Leaf.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: now.Add(margin), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return err
	}
	for _, h := range hosts {
		if err := c.Leaf.VerifyHostname(h); err != nil {
			return err
		}
	}
	return nil
}
