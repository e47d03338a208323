package pki_test

import (
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/pki"
)

func TestMutualTLSWorksAndStrangersAreRefused(t *testing.T) {
	now := time.Now()
	ca, err := pki.NewCA("test", now)
	if err != nil {
		t.Fatal(err)
	}
	issue := func(ca pki.Pair, use pki.Usage) tls.Certificate {
		p, err := pki.Issue(ca, "leaf", use, []string{"127.0.0.1", "localhost"}, now)
		if err != nil {
			t.Fatal(err)
		}
		c, err := tls.X509KeyPair(p.Cert, p.Key)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca.Cert)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{issue(ca, pki.Server)}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}
	srv.StartTLS()
	defer srv.Close()
	other, err := pki.NewCA("other", now)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		cert tls.Certificate
		ok   bool
	}{
		"client leaf": {issue(ca, pki.Client), true}, "peer leaf": {issue(ca, pki.Peer), true},
		"server leaf as client": {issue(ca, pki.Server), false}, "another CA's client": {issue(other, pki.Client), false},
	} {
		cl := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{c.cert}}}}
		res, err := cl.Get(srv.URL)
		if err == nil {
			res.Body.Close()
		}
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestValid(t *testing.T) {
	now := time.Now()
	ca, _ := pki.NewCA("test", now)
	other, _ := pki.NewCA("other", now)
	leaf, err := pki.Issue(ca, "api", pki.Server, []string{"kms-api"}, now)
	if err != nil {
		t.Fatal(err)
	}
	if err := pki.Valid(ca.Cert, leaf, []string{"kms-api"}, now, 24*time.Hour); err != nil {
		t.Errorf("a fresh leaf: %v", err)
	}
	if pki.Valid(ca.Cert, leaf, []string{"elsewhere"}, now, 0) == nil {
		t.Error("a host that is not in the leaf")
	}
	if pki.Valid(ca.Cert, leaf, nil, now, 400*24*time.Hour) == nil {
		t.Error("a leaf that ends within the margin")
	}
	if pki.Valid(other.Cert, leaf, nil, now, 0) == nil {
		t.Error("another CA")
	}
	if pki.Valid(ca.Cert, pki.Pair{Cert: leaf.Cert, Key: ca.Key}, nil, now, 0) == nil {
		t.Error("a key that does not fit")
	}
}
