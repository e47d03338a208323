//go:build !unix

package servecmd

import (
	"errors"
	"os"
)

// flock fails: the embedded KMS runs on Unix only.
func flock(*os.File) error { return errors.ErrUnsupported }
