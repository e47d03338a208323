package main

import (
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"github.com/kmsctl/kmsctl/internal/testkit"
)

// TestLoadKilled kills load 20 times at random moments: no image is ever under
// its name before it is whole, and the same command then finishes.
func TestLoadKilled(t *testing.T) {
	dir := t.TempDir()
	foreign := filepath.Join(dir, "foreign.tar.gz")
	if err := os.WriteFile(foreign, testkit.Archives()["big"], 0o600); err != nil {
		t.Fatal(err)
	}
	kmsctl, err := filepath.Abs("../../bin/kmsctl")
	if err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(dir, "own.tar.gz")
	if out, err := exec.Command(kmsctl, "archive", "repack", foreign, "--output-file", own).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, file := range []string{foreign, own} {
		t.Run(filepath.Base(file), func(t *testing.T) {
			host := testkit.Registry(t, t.TempDir())
			load := func() *exec.Cmd {
				c := exec.Command(kmsctl, "load", file, "--registry", host, "--repo", filepath.Join(dir, "charts"), "--chunk-size", "1048576")
				c.Env = append(os.Environ(), "XDG_STATE_HOME="+filepath.Join(dir, "state"), "XDG_CONFIG_HOME="+dir)
				return c
			}
			start := time.Now()
			if out, err := load().CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			whole := time.Since(start)
			host = testkit.Registry(t, t.TempDir())
			for range 20 {
				c := load()
				if err := c.Start(); err != nil {
					t.Fatal(err)
				}
				after := rand.N(whole)
				time.Sleep(after)
				_ = c.Process.Kill() // it may have ended
				_ = c.Wait()
				for _, image := range []string{"org/one:1.0", "org/two:1.0"} {
					valid(t, host+"/"+image, false)
				}
			}
			if out, err := load().CombinedOutput(); err != nil {
				t.Fatalf("the last run: %v\n%s", err, out)
			}
			for _, image := range []string{"org/one:1.0", "org/two:1.0"} {
				valid(t, host+"/"+image, true)
			}
		})
	}
}

// valid checks an image that is there, and that one is there when it must.
func valid(t *testing.T, image string, must bool) {
	t.Helper()
	ref, err := name.ParseReference(image, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(ref)
	if err != nil && !must {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	opts := []validate.Option{validate.Fast} // all layers are there, by their digests and sizes
	if must {
		opts = nil
	}
	if err := validate.Image(img, opts...); err != nil {
		t.Errorf("%s: %v", image, err)
	}
}
