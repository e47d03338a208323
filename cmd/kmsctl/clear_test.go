//go:build linux

package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/internal/testkit"
)

// kept is the data folder of an embedded KMS that runs for each call only.
type kept struct {
	dir, program string
}

func newKept(t *testing.T) *kept {
	t.Helper()
	program, err := filepath.Abs("../../bin/kmsctl")
	if err != nil {
		t.Fatal(err)
	}
	k := &kept{t.TempDir(), program}
	for name, text := range map[string]string{"sec.yaml": "apiVersion: v1\nkind: Secret\nmetadata: {name: hsm-secret, namespace: kube-system}\nstringData: {hsm-pass: a-phrase}\n",
		"val.yaml": "hsm: {hsm_model: softhsm}\n"} {
		if err := os.WriteFile(filepath.Join(k.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	k.look(t) // makes it
	return k
}

func (k *kept) clear(args ...string) *exec.Cmd {
	cmd := exec.Command(k.program, append([]string{"hsm", "clear", "--data", "d", "--secret", "sec.yaml", "--values", "val.yaml"}, args...)...)
	cmd.Dir = k.dir
	return cmd
}

// looked is what a look at the KMS shows.
type looked struct {
	Installation string
	RootKeys     int
	Objects      []string
	Others       []struct{ Installation string }
}

func (k *kept) look(t *testing.T) (l looked) {
	t.Helper()
	out, err := k.clear("--dry-run", "-o", "json").Output()
	if err == nil {
		err = json.Unmarshal(out, &l)
	}
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return l
}

func (k *kept) run(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.Command(k.program, args...)
	cmd.Dir = k.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// TestClearHasTheNameTyped: only the installation's id, typed by the person,
// goes on.
func TestClearHasTheNameTyped(t *testing.T) {
	k := newKept(t)
	k.run(t, "onboard", "orders", "--data", "d")
	before := k.look(t)
	for _, typed := range []string{"yes", "key-management-hsm"} {
		p := testkit.StartPty(t, k.clear())
		p.Expect("This will go:")
		p.Expect("1 root keys")
		p.Answer("Type \""+before.Installation+"\" to go on", typed)
		if got := p.Wait(); got != 130 {
			t.Errorf("typed %q: exit %d\n%s", typed, got, p.Screen())
		}
		if now := k.look(t); now.Installation != before.Installation || now.RootKeys != 1 {
			t.Errorf("typed %q: %+v", typed, now)
		}
	}
	p := testkit.StartPty(t, k.clear())
	p.Answer("Type \""+before.Installation+"\" to go on", before.Installation)
	if got := p.Wait(); got != 0 {
		t.Errorf("exit %d\n%s", got, p.Screen())
	}
	if now := k.look(t); now.Installation == before.Installation || now.RootKeys != 0 || len(now.Others) != 0 {
		t.Errorf("%+v", now)
	}
}
