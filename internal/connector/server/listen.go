package server

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsctl/kmsctl/internal/connector/wire"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// Inherited serves the one connection of an inherited socket pair: when the
// parent closes its end, or dies, Serve ends.
func Inherited(fd int) (net.Listener, error) {
	f := os.NewFile(uintptr(fd), "calls")
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fault.New(fault.Usage, "use descriptor", f.Name(), err).WithHint("--fd is for kmsctl; give --socket")
	}
	_ = f.Close()
	return &once{conn: &closing{Conn: c, closed: make(chan struct{})}}, nil
}

// once is a listener with one connection; Accept waits for its end.
type once struct {
	conn  *closing
	given sync.Once
}

type closing struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (c *closing) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { close(c.closed) })
	return err
}

// Accept gives the connection, then io.EOF when it is closed.
func (o *once) Accept() (c net.Conn, err error) {
	err = io.EOF
	o.given.Do(func() { c, err = o.conn, nil })
	if err != nil {
		<-o.conn.closed
	}
	return c, err
}

// Close closes the connection.
func (o *once) Close() error { return o.conn.Close() }

// Addr is the pair's.
func (o *once) Addr() net.Addr { return o.conn.LocalAddr() }

// InheritedWork is the connection for wraps and unwraps of a parent.
func InheritedWork(fd int) (*wire.Conn, error) {
	f := os.NewFile(uintptr(fd), "work")
	c, err := wire.NewConn(f)
	if err != nil {
		return nil, fault.New(fault.Usage, "use descriptor", f.Name(), err).WithHint("--work-fd is for kmsctl")
	}
	return c, nil
}

// door looks at how a connection begins: calls go to gRPC, which listens here,
// wraps and unwraps to work.
type door struct {
	net.Listener
	work  func(*wire.Conn)
	calls chan net.Conn
	over  chan struct{} // closed when Listener is done; err says how
	err   error
}

// helloTime is how long a connection may take to say what it is for.
const helloTime = 5 * time.Second

func newDoor(l net.Listener, work func(*wire.Conn)) *door {
	d := &door{Listener: l, work: work, calls: make(chan net.Conn), over: make(chan struct{})}
	go func() {
		defer close(d.over)
		for {
			c, err := l.Accept()
			if err != nil {
				d.err = err
				return
			}
			go d.sort(c)
		}
	}()
	return d
}

// Accept gives the next connection for calls.
func (d *door) Accept() (net.Conn, error) {
	select {
	case c := <-d.calls:
		return c, nil
	case <-d.over:
		return nil, d.err
	}
}

func (d *door) sort(c net.Conn) {
	head := make([]byte, len(wire.Hello)) // HTTP/2 begins with more
	_ = c.SetReadDeadline(time.Now().Add(helloTime))
	if _, err := io.ReadFull(c, head); err != nil {
		_ = c.Close()
		return
	}
	_ = c.SetReadDeadline(time.Time{})
	if string(head) == wire.Hello {
		if w, err := wire.FromNet(c); err == nil {
			d.work(w)
		}
		return
	}
	select {
	case d.calls <- &begun{Conn: c, head: head}:
	case <-d.over:
		_ = c.Close()
	}
}

// begun is a connection whose first bytes were read already.
type begun struct {
	net.Conn
	head []byte
}

func (b *begun) Read(p []byte) (int, error) {
	if len(b.head) == 0 {
		return b.Conn.Read(p)
	}
	n := copy(p, b.head)
	b.head = b.head[n:]
	return n, nil
}

// Listen makes a unix socket that its owner alone may use. A socket that a
// killed process left is removed, one that answers is not.
func Listen(ctx context.Context, path string, log *slog.Logger) (net.Listener, error) {
	var d net.Dialer
	if c, err := d.DialContext(ctx, "unix", path); err == nil {
		_ = c.Close()
		return nil, fault.Newf(fault.Conflict, "listen on", path, "another connector answers there").WithHint("stop it, or choose another --socket")
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fault.New(fault.Other, "remove", path, err)
	}
	old := unix.Umask(0o177) // no moment in which others could connect
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, fault.New(fault.Other, "listen on", path, err).WithHint("check the folder's permissions, and that the path is shorter than 108 characters")
	}
	return &sameUser{Listener: l, log: log}, nil
}

// sameUser refuses peers of another user, whatever the socket's mode is.
type sameUser struct {
	net.Listener
	log *slog.Logger
}

// Accept gives the next connection of this user.
func (s *sameUser) Accept() (net.Conn, error) {
	for {
		c, err := s.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if uid, err := peer(c); err != nil || uid != uint32(os.Getuid()) {
			s.log.Warn("a peer was refused", "uid", uid, "error", err)
			_ = c.Close()
			continue
		}
		return c, nil
	}
}

func peer(c net.Conn) (uid uint32, err error) {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return 0, errors.New("not a unix socket")
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if cerr != nil {
		return 0, cerr
	}
	return cred.Uid, nil
}

const maxPINFile = 4096

// PINFile reads the PIN from a file each time, so that a changed secret counts.
func PINFile(path string) func() (secret.Value, error) {
	return func() (secret.Value, error) {
		f, err := os.Open(path)
		if err != nil {
			return secret.Value{}, err
		}
		defer f.Close()
		b := make([]byte, maxPINFile)
		n, err := io.ReadFull(f, b)
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
			return secret.Value{}, err
		}
		return secret.New(b[:n]), nil
	}
}

// PINPipe asks the parent for the PIN each time: one byte there, two bytes of
// length and the PIN back.
func PINPipe(fd int) (func() (secret.Value, error), error) {
	f := os.NewFile(uintptr(fd), "pins")
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fault.New(fault.Usage, "use descriptor", f.Name(), err).WithHint("--pin-fd is for kmsctl; give --pin-file")
	}
	_ = f.Close()
	var mu sync.Mutex
	return func() (secret.Value, error) {
		mu.Lock()
		defer mu.Unlock()
		head := make([]byte, 2)
		if _, err := c.Write(head[:1]); err != nil {
			return secret.Value{}, err
		}
		if _, err := io.ReadFull(c, head); err != nil {
			return secret.Value{}, err
		}
		b := make([]byte, binary.BigEndian.Uint16(head))
		if _, err := io.ReadFull(c, b); err != nil {
			return secret.Value{}, err
		}
		return secret.New(b), nil
	}, nil
}
