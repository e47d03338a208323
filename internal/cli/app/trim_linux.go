package app

import (
	"os"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Trim gives back what the start alone needed: garbage, and the mapped pages
// of the program's own file. Those that are used come back from the page
// cache as they are touched. A failure costs memory, nothing else.
func Trim() {
	debug.FreeOSMemory()
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	maps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		return
	}
	var from, to string
	for line := range strings.Lines(string(maps)) { // proc(5): from-to perms offset dev inode path, then fields
		f := strings.Fields(line)
		switch {
		case len(f) >= 5 && strings.Contains(f[0], "-"):
			from, to = "", ""
			if len(f) >= 6 && f[5] == self && !strings.Contains(f[1], "w") {
				from, to, _ = strings.Cut(f[0], "-")
			}
		case from != "" && f[0] == "Private_Dirty:" && f[1] == "0":
			// Pages that the linker wrote to before it made them read-only
			// (RELRO) are no copy of the file: without them, it crashes.
			drop(from, to)
		}
	}
}

func drop(from, to string) {
	lo, err := strconv.ParseUint(from, 16, 64)
	hi, err2 := strconv.ParseUint(to, 16, 64)
	if err == nil && err2 == nil {
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(lo), uintptr(hi-lo), unix.MADV_DONTNEED)
	}
}
