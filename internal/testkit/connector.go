package testkit

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// SoftHSM is where Debian's package softhsm2 puts its PKCS#11 library.
const SoftHSM = "/usr/lib/softhsm/libsofthsm2.so"

var built struct {
	sync.Once
	path string
	err  error
}

// Connector builds kms-connector, once for each test program, and says where
// it is. Parallel test programs share Go's build cache, not the file.
func Connector(tb testing.TB) string {
	tb.Helper()
	built.Do(func() {
		dir, err := os.MkdirTemp("", "kms-connector-") //nolint:usetesting // it outlives the first test
		if err != nil {
			built.err = err
			return
		}
		built.path = filepath.Join(dir, "kms-connector")
		cmd := exec.Command("go", "build", "-o", built.path, "github.com/kmsctl/kmsctl/cmd/kms-connector")
		cmd.Stderr = os.Stderr
		built.err = cmd.Run()
	})
	if built.err != nil {
		tb.Fatalf("build kms-connector: %v", built.err)
	}
	return built.path
}

// Cleanup removes what Connector built; call it at the end of TestMain.
func Cleanup() {
	if built.path != "" {
		_ = os.RemoveAll(filepath.Dir(built.path)) // a temporary folder
	}
}
