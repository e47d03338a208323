package testkit

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
)

// Quirk is a PKCS#11 library that wraps SoftHSM and behaves badly in the ways
// of real HSMs, as far as documents tell them. Modes:
//
//	iv-append12, iv-append16   AES-GCM with an IV of its own, behind the output (Luna in FIPS mode)
//	iv-write                   twelve zeros are replaced by an IV of its own (nShield)
//	iv-zero                    AES-GCM with a zero IV whatever was given, and not a word
//	no-gcm, no-kw              mechanisms that are not there
//	cbc-wrap                   wraps by CKM_AES_CBC_PAD, as SoftHSM does not
//	luna                       Luna's own numbers for AES-GCM and RFC 3394; wants CKA_VALUE_LEN at C_UnwrapKey, and ulIvBits
//	kwp, luna-kwp              RFC 5649 under the number of CKM_AES_KEY_WRAP_KWP, and under Luna's
//	nc-mac                     keys for HMAC-SHA-256 by nShield's own mechanism and type
//	assurances                 no extractable token keys (nShield's security assurances)
//	accelerator                the token needs no login, and takes no private objects (nShield's slot without cards)
//	pad-lies                   another algorithm under the number of CKM_AES_KEY_WRAP_PAD
//	slots, slots64             slot numbers of nShield, and beyond 32 bits
//	unwrap-loose, unwrap-lies  C_UnwrapKey ignores its template, and can be corrected, or cannot
//	readable, wrap-any         a sensitive key can be read; one that is not extractable can be wrapped
//	no-import                  C_CreateObject refuses keys (FIPS level 3)
//	token-full, no-token-keys  no more token objects: there is no room, or the profile forbids them
//	read-only                  the token's flag says that it is write-protected
//	duplicates                 each object is found three times, by two names
//	short-length               the length that C_Encrypt announces lacks the tag
//	locked, final-try          the PIN's flags; lock-after-ten counts wrong PINs
//	few-sessions               four sessions at most, and no word but in the token's information
//	drop-sessions              sessions that are open become stale, once each time that it is set
//	gone                       the line is lost: all calls fail, until C_Finalize and C_Initialize after it is back
//	hang, die                  calls do not return; the library crashes
type Quirk struct {
	Module  string
	control string
	log     string
}

var quirkBuilt struct {
	sync.Once
	so  []byte
	err error
}

// NewQuirk builds the library and sets the environment that it reads. The
// SoftHSM token under it is the caller's.
func NewQuirk(t *testing.T, modes ...string) *Quirk {
	t.Helper()
	quirkBuilt.Do(func() {
		_, self, _, _ := runtime.Caller(0)
		dir, err := os.MkdirTemp("", "quirk-") //nolint:usetesting // it outlives the first test
		if err != nil {
			quirkBuilt.err = err
			return
		}
		defer func() { _ = os.RemoveAll(dir) }()
		so := filepath.Join(dir, "quirk.so")
		args := append([]string{"-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"}, strings.Fields(os.Getenv("QUIRK_CFLAGS"))...) // scripts/sanitize.sh sets it
		cmd := exec.Command("gcc", append(args, "-o", so, filepath.Join(filepath.Dir(self), "quirk", "quirk.c"), "-ldl", "-lpthread")...)
		cmd.Stderr = os.Stderr
		if quirkBuilt.err = cmd.Run(); quirkBuilt.err == nil {
			quirkBuilt.so, quirkBuilt.err = os.ReadFile(so)
		}
	})
	if quirkBuilt.err != nil {
		t.Fatalf("build the quirk library: %v", quirkBuilt.err)
	}
	dir := t.TempDir()
	// A copy of its own, since a library that a process has loaded keeps its state.
	q := &Quirk{Module: filepath.Join(dir, "quirk.so"), control: filepath.Join(dir, "control"), log: filepath.Join(dir, "log")}
	if err := os.WriteFile(q.Module, quirkBuilt.so, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("QUIRK_MODULE", SoftHSM)
	t.Setenv("QUIRK_CONTROL", q.control)
	t.Setenv("QUIRK_LOG", q.log)
	q.Set(t, modes...)
	return q
}

// Env is what the library reads, for a program of its own.
func (q *Quirk) Env() []string {
	return []string{"QUIRK_MODULE=" + SoftHSM, "QUIRK_CONTROL=" + q.control, "QUIRK_LOG=" + q.log}
}

// Set changes the modes, from the next call on.
func (q *Quirk) Set(t testing.TB, modes ...string) { //nolint:thelper // it is called from goroutines of benchmarks too
	if err := os.WriteFile(q.control+".new", []byte(strings.Join(modes, " ")+"\n"), 0o600); err != nil {
		t.Error(err)
	}
	if err := os.Rename(q.control+".new", q.control); err != nil {
		t.Error(err)
	}
}

// Logins gives what each C_Login ended with: good, wrong, locked, other.
func (q *Quirk) Logins() []string {
	b, err := os.ReadFile(q.log)
	if err != nil {
		return nil // none yet
	}
	var out []string
	for _, line := range strings.Split(strings.TrimSpace(string(b)), "\n") {
		out = append(out, strings.TrimPrefix(line, "login "))
	}
	return out
}
