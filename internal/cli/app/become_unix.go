//go:build unix

package app

import (
	"context"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// become makes this process run another program: its id, descriptors and
// environment stay. It returns only when that fails.
func become(_ context.Context, path string, argv []string) error {
	return fault.New(fault.Other, "run", path, unix.Exec(path, argv, os.Environ()))
}
