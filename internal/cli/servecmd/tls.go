package servecmd

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"sync"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// FileTLS serves the certificate of two PEM files, and reads them again when
// they change, so that a renewed certificate needs no restart. With a CA for
// clients, who shows a certificate must show one of that CA; nobody has to.
func FileTLS(cert, key, clientCA string) (*tls.Config, error) {
	f := &certFile{cert: cert, key: key}
	if _, err := f.get(nil); err != nil {
		return nil, err
	}
	c := &tls.Config{GetCertificate: f.get, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}}
	if clientCA == "" {
		return c, nil
	}
	b, err := os.ReadFile(clientCA)
	if err != nil {
		return nil, fault.New(fault.NotFound, "read the CA of clients", clientCA, err).WithHint("check --client-ca-file")
	}
	c.ClientAuth, c.ClientCAs = tls.VerifyClientCertIfGiven, x509.NewCertPool()
	if !c.ClientCAs.AppendCertsFromPEM(b) {
		return nil, fault.Newf(fault.BadContent, "read the CA of clients", clientCA, "no certificate in it").WithHint("check --client-ca-file")
	}
	return c, nil
}

type certFile struct {
	cert, key string

	mu    sync.Mutex
	pair  *tls.Certificate
	mtime time.Time
}

func (f *certFile) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	st, err := os.Stat(f.cert)
	if err == nil && f.pair != nil && st.ModTime().Equal(f.mtime) {
		return f.pair, nil
	}
	var pair tls.Certificate
	if err == nil {
		pair, err = tls.LoadX509KeyPair(f.cert, f.key)
	}
	switch {
	case err == nil:
		f.pair, f.mtime = &pair, st.ModTime()
	case f.pair == nil:
		return nil, fault.New(fault.NotFound, "read the API's certificate", f.cert, err)
	} // a half-renewed pair: the old one serves until both files fit
	return f.pair, nil
}
