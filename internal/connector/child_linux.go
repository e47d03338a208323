package connector

import "syscall"

// ownGroup keeps the terminal's Ctrl-C away from the connector: we end it. If
// we are killed, the kernel ends it with us: one that finished its last call
// alone would make a second set of keys beside those of the next run. (The
// kernel looks at the thread that started it; no thread of ours ends early,
// since nothing here is locked to one.)
func ownGroup() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
