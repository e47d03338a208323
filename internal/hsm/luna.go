package hsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// LunaPort is where a Luna appliance answers its clients (NTLS).
const LunaPort = "1792"

// lunaLife is how long a client certificate lives; a new one has to be
// registered at the appliance by hand.
const lunaLife = 10 * 365 * 24 * time.Hour

// NewLunaClient makes a management node's key and certificate as the vendor's
// `vtl createCert -n IP` does: RSA with 2048 bits, signed by itself, the name
// in the CN. The IP is also a SAN, which the vendor's tool leaves out.
func NewLunaClient(ip string, now time.Time) (cert, key []byte, err error) {
	if err := CheckNodeIP(ip); err != nil {
		return nil, nil, err
	}
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 63))
	if err != nil {
		return nil, nil, err
	}
	t := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: ip}, IPAddresses: []net.IP{net.ParseIP(ip)},
		NotBefore: now.Add(-24 * time.Hour), // the appliance's clock may be behind
		NotAfter:  now.Add(lunaLife), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, k.Public(), k)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(k)}), nil
}

// CheckNodeIP refuses what cannot name a management node in hsm-secret.
func CheckNodeIP(ip string) error {
	a, err := netip.ParseAddr(ip)
	switch {
	case err != nil:
		return fmt.Errorf("%q is not an IP address", ip)
	case !a.Is4():
		return fmt.Errorf("%s is an IPv6 address, and a key of a Secret may hold no colon: use the node's IPv4 address", ip)
	}
	return nil
}

// LunaCommands are what the appliance's administrator types (lunash) to let
// the nodes in.
func LunaCommands(partition string, ips []string) []string {
	var out []string
	for _, ip := range ips {
		out = append(out, fmt.Sprintf("client register -client %s -ip %s", ip, ip), fmt.Sprintf("client assignPartition -client %s -partition %s", ip, partition))
	}
	return out
}

// Fingerprint is the SHA-256 of a certificate, as 32 pairs of hex digits.
func Fingerprint(der []byte) string {
	sum := sha256.Sum256(der)
	pairs := make([]string, len(sum))
	for i, b := range sum {
		pairs[i] = fmt.Sprintf("%02X", b)
	}
	return strings.Join(pairs, ":")
}

// ParseFingerprint reads a SHA-256 fingerprint with or without colons and in
// either case, and gives it as Fingerprint does.
func ParseFingerprint(s string) (string, error) {
	plain := strings.NewReplacer(":", "", " ", "").Replace(strings.ToUpper(s))
	plain = strings.TrimPrefix(strings.TrimPrefix(plain, "SHA256"), "=")
	b, err := hex.DecodeString(plain)
	switch {
	case err != nil:
		return "", errors.New("not hex digits")
	case len(b) == 20:
		return "", errors.New("a SHA-1 fingerprint, which can be forged: give the SHA-256 one")
	case len(b) != sha256.Size:
		return "", fmt.Errorf("%d bytes, and SHA-256 has %d", len(b), sha256.Size)
	}
	pairs := make([]string, len(b))
	for i := range b {
		pairs[i] = plain[2*i : 2*i+2]
	}
	return strings.Join(pairs, ":"), nil
}

// Stages of a try to reach a Luna appliance.
const (
	StageTCP    = "tcp"    // no connection
	StageTLS    = "tls"    // something answers, but no NTLS server
	StageServer = "server" // the certificate is none of ServerCAFile
	StageClient = "client" // the appliance does not know our certificate
)

// NTLSError says how far a try came.
type NTLSError struct {
	Addr, Stage string
	Err         error
}

// Error is the stage in words, and the cause.
func (e *NTLSError) Error() string {
	what := map[string]string{
		StageTCP: "does not answer", StageTLS: "answers, but not as an NTLS server", StageServer: "shows a certificate that is not in ServerCAFile",
		StageClient: "refuses the client certificate",
	}[e.Stage]
	return fmt.Sprintf("%s %s: %v", e.Addr, what, e.Err)
}

// Unwrap gives the cause.
func (e *NTLSError) Unwrap() error { return e.Err }

// LunaServer gets the certificate that an appliance shows. Nothing vouches
// for it: compare its fingerprint with the appliance's console.
func LunaServer(ctx context.Context, addr string) (*x509.Certificate, error) {
	var got *x509.Certificate
	err := ntls(ctx, addr, func(c *x509.Certificate) error { got = c; return nil }, nil)
	if got != nil {
		return got, nil // that it wants a certificate of ours is no matter here
	}
	return nil, err
}

// CheckNTLS opens a connection as the client on a node does: the appliance
// must show a certificate of serverCA and take the pair.
func CheckNTLS(ctx context.Context, addr string, serverCA, cert, key []byte) error {
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return &NTLSError{addr, StageClient, err}
	}
	return ntls(ctx, addr, func(c *x509.Certificate) error { return known(c, serverCA) }, &pair)
}

// known says whether c is one of the certificates in pem, or signed by one.
func known(c *x509.Certificate, ca []byte) error {
	pool := x509.NewCertPool()
	for rest := ca; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if bytes.Equal(block.Bytes, c.Raw) {
			return nil
		}
		if p, err := x509.ParseCertificate(block.Bytes); err == nil {
			pool.AddCert(p)
		}
	}
	if _, err := c.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return fmt.Errorf("SHA-256 %s, for %q", Fingerprint(c.Raw), c.Subject.CommonName)
	}
	return nil
}

func ntls(ctx context.Context, addr string, server func(*x509.Certificate) error, pair *tls.Certificate) error {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return &NTLSError{addr, StageTCP, err}
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return &NTLSError{addr, StageTCP, err}
		}
	}
	shown, refused := false, error(nil)
	c := tls.Client(conn, &tls.Config{
		// Appliances sign for themselves and have no DNS name: who they are
		// says VerifyConnection. TLS 1.2 is the newest that they know.
		InsecureSkipVerify: true, MinVersion: tls.VersionTLS12, MaxVersion: tls.VersionTLS12, //nolint:gosec // see above
		CipherSuites: suites(),
		VerifyConnection: func(s tls.ConnectionState) error {
			shown = true
			refused = server(s.PeerCertificates[0])
			return refused
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if pair == nil {
				return &tls.Certificate{}, nil
			}
			return pair, nil
		},
	})
	err = c.HandshakeContext(ctx)
	switch {
	case err == nil:
		return nil
	case refused != nil:
		return &NTLSError{addr, StageServer, refused}
	case shown:
		return &NTLSError{addr, StageClient, err}
	}
	return &NTLSError{addr, StageTLS, err}
}

// suites are Go's own and those with RSA key exchange, which is all that old
// appliances offer and which Go leaves out unless asked.
func suites() []uint16 {
	var ids []uint16
	for _, s := range slices.Concat(tls.CipherSuites(), tls.InsecureCipherSuites()) {
		if strings.HasPrefix(s.Name, "TLS_ECDHE_") || strings.HasPrefix(s.Name, "TLS_RSA_WITH_AES_") {
			ids = append(ids, s.ID)
		}
	}
	return ids
}
