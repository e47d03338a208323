package main

import (
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	ggcr "github.com/google/go-containerregistry/pkg/registry"

	"github.com/kmsctl/kmsctl/internal/testkit"
)

// TestLoadShowsBars loads from a terminal into a registry that takes no image
// before its bar is seen; elsewhere there are lines alone.
func TestLoadShowsBars(t *testing.T) {
	bin, err := filepath.Abs("../../bin/kmsctl")
	if err != nil {
		t.Fatal(err)
	}
	inner := ggcr.New()
	seen := make(chan struct{})
	open := sync.OnceFunc(func() { close(seen) })
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			<-seen
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	t.Cleanup(open) // else the server waits for its requests
	dir := t.TempDir()
	archive := filepath.Join(dir, "a.tar.gz")
	if err := os.WriteFile(archive, testkit.Archives()["good"], 0o600); err != nil {
		t.Fatal(err)
	}
	ours := filepath.Join(dir, "ours.tar.gz")
	if out, err := exec.Command(bin, "archive", "repack", archive, "--output-file", ours).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	load := func(file, place string) *exec.Cmd {
		cmd := exec.Command(bin, "load", file, "--registry", srv.Listener.Addr().String()+"/"+place)
		cmd.Env = append(os.Environ(), "TERM=xterm", "XDG_STATE_HOME="+dir)
		return cmd
	}
	p := testkit.StartPty(t, load(archive, "foreign"))
	p.Expect("org/one:1.0")
	p.Expect(" / ")
	open()
	p.Expect("pushed     ")
	if code := p.Wait(); code != 0 {
		t.Fatalf("exit %d\n%s", code, p.Screen())
	}
	for place, file := range map[string]string{"x": archive, "y": ours} {
		out, err := load(file, place).CombinedOutput()
		if err != nil || strings.ContainsAny(string(out), "\x1b\r") || !strings.Contains(string(out), "pushed     "+srv.Listener.Addr().String()+"/"+place+"/org/one:1.0") {
			t.Errorf("%v\n%q", err, out)
		}
	}
}
