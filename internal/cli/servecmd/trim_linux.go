package servecmd

import (
	"os"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Trim gives back what the start alone needed: garbage, and the mapped pages
// of files, which are the program's own and etcd's. Those that are used come
// back from the page cache as they are touched. A failure costs memory,
// nothing else.
func Trim() {
	debug.FreeOSMemory()
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
			if len(f) >= 6 && strings.HasPrefix(f[5], "/") && !strings.Contains(f[1], "w") {
				from, to, _ = strings.Cut(f[0], "-")
			}
		case from != "" && f[0] == "Anonymous:" && f[1] == "0":
			// Pages that the linker wrote to before it made them read-only
			// (RELRO) are no copy of the file: without them, it crashes.
			drop(from, to)
		}
	}
}

// drop forgets the pages, and has them come back one by one: a page cache of
// huge pages would map two megabytes for each byte that is touched.
func drop(from, to string) {
	lo, err := strconv.ParseUint(from, 16, 64)
	hi, err2 := strconv.ParseUint(to, 16, 64)
	if err != nil || err2 != nil {
		return
	}
	for _, advice := range []uintptr{unix.MADV_NOHUGEPAGE, unix.MADV_DONTNEED} {
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(lo), uintptr(hi-lo), advice)
	}
}
