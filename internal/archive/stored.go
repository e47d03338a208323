package archive

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
)

// Stored gzip: our archives hold layers that are compressed already, so the
// outer gzip stores them as they are (RFC 1951, 3.2.4). Each piece is a gzip
// member of its own (RFC 1952, 2.2), so that every gunzip reads the whole as
// one stream, and our reader finds a piece, and any place in it, by arithmetic.
// The bytes do not depend on a compressor's version.
const (
	storedHead  = 10
	storedTail  = 8
	storedBlock = 65535
	blockHead   = 5
)

// storedHeader has no name and no time; OS is unknown.
var storedHeader = [storedHead]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255}

// storedSize is how many bytes a stored piece of n bytes takes.
func storedSize(n int64) int64 {
	blocks := max((n+storedBlock-1)/storedBlock, 1)
	return storedHead + blocks*blockHead + n + storedTail
}

// writeStored writes exactly n bytes of r as one stored gzip member.
func writeStored(w io.Writer, r io.Reader, n int64) error {
	if _, err := w.Write(storedHeader[:]); err != nil {
		return err
	}
	sum, left := crc32.NewIEEE(), n
	buf := make([]byte, blockHead+storedBlock)
	for first := true; first || left > 0; first = false {
		k := min(left, storedBlock)
		left -= k
		buf[0] = 0
		if left == 0 {
			buf[0] = 1 // the last block
		}
		binary.LittleEndian.PutUint16(buf[1:], uint16(k))
		binary.LittleEndian.PutUint16(buf[3:], ^uint16(k))
		data := buf[blockHead : blockHead+k]
		if _, err := io.ReadFull(r, data); err != nil {
			return err
		}
		sum.Write(data) // a hash never fails
		if _, err := w.Write(buf[:blockHead+k]); err != nil {
			return err
		}
	}
	var tail [storedTail]byte
	binary.LittleEndian.PutUint32(tail[:], sum.Sum32())
	binary.LittleEndian.PutUint32(tail[4:], uint32(n)) // modulo 2^32, as the RFC has it
	_, err := w.Write(tail[:])
	return err
}

// readBlocks is how many stored blocks are read at once.
const readBlocks = 8

// storedReader reads one stored piece from a place in it to its end. Read from
// the start, it checks the piece's CRC before it says io.EOF, so that damage
// is seen before a receiver is told that the piece is whole.
type storedReader struct {
	r       io.ReaderAt
	start   int64 // where the first block's header stands in r
	size    int64
	pos     int64 // what was given out
	read    int64 // what was read: whole blocks
	sum     uint32
	summed  bool // the CRC counts: all is read, from the start
	checked bool
	buf     []byte
	data    [][]byte // blocks read and not yet given out
}

// openStored reads the piece of size bytes that starts at offset in r, from
// its byte from.
func openStored(r io.ReaderAt, offset, size, from int64) *storedReader {
	s := &storedReader{r: r, start: offset + storedHead, size: size, pos: from, read: from / storedBlock * storedBlock, summed: from == 0}
	s.checked = size > 0 && from == size // at the end: nothing is left to read
	return s
}

// where is the place in r of a byte of the piece.
func (s *storedReader) where(pos int64) int64 {
	return s.start + pos/storedBlock*(blockHead+storedBlock) + blockHead + pos%storedBlock
}

// Section gives bytes that stand together in a file, limit at most, as if they
// had been read: whoever takes them can have the system send them. None when
// the piece is at its end or in no file of its own. What goes this way is not
// checked here; the receiver has the blob's digest.
func (s *storedReader) Section(limit int64) (f *os.File, at, n int64) {
	f, ok := s.r.(*os.File)
	if !ok || s.pos >= s.size {
		return nil, 0, 0
	}
	at, n = s.where(s.pos), min(limit, storedBlock-s.pos%storedBlock, s.size-s.pos)
	s.pos += n
	s.read, s.data, s.summed = s.pos/storedBlock*storedBlock, nil, false
	if s.pos == s.size {
		s.read = s.size
	}
	return f, at, n
}

func (s *storedReader) Read(p []byte) (int, error) {
	for len(s.data) == 0 {
		if s.pos == s.size {
			return 0, s.finish()
		}
		if err := s.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, s.data[0])
	s.pos += int64(n)
	s.data[0] = s.data[0][n:]
	if len(s.data[0]) == 0 {
		s.data = s.data[1:]
	}
	return n, nil
}

// WriteTo gives whole blocks to w, without a copy between.
func (s *storedReader) WriteTo(w io.Writer) (total int64, err error) {
	for {
		for len(s.data) > 0 {
			n, err := w.Write(s.data[0])
			total, s.pos = total+int64(n), s.pos+int64(n)
			if err != nil {
				return total, err
			}
			s.data = s.data[1:]
		}
		if s.pos == s.size {
			if err := s.finish(); !errors.Is(err, io.EOF) {
				return total, err
			}
			return total, nil
		}
		if err := s.fill(); err != nil {
			return total, err
		}
	}
}

// fill reads blocks: one, since the rest may be wanted as sections, then many
// at once.
func (s *storedReader) fill() error {
	most := int64(readBlocks)
	if s.buf == nil {
		s.buf, most = make([]byte, blockHead+storedBlock), 1
	} else if len(s.buf) < readBlocks*(blockHead+storedBlock) {
		s.buf = make([]byte, readBlocks*(blockHead+storedBlock))
	}
	want := min(s.size-s.read, most*storedBlock)
	blocks := (want + storedBlock - 1) / storedBlock
	b := s.buf[:blocks*blockHead+want]
	if n, err := s.r.ReadAt(b, s.where(s.read)-blockHead); n < len(b) {
		return cutOff(err)
	}
	for want > 0 {
		k := min(want, storedBlock)
		length := int64(binary.LittleEndian.Uint16(b[1:]))
		if length != k || binary.LittleEndian.Uint16(b[3:]) != ^uint16(k) {
			return damaged("a stored block of %d bytes says that it has %d", k, length)
		}
		data := b[blockHead : blockHead+k]
		if s.summed {
			s.sum = crc32.Update(s.sum, crc32.IEEETable, data)
		}
		s.data = append(s.data, data[max(s.pos-s.read, 0):])
		s.read += k
		b, want = b[blockHead+k:], want-k
	}
	return nil
}

func (s *storedReader) finish() error {
	if s.checked {
		return io.EOF
	}
	s.checked = true
	at := s.start + storedSize(s.size) - storedHead - storedTail
	var tail [storedTail]byte
	if n, err := s.r.ReadAt(tail[:], at); n < storedTail {
		return cutOff(err)
	}
	if got := int64(binary.LittleEndian.Uint32(tail[4:])); got != s.size&0xffffffff {
		return damaged("a piece of %d bytes says that it has %d", s.size, got)
	}
	if s.summed && binary.LittleEndian.Uint32(tail[:]) != s.sum {
		return damaged("the CRC of a piece of %d bytes does not match", s.size)
	}
	return io.EOF
}

func damaged(format string, a ...any) error {
	return badContent(fmt.Errorf(format, a...)).WithHint("the archive was damaged on its way; copy it again and run `kmsctl archive verify`")
}
