package testkit

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// OpenCryptoki is IBM's software token, the second one that every test of the
// connector passes on: it has no AES-GCM, ignores what it is asked at
// C_UnwrapKey and names objects twice.
const OpenCryptoki = "/usr/lib/x86_64-linux-gnu/opencryptoki/libopencryptoki.so.0"

// What the token of OpenCryptokiToken is called; its PIN has at most 8 letters.
const (
	OpenCryptokiLabel = "kmsctl-test"
	OpenCryptokiPIN   = "11223344"
	openCryptokiSlot  = "3"
	openCryptokiSO    = "76543210"
)

// OpenCryptokiToken starts openCryptoki's daemon and makes its one token,
// where that was not done before, and keeps other tests away from it. It
// needs root, as the daemon does.
func OpenCryptokiToken(tb testing.TB) {
	tb.Helper()
	f, err := os.OpenFile("/run/lock/kmsctl-test-opencryptoki", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		tb.Fatalf("lock openCryptoki's token: %v", err)
	}
	tb.Cleanup(func() { f.Close() })
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		tb.Fatalf("lock openCryptoki's token: %v", err)
	}
	for _, dir := range []string{"/run/lock/opencryptoki/swtok", "/var/log/opencryptoki"} {
		if err := os.MkdirAll(dir, 0o770); err != nil {
			tb.Fatal(err)
		}
	}
	if err := startSlotDaemon(); err != nil {
		tb.Fatalf("start openCryptoki's daemon: %v (Debian package opencryptoki)", err)
	}
	out, _ := pkcsconf("", "-t")
	if strings.Contains(out, OpenCryptokiLabel) && strings.Contains(out, "USER_PIN_INITIALIZED") {
		return
	}
	for _, step := range []struct {
		in   string
		args []string
	}{
		{OpenCryptokiLabel + "\n", []string{"-I", "-S", "87654321"}},
		{"", []string{"-P", "-S", "87654321", "-n", openCryptokiSO}},
		{"", []string{"-u", "-S", openCryptokiSO, "-n", OpenCryptokiPIN}},
	} {
		if out, err := pkcsconf(step.in, step.args...); err != nil {
			tb.Fatalf("pkcsconf %v: %v: %s (a token of another hand? it is made anew after: pkill pkcsslotd; rm -r /var/lib/opencryptoki/swtok/*)", step.args, err, out)
		}
	}
}

func pkcsconf(in string, args ...string) (string, error) {
	cmd := exec.Command("pkcsconf", append([]string{"-c", openCryptokiSlot}, args...)...)
	cmd.Stdin = strings.NewReader(in)
	var b bytes.Buffer
	cmd.Stdout, cmd.Stderr = &b, &b
	err := cmd.Run()
	return b.String(), err
}

// startSlotDaemon starts pkcsslotd, which goes into the background by itself
// and stays for later tests.
func startSlotDaemon() error {
	if _, err := pkcsconf("", "-t"); err == nil {
		return nil
	}
	if out, err := exec.Command("pkcsslotd").CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	for range 50 {
		if _, err := pkcsconf("", "-t"); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond) // it says nowhere when it is ready
	}
	return errors.New("it does not answer after 5 s")
}
