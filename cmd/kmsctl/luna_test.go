package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net"
	"os"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/kmsctl/kmsctl/internal/hsm"
)

// luna is a Luna appliance beside a script, as far as certificates go:
//
//	luna VAR CERTFILE [CLIENTCERT...]
//
// It listens on 127.0.0.1 with TLS 1.2 and takes the clients of CLIENTCERT. It
// sets VAR to its port and VAR_FINGERPRINT, and writes its certificate to
// CERTFILE.
func luna(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: luna VAR CERTFILE [CLIENTCERT...]")
	}
	cert, key, err := hsm.NewLunaClient("127.0.0.1", time.Now())
	ts.Check(err)
	pair, err := tls.X509KeyPair(cert, key)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), cert, 0o644))
	var clients [][]byte
	for _, f := range args[2:] {
		block, _ := pem.Decode([]byte(ts.ReadFile(f)))
		clients = append(clients, block.Bytes)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { _ = l.Close() })
	cfg := &tls.Config{Certificates: []tls.Certificate{pair}, MaxVersion: tls.VersionTLS12, ClientAuth: tls.RequireAnyClientCert,
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			for _, c := range clients {
				if bytes.Equal(c, raw[0]) {
					return nil
				}
			}
			return errors.New("unknown client")
		}}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _ = tls.Server(c, cfg).Handshake(); _ = c.Close() }() // the client says how it went
		}
	}()
	_, port, err := net.SplitHostPort(l.Addr().String())
	ts.Check(err)
	ts.Setenv(args[0], port)
	ts.Setenv(args[0]+"_FINGERPRINT", hsm.Fingerprint(pair.Certificate[0]))
}
