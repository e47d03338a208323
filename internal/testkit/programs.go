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

// The programs that tests run beside themselves, each built once for each test
// program. Parallel test programs share Go's build cache, not the files.
var (
	connector = program{name: "kms-connector", cgo: "1"}
	server    = program{name: "kms-server", cgo: "0"}
)

type program struct {
	name, cgo string
	once      sync.Once
	path      string
	err       error
}

// Connector builds kms-connector and says where it is.
func Connector(tb testing.TB) string {
	tb.Helper()
	return connector.build(tb)
}

// Server builds kms-server, static as the images need it, and says where it is.
func Server(tb testing.TB) string {
	tb.Helper()
	return server.build(tb)
}

func (p *program) build(tb testing.TB) string {
	tb.Helper()
	p.once.Do(func() {
		dir, err := os.MkdirTemp("", p.name+"-") //nolint:usetesting // it outlives the first test
		if err != nil {
			p.err = err
			return
		}
		p.path = filepath.Join(dir, p.name)
		cmd := exec.Command("go", "build", "-o", p.path, "github.com/kmsctl/kmsctl/cmd/"+p.name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+p.cgo)
		cmd.Stderr = os.Stderr
		p.err = cmd.Run()
	})
	if p.err != nil {
		tb.Fatalf("build %s: %v", p.name, p.err)
	}
	return p.path
}

// Cleanup removes what was built here; call it at the end of TestMain.
func Cleanup() {
	for _, p := range []*program{&connector, &server} {
		if p.path != "" {
			_ = os.RemoveAll(filepath.Dir(p.path)) // a temporary folder
		}
	}
}
