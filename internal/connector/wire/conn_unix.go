//go:build unix

package wire

import (
	"errors"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Conn is a unix socket on which reading blocks its thread: to be woken
// through Go's poller, and then another goroutine, takes longer than the token
// needs for a wrap. Safe for concurrent use by one reader and one writer.
type Conn struct {
	f   *os.File
	raw syscall.RawConn

	text []byte // of the try that is under way
	n    int
	err  error
	try  func(fd uintptr) bool // made once: it would be an allocation for each write
}

// NewConn takes a socket over; it must not be used otherwise any more.
func NewConn(f *os.File) (*Conn, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0) // Fd made it block; a new File knows it
	_ = f.Close()
	if err != nil {
		return nil, err
	}
	c := &Conn{f: os.NewFile(uintptr(fd), "work")}
	if c.raw, err = c.f.SyscallConn(); err != nil {
		_ = c.f.Close()
		return nil, err
	}
	c.try = func(fd uintptr) bool {
		c.n, c.err = unix.SendmsgN(int(fd), c.text, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		return true
	}
	return c, nil
}

// FromNet does the same with a connection of package net.
func FromNet(c net.Conn) (*Conn, error) {
	defer c.Close()
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.New("not a unix socket")
	}
	f, err := u.File()
	if err != nil {
		return nil, err
	}
	return NewConn(f)
}

// ErrNothing says that nothing came within the time of LookUp.
var ErrNothing = os.ErrDeadlineExceeded

// LookUp makes Read return ErrNothing after d.
func (c *Conn) LookUp(d time.Duration) error {
	return c.control(func(fd int) error {
		tv := unix.NsecToTimeval(d.Nanoseconds())
		return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	})
}

func (c *Conn) control(f func(fd int) error) error {
	var err error
	if cerr := c.raw.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

// Read waits for something.
func (c *Conn) Read(b []byte) (int, error) {
	n, err := c.f.Read(b)
	if errors.Is(err, unix.EAGAIN) {
		return n, ErrNothing
	}
	return n, err
}

// Write sends all of b.
func (c *Conn) Write(b []byte) (int, error) { return c.f.Write(b) }

// Try sends what the socket takes at once.
func (c *Conn) Try(b []byte) (int, error) {
	c.text = b
	err := c.raw.Write(c.try)
	c.text = nil
	switch {
	case err != nil:
		return 0, err
	case errors.Is(c.err, unix.EAGAIN), errors.Is(c.err, unix.EINTR):
		return 0, nil
	}
	return max(c.n, 0), c.err
}

// Stop lets the reader come to an end; what was taken may still be answered.
func (c *Conn) Stop() { _ = c.control(func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RD) }) }

// Close ends all.
func (c *Conn) Close() error {
	_ = c.control(func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) }) // wakes who reads or writes
	return c.f.Close()
}
