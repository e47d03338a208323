package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// authority signs the cluster's certificates; all of them lie in dir.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(dir, name string) *authority {
	a := &authority{dir: dir}
	a.cert, a.key = a.sign(name, &x509.Certificate{
		Subject:  pkix.Name{CommonName: name},
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, IsCA: true, BasicConstraintsValid: true,
	})
	return a
}

// issue makes dir/name.crt and dir/name.key; org may be empty.
func (a *authority) issue(name, commonName, org string, sans ...string) {
	t := &x509.Certificate{
		Subject:  pkix.Name{CommonName: commonName},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if org != "" {
		t.Subject.Organization = []string{org}
	}
	for _, s := range sans {
		if ip := net.ParseIP(s); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, s)
		}
	}
	a.sign(name, t)
}

// sign completes the template, signs it (by itself when the authority has no
// certificate yet) and writes both files.
func (a *authority) sign(name string, t *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err, "make a key")
	t.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62))
	check(err, "make a serial number")
	t.NotBefore, t.NotAfter = time.Now().Add(-time.Hour), time.Now().AddDate(1, 0, 0)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = t, key
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), signer)
	check(err, "sign %s", name)
	keyDER, err := x509.MarshalECPrivateKey(key)
	check(err, "encode the key of %s", name)
	writeFile(a.dir, name+".crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	writeFile(a.dir, name+".key", string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})))
	cert, err := x509.ParseCertificate(der)
	check(err, "parse %s", name)
	return cert, key
}

// base64File is a file of the authority's as a kubeconfig wants it.
func (a *authority) base64File(name string) string {
	b, err := os.ReadFile(filepath.Join(a.dir, name))
	check(err, "read %s", name)
	return base64.StdEncoding.EncodeToString(b)
}
