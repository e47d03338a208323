package testkit_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// canaries are secrets of every kind that a person gives or gets, each of which
// nothing else contains.
type canaries map[string][]byte

// watched runs the real program with every way out watched: what it prints,
// what it leaves on disk, and what anybody on the machine can read of its
// processes. It has no folder for temporary files.
type watched struct {
	program
	printed map[string]string // by each command
}

// exits runs a command, and wants its exit code.
func (w *watched) exits(t *testing.T, code int, args ...string) {
	t.Helper()
	cmd := w.cmd(args...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != code {
		t.Fatalf("kmsctl %v: %v, want exit code %d: %s", args, err, code, out)
	}
	w.printed[strings.Join(args, " ")] = string(out)
}

func (w *watched) does(t *testing.T, args ...string) { t.Helper(); w.exits(t, 0, args...) }

// TestSecretsLeakNowhere plants a secret of each kind in what is given to the
// program, and then looks for it in all that install, setup, serve, backup,
// restore and luna-cert print, write and show in the list of processes. Only
// the files that are there to hold a secret hold it, for their owner alone.
func TestSecretsLeakNowhere(t *testing.T) {
	dir := t.TempDir()
	w := &watched{program: newProgram(t, dir), printed: map[string]string{}}
	home := filepath.Join(dir, "home")
	calls := filepath.Join(dir, "calls")
	w.does(t, "archive", "build", "--output-file", "kms.tar.gz")
	// What the connector is started with, and with which environment.
	wrapper := filepath.Join(dir, "connector.sh")
	write(t, wrapper, 0o700, fmt.Sprintf("#!/bin/sh\n{ echo \"$0 $*\"; env; } >> %s\nexec %s \"$@\"\n", calls, w.connector))
	w.connector = wrapper
	c := canaries{"HSM password": []byte("canary pin 4711"), "passphrase": []byte("canary-passphrase-0815"), "key material": []byte("canary-material-of-32-bytes-0007")}
	w.env = []string{"HOME=" + home, "XDG_STATE_HOME=" + home + "/state", "XDG_DATA_HOME=" + home + "/data", "TMPDIR=" + dir + "/absent",
		"KMSCTL_HSM_PASSWORD=" + string(c["HSM password"]), "KMSCTL_BACKUP_PASSPHRASE=" + string(c["passphrase"]), "KMSCTL_PASSPHRASE=" + string(c["passphrase"])}
	write(t, filepath.Join(dir, "material"), 0o600, string(c["key material"]))
	mayHold := map[string]bool{"material": true, "secret.yaml": true, "admin.key": true}

	w.does(t, "render", "secret", "--model", "softhsm", "--output-file", "secret.age")
	w.does(t, "render", "secret", "--model", "softhsm", "--plain", "--output-file", "secret.yaml")
	w.does(t, "render", "overrides", "--model", "softhsm", "--registry", "r.example", "--version", "1", "--plain", "--output-file", "overrides.yaml")
	w.does(t, "install", "--archive", "kms.tar.gz", "--registry", "r.example", "--secret", "secret.age", "--values", "overrides.yaml", "--dry-run", "-o", "json")
	w.exits(t, 7, "setup", "--archive", "kms.tar.gz", "--registry", "127.0.0.1:1", "--repo", "charts", "--model", "softhsm", "--admin-key-file", "other.key", "--kubeconfig", "none", "--yes")
	w.does(t, "hsm", "luna-cert", "create", "--node", "10.0.0.11", "--output-dir", "certs")
	luna, err := os.ReadFile(filepath.Join(dir, "certs", "10.0.0.11Key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	c["Luna client key"] = bytes.Split(luna, []byte("\n"))[3]
	mayHold["certs/10.0.0.11Key.pem"] = true

	server := w.serve(t, "--admin-key-file", "admin.key")
	c["administrator's key"], err = os.ReadFile(filepath.Join(dir, "admin.key"))
	if err != nil {
		t.Fatal(err)
	}
	var made struct{ InstanceID, APIKey string }
	w.json(t, &made, "onboard", "orders", "--data", "d", "-o", "json")
	c["API key"] = []byte(made.APIKey)
	w.does(t, "keys", "import", "brought", "--payload-file", "material", "--instance", "orders", "--data", "d")
	w.does(t, "keys", "create", "standard", "--standard", "--payload-file", "material", "--instance", "orders", "--data", "d")
	w.does(t, "keys", "list", "--instance", "orders", "--data", "d", "-o", "json")
	w.does(t, "backup", "--data", "d", "--output-file", "copy.age")
	w.processes(t, c, server.Process.Pid, childOf(t, server.Process.Pid))
	stop(t, server)
	w.does(t, "audit", "verify", "--data", "d")
	if err := os.CopyFS(filepath.Join(dir, "new", "softhsm"), os.DirFS(filepath.Join(dir, "d", "softhsm"))); err != nil {
		t.Fatal(err)
	}
	w.does(t, "restore", "copy.age", "--data", "new", "--secret", "secret.age", "--values", "overrides.yaml")

	for name, out := range w.printed {
		c.absent(t, "what `kmsctl "+name+"` printed", []byte(out))
	}
	files := 0
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil || rel == "kmsctl" {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if mayHold[rel] {
			if info.Mode().Perm() != 0o600 {
				t.Errorf("%s holds a secret, and its mode is %v", rel, info.Mode())
			}
			return nil
		}
		files++
		b, err := os.ReadFile(path)
		c.absent(t, rel, b)
		return err
	})
	if err != nil || files < 10 {
		t.Errorf("looked at %d files: %v", files, err)
	}
	if b, err := os.ReadFile(calls); err != nil || !bytes.Contains(b, []byte("connector.sh")) {
		t.Errorf("nothing is known of the connector's start: %s %v", b, err)
	}
}

// processes looks at what /proc shows of the service's two processes: the
// arguments of both, which everybody can read, and the connector's environment.
func (w *watched) processes(t *testing.T, c canaries, kmsctl, connector int) {
	t.Helper()
	for _, f := range []string{fmt.Sprintf("/proc/%d/cmdline", kmsctl), fmt.Sprintf("/proc/%d/cmdline", connector), fmt.Sprintf("/proc/%d/environ", connector)} {
		b, err := os.ReadFile(f)
		if err != nil || len(b) == 0 {
			t.Errorf("%s: %d bytes, %v", f, len(b), err)
		}
		c.absent(t, f, b)
	}
}

func (c canaries) absent(t *testing.T, where string, b []byte) {
	t.Helper()
	for name, secret := range c {
		for form, text := range forms(secret) {
			if form != "half of it" && bytes.Contains(b, text) {
				t.Errorf("the %s (%s) is in %s", name, form, where)
			}
		}
	}
}

func write(t *testing.T, path string, mode fs.FileMode, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}
