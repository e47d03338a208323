//go:build unix

package connector

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// pair makes two joined sockets that no child inherits unless it is given one.
func pair() (ours, theirs *os.File, err error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return nil, nil, err
	}
	unix.CloseOnExec(fds[0])
	unix.CloseOnExec(fds[1])
	return os.NewFile(uintptr(fds[0]), "connector"), os.NewFile(uintptr(fds[1]), "connector"), nil
}
