package wire_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kmsctl/kmsctl/internal/connector/wire"
)

func wrapOp(text []byte) *wire.Op {
	return &wire.Op{WithinMs: 7, Body: &wire.Op_Wrap{Wrap: &wire.WrapRequest{Blob: []byte("blob"), Plaintext: text}}}
}

func frames(t *testing.T, texts ...string) (b []byte) {
	t.Helper()
	for i, text := range texts {
		var err error
		if b, err = wire.AppendFrame(b, uint64(i+1), wrapOp([]byte(text))); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

// pieces gives what was written in pieces of n bytes.
type pieces struct {
	b []byte
	n int
}

func (p *pieces) Read(out []byte) (int, error) {
	if len(p.b) == 0 {
		return 0, io.EOF
	}
	n := copy(out[:min(p.n, len(out))], p.b)
	p.b = p.b[n:]
	return n, nil
}

func TestFramesComeWholeHoweverTheyAreCut(t *testing.T) {
	texts := []string{"one", string(bytes.Repeat([]byte("x"), 100_000)), "", "four"}
	all := frames(t, texts...)
	for _, n := range []int{1, 2, 3, 4, 5, 12, 13, 1000, len(all)} {
		r, got := wire.NewReader(&pieces{all, n}), []string(nil)
		for {
			fs, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(n, err)
			}
			for _, f := range fs {
				op, err := f.Op()
				if err != nil || f.ID() != uint64(len(got)+1) || op.WithinMs != 7 {
					t.Fatalf("%d: %d %v %v", n, f.ID(), op.GetWithinMs(), err)
				}
				got = append(got, string(op.GetWrap().Plaintext))
			}
		}
		if len(got) != len(texts) {
			t.Fatalf("in pieces of %d: %d frames", n, len(got))
		}
		for i := range texts {
			if got[i] != texts[i] {
				t.Errorf("in pieces of %d: frame %d differs", n, i)
			}
		}
	}
}

func TestFramesThatCannotBe(t *testing.T) {
	for name, b := range map[string][]byte{"too short": {0, 0, 0, 7, 1, 2, 3, 4, 5, 6, 7}, "too long": {0xff, 0, 0, 0}, "HTTP/2": []byte("PRI * HTTP/2.0\r\n")} {
		if fs, err := wire.NewReader(bytes.NewReader(b)).Next(); err == nil {
			t.Errorf("%s: %v", name, fs)
		}
	}
	before := frames(t, "one")
	if b, err := wire.AppendFrame(before, 2, wrapOp(make([]byte, 1<<20))); err == nil || !bytes.Equal(b, before) {
		t.Errorf("a frame that is too long: %d bytes, %v", len(b), err)
	}
}

func FuzzReader(f *testing.F) {
	one, err := wire.AppendFrame(nil, 1, wrapOp([]byte("one")))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(one)
	f.Add([]byte{0, 0, 0, 7})
	f.Fuzz(func(t *testing.T, b []byte) {
		for r := wire.NewReader(&pieces{b, 3}); ; {
			fs, err := r.Next()
			if err != nil {
				return
			}
			for _, f := range fs {
				op, err := f.Op()
				if err != nil {
					continue
				}
				again, err := wire.AppendFrame(nil, f.ID(), op)
				if err != nil {
					t.Fatal(err)
				}
				back, err := wire.NewReader(bytes.NewReader(again)).Next()
				if err != nil || len(back) != 1 {
					t.Fatal(back, err)
				}
				if op2, err := back[0].Op(); err != nil || !proto.Equal(op, op2) {
					t.Fatal(op, op2, err)
				}
			}
		}
	})
}

func pair(t *testing.T) (a, b *wire.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*wire.Conn
	for i, fd := range fds {
		if ends[i], err = wire.NewConn(os.NewFile(uintptr(fd), "test")); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = ends[i].Close() })
	}
	return ends[0], ends[1]
}

// TestAFullSocketHoldsNobodyUp: Add returns though nobody reads yet, and all
// arrives, once and in one piece each.
func TestAFullSocketHoldsNobodyUp(t *testing.T) {
	a, b := pair(t)
	w := wire.NewWriter(a)
	const writers, each = 8, 200
	var wg sync.WaitGroup
	for g := range writers {
		wg.Go(func() {
			for i := range each {
				f, err := wire.AppendFrame(nil, uint64(g*each+i+1), wrapOp(bytes.Repeat([]byte{byte(i)}, 1000)))
				if err != nil {
					t.Error(err)
				}
				if err := w.Add(f, i%2 == 0); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait() // more than a socket holds is under way
	seen := map[uint64]bool{}
	for r := wire.NewReader(b); len(seen) < writers*each; {
		fs, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range fs {
			op, err := f.Op()
			i := int(f.ID()-1) % each
			if err != nil || seen[f.ID()] || !bytes.Equal(op.GetWrap().Plaintext, bytes.Repeat([]byte{byte(i)}, 1000)) {
				t.Fatalf("frame %d: %v", f.ID(), err)
			}
			seen[f.ID()] = true
		}
	}
}

func TestAConnThatEnds(t *testing.T) {
	a, b := pair(t)
	if err := b.LookUp(time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if _, err := wire.NewReader(b).Next(); !errors.Is(err, wire.ErrNothing) {
		t.Errorf("nothing came: %v", err)
	}
	a.Stop()
	if _, err := wire.NewReader(a).Next(); !errors.Is(err, io.EOF) {
		t.Errorf("stopped: %v", err)
	}
	if err := wire.NewWriter(a).Add(frames(t, "a reply still goes"), false); err != nil {
		t.Error(err)
	}
	if fs, err := wire.NewReader(b).Next(); err != nil || len(fs) != 1 {
		t.Errorf("%v %v", fs, err)
	}
	ended := make(chan error)
	go func() {
		_, err := a.Read(make([]byte, 1))
		ended <- err
	}()
	_ = b.Close()
	if err := <-ended; !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	w := wire.NewWriter(a)
	if err := w.Add(frames(t, "nobody reads"), false); err == nil {
		t.Error("a broken connection takes frames")
	}
	if err := w.Add(frames(t, "nor this"), false); err == nil {
		t.Error("its error does not stay")
	}
}
