//go:build !linux

package image

import "os"

func (p *patient) sendFile(f *os.File, at, n int64) (int64, error) { return p.copyFile(f, at, n) }
