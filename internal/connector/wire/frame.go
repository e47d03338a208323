// Package wire is what goes between kmsctl and kms-connector: calls by gRPC,
// and wraps and unwraps as frames on a socket of their own. It knows no
// PKCS#11 and no policy.
package wire

import (
	"encoding/binary"
	"fmt"
	"io"
	"runtime"
	"sync"

	"google.golang.org/protobuf/proto"
)

// Wraps and unwraps travel on a connection of their own, beside that of the
// calls: at some ten thousand a second, HTTP/2 would cost more than the token
// does. Each is a frame: the length of the rest in 4 bytes, a number in 8 by
// which request and reply know each other, and an Op.

// Hello begins such a connection on a socket that serves both; what gRPC
// sends there begins with "PRI".
const Hello = "kmsctl-work-1\n"

const (
	lengthSize = 4
	idSize     = 8
	maxFrame   = 1 << 20
)

// AppendFrame appends one frame to b, or gives b back as it was.
func AppendFrame(b []byte, id uint64, op *Op) ([]byte, error) {
	at := len(b)
	out := binary.BigEndian.AppendUint64(append(b, 0, 0, 0, 0), id)
	out, err := proto.MarshalOptions{}.MarshalAppend(out, op)
	if err != nil {
		return b, err
	}
	n := len(out) - at - lengthSize
	if n > maxFrame {
		return b, fmt.Errorf("%d bytes are too long: at most %d", n, maxFrame)
	}
	binary.BigEndian.PutUint32(out[at:], uint32(n))
	return out, nil
}

// Frame is one request or reply, not yet decoded: that is left to who works
// on it.
type Frame []byte

// ID is the number by which the reply knows its request.
func (f Frame) ID() uint64 { return binary.BigEndian.Uint64(f) }

// Op decodes the frame.
func (f Frame) Op() (*Op, error) {
	op := &Op{}
	return op, proto.Unmarshal(f[idSize:], op)
}

// Reader takes frames from a connection. Not safe for concurrent use.
type Reader struct {
	r       io.Reader
	buf     []byte
	from, n int // what is there and not yet given out
}

// readSize is what one system call may bring.
const readSize = 32 << 10

// NewReader reads frames from r.
func NewReader(r io.Reader) *Reader { return &Reader{r: r, buf: make([]byte, readSize)} }

// Next gives all frames that have come, and waits for one when none has. They
// stay good after the next call. After ErrNothing it can be called again.
func (r *Reader) Next() ([]Frame, error) {
	for {
		frames, err := r.take()
		if err != nil || len(frames) > 0 {
			return frames, err
		}
		copy(r.buf, r.buf[r.from:r.n])
		r.from, r.n = 0, r.n-r.from
		if r.n == len(r.buf) { // one long frame
			r.buf = append(r.buf, make([]byte, len(r.buf))...)
		}
		n, err := r.r.Read(r.buf[r.n:])
		r.n += n
		if n == 0 && err != nil {
			return nil, err
		}
	}
}

// take cuts whole frames off, in a copy: the buffer is read into again.
func (r *Reader) take() (frames []Frame, err error) {
	end := r.from
	for r.n-end >= lengthSize {
		n := int(binary.BigEndian.Uint32(r.buf[end:]))
		if n < idSize || n > maxFrame {
			return nil, fmt.Errorf("a frame of %d bytes cannot be", n)
		}
		if r.n-end < lengthSize+n {
			break
		}
		end += lengthSize + n
	}
	for b := append([]byte(nil), r.buf[r.from:end]...); len(b) > 0; {
		n := lengthSize + int(binary.BigEndian.Uint32(b))
		frames, b = append(frames, Frame(b[lengthSize:n:n])), b[n:]
	}
	r.from = end
	return frames, nil
}

// Writer joins what several goroutines write at the same time: what comes
// while a write is under way goes together into the next one. Who finds none
// under way writes himself, as much as the socket takes at once, so that one
// caller alone waits for no other goroutine and none waits for the socket.
type Writer struct {
	conn *Conn

	mu     sync.Mutex
	next   []byte
	spare  []byte
	active bool
	err    error
}

// NewWriter joins what is written to c.
func NewWriter(c *Conn) *Writer { return &Writer{conn: c} }

// Add sends frames. With join set, others are likely to have some as well, and
// are let go first: that wakes another thread, so it is not for one alone. An
// error is that of the connection, and stays.
func (w *Writer) Add(frames []byte, join bool) error {
	w.mu.Lock()
	w.next = append(w.next, frames...)
	if w.active || w.err != nil {
		defer w.mu.Unlock()
		return w.err
	}
	w.active = true
	w.mu.Unlock()
	if join {
		runtime.Gosched()
	}
	b := w.turn(nil, nil)
	n, err := w.conn.Try(b)
	if err == nil && n < len(b) {
		go w.rest(b, n)
		return nil
	}
	if b = w.turn(b, err); b != nil {
		go w.rest(b, 0)
	}
	return err
}

// rest writes b from n on, and what came meanwhile.
func (w *Writer) rest(b []byte, n int) {
	for b != nil {
		_, err := w.conn.Write(b[n:])
		b, n = w.turn(b, err), 0
	}
}

// turn takes back what was written, and gives what is next: nothing ends the
// turn of who writes.
func (w *Writer) turn(done []byte, err error) []byte {
	clear(done) // keys of callers are in it
	w.mu.Lock()
	defer w.mu.Unlock()
	if done != nil {
		w.spare = done[:0]
	}
	if err != nil {
		w.err = err
		_ = w.conn.Close() // so that its reader hears of it
	}
	if w.err != nil || len(w.next) == 0 {
		w.active = false
		return nil
	}
	b := w.next
	w.next, w.spare = w.spare, nil
	return b
}
