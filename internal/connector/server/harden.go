package server

import (
	"golang.org/x/sys/unix"
)

// Harden keeps the process out of core dumps, out of other processes' reach
// and, where the limit allows, out of swap. It says what was set.
func Harden() (set []string, missed []string) {
	note := func(what string, err error) {
		if err != nil {
			missed = append(missed, what+": "+err.Error())
			return
		}
		set = append(set, what)
	}
	note("not dumpable", unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0))
	note("no core file", unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}))
	note("no new privileges", unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
	note("memory not swappable", lockMemory())
	return set, missed
}

// lockMemory locks pages as they are touched. It needs the right to lock
// without limit: with a limit, some later allocation would fail instead.
func lockMemory() error {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l); err != nil {
		return err
	}
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&head, &caps[0]); err != nil {
		return err
	}
	if l.Cur != unix.RLIM_INFINITY && caps[0].Effective&(1<<unix.CAP_IPC_LOCK) == 0 {
		return unix.EPERM
	}
	return unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
}
