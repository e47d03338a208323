package pack

import (
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"io"
)

// summer counts and hashes what it passes on.
type summer struct {
	w io.Writer
	h hash.Hash
	n int64
}

func newSummer(w io.Writer) *summer { return &summer{w: w, h: sha256.New()} }

func (s *summer) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.h.Write(p[:n]) // a hash never fails
	s.n += int64(n)
	return n, err
}

func (s *summer) digest() string { return "sha256:" + hex.EncodeToString(s.h.Sum(nil)) }
