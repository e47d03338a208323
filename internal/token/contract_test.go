package token_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/testkit"
	"github.com/kmsctl/kmsctl/internal/token"
)

// fixture is a token to keep the contract on, and what is known about it.
type fixture struct {
	name  string
	open  func(t *testing.T) *token.Token // opened, not logged in
	pin   string
	suite uint8
	way   string
}

func fixtures() []fixture {
	return []fixture{
		{"softhsm", freshSoftToken, "password", hsm.SuiteGCM, "CKM_AES_KEY_WRAP_PAD (RFC 5649)"},
		{"opencryptoki", openCryptoki, testkit.OpenCryptokiPIN, hsm.SuiteCBCHMAC, "CKM_AES_CBC_PAD with HMAC-SHA-256"},
	}
}

func freshSoftToken(t *testing.T) *token.Token {
	t.Helper()
	return softToken(t, t.TempDir())
}

func openCryptoki(t *testing.T) *token.Token {
	t.Helper()
	testkit.OpenCryptokiToken(t)
	tok, err := token.Open(token.Config{Module: testkit.OpenCryptoki, Label: testkit.OpenCryptokiLabel})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tok.Close)
	return tok
}

// newIDs are for one test: a token may be shared.
func newIDs() hsm.MasterIDs {
	b := make([]byte, 52)
	_, _ = rand.Read(b)
	return hsm.MasterIDs{Install: fmt.Sprintf("t%x", b[:3]), Wrap: b[4:20], Seal: b[20:36], Sign: b[36:52]}
}

func (f fixture) ready(t *testing.T) (*token.Token, hsm.MasterIDs, hsm.Master) {
	t.Helper()
	tok := f.open(t)
	if err := tok.Login(pin(f.pin)); err != nil {
		t.Fatal(err)
	}
	ids := newIDs()
	m, err := tok.OpenMaster(ids, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if n, err := tok.Clear(ids.Install, nil); err != nil || n < 4 {
			t.Errorf("clear: %d, %v", n, err)
		}
	})
	return tok, ids, m
}

// TestContract holds every token to the same promises.
func TestContract(t *testing.T) {
	for _, f := range fixtures() {
		t.Run(f.name, func(t *testing.T) { contract(t, f) })
	}
}

func contract(t *testing.T, f fixture) {
	t.Helper()
	tok, ids, m := f.ready(t)
	if m.Suite != f.suite || m.WrapWay != f.way {
		t.Errorf("suite %d, %s; want %d, %s", m.Suite, m.WrapWay, f.suite, f.way)
	}
	t.Run("report", func(t *testing.T) { reported(t, tok, f) })
	t.Run("keys", func(t *testing.T) { keysKeep(t, tok) })
	t.Run("imported twice", func(t *testing.T) { importedTwice(t, tok) })
	t.Run("placed keys", func(t *testing.T) { placedKeys(t, tok, ids) })
	t.Run("sent keys", func(t *testing.T) { sentKeys(t, tok, []byte("pair-id-16-bytes")) })
	t.Run("foreign blobs", func(t *testing.T) { foreignBlobs(t, tok) })
	t.Run("seal and sign", func(t *testing.T) { sealAndSign(t, tok, m) })
	t.Run("found again", func(t *testing.T) {
		again, err := tok.OpenMaster(ids, false)
		if err != nil || !hsm.SameKey(m.WrapKCV, again.WrapKCV) || !hsm.SameKey(m.SealKCV, again.SealKCV) {
			t.Errorf("%+v %v", again, err)
		}
		if _, err := tok.OpenMaster(newIDs(), false); fault.KindOf(err) != fault.NotFound {
			t.Errorf("keys that are not there: %v", err)
		}
	})
	t.Run("many at once", func(t *testing.T) { manyAtOnce(t, tok) })
	t.Run("cleared", func(t *testing.T) { cleared(t, tok, ids, m) })
	t.Run("master keys changed", func(t *testing.T) { masterChanged(t, tok, ids) })
}

// reported: the report says what is used. With -v it is printed.
func reported(t *testing.T, tok *token.Token, f fixture) {
	t.Helper()
	r, err := tok.Probe()
	if err != nil || !r.Usable || r.Capabilities.Suite != f.suite || r.Capabilities.WrapWay != f.way {
		t.Errorf("usable %v, suite %d, %s: %v", r.Usable, r.Capabilities.Suite, r.Capabilities.WrapWay, err)
	}
	if len(r.Capabilities.Imports) == 0 || len(r.Capabilities.Notes) == 0 {
		t.Errorf("%+v", r.Capabilities)
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", b)
}

func keysKeep(t *testing.T, tok *token.Token) {
	t.Helper()
	made, err := tok.CreateRootKey()
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{16, 24, 32} {
		if _, err := tok.ImportRootKey(pin(string(bytes.Repeat([]byte{7}, size)))); err != nil {
			t.Errorf("import of %d bytes: %v", size, err)
		}
	}
	if _, err := tok.ImportRootKey(pin("short")); fault.KindOf(err) != fault.Usage {
		t.Errorf("5 bytes: %v", err)
	}
	for n := range 70 {
		text := bytes.Repeat([]byte{byte(n)}, n+1)
		a, err := tok.Wrap(made.Blob, text, []byte("aad"))
		if err != nil {
			t.Fatal(n, err)
		}
		if got, err := tok.Unwrap(made.Blob, a, []byte("aad")); err != nil || !bytes.Equal(got, text) {
			t.Fatalf("%d bytes: %x %v", n+1, got, err)
		}
	}
	a, err := tok.Wrap(made.Blob, []byte("a text"), []byte("aad"))
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range changed(a) {
		if _, err := tok.Unwrap(made.Blob, bad, []byte("aad")); fault.KindOf(err) != fault.BadContent {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := tok.Unwrap(made.Blob, a, []byte("other")); fault.KindOf(err) != fault.BadContent {
		t.Errorf("other aad: %v", err)
	}
	if got, err := tok.Unwrap(made.Blob, a, []byte("aad")); err != nil || string(got) != "a text" {
		t.Errorf("bad ciphertexts left something behind: %q %v", got, err)
	}
}

// changed gives a ciphertext with each of its bytes changed, and cut.
func changed(a hsm.Sealed) map[string]hsm.Sealed {
	out := map[string]hsm.Sealed{}
	for i := range a.Ciphertext {
		c := hsm.Sealed{Suite: a.Suite, IV: a.IV, Ciphertext: bytes.Clone(a.Ciphertext)}
		c.Ciphertext[i] ^= 1
		out[fmt.Sprint("ciphertext byte ", i)] = c
	}
	for i := range a.IV {
		c := hsm.Sealed{Suite: a.Suite, IV: bytes.Clone(a.IV), Ciphertext: a.Ciphertext}
		c.IV[i] ^= 1
		out[fmt.Sprint("iv byte ", i)] = c
	}
	out["cut"] = hsm.Sealed{Suite: a.Suite, IV: a.IV, Ciphertext: a.Ciphertext[:len(a.Ciphertext)-1]}
	out["empty"] = hsm.Sealed{Suite: a.Suite, IV: a.IV}
	out["no iv"] = hsm.Sealed{Suite: a.Suite, Ciphertext: a.Ciphertext}
	return out
}

// importedTwice: the same material opens the same ciphertexts, as users who
// keep a duplicate elsewhere rely on.
func importedTwice(t *testing.T, tok *token.Token) {
	t.Helper()
	one, err := tok.ImportRootKey(pin("0123456789abcdef"))
	if err != nil {
		t.Fatal(err)
	}
	two, err := tok.ImportRootKey(pin("0123456789abcdef"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := tok.Wrap(one.Blob, []byte("dek"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := tok.Unwrap(two.Blob, c, nil); err != nil || string(got) != "dek" || !hsm.SameKey(one.KCV, two.KCV) {
		t.Errorf("%q %v", got, err)
	}
}

func foreignBlobs(t *testing.T, tok *token.Token) {
	t.Helper()
	k, err := tok.CreateRootKey()
	if err != nil {
		t.Fatal(err)
	}
	bad := map[string][]byte{"empty": nil, "short": k.Blob[:3], "cut": k.Blob[:len(k.Blob)-1], "longer": append(bytes.Clone(k.Blob), 0)}
	for i := range k.Blob {
		b := bytes.Clone(k.Blob)
		b[i] ^= 0x40
		bad[fmt.Sprint("byte ", i)] = b
	}
	for name, b := range bad {
		if _, err := tok.Wrap(b, []byte("x"), nil); fault.KindOf(err) != fault.BadContent && fault.KindOf(err) != fault.NotReady {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := tok.Wrap(k.Blob, []byte("x"), nil); err != nil {
		t.Errorf("bad blobs left something behind: %v", err)
	}
}

func sealAndSign(t *testing.T, tok *token.Token, m hsm.Master) {
	t.Helper()
	sealed, err := tok.Seal([]byte("secret"), []byte("purpose"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := tok.Unseal(sealed, []byte("purpose")); err != nil || string(got) != "secret" {
		t.Errorf("%q %v", got, err)
	}
	if got, err := tok.Unseal(sealed[3:], []byte("purpose")); err != nil || string(got) != "secret" {
		t.Errorf("the form without a version: %q %v", got, err)
	}
	for i := range sealed {
		b := bytes.Clone(sealed)
		b[i] ^= 1
		if _, err := tok.Unseal(b, []byte("purpose")); err == nil {
			t.Errorf("byte %d flipped and it opens", i)
		}
	}
	sig, err := tok.Sign([]byte("head"))
	if err != nil {
		t.Fatal(err)
	}
	pub, err := x509.ParsePKIXPublicKey(m.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	sum, good := sha256.Sum256([]byte("head")), false
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		good = ecdsa.VerifyASN1(k, sum[:], sig)
	case *rsa.PublicKey:
		good = rsa.VerifyPKCS1v15(k, crypto.SHA256, sum[:], sig) == nil
	}
	if !good {
		t.Errorf("the signature does not verify by %T", pub)
	}
}

// masterChanged: what an older version of the master keys made opens beside
// the new one, is taken over to it, and outlives it.
func masterChanged(t *testing.T, tok *token.Token, ids hsm.MasterIDs) {
	t.Helper()
	k, err := tok.CreateRootKey()
	if err != nil {
		t.Fatal(err)
	}
	c, err := tok.Wrap(k.Blob, []byte("dek"), []byte("aad"))
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := tok.Seal([]byte("secret"), []byte("purpose"))
	if err != nil {
		t.Fatal(err)
	}
	next := newIDs()
	next.Install, next.Sign, next.Version, next.Spare = ids.Install, ids.Sign, 2, true
	made, err := tok.OpenMaster(next, true)
	if err != nil {
		t.Fatal(err)
	}
	if still, err := tok.CreateRootKey(); err != nil || versionOf(still.Blob) != 1 {
		t.Errorf("a spare version makes keys: %d, %v", versionOf(still.Blob), err)
	}
	next.Spare = false
	again, err := tok.OpenMaster(next, false)
	if err != nil || !hsm.SameKey(made.WrapKCV, again.WrapKCV) {
		t.Fatalf("%+v %v", again, err)
	}
	if err := tok.DestroyMaster(next); fault.KindOf(err) != fault.Conflict {
		t.Errorf("destroyed what is in use: %v", err)
	}
	moved, err := tok.Rewrap(k.Blob)
	if err != nil {
		t.Fatal(err)
	}
	resealed, err := tok.Reseal(sealed, []byte("purpose"))
	if err != nil {
		t.Fatal(err)
	}
	if v, _ := hsm.ParseSeal(resealed); v != 2 || versionOf(moved.Blob) != 2 || !hsm.SameKey(moved.KCV, k.KCV) {
		t.Errorf("blob of version %d, seal of version %d", versionOf(moved.Blob), v)
	}
	opens := func(blob, sealed []byte) {
		t.Helper()
		if got, err := tok.Unwrap(blob, c, []byte("aad")); err != nil || string(got) != "dek" {
			t.Errorf("blob of version %d: %q, %v", versionOf(blob), got, err)
		}
		if got, err := tok.Unseal(sealed, []byte("purpose")); err != nil || string(got) != "secret" {
			t.Errorf("%q, %v", got, err)
		}
	}
	opens(k.Blob, sealed)
	opens(moved.Blob, resealed)
	if _, err := tok.Reseal(sealed, []byte("another")); fault.KindOf(err) != fault.BadContent {
		t.Errorf("resealed for another purpose: %v", err)
	}
	first := ids
	first.Version = 1
	for range 2 { // a second time there is nothing to do
		if err := tok.DestroyMaster(first); err != nil {
			t.Fatal(err)
		}
	}
	opens(moved.Blob, resealed)
	if _, err := tok.Unwrap(k.Blob, c, []byte("aad")); fault.KindOf(err) != fault.NotReady {
		t.Errorf("a blob of destroyed master keys: %v", err)
	}
	if _, err := tok.OpenMaster(first, false); fault.KindOf(err) != fault.NotFound {
		t.Errorf("destroyed master keys: %v", err)
	}
}

func versionOf(blob []byte) uint16 {
	_, v, _, _ := hsm.ParseBlob(blob)
	return v
}

func manyAtOnce(t *testing.T, tok *token.Token) {
	t.Helper()
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			k, err := tok.CreateRootKey()
			if err != nil {
				t.Error(err)
				return
			}
			for i := range 20 {
				text := []byte(fmt.Sprint(g, i))
				c, err := tok.Wrap(k.Blob, text, nil)
				if err != nil {
					t.Error(err)
					return
				}
				if i%5 == 0 {
					tok.Evict(k.Blob)
				}
				if got, err := tok.Unwrap(k.Blob, c, nil); err != nil || !bytes.Equal(got, text) {
					t.Errorf("%q %v", got, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// cleared: what one installation made goes, by its own proof only, and another
// one's keys on the same token stay.
func cleared(t *testing.T, tok *token.Token, ids hsm.MasterIDs, m hsm.Master) {
	t.Helper()
	aad := []byte("what is asked for")
	prove := func() *hsm.Proof {
		sealed, err := tok.Seal([]byte("clear"), aad)
		if err != nil {
			t.Fatal(err)
		}
		return &hsm.Proof{Sealed: sealed, AAD: aad}
	}
	foreign := prove()
	other := newIDs()
	if _, err := tok.OpenMaster(other, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = tok.Clear(other.Install, nil) })
	good := prove()
	before := installed(t, tok)
	if len(before[other.Install]) < 4 || !slices.Equal(before[ids.Install], before[other.Install]) {
		t.Errorf("on the token: %q", before)
	}
	for name, bad := range map[string]*hsm.Proof{
		"of another installation": foreign, "for something else": {Sealed: good.Sealed, AAD: []byte("other")}, "cut": {Sealed: good.Sealed[:20], AAD: aad}, "none": {},
	} {
		if n, err := tok.Clear(other.Install, bad); n != 0 || fault.KindOf(err) != fault.BadContent {
			t.Errorf("proof %s: %d, %v", name, n, err)
		}
	}
	if got := installed(t, tok); !slices.Equal(got[other.Install], before[other.Install]) {
		t.Errorf("a bad proof destroyed something: %q", got)
	}
	if n, err := tok.Clear(other.Install, good); err != nil || n < 4 {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := tok.Clear(other.Install, good); err != nil || n != 0 {
		t.Errorf("again: %d, %v", n, err)
	}
	if _, err := tok.Seal([]byte("x"), nil); !errors.Is(err, token.ErrNotOpen) {
		t.Errorf("the keys that went are in use: %v", err)
	}
	got := installed(t, tok)
	if _, there := got[other.Install]; there || !slices.Equal(got[ids.Install], before[ids.Install]) {
		t.Errorf("on the token: %q", got)
	}
	again, err := tok.OpenMaster(ids, false)
	if err != nil || !hsm.SameKey(m.WrapKCV, again.WrapKCV) {
		t.Errorf("the other installation: %+v %v", again, err)
	}
	if _, err := tok.Clear("", nil); fault.KindOf(err) != fault.Usage {
		t.Errorf("nobody's keys: %v", err)
	}
}

func installed(t *testing.T, tok *token.Token) map[string][]string {
	t.Helper()
	all, err := tok.Installations()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]string{}
	for _, i := range all {
		out[i.ID] = i.Objects
	}
	return out
}
