package store

import "syscall"

// volumeSize is the size of the volume that holds dir, 0 when that is not told.
func volumeSize(dir string) int64 {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return 0
	}
	return int64(st.Blocks) * st.Bsize
}
