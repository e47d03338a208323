//go:build !linux

package store

// volumeSize is not told here.
func volumeSize(string) int64 { return 0 }
