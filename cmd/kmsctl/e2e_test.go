//go:build e2e

package main

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/rogpeppe/go-internal/testscript"
)

// TestE2E runs the scripts that need a real cluster and a real registry;
// scripts/e2e.sh starts both and says in the environment where they are.
func TestE2E(t *testing.T) {
	bin, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	env := map[string]string{"BIN": bin, "PATH": bin + string(os.PathListSeparator) + os.Getenv("PATH")}
	for _, k := range []string{"KUBECONFIG", "REGISTRY", "CLUSTER_SH", "KMSCTL_CACHE", "KMSCTL_CLUSTER"} {
		if env[k] = os.Getenv(k); env[k] == "" {
			t.Fatalf("%s is not set: run this by `make e2e`", k)
		}
	}
	t.Run("wizard", func(t *testing.T) { installByWizard(t, bin, env["PATH"]) })
	testscript.Run(t, testscript.Params{
		Dir:                 "../../testdata/e2e",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			for k, v := range env {
				e.Setenv(k, v)
			}
			e.Values["servers"] = servers{}
			// The programs as they are built, not this test.
			e.Setenv("PATH", bin+string(filepath.ListSeparator)+e.Getenv("PATH"))
			e.Setenv("XDG_STATE_HOME", filepath.Join(e.WorkDir, "xdg-state"))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": exits, "pushimage": pushImage, "resolve": resolve, "field": field, "line": line, "eventually": eventually, "kms": kms, "freeport": freePort, "registry": registry,
		},
	})
}

// pushImage pushes an image that holds one static program:
// pushimage REF PROGRAM [ARG...].
func pushImage(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: pushimage REF PROGRAM [ARG...]")
	}
	program, err := os.ReadFile(ts.MkAbs(args[1]))
	ts.Check(err)
	base := filepath.Base(args[1])
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	ts.Check(w.WriteHeader(&tar.Header{Name: base, Mode: 0o755, Size: int64(len(program))}))
	_, err = w.Write(program)
	ts.Check(err)
	ts.Check(w.Close())
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	ts.Check(err)
	img, err := mutate.AppendLayers(empty.Image, layer)
	ts.Check(err)
	config, err := img.ConfigFile()
	ts.Check(err)
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config = v1.Config{Entrypoint: append([]string{"/" + base}, args[2:]...)}
	img, err = mutate.ConfigFile(img, config)
	ts.Check(err)
	ref, err := name.ParseReference(args[0])
	ts.Check(err)
	ts.Check(remote.Write(ref, img))
}

// resolve asks a DNS server over TCP: resolve SERVER NAME ADDRESS.
func resolve(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: resolve SERVER NAME ADDRESS")
	}
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", args[0])
	}}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	got, err := r.LookupHost(ctx, args[1])
	ts.Check(err)
	if strings.Join(got, " ") != args[2] {
		ts.Fatalf("%s is %v, want %s", args[1], got, args[2])
	}
}

// freePort gives ports of the loopback that nobody uses: freeport VAR...
func freePort(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: freeport VAR...")
	}
	for _, name := range args {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		ts.Check(err)
		defer l.Close() // all are taken until the last one is known
		_, port, err := net.SplitHostPort(l.Addr().String())
		ts.Check(err)
		ts.Setenv(name, port)
	}
}

// line keeps the first line of the last command's output: line VAR.
func line(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: line VAR")
	}
	first, _, _ := strings.Cut(ts.ReadFile("stdout"), "\n")
	ts.Setenv(args[0], first)
}

// eventually runs a command until it succeeds, for things that a cluster does
// in its own time: eventually DURATION COMMAND [ARG...].
func eventually(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: eventually DURATION COMMAND [ARG...]")
	}
	limit, err := time.ParseDuration(args[0])
	ts.Check(err)
	for deadline := time.Now().Add(limit); ; time.Sleep(200 * time.Millisecond) {
		if err = ts.Exec(args[1], args[2:]...); err == nil {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%s still fails after %s: %v", args[1], limit, err)
		}
	}
}
