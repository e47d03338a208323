package hsm_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/pki"
)

// appliance answers as an NTLS server does: TLS 1.2, RSA key exchange only,
// and only clients that it knows.
func appliance(t *testing.T, server pki.Pair, clients ...[]byte) string {
	t.Helper()
	pair, err := tls.X509KeyPair(server.Cert, server.Key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	cfg := &tls.Config{Certificates: []tls.Certificate{pair}, MaxVersion: tls.VersionTLS12, ClientAuth: tls.RequireAnyClientCert,
		CipherSuites: []uint16{tls.TLS_RSA_WITH_AES_256_GCM_SHA384},
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			for _, c := range clients {
				if block, _ := pem.Decode(c); bytes.Equal(block.Bytes, raw[0]) {
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
			go func() { _ = tls.Server(c, cfg).Handshake(); _ = c.Close() }()
		}
	}()
	return l.Addr().String()
}

// luna is an appliance's own RSA certificate.
func luna(t *testing.T) pki.Pair {
	t.Helper()
	cert, key, err := hsm.NewLunaClient("127.0.0.1", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return pki.Pair{Cert: cert, Key: key}
}

func stage(err error) string {
	var e *hsm.NTLSError
	if errors.As(err, &e) {
		return e.Stage
	}
	return ""
}

func TestLunaAppliance(t *testing.T) {
	server, client, other := luna(t), luna(t), luna(t)
	addr := appliance(t, server, client.Cert)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()

	got, err := hsm.LunaServer(ctx, addr)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(server.Cert)
	if !bytes.Equal(got.Raw, block.Bytes) {
		t.Error("another certificate")
	}
	if err := hsm.CheckNTLS(ctx, addr, append(bytes.Clone(other.Cert), server.Cert...), client.Cert, client.Key); err != nil {
		t.Errorf("the right pair: %v", err)
	}
	for name, c := range map[string]struct {
		addr  string
		ca    []byte
		pair  pki.Pair
		stage string
		text  string
	}{
		"unknown server": {addr, other.Cert, client, hsm.StageServer, "not in ServerCAFile: SHA-256 " + hsm.Fingerprint(block.Bytes)},
		"unknown client": {addr, server.Cert, other, hsm.StageClient, "refuses the client certificate"},
		"no pair":        {addr, server.Cert, pki.Pair{}, hsm.StageClient, ""},
		"nobody":         {closedPort(t), server.Cert, client, hsm.StageTCP, "does not answer"},
		"no TLS":         {talker(t), server.Cert, client, hsm.StageTLS, "not as an NTLS server"},
	} {
		err := hsm.CheckNTLS(ctx, c.addr, c.ca, c.pair.Cert, c.pair.Key)
		if stage(err) != c.stage || !strings.Contains(err.Error(), c.text) || !strings.HasPrefix(err.Error(), c.addr) {
			t.Errorf("%s: %v, stage %q; want %q, %q", name, err, stage(err), c.stage, c.text)
		}
	}
	if _, err := hsm.LunaServer(ctx, closedPort(t)); stage(err) != hsm.StageTCP {
		t.Errorf("%v", err)
	}
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := hsm.LunaServer(short, mute(t)); stage(err) != hsm.StageTLS {
		t.Errorf("a server that says nothing: %v", err)
	}
}

func closedPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	return l.Addr().String()
}

func talker(t *testing.T) string {
	t.Helper()
	return serve(t, func(c net.Conn) { _, _ = c.Write([]byte("220 mail.example ESMTP\r\n")); _ = c.Close() })
}

func mute(t *testing.T) string {
	t.Helper()
	return serve(t, func(net.Conn) {})
}

func serve(t *testing.T, f func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f(c)
		}
	}()
	return l.Addr().String()
}

// TestNewLunaClient: OpenSSL, which the vendor's client is built on, reads the
// pair, and finds the names that `vtl createCert` gives.
func TestNewLunaClient(t *testing.T) {
	cert, key, err := hsm.NewLunaClient("10.0.0.11", now)
	if err != nil {
		t.Fatal(err)
	}
	if warns, err := hsm.CheckClient("10.0.0.11", cert, key, now); err != nil || len(warns) > 0 {
		t.Errorf("%v, %q", err, warns)
	}
	openssl := func(in []byte, args ...string) string {
		cmd := exec.Command("openssl", args...)
		cmd.Stdin = bytes.NewReader(in)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	text := strings.ReplaceAll(openssl(cert, "x509", "-noout", "-text"), " = ", "=") // versions differ
	for _, want := range []string{"Subject: CN=10.0.0.11", "Issuer: CN=10.0.0.11", "IP Address:10.0.0.11", "(2048 bit)", "TLS Web Client Authentication"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if out := openssl(key, "rsa", "-check", "-noout"); !strings.Contains(out, "RSA key ok") {
		t.Error(out)
	}
	for _, ip := range []string{"fe80::1", "::ffff:10.0.0.1", "node1", ""} {
		if _, _, err := hsm.NewLunaClient(ip, now); err == nil {
			t.Errorf("%q is taken", ip)
		}
	}
}

func TestFingerprint(t *testing.T) {
	want := hsm.Fingerprint([]byte("x"))
	for _, s := range []string{want, strings.ToLower(want), strings.ReplaceAll(want, ":", ""), "SHA256:" + want, "sha256 " + want} {
		if got, err := hsm.ParseFingerprint(s); err != nil || got != want {
			t.Errorf("%q: %q, %v", s, got, err)
		}
	}
	for s, text := range map[string]string{"": "0 bytes", want[:59]: "SHA-1", "zz": "not hex", want + ":00": "33 bytes"} {
		if _, err := hsm.ParseFingerprint(s); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%q: %v, want %q", s, err, text)
		}
	}
}

func TestLunaCommands(t *testing.T) {
	got := strings.Join(hsm.LunaCommands("kms", []string{"10.0.0.11"}), "\n")
	if got != "client register -client 10.0.0.11 -ip 10.0.0.11\nclient assignPartition -client 10.0.0.11 -partition kms" {
		t.Error(got)
	}
}
