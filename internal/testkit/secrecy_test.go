package testkit_test

import (
	"bufio"
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/kmsctl/kmsctl/internal/store"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

func TestMain(m *testing.M) {
	code := m.Run()
	testkit.Cleanup()
	os.Exit(code)
}

const secrecyPIN = "a pass phrase of the secrecy test"

// TestARootKeyIsNowhereOutsideTheToken learns a generated root key by
// unwrapping it in the token as a readable copy, which nothing but this test
// does, and then looks for it in everything that the KMS keeps on disk and in
// the memory of a real `kmsctl serve` that is using it.
func TestARootKeyIsNowhereOutsideTheToken(t *testing.T) {
	dir := t.TempDir()
	p := newProgram(t, dir)
	p.run(t, "render", "secret", "--model", "softhsm", "--plain", "--output-file", "secret.yaml")
	p.run(t, "render", "overrides", "--model", "softhsm", "--registry", "r.example", "--version", "1", "--plain", "--output-file", "overrides.yaml")

	server := p.serve(t)
	var made struct{ KeyID, InstanceID string }
	p.json(t, &made, "onboard", "orders", "--data", "d", "-o", "json")
	stop(t, server)

	root := learn(t, filepath.Join(dir, "d", "softhsm"), blobOf(t, filepath.Join(dir, "d", "etcd"), made.KeyID))

	server = p.serve(t)
	defer stop(t, server)
	var dek struct{ Plaintext, Ciphertext string }
	for range 20 { // so that the key is in use while we look
		p.json(t, &dek, "keys", "wrap", made.KeyID, "--instance", made.InstanceID, "--data", "d", "-o", "json")
	}
	if err := os.WriteFile(filepath.Join(dir, "cipher"), []byte(dek.Ciphertext), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := p.run(t, "keys", "unwrap", made.KeyID, "--instance", made.InstanceID, "--data", "d", "--ciphertext-file", "cipher"); !strings.Contains(out, dek.Plaintext) {
		t.Fatalf("unwrap gave %q", out)
	}

	opensWith(t, root, dek.Ciphertext, dek.Plaintext)

	// Searching for something that must be there shows that the search works.
	seen, regions := searchMemory(t, server.Process.Pid, forms([]byte(made.KeyID)))
	if len(seen) == 0 {
		t.Fatalf("the key's id is not in %d regions of kmsctl's memory: the search is broken", regions)
	}
	if seen, regions := searchMemory(t, server.Process.Pid, forms(root)); len(seen) > 0 {
		t.Errorf("the root key is in kmsctl's memory: %v", seen)
	} else {
		t.Logf("not in %d regions of kmsctl's memory", regions)
	}
	files := 0
	err := filepath.WalkDir(filepath.Join(dir, "d"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files++
		for form, text := range forms(root) {
			if bytes.Contains(b, text) {
				t.Errorf("the root key is in %s, as %s", path, form)
			}
		}
		return nil
	})
	if err != nil || files < 5 {
		t.Errorf("looked at %d files: %v", files, err)
	}
}

// opensWith makes sure that the key which was learnt is the one that wraps:
// under the tag, AES-GCM is CTR from block 2 on.
func opensWith(t *testing.T, root []byte, ciphertext, plaintext string) {
	t.Helper()
	var c struct{ Ciphertext, IV []byte }
	b, err := base64.StdEncoding.DecodeString(ciphertext)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &c); err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(root)
	if err != nil {
		t.Fatal(err)
	}
	out := make([]byte, len(c.Ciphertext)-16)
	cipher.NewCTR(block, append(c.IV, 0, 0, 0, 2)).XORKeyStream(out, c.Ciphertext[:len(out)])
	if !strings.Contains(string(out), plaintext) && base64.StdEncoding.EncodeToString(out) != plaintext {
		t.Fatal("the key that was learnt is not the one that wraps")
	}
}

// TestServeOutlivesItsConnector kills the connector under a running KMS, time
// after time: each next call is answered, by the ledger's own way of logging in.
func TestServeOutlivesItsConnector(t *testing.T) {
	dir := t.TempDir()
	p := newProgram(t, dir)
	p.run(t, "render", "secret", "--model", "softhsm", "--plain", "--output-file", "secret.yaml")
	p.run(t, "render", "overrides", "--model", "softhsm", "--registry", "r.example", "--version", "1", "--plain", "--output-file", "overrides.yaml")
	server := p.serve(t)
	defer stop(t, server)
	var made struct{ KeyID, InstanceID string }
	p.json(t, &made, "onboard", "orders", "--data", "d", "-o", "json")
	for range 5 {
		pid := childOf(t, server.Process.Pid)
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		p.run(t, "keys", "wrap", made.KeyID, "--instance", made.InstanceID, "--data", "d", "-o", "json")
		t.Logf("answered after %s", time.Since(began).Round(time.Millisecond))
	}
}

// childOf finds the process whose parent is pid.
func childOf(t *testing.T, pid int) int {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		var child, parent int
		var state string
		_, rest, _ := bytes.Cut(b, []byte(") "))
		if _, err := fmt.Sscan(string(rest), &state, &parent); err != nil || parent != pid {
			continue
		}
		if _, err := fmt.Sscan(string(b), &child); err == nil {
			return child
		}
	}
	t.Fatalf("process %d has no child", pid)
	return 0
}

// forms are the ways in which bytes may lie somewhere.
func forms(b []byte) map[string][]byte {
	return map[string][]byte{"itself": b, "hex": []byte(hex.EncodeToString(b)), "HEX": []byte(strings.ToUpper(hex.EncodeToString(b))),
		"base64": []byte(base64.RawStdEncoding.EncodeToString(b)), "base64url": []byte(base64.RawURLEncoding.EncodeToString(b)), "half of it": b[:len(b)/2]}
}

type program struct {
	bin, dir, connector, server string
	env                         []string
}

func newProgram(t *testing.T, dir string) program {
	t.Helper()
	p := program{bin: filepath.Join(dir, "kmsctl"), dir: dir, connector: testkit.Connector(t), server: testkit.Server(t)}
	cmd := exec.Command("go", "build", "-o", p.bin, "github.com/kmsctl/kmsctl/cmd/kmsctl")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build kmsctl: %v %s", err, out)
	}
	return p
}

func (p program) cmd(args ...string) *exec.Cmd {
	cmd := exec.Command(p.bin, args...)
	cmd.Dir = p.dir
	cmd.Env = append(os.Environ(), "KMSCTL_CONNECTOR="+p.connector, "KMSCTL_KMS_SERVER="+p.server, "KMSCTL_NO_INPUT=1", "KMSCTL_HSM_PASSWORD="+secrecyPIN)
	cmd.Env = append(cmd.Env, p.env...)
	return cmd
}

func (p program) run(t *testing.T, args ...string) string {
	t.Helper()
	cmd := p.cmd(args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("kmsctl %v: %v %s", args, err, &errs)
	}
	return string(out)
}

func (p program) json(t *testing.T, v any, args ...string) {
	t.Helper()
	if err := json.Unmarshal([]byte(p.run(t, args...)), v); err != nil {
		t.Fatal(err)
	}
}

// serve starts the KMS and waits until it says that it is ready.
func (p program) serve(t *testing.T, more ...string) *exec.Cmd {
	t.Helper()
	cmd := p.cmd(append([]string{"serve", "--data", "d", "--listen", "127.0.0.1:0", "--secret", "secret.yaml", "--values", "overrides.yaml"}, more...)...)
	errs, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	var all strings.Builder
	lines := bufio.NewScanner(errs)
	for lines.Scan() {
		fmt.Fprintln(&all, lines.Text())
		if strings.HasPrefix(lines.Text(), "ready") {
			go func() { _, _ = io.Copy(io.Discard, errs) }()
			return cmd
		}
	}
	t.Fatalf("kmsctl serve ended: %s", &all)
	return nil
}

func stop(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	_ = cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("kmsctl serve: %v", err)
	}
}

// blobOf reads a key's wrapped material from the store's folder.
func blobOf(t *testing.T, etcd, id string) []byte {
	t.Helper()
	m, err := store.OpenEmbedded(t.Context(), etcd)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	c := m.Client()
	defer c.Close()
	all, err := c.Get(t.Context(), "", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range all.Kvs {
		found := regexp.MustCompile(`"blob":"([^"]+)"`).FindSubmatch(kv.Value)
		if found == nil || !bytes.Contains(kv.Key, []byte(id)) {
			continue
		}
		b, err := base64.StdEncoding.DecodeString(string(found[1]))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	t.Fatalf("no key with a blob among %d records", len(all.Kvs))
	return nil
}

// learn unwraps the blob in the token as a key that may be read.
func learn(t *testing.T, softhsm string, blob []byte) []byte {
	t.Helper()
	const form, kwp, ckmKeyWrapPad = 1, 2, 0x210A
	if len(blob) < 6 || blob[form] != kwp {
		t.Fatalf("a blob of another form: %x", blob)
	}
	wrapped := blob[6 : 6+int(binary.BigEndian.Uint16(blob[4:]))]
	t.Setenv("SOFTHSM2_CONF", filepath.Join(softhsm, "softhsm2.conf"))
	p := pkcs11.New(testkit.SoftHSM)
	if p == nil {
		t.Fatal("no SoftHSM")
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(p.Initialize())
	defer func() { _ = p.Finalize() }()
	slots, err := p.GetSlotList(true)
	check(err)
	s, err := p.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	check(err)
	check(p.Login(s, pkcs11.CKU_USER, secrecyPIN))
	check(p.FindObjectsInit(s, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_WRAP, true)}))
	found, _, err := p.FindObjects(s, 2)
	check(err)
	check(p.FindObjectsFinal(s))
	if len(found) != 1 {
		t.Fatalf("%d keys that wrap", len(found))
	}
	h, err := p.UnwrapKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmKeyWrapPad, nil)}, found[0], wrapped, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true)})
	check(err)
	v, err := p.GetAttributeValue(s, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)})
	check(err)
	if len(v[0].Value) != 32 {
		t.Fatalf("a root key of %d bytes", len(v[0].Value))
	}
	return v[0].Value
}

// searchMemory looks for each of the texts in a process.
func searchMemory(t *testing.T, pid int, texts map[string][]byte) (seen []string, regions int) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	for _, line := range strings.Split(string(maps), "\n") {
		var from, to int64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil || mode[0] != 'r' || to-from > 1<<30 {
			continue
		}
		b := make([]byte, to-from)
		if n, err := mem.ReadAt(b, from); err == nil || n > 0 {
			regions++
			for form, text := range texts {
				if bytes.Contains(b[:n], text) {
					seen = append(seen, fmt.Sprintf("%s in %s", form, line))
				}
			}
		}
	}
	return seen, regions
}
