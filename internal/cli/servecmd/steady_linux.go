package servecmd

import (
	"time"

	"golang.org/x/sys/unix"
)

// steady is the time since the machine started, whatever its clock is set to.
// It counts while the machine sleeps, which Go's own monotonic time does not.
func steady() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) // there since Linux 2.6.39
	return time.Duration(t.Nano())
}
