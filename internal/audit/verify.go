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
	"slices"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// Report is what Verify found in a log that is whole.
type Report struct {
	Files      int    `json:"files"`
	First      uint64 `json:"first"` // number of the first line; above 1 the files before it were not given
	Lines      uint64 `json:"lines"`
	Events     uint64 `json:"events"`
	SignedUpTo uint64 `json:"signedUpTo"`   // number of the line with the last valid signature
	Keys       int    `json:"keys"`         // that signed, one after the other: clearing the HSM makes a new one
	Recoveries int    `json:"recoveries"`   // crashes whose torn line was closed
	Lost       uint64 `json:"lost"`         // calls that went by unwritten while the disk was full
	SetBack    int    `json:"clockSetBack"` // lines that are earlier than the one before: order is by number, whatever the clock said
	// Tail says what is known of the end: nobody can have removed signed
	// lines and left a valid head of later ones, but the last lines may be
	// missing unless a head kept elsewhere is given.
	Tail string `json:"tail"`
}

// Words for Report.Tail.
const (
	TailProven   = "proven: the head that was kept elsewhere is in the log"
	TailSigned   = "signed to the end; that later lines were cut off cannot be excluded without a head kept elsewhere"
	TailUnsigned = "the last lines are chained and not signed yet"
	TailGrowing  = "proven up to the last signature; the lines after it are chained and not signed yet"
)

// File is one file of a log.
type File struct {
	Name string
	io.Reader
}

// ParsePublicKeys reads the public keys in PEM, the oldest first, into PKIX DER.
func ParsePublicKeys(b []byte) (keys [][]byte, err error) {
	for {
		p, rest := pem.Decode(b)
		if p == nil || p.Type != "PUBLIC KEY" {
			break
		}
		keys, b = append(keys, p.Bytes), rest
	}
	if len(keys) == 0 {
		return nil, errors.New("no PEM public key")
	}
	return keys, nil
}

// Verify reads the files of a log in their order, and checks every line and
// signature. pubs are the PKIX DER of the keys that must have signed, one
// after the other. want, when given, is a head kept elsewhere that the log
// must contain. With partial the first files may be missing. The error names
// the first bad line and its file.
func Verify(files []File, pubs [][]byte, want *Head, partial bool) (Report, error) {
	v := verifier{pubs: pubs, want: want, partial: partial}
	for _, pub := range pubs {
		key, err := x509.ParsePKIXPublicKey(pub)
		if err != nil || !fits(key) {
			return Report{}, fault.Usagef("the public key is no ECDSA or RSA key in PKIX form")
		}
		v.keys = append(v.keys, key)
	}
	for _, f := range files {
		v.report.Files++
		v.file, v.n = f.Name, 0
		if err := v.read(f); err != nil {
			return v.report, err
		}
		if v.torn > 0 {
			return v.report, v.bad(v.n, "it is no line of a log")
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

func (v *verifier) read(r io.Reader) error {
	br := bufio.NewReaderSize(r, 1<<16)
	for {
		text, err := br.ReadBytes('\n')
		if errors.Is(err, io.EOF) && len(text) == 0 {
			return nil
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		v.n++
		if errors.Is(err, io.EOF) {
			return v.bad(v.n, "it is torn: the program that wrote it was killed, or the file was cut")
		}
		if err := v.line(text[:len(text)-1]); err != nil {
			return err
		}
	}
}

// bad names a line of the present file.
func (v *verifier) bad(n uint64, format string, a ...any) error {
	return fault.Newf(fault.BadContent, fmt.Sprintf("verify audit log %q, line", v.file), fmt.Sprint(n), format, a...).
		WithHint("the log was changed, or the disk lost data: compare with a copy; lines before this one are whole")
}

type verifier struct {
	pubs    [][]byte
	keys    []any
	at      int // which of the keys signs here
	want    *Head
	partial bool
	file    string
	n       uint64 // line of the file
	report  Report
	seq     uint64
	prev    string
	torn    int // length of a torn line that the next line must account for
	found   bool
	last    string // kind of the last line
	time    time.Time
	signer  int // one more than the key that was counted last
}

// signs counts the key that signs here.
func (v *verifier) signs() {
	if v.signer != v.at+1 {
		v.signer = v.at + 1
		v.report.Keys++
	}
}

// jitter is how much earlier than the one before it a line may be without a
// clock that was set back.
const jitter = time.Second

func (v *verifier) line(text []byte) error {
	var ln line
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&ln); err != nil || d.More() {
		if v.torn > 0 || len(text) == 0 {
			return v.bad(v.n, "it is no line of a log")
		}
		v.torn = len(text) // good only if a recovery line follows and says so
		return nil
	}
	if again, err := json.Marshal(ln); err != nil || !bytes.Equal(again, text) {
		return v.bad(v.n, "its form is not the one that is written")
	}
	if v.seq == 0 && v.torn == 0 && ln.Seq > 1 {
		if !v.partial {
			return v.bad(v.n, "it is number %d, and the files before it are missing", ln.Seq)
		}
		v.seq, v.prev = ln.Seq-1, ln.Prev
	}
	switch {
	case v.torn > 0 && (ln.Kind != "recovery" || ln.Torn != v.torn):
		return v.bad(v.n-1, "it is no line of a log, and no recovery line follows")
	case v.torn == 0 && ln.Kind == "recovery":
		return v.bad(v.n, "a recovery without a torn line before it")
	case ln.Seq != v.seq+1:
		return v.bad(v.n, "its number is %d, want %d: lines are missing, added or moved", ln.Seq, v.seq+1)
	case ln.Prev != v.prev:
		return v.bad(v.n, "it does not continue the line before it")
	}
	if ln.Kind == "recovery" {
		v.report.Recoveries++
	}
	if ln.Time.Before(v.time.Add(-jitter)) {
		v.report.SetBack++
	}
	v.torn, v.time = 0, ln.Time
	if err := v.kind(ln); err != nil {
		return err
	}
	v.seq, v.prev, v.last = ln.Seq, hashOf(text), ln.Kind
	if v.report.First == 0 {
		v.report.First = ln.Seq
	}
	v.report.Lines++
	return nil
}

func (v *verifier) kind(ln line) error {
	switch ln.Kind {
	case "event":
		v.report.Events++
	case "open":
		next := slices.IndexFunc(v.pubs[v.at:], func(p []byte) bool { return bytes.Equal(p, ln.PublicKey) })
		if next < 0 {
			return v.bad(v.n, "it names another public key: after a clearing of the HSM all keys are needed, the oldest first")
		}
		v.at += next
		v.signs()
	case "recovery":
	case "gap":
		v.report.Lost += ln.Lost
	case "missing":
		if ln.Missing == nil {
			return v.bad(v.n, "it does not say what was missing")
		}
		return v.bad(v.n, "when the log was opened here, lines up to number %d of chain %s were missing: the store's head is of that line", ln.Missing.Seq, ln.Missing.Chain)
	case "head":
		for v.partial && v.report.Keys == 0 && v.at+1 < len(v.keys) && !signed(v.keys[v.at], headMessage(ln), ln.Signature) {
			v.at++ // the line that names the key is in a file that is missing
		}
		if !signed(v.keys[v.at], headMessage(ln), ln.Signature) {
			return v.bad(v.n, "its signature does not fit")
		}
		v.signs()
		v.report.SignedUpTo = ln.Seq
		if v.want != nil && v.want.Chain == ln.Chain && v.want.Seq == ln.Seq && v.want.Prev == ln.Prev {
			v.found = true
		}
	default:
		return v.bad(v.n, "its kind %q is unknown", ln.Kind)
	}
	return nil
}

func (v *verifier) end() (Report, error) {
	switch {
	case v.want != nil && !v.found:
		return v.report, v.bad(v.n+1, "the head that was kept elsewhere (line number %d of chain %s) is not in the log: its end is missing", v.want.Seq, v.want.Chain)
	case v.last == "head" && v.found:
		v.report.Tail = TailProven
	case v.last == "head":
		v.report.Tail = TailSigned
	case v.found:
		v.report.Tail = TailGrowing
	default:
		v.report.Tail = TailUnsigned
	}
	return v.report, nil
}
