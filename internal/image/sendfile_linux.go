package image

import (
	"errors"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// sendFile writes n bytes of f from at on, which never come into this
// process's memory.
func (p *patient) sendFile(f *os.File, at, n int64) (int64, error) {
	to, ok := p.Conn.(syscall.Conn)
	if !ok {
		return p.copyFile(f, at, n)
	}
	out, err := to.SyscallConn()
	if err != nil {
		return 0, err
	}
	in, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var sent int64
	var serr error
	once := func(from uintptr) error {
		if err := p.SetWriteDeadline(time.Now().Add(stallLimit)); err != nil {
			return err
		}
		return out.Write(func(fd uintptr) bool {
			var k int
			if k, serr = unix.Sendfile(int(fd), int(from), &at, int(n-sent)); k > 0 {
				sent += int64(k)
			} else if serr == nil {
				serr = errShorter
			}
			return !errors.Is(serr, unix.EAGAIN)
		})
	}
	for sent < n && (serr == nil || errors.Is(serr, unix.EINTR)) {
		var werr error
		if err := in.Control(func(from uintptr) { werr = once(from) }); err != nil {
			return sent, err
		}
		if werr != nil {
			return sent, werr
		}
	}
	if sent == 0 && (errors.Is(serr, unix.EINVAL) || errors.Is(serr, unix.ENOSYS)) {
		return p.copyFile(f, at, n)
	}
	return sent, serr
}
