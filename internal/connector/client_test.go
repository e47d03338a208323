package connector_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

func TestMain(m *testing.M) {
	if socket := os.Getenv("TEST_DIAL"); socket != "" {
		os.Exit(dialOnly(socket)) // see TestAPeerOfAnotherUserIsRefused
	}
	code := m.Run()
	testkit.Cleanup()
	os.Exit(code)
}

var ids = hsm.MasterIDs{Install: "test", Wrap: []byte("wrap-id-16-bytes"), Seal: []byte("seal-id-16-bytes"), Sign: []byte("sign-id-16-bytes")}

// log is a connector's stderr that tests may read while it runs.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func options(tb testing.TB, pin string) connector.Options {
	tb.Helper()
	return connector.Options{Path: testkit.Connector(tb), Module: testkit.SoftHSM, SoftHSMDir: tb.TempDir(), PIN: secret.New([]byte(pin)), Stderr: &log{}}
}

func start(tb testing.TB, o connector.Options) *connector.Client {
	tb.Helper()
	c, err := connector.Start(tb.Context(), o)
	if err != nil {
		tb.Fatalf("%v\n%s", err, o.Stderr)
	}
	tb.Cleanup(c.Close)
	return c
}

// unlock is kms.Unlock without a ledger.
func unlock(c *connector.Client, logins *atomic.Int32) func(context.Context) error {
	return func(ctx context.Context) error {
		logins.Add(1)
		if err := c.Login(ctx); err != nil {
			return err
		}
		_, err := c.OpenMaster(ctx, ids, true)
		return err
	}
}

func opened(tb testing.TB, o connector.Options) (*connector.Client, *atomic.Int32) {
	tb.Helper()
	c, logins := start(tb, o), &atomic.Int32{}
	hook := unlock(c, logins)
	if err := hook(tb.Context()); err != nil {
		tb.Fatalf("%v\n%s", err, o.Stderr)
	}
	c.Reopen(hook)
	return c, logins
}

func TestEveryCall(t *testing.T) {
	ctx := t.Context()
	c, _ := opened(t, options(t, "password"))
	info, err := c.Describe(ctx)
	if err != nil || info.Label != "kms" || info.Serial == "" || !info.LoggedIn || info.Module != testkit.SoftHSM {
		t.Fatalf("%+v %v", info, err)
	}
	made, err := c.CreateRootKey(ctx)
	if err != nil || len(made.KCV) != 4 {
		t.Fatalf("%+v %v", made, err)
	}
	brought, err := c.ImportRootKey(ctx, secret.New([]byte("0123456789abcdef")))
	if err != nil {
		t.Fatal(err)
	}
	for name, blob := range map[string][]byte{"made": made.Blob, "brought": brought.Blob} {
		s, err := c.Wrap(ctx, blob, []byte("dek"), []byte("aad"))
		if err != nil {
			t.Fatal(name, err)
		}
		if got, err := c.Unwrap(ctx, blob, s, []byte("aad")); err != nil || string(got) != "dek" {
			t.Errorf("%s: %q %v", name, got, err)
		}
		if _, err := c.Unwrap(ctx, blob, s, []byte("other")); fault.KindOf(err) != fault.BadContent {
			t.Errorf("%s: %v", name, err)
		}
		if err := c.Evict(ctx, blob); err != nil {
			t.Error(err)
		}
		plain, s, err := c.WrapNew(ctx, blob, 32, nil)
		if err != nil || len(plain) != 32 {
			t.Fatal(plain, err)
		}
		if got, err := c.Unwrap(ctx, blob, s, nil); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%s: %x %v", name, got, err)
		}
	}
	sealed, err := c.Seal(ctx, []byte("secret"), []byte("p"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.Unseal(ctx, sealed, []byte("p")); err != nil || string(got) != "secret" {
		t.Errorf("%q %v", got, err)
	}
	sealed, err = c.SealRandom(ctx, 32, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.Unseal(ctx, sealed, nil); err != nil || len(got) != 32 {
		t.Errorf("%x %v", got, err)
	}
	m, err := c.OpenMaster(ctx, ids, false)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := c.Sign(ctx, []byte("head"))
	if err != nil {
		t.Fatal(err)
	}
	pub, err := x509.ParsePKIXPublicKey(m.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256([]byte("head")); !ecdsa.VerifyASN1(pub.(*ecdsa.PublicKey), sum[:], sig) {
		t.Error("the signature does not verify")
	}
	if b, err := c.Random(ctx, 48); err != nil || len(b) != 48 {
		t.Errorf("%x %v", b, err)
	}
	if _, err := c.Random(ctx, 1<<20); fault.KindOf(err) != fault.Usage {
		t.Errorf("%v", err)
	}
	salt := []byte("0123456789abcdef")
	a, err := c.Fingerprint(ctx, salt)
	if err != nil || len(a) != 32 {
		t.Fatalf("%x %v", a, err)
	}
	if b, err := c.Fingerprint(ctx, []byte("fedcba9876543210")); err != nil || bytes.Equal(a, b) {
		t.Errorf("the salt does not count: %v", err)
	}
}

// TestImportPairs are held by the token, outlive the connector, and leave
// nothing; where there are several tokens they are sealed.
func TestImportPairs(t *testing.T) {
	ctx, aad := t.Context(), []byte("aad")
	c, _ := opened(t, options(t, "password"))
	objects := func() int {
		all, err := c.Installations(ctx)
		if err != nil || len(all) != 1 {
			t.Fatalf("%v %v", all, err)
		}
		return len(all[0].Objects)
	}
	before := objects()
	p, err := c.NewImportPair(ctx, []byte("pair-id-16-bytes"), aad)
	if err != nil || p.Held == nil || p.Sealed != nil || objects() != before+1 {
		t.Fatalf("held %v, sealed %v, %d objects: %v", p.Held != nil, p.Sealed != nil, objects(), err)
	}
	if err := syscall.Kill(c.Pid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	m := sent(t, p.Public)
	for _, place := range [][]byte{nil, []byte("placed-id-123456")} {
		k, bits, err := c.ImportSent(ctx, p, aad, m, place)
		if err != nil || bits != 256 || hsm.InToken(k.Blob) != (place != nil) {
			t.Fatalf("%d bits, %v", bits, err)
		}
		s, err := c.Wrap(ctx, k.Blob, []byte("dek"), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := c.Unwrap(ctx, k.Blob, s, nil); err != nil || string(got) != "dek" {
			t.Errorf("%q %v", got, err)
		}
		if err := c.Destroy(ctx, k.Blob); err != nil {
			t.Error(err)
		}
	}
	for want, bad := range map[error]hsm.Sent{
		hsm.ErrMaterial:    {Material: m.Material[:len(m.Material)-1], Nonce: m.Nonce, IV: m.IV, Want: m.Want},
		hsm.ErrSealedNonce: {Material: m.Material, Nonce: m.Nonce[1:], IV: m.IV, Want: m.Want},
		hsm.ErrNonce:       {Material: m.Material, Nonce: m.Nonce, IV: m.IV, Want: []byte("other")},
	} {
		if _, _, err := c.ImportSent(ctx, p, aad, bad, nil); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
	if err := c.Destroy(ctx, p.Held); err != nil || objects() != before {
		t.Errorf("%d objects, %d before: %v", objects(), before, err)
	}
	c.Join(start(t, options(t, "password")))
	if p, err = c.NewImportPair(ctx, []byte("pair-id-16-bytes"), aad); err != nil || p.Held != nil || p.Sealed == nil {
		t.Fatalf("held %v, sealed %v: %v", p.Held != nil, p.Sealed != nil, err)
	}
	if _, bits, err := c.ImportSent(ctx, p, aad, sent(t, p.Public), nil); err != nil || bits != 256 {
		t.Errorf("%d bits, %v", bits, err)
	}
}

// sent is material as a client sends it.
func sent(t *testing.T, public []byte) hsm.Sent {
	t.Helper()
	pub, err := x509.ParsePKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	material, iv := make([]byte, 32), make([]byte, 12)
	sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, pub.(*rsa.PublicKey), material, nil)
	if err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(material)
	if err != nil {
		t.Fatal(err)
	}
	g, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	return hsm.Sent{Material: sealed, IV: iv, Nonce: g.Seal(nil, iv, []byte("nonce"), nil), Want: []byte("nonce")}
}

func TestBeforeLoginNothingWorks(t *testing.T) {
	c := start(t, options(t, "password"))
	if _, err := c.CreateRootKey(t.Context()); fault.KindOf(err) != fault.NotReady {
		t.Errorf("%v", err)
	}
}

func TestAKilledConnectorIsReplaced(t *testing.T) {
	ctx := t.Context()
	c, logins := opened(t, options(t, "password"))
	k, err := c.CreateRootKey(ctx)
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.Wrap(ctx, k.Blob, []byte("dek"), nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		before := c.Pid()
		if err := syscall.Kill(before, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		// The call itself waits for the replacement, and its login.
		if got, err := c.Unwrap(ctx, k.Blob, s, nil); err != nil || string(got) != "dek" {
			t.Fatalf("%q %v", got, err)
		}
		t.Logf("back after %s", time.Since(began))
		if c.Pid() == before {
			t.Error("the same process")
		}
	}
	if n := logins.Load(); n != 4 {
		t.Errorf("%d logins for 4 connectors", n)
	}
}

func TestAWrongPINIsTriedOnce(t *testing.T) {
	o := options(t, "password")
	opened(t, o)
	bad := o
	bad.PIN, bad.Stderr = secret.New([]byte("wrongpin")), &log{}
	c := start(t, bad)
	if err := c.Login(t.Context()); fault.KindOf(err) != fault.Denied || !strings.Contains(err.Error(), "CKR_PIN_INCORRECT") || fault.HintOf(err) == "" {
		t.Fatalf("%v", err)
	}
	if err := c.Login(t.Context()); fault.KindOf(err) != fault.Denied {
		t.Errorf("%v", err)
	}
	if info, err := c.Describe(t.Context()); err != nil || !info.PINCountLow || info.LoggedIn {
		t.Errorf("%+v %v", info, err)
	}
}

func TestAPINWithALineBreakNeverReachesTheToken(t *testing.T) {
	o := options(t, "password\n")
	_, err := connector.Start(t.Context(), o)
	if fault.KindOf(err) != fault.Usage || !strings.Contains(fault.HintOf(err), "line break") {
		t.Errorf("%v", err)
	}
}

func TestNoLibraryNoTokenNoConnector(t *testing.T) {
	o := options(t, "password")
	o.SoftHSMDir, o.Module = "", "/nowhere/lib.so"
	if _, err := connector.Start(t.Context(), o); fault.KindOf(err) != fault.NotFound || fault.ObjectOf(err) != "/nowhere/lib.so" || fault.HintOf(err) == "" {
		t.Errorf("%v", err)
	}
	o = options(t, "password")
	opened(t, o)
	o.Env = []string{"SOFTHSM2_CONF=" + filepath.Join(o.SoftHSMDir, "softhsm2.conf")}
	o.SoftHSMDir, o.TokenLabel = "", "other"
	if _, err := connector.Start(t.Context(), o); fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), `"kms"`) {
		t.Errorf("%v", err)
	}
	o.Path = "/bin/false"
	if _, err := connector.Start(t.Context(), o); fault.KindOf(err) != fault.Unreachable || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("%v", err)
	}
	o.Path = "/nowhere/kms-connector"
	if _, err := connector.Start(t.Context(), o); fault.KindOf(err) != fault.NotFound {
		t.Errorf("%v", err)
	}
}

func TestFind(t *testing.T) {
	bin := testkit.Connector(t)
	env := func(k string) string { return map[string]string{"KMSCTL_CONNECTOR": bin}[k] }
	if p, err := connector.Find(env); err != nil || p != bin {
		t.Errorf("%q %v", p, err)
	}
	if _, err := connector.Find(func(string) string { return "/nowhere" }); fault.KindOf(err) != fault.NotFound {
		t.Errorf("%v", err)
	}
	t.Setenv("PATH", filepath.Dir(bin))
	if p, err := connector.Find(func(string) string { return "" }); err != nil || p != bin {
		t.Errorf("%q %v", p, err)
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := connector.Find(func(string) string { return "" }); fault.KindOf(err) != fault.NotFound || fault.HintOf(err) == "" {
		t.Errorf("%v", err)
	}
}

// sidecar runs a connector on a unix socket, as a pod does.
func sidecar(t *testing.T, pin, dir string) (socket string, out *log, cmd *exec.Cmd) {
	t.Helper()
	socket, out = filepath.Join(dir, "c.sock"), &log{}
	pinFile := filepath.Join(dir, "pin")
	if err := os.WriteFile(pinFile, []byte(pin), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd = exec.Command(testkit.Connector(t), "--socket", socket, "--pin-file", pinFile, "--module", testkit.SoftHSM, "--softhsm-dir", filepath.Join(dir, "hsm"))
	cmd.Stderr = out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	return socket, out, cmd
}

func TestSidecar(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	socket, out, cmd := sidecar(t, "password", dir)
	c, err := connector.Dial(ctx, socket)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	defer c.Close()
	var logins atomic.Int32
	c.Reopen(unlock(c, &logins))
	k, err := c.CreateRootKey(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	check := exec.Command(testkit.Connector(t), "check", "--socket", socket)
	if b, err := check.CombinedOutput(); err != nil {
		t.Errorf("check: %v %s", err, b)
	}
	// A second one at the same socket is refused; a killed one is followed.
	second := exec.Command(cmd.Path, cmd.Args[1:]...)
	if b, err := second.CombinedOutput(); err == nil || !strings.Contains(string(b), "another connector answers") {
		t.Errorf("%v %s", err, b)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if b, err := exec.Command(cmd.Path, "check", "--socket", socket).CombinedOutput(); err == nil {
		t.Errorf("check of a dead connector: %s", b)
	}
	sidecar(t, "password", dir)
	if _, err := c.Wrap(ctx, k.Blob, []byte("x"), nil); err != nil {
		t.Errorf("after the restart: %v", err)
	}
	if n := logins.Load(); n != 2 {
		t.Errorf("%d logins", n)
	}
}

func dialOnly(socket string) int {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	c, err := connector.Dial(ctx, socket)
	if err != nil {
		return 7
	}
	c.Close()
	return 0
}

// TestAPeerOfAnotherUserIsRefused opens the socket's mode on purpose: the
// check of the peer's user is the second door.
func TestAPeerOfAnotherUserIsRefused(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("needs root, to be another user")
	}
	dir, err := os.MkdirTemp("/tmp", "peer-") //nolint:usetesting // t.TempDir is closed to other users
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket, out, _ := sidecar(t, "password", dir)
	c, err := connector.Dial(t.Context(), socket)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	c.Close()
	for _, p := range []string{dir, socket} {
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	self := filepath.Join(dir, "self")
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(self, b, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Dir, cmd.Env = "/", []string{"TEST_DIAL=" + socket}
	if err := cmd.Run(); err != nil {
		t.Fatalf("the same user: %v", err)
	}
	cmd = exec.Command(self)
	cmd.Dir, cmd.Env = "/", []string{"TEST_DIAL=" + socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	var ee *exec.ExitError
	if err := cmd.Run(); !errors.As(err, &ee) || ee.ExitCode() != 7 {
		t.Errorf("another user: %v", err)
	}
	if !strings.Contains(out.String(), "a peer was refused") {
		t.Errorf("the log does not say so:\n%s", out)
	}
}

func TestTheConnectorEndsWithItsParent(t *testing.T) {
	o := options(t, "password")
	c, err := connector.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	pid := c.Pid()
	c.Close()
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("process %d is there: %v", pid, err)
	}
}

func TestNoPINWhereOthersLook(t *testing.T) {
	o := options(t, "secret-pin-4711")
	c, _ := opened(t, o)
	for _, f := range []string{"cmdline", "environ"} {
		b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(c.Pid()), f))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte("secret-pin-4711")) {
			t.Errorf("the PIN is in %s", f)
		}
	}
	if s := o.Stderr.(*log).String(); strings.Contains(s, "secret-pin-4711") || !strings.Contains(s, "not dumpable") {
		t.Errorf("log: %s", s)
	}
}
