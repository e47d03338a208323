package audit

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// Report is what Verify found in a log that is whole.
type Report struct {
	Lines      uint64 `json:"lines"`
	Events     uint64 `json:"events"`
	SignedUpTo uint64 `json:"signedUpTo"` // line number of the last valid signature
	Recoveries int    `json:"recoveries"` // crashes whose torn line was closed
	// Tail says what is known of the end: nobody can have removed signed
	// lines and left a valid head of later ones, but the last lines may be
	// missing unless a head kept elsewhere is given.
	Tail string `json:"tail"`
}

// Words for Report.Tail.
const (
	TailProven   = "proven: the head that was kept elsewhere is in the file"
	TailSigned   = "signed to the end; that later lines were cut off cannot be excluded without a head kept elsewhere"
	TailUnsigned = "the last lines are chained and not signed yet"
)

// ParsePublicKey reads a PEM public key into PKIX DER.
func ParsePublicKey(b []byte) ([]byte, error) {
	p, _ := pem.Decode(b)
	if p == nil || p.Type != "PUBLIC KEY" {
		return nil, errors.New("no PEM public key")
	}
	return p.Bytes, nil
}

// Verify reads a log and checks every line and signature. pub is the PKIX DER
// of the key that must have signed. want, when given, is a head kept
// elsewhere that the log must contain. The error names the first bad line.
func Verify(r io.Reader, pub []byte, want *Head) (Report, error) {
	key, err := x509.ParsePKIXPublicKey(pub)
	if err != nil || !fits(key) {
		return Report{}, fault.Usagef("the public key is no ECDSA or RSA key in PKIX form")
	}
	v := verifier{key: key, pub: pub, want: want}
	br := bufio.NewReaderSize(r, 1<<16)
	for n := uint64(1); ; n++ {
		text, err := br.ReadBytes('\n')
		if errors.Is(err, io.EOF) && len(text) == 0 {
			break
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return v.report, err
		}
		if errors.Is(err, io.EOF) {
			return v.report, bad(n, "it is torn: the program that wrote it was killed, or the file was cut")
		}
		if err := v.line(n, text[:len(text)-1]); err != nil {
			return v.report, err
		}
	}
	return v.end()
}

// fits says whether a token of ours signs with such a key: ECDSA, or RSA where
// the token has no elliptic curves.
func fits(key any) bool {
	switch key.(type) {
	case *ecdsa.PublicKey, *rsa.PublicKey:
		return true
	}
	return false
}

func signed(key any, message, signature []byte) bool {
	sum := sha256.Sum256(message)
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(k, sum[:], signature)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(k, crypto.SHA256, sum[:], signature) == nil
	}
	return false
}

func bad(n uint64, format string, a ...any) error {
	return fault.Newf(fault.BadContent, "verify audit log, line", fmt.Sprint(n), format, a...).
		WithHint("the log was changed, or the disk lost data: compare with a copy; lines before this one are whole")
}

type verifier struct {
	key    any
	pub    []byte
	want   *Head
	report Report
	seq    uint64
	prev   string
	torn   int // length of a torn line that the next line must account for
	found  bool
	last   string // kind of the last line
}

func (v *verifier) line(n uint64, text []byte) error {
	var ln line
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&ln); err != nil || d.More() {
		if v.torn > 0 || len(text) == 0 {
			return bad(n, "it is no line of a log")
		}
		v.torn = len(text) // good only if a recovery line follows and says so
		return nil
	}
	if again, err := json.Marshal(ln); err != nil || !bytes.Equal(again, text) {
		return bad(n, "its form is not the one that is written")
	}
	switch {
	case v.torn > 0 && (ln.Kind != "recovery" || ln.Torn != v.torn):
		return bad(n-1, "it is no line of a log, and no recovery line follows")
	case v.torn == 0 && ln.Kind == "recovery":
		return bad(n, "a recovery without a torn line before it")
	case ln.Seq != v.seq+1:
		return bad(n, "its number is %d, want %d: lines are missing, added or moved", ln.Seq, v.seq+1)
	case ln.Prev != v.prev:
		return bad(n, "it does not continue the line before it")
	}
	if ln.Kind == "recovery" {
		v.report.Recoveries++
	}
	v.torn = 0
	if err := v.kind(n, ln); err != nil {
		return err
	}
	v.seq, v.prev, v.last = ln.Seq, hashOf(text), ln.Kind
	v.report.Lines = n
	return nil
}

func (v *verifier) kind(n uint64, ln line) error {
	switch ln.Kind {
	case "event":
		v.report.Events++
	case "open":
		if !bytes.Equal(ln.PublicKey, v.pub) {
			return bad(n, "it names another public key")
		}
	case "recovery":
	case "head":
		if !signed(v.key, headMessage(ln), ln.Signature) {
			return bad(n, "its signature does not fit")
		}
		v.report.SignedUpTo = n
		if v.want != nil && v.want.Chain == ln.Chain && v.want.Seq == ln.Seq && v.want.Prev == ln.Prev {
			v.found = true
		}
	default:
		return bad(n, "its kind %q is unknown", ln.Kind)
	}
	return nil
}

func (v *verifier) end() (Report, error) {
	switch {
	case v.torn > 0:
		return v.report, bad(v.report.Lines+1, "it is no line of a log")
	case v.want != nil && !v.found:
		return v.report, bad(v.report.Lines+1, "the head that was kept elsewhere (line %d of chain %s) is not in the file: its end is missing", v.want.Seq, v.want.Chain)
	case v.last == "head" && v.found:
		v.report.Tail = TailProven
	case v.last == "head":
		v.report.Tail = TailSigned
	default:
		v.report.Tail = TailUnsigned
	}
	return v.report, nil
}
