package connector_test

import (
	"bytes"
	"slices"
	"testing"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// FuzzUnwrap gives the connector over SoftHSM what no wrap has made, past the
// KMS's own checks. Each is a fault of the content: the process lives on with
// its one login, no plaintext comes out, and what is whole still opens.
func FuzzUnwrap(f *testing.F) {
	c, logins := opened(f, options(f, "password"))
	ctx, pid := f.Context(), c.Pid()
	k, err := c.CreateRootKey(ctx)
	if err != nil {
		f.Fatal(err)
	}
	plain, aad := []byte("a data key of thirty-two letters"), []byte("aad")
	whole, err := c.Wrap(ctx, k.Blob, plain, aad)
	if err != nil {
		f.Fatal(err)
	}
	for op := range uint8(9) {
		for _, text := range []string{"", "A", "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "0123456789abcdef0123456789abcdef0123456789abcdef"} {
			f.Add(op, uint16(5), text)
		}
	}
	for suite := range uint16(5) {
		f.Add(uint8(9), suite, "")
	}
	f.Fuzz(func(t *testing.T, op uint8, at uint16, text string) {
		s, with := whole, aad
		s.IV, s.Ciphertext = slices.Clone(s.IV), slices.Clone(s.Ciphertext)
		switch op / 3 % 4 {
		case 0:
			s.Ciphertext = edit(s.Ciphertext, op, at, text)
		case 1:
			s.IV = edit(s.IV, op, at, text)
		case 2:
			with = edit(slices.Clone(with), op, at, text)
		case 3:
			s.Suite = uint8(at)
		}
		same := s.Suite == whole.Suite && bytes.Equal(s.IV, whole.IV) && bytes.Equal(s.Ciphertext, whole.Ciphertext) && bytes.Equal(with, aad)
		switch got, err := c.Unwrap(t.Context(), k.Blob, s, with); {
		case same && (err != nil || !bytes.Equal(got, plain)):
			t.Errorf("what is whole: %q %v", got, err)
		case !same && (len(got) != 0 || fault.KindOf(err) != fault.BadContent):
			t.Errorf("suite %d, %d bytes of IV, %d of ciphertext, %q: %q %v", s.Suite, len(s.IV), len(s.Ciphertext), with, got, err)
		}
		if got, err := c.Unwrap(t.Context(), k.Blob, whole, aad); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("afterwards: %q %v", got, err)
		}
		if c.Pid() != pid || logins.Load() != 1 {
			t.Errorf("process %d became %d, with %d logins", pid, c.Pid(), logins.Load())
		}
	})
}

// edit replaces, inserts or deletes.
func edit(b []byte, op uint8, at uint16, text string) []byte {
	i := int(at) % (len(b) + 1)
	j := min(i+len(text), len(b))
	switch op % 3 {
	case 0:
		return slices.Replace(b, i, j, []byte(text)...)
	case 1:
		return slices.Insert(b, i, []byte(text)...)
	}
	return slices.Delete(b, i, j)
}
