// Package seal encrypts files at rest with age: to recipients or by a
// passphrase. What it writes, `age --decrypt` reads.
package seal

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"filippo.io/age"
	"filippo.io/age/armor"

	"github.com/kmsctl/kmsctl/internal/secret"
)

// Is says whether b is an age file, armored or not.
func Is(b []byte) bool {
	b = bytes.TrimLeft(b, " \t\r\n")
	return bytes.HasPrefix(b, []byte(armor.Header)) || bytes.HasPrefix(b, []byte("age-encryption.org/"))
}

// Seal encrypts b to recipients (age1…), or by the passphrase when there are
// none. The result is armored text.
func Seal(b []byte, recipients []string, passphrase secret.Value) ([]byte, error) {
	to, err := parseRecipients(recipients, passphrase)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	aw := armor.NewWriter(&out)
	w, err := age.Encrypt(aw, to...)
	if err != nil {
		return nil, fmt.Errorf("encrypt: %w", err)
	}
	if _, err := w.Write(b); err != nil {
		return nil, fmt.Errorf("encrypt: %w", err)
	}
	if err := errors.Join(w.Close(), aw.Close()); err != nil {
		return nil, fmt.Errorf("encrypt: %w", err)
	}
	return out.Bytes(), nil
}

// CheckRecipient says whether r is an age recipient.
func CheckRecipient(r string) error {
	_, err := age.ParseRecipients(strings.NewReader(r))
	if err != nil {
		return fmt.Errorf("%q is not an age recipient as in age1…: %w", r, err)
	}
	return nil
}

func parseRecipients(recipients []string, passphrase secret.Value) ([]age.Recipient, error) {
	if len(recipients) == 0 {
		if passphrase.Empty() {
			return nil, errors.New("encrypt: neither a recipient nor a passphrase")
		}
		r, err := age.NewScryptRecipient(string(passphrase.Reveal()))
		if err != nil {
			return nil, fmt.Errorf("encrypt: %w", err)
		}
		if testOnlyWorkFactor != 0 {
			r.SetWorkFactor(testOnlyWorkFactor)
		}
		return []age.Recipient{r}, nil
	}
	var to []age.Recipient
	for _, s := range recipients {
		r, err := age.ParseRecipients(strings.NewReader(s))
		if err != nil {
			return nil, fmt.Errorf("%q is not an age recipient: %w", s, err)
		}
		to = append(to, r...)
	}
	return to, nil
}

// testOnlyWorkFactor makes scrypt quick: age's own takes seconds under the
// race detector.
var testOnlyWorkFactor int

// ByPassphrase says whether the age file b opens by a passphrase (true) or by
// an identity.
func ByPassphrase(b []byte) bool {
	raw, err := io.ReadAll(io.LimitReader(reader(b), 4096))
	return (err == nil || len(raw) > 0) && bytes.Contains(raw, []byte("\n-> scrypt "))
}

// Open decrypts an age file by identities (the text of an identity file), or
// by the passphrase when there are none. A wrong key and a broken file give
// an error that tells nothing of the content.
func Open(b []byte, identities []byte, passphrase secret.Value) ([]byte, error) {
	r, err := NewReader(reader(b), identities, passphrase)
	if err != nil {
		return nil, err
	}
	out, err := io.ReadAll(r)
	if err != nil {
		clear(out)
		return nil, fmt.Errorf("decrypt: the file is damaged: %w", err)
	}
	return out, nil
}

// NewReader decrypts an age file in binary form as it is read. What it gives
// is authentic, and complete when io.EOF ends it.
func NewReader(r io.Reader, identities []byte, passphrase secret.Value) (io.Reader, error) {
	var ids []age.Identity
	switch {
	case len(identities) > 0:
		got, err := age.ParseIdentities(bytes.NewReader(identities))
		if err != nil {
			return nil, errors.New("the identity file has no age identity (AGE-SECRET-KEY-…)")
		}
		ids = got
	case !passphrase.Empty():
		id, err := age.NewScryptIdentity(string(passphrase.Reveal()))
		if err != nil {
			return nil, fmt.Errorf("decrypt: %w", err)
		}
		ids = []age.Identity{id}
	default:
		return nil, errors.New("decrypt: neither an identity nor a passphrase")
	}
	out, err := age.Decrypt(r, ids...)
	if err != nil {
		var none *age.NoIdentityMatchError
		if errors.As(err, &none) {
			return nil, errors.New("decrypt: the passphrase or identity does not fit")
		}
		return nil, fmt.Errorf("decrypt: %w", err)
	}
	return out, nil
}

func reader(b []byte) io.Reader {
	b = bytes.TrimLeft(b, " \t\r\n")
	if bytes.HasPrefix(b, []byte(armor.Header)) {
		return armor.NewReader(bytes.NewReader(b))
	}
	return bytes.NewReader(b)
}

// NewWriter encrypts what is written to it into w, in age's binary form: to
// recipients, or by the passphrase when there are none. Close ends the file,
// not w. To recipients it gives an identity of one use that opens the file
// too, so that it can be read back and checked by who holds no identity of the
// recipients; forget it after that.
func NewWriter(w io.Writer, recipients []string, passphrase secret.Value) (io.WriteCloser, []byte, error) {
	to, err := parseRecipients(recipients, passphrase)
	if err != nil {
		return nil, nil, err
	}
	if len(recipients) > 0 {
		return withOnce(w, to)
	}
	out, err := age.Encrypt(w, to...)
	if err != nil {
		return nil, nil, fmt.Errorf("encrypt: %w", err)
	}
	return out, nil, nil
}

// NewSpool is NewWriter for who alone reads the file again: only the identity
// of one use that it gives opens it.
func NewSpool(w io.Writer) (io.WriteCloser, []byte, error) { return withOnce(w, nil) }

func withOnce(w io.Writer, to []age.Recipient) (io.WriteCloser, []byte, error) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, nil, fmt.Errorf("encrypt: %w", err)
	}
	out, err := age.Encrypt(w, append(to, id.Recipient())...)
	if err != nil {
		return nil, nil, fmt.Errorf("encrypt: %w", err)
	}
	return out, []byte(id.String()), nil
}
