// Package file writes files so that a reader sees the old one or the new one,
// never half of one, whenever the writer is killed.
package file

import (
	"io"
	"os"
	"path/filepath"
)

// Write puts b at path with the mode, by way of a temporary name in the same
// folder; it is on disk when Write returns. On failure path is as it was, and
// the error is the system's own.
func Write(path string, b []byte, mode os.FileMode) error {
	return WriteFrom(path, mode, from(b))
}

// WriteSoon is Write that does not wait for the disk. When the writer is killed
// a reader sees the old file or the new one all the same; when the power fails
// it may find neither, or anything. It is for what is safe to lose.
func WriteSoon(path string, b []byte, mode os.FileMode) error {
	return swap(path, mode, from(b), func(*os.File) error { return nil })
}

// WriteFrom is Write of what write writes, for files that are large; an error
// of write's own comes back as it is.
func WriteFrom(path string, mode os.FileMode, write func(io.Writer) error) error {
	return swap(path, mode, write, (*os.File).Sync)
}

func from(b []byte) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := w.Write(b)
		return err
	}
}

func swap(path string, mode os.FileMode, write func(io.Writer) error, settle func(*os.File) error) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // fails after the rename, as it should
	err = write(f)
	for _, step := range []func() error{func() error { return f.Chmod(mode) }, func() error { return settle(f) }, f.Close, func() error { return os.Rename(f.Name(), path) }} {
		if err == nil {
			err = step()
		}
	}
	if err != nil {
		_ = f.Close() // closed already, unless a step before failed
	}
	return err
}
