package archive

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// Whole reads an archive that does not show its end through to it, so that
// what is cut off is found before anything is done with what is there. One of
// ours has shown by its index that it is whole, and of a stream nobody knows.
func (a *Archive) Whole(ctx context.Context, lim Limits) error {
	if !a.Seekable() || a.Index != nil || a.showsEnd() {
		return nil
	}
	return a.partMissing(a.Walk(ctx, lim, nil, func(string, int64, io.Reader) error { return nil }))
}

// partMissing says of an archive in parts that is not whole which part is last.
func (a *Archive) partMissing(err error) error {
	var f *fault.Error
	if a.last == "" || !errors.As(err, &f) || f.Kind != fault.BadContent {
		return err
	}
	return f.WithHint("the last part that is there is %q: is one missing behind it?", a.last)
}

// showsEnd says whether the last bytes look like an archive's: a tar is whole
// blocks that end with zeros, and a gzip ends with the length of what it holds.
// The last part of a split archive is shorter than the first one.
func (a *Archive) showsEnd() bool {
	const block = 512
	var head [4]byte
	var end [block]byte
	if a.full || a.size < block {
		return false
	}
	if n, err := a.in.ReadAt(head[:], 0); n < len(head) {
		return err == nil
	}
	if n, err := a.in.ReadAt(end[:], a.size-block); n < block {
		return err == nil
	}
	switch {
	case bytes.HasPrefix(head[:], gzipMagic):
		return binary.LittleEndian.Uint32(end[block-4:])%block == 0
	case bytes.HasPrefix(head[:], zstdMagic):
		return true // it ends with nothing that tells
	}
	return end == [block]byte{}
}
