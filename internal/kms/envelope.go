package kms

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// maxCiphertext bounds the text that unwrap looks at: the largest plaintext,
// twice base64, and the header.
const maxCiphertext = 16 << 10

func encodeCiphertext(s hsm.Sealed, handle string) (string, error) {
	b, err := json.Marshal(kmsapi.Ciphertext{Ciphertext: s.Ciphertext, IV: s.IV, Version: kmsapi.CiphertextVersion, Handle: handle, Suite: s.Suite})
	if err != nil {
		return "", err
	}
	return base64.StdEncoding.EncodeToString(b), nil
}

// decodeCiphertext takes exactly what encodeCiphertext makes: one spelling, so
// that a ciphertext that was touched anywhere is refused.
func decodeCiphertext(text string) (kmsapi.Ciphertext, error) {
	var c kmsapi.Ciphertext
	if len(text) > maxCiphertext {
		return c, fmt.Errorf("%d characters are too many", len(text))
	}
	if strings.ContainsAny(text, "\r\n") { // base64 would skip them
		return c, errors.New("it holds a line break")
	}
	b, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil {
		return c, err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return c, err
	}
	if c.Version != kmsapi.CiphertextVersion {
		return c, fmt.Errorf("version %q is not ours: data wrapped by another product unwraps only there", c.Version)
	}
	if again, err := json.Marshal(c); err != nil || !bytes.Equal(again, b) {
		return c, errors.New("not in the form that wrap writes")
	}
	if !(hsm.Sealed{Suite: c.Suite, IV: c.IV, Ciphertext: c.Ciphertext}).Plausible() {
		return c, errors.New("no suite makes such a ciphertext")
	}
	return c, nil
}

// bindAAD is what a ciphertext's tag covers besides the suite: the header and
// the caller's strings, each with its length, so that no two lists are alike.
func bindAAD(version, handle string, aad []string) []byte {
	out := []byte("kmsctl wrap\x00")
	for _, s := range append([]string{version, handle}, aad...) {
		out = binary.BigEndian.AppendUint32(out, uint32(len(s))) // bounded by checkAAD
		out = append(out, s...)
	}
	return out
}
