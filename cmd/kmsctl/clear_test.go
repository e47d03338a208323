//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

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

// TestKilledWhileClearing kills the program at any moment of a clearing: the
// next run finds either everything or nothing, never a part, and ends it.
func TestKilledWhileClearing(t *testing.T) {
	k := newKept(t)
	k.run(t, "onboard", "orders", "--data", "d")
	began := time.Now()
	if out, err := k.clear("--yes").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	whole := time.Since(began)
	log := func() []byte {
		b, err := os.ReadFile(filepath.Join(k.dir, "d", "audit", "audit.log"))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	count := map[string]int{}
	for range kills(t) {
		k.run(t, "onboard", "orders", "--data", "d")
		old := k.look(t)
		cmd := k.clear("--yes")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rand.Int64N(int64(whole)))) // the moment is what the test varies
		_ = cmd.Process.Kill()                               // it may have ended
		_ = cmd.Wait()
		begun := bytes.Contains(log(), []byte("kmsctl.clear.begin\",\"outcome\":\"success\",\"status\":202,\"principal\":\"local-admin\",\"correlationId\"")) &&
			bytes.Contains(log(), []byte("installation "+old.Installation+", token"))
		now := k.look(t)
		untouched := now.Installation == old.Installation && now.RootKeys == 1 && len(now.Objects) == len(old.Objects)
		cleared := now.Installation != old.Installation && now.RootKeys == 0 && len(now.Others) == 0 && len(now.Objects) == len(old.Objects)
		switch {
		case cleared && !begun:
			t.Error("cleared, and the log does not say by whom")
		case !cleared && !untouched:
			t.Errorf("half: before %+v, now %+v", old, now)
		}
		count[map[bool]string{true: "cleared", false: "untouched"}[cleared]]++
		k.run(t, "hsm", "clear", "--data", "d", "--yes")
		if now := k.look(t); now.Installation == old.Installation || now.RootKeys != 0 || len(now.Others) != 0 {
			t.Errorf("after the second run: %+v", now)
		}
		k.run(t, "audit", "verify", "--data", "d")
	}
	t.Logf("killed within %s: %v", whole.Round(time.Millisecond), count)
}
