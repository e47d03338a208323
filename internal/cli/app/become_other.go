//go:build !unix

package app

import (
	"context"
	"errors"
	"os"
	"os/exec"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// become runs another program in this one's place and ends with its exit code.
func become(ctx context.Context, path string, argv []string) error {
	cmd := exec.CommandContext(ctx, path, argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	var ended *exec.ExitError
	if err != nil && !errors.As(err, &ended) {
		return fault.New(fault.Other, "run", path, err)
	}
	os.Exit(cmd.ProcessState.ExitCode())
	return nil
}
