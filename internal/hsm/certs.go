package hsm

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"
)

// CertWarning is what is odd with a certificate and may still work.
type CertWarning string

// CheckClient checks the certificate pair of a management node: the PEM
// parses, the key fits, the certificate has not expired. That its name is the
// node's IP is a warning: an appliance may know the client by host name.
func CheckClient(ip string, cert, key []byte, now time.Time) ([]CertWarning, error) {
	// The causes of crypto/tls name PEM types and never the content.
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("certificate pair of node %s: %w", ip, err)
	}
	c := pair.Leaf
	if now.After(c.NotAfter) {
		return nil, fmt.Errorf("certificate of node %s expired on %s", ip, c.NotAfter.UTC().Format(time.RFC3339))
	}
	if now.Before(c.NotBefore) {
		return nil, fmt.Errorf("certificate of node %s is valid only from %s on: is the clock right?", ip, c.NotBefore.UTC().Format(time.RFC3339))
	}
	var warns []CertWarning
	if now.Add(30 * 24 * time.Hour).After(c.NotAfter) {
		warns = append(warns, CertWarning(fmt.Sprintf("certificate of node %s expires on %s", ip, c.NotAfter.UTC().Format(time.RFC3339))))
	}
	names := []string{c.Subject.CommonName}
	for _, a := range c.IPAddresses {
		names = append(names, a.String())
	}
	if !slices.Contains(names, ip) {
		warns = append(warns, CertWarning(fmt.Sprintf("certificate of node %s is for %q: the appliance must know the client by that name", ip, c.Subject.CommonName)))
	}
	return warns, nil
}

// CheckServerCA checks the appliances' certificates: at least one, all parse,
// none has expired.
func CheckServerCA(b []byte, now time.Time) error {
	n := 0
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return fmt.Errorf("server certificate file has a %s: it must hold the appliances' certificates only", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return fmt.Errorf("server certificate %d: %w", n+1, err)
		}
		if now.After(c.NotAfter) {
			return fmt.Errorf("server certificate %q expired on %s", c.Subject.CommonName, c.NotAfter.UTC().Format(time.RFC3339))
		}
		n++
	}
	if n == 0 {
		return errors.New("server certificate file has no certificate in PEM")
	}
	return nil
}
