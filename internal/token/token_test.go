package token_test

import (
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/token"
)

const module = "/usr/lib/softhsm/libsofthsm2.so"

var ids = hsm.MasterIDs{Install: "test", Wrap: []byte("wrap-id-16-bytes"), Seal: []byte("seal-id-16-bytes"), Sign: []byte("sign-id-16-bytes")}

func pin(s string) secret.Value { return secret.New([]byte(s)) }

// softToken makes a token in a folder of its own and opens it.
func softToken(t *testing.T, dir string) *token.Token {
	t.Helper()
	t.Setenv("SOFTHSM2_CONF", "")
	if err := token.MakeSoftToken(dir, module, "kms", pin("password")); err != nil {
		t.Fatal(err)
	}
	tok, err := token.Open(token.Config{Module: module, Label: "kms"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tok.Close)
	return tok
}

func openToken(t *testing.T, dir string) *token.Token {
	t.Helper()
	tok := softToken(t, dir)
	if err := tok.Login(pin("password")); err != nil {
		t.Fatal(err)
	}
	if _, err := tok.OpenMaster(ids, true); err != nil {
		t.Fatal(err)
	}
	return tok
}

func TestMasterKeysOutliveTheProcessAndAreNeverReadable(t *testing.T) {
	dir := t.TempDir()
	var first hsm.Master
	var k hsm.NewKey
	t.Run("first", func(t *testing.T) {
		tok := openToken(t, dir)
		var err error
		if first, err = tok.OpenMaster(ids, false); err != nil {
			t.Fatal(err)
		}
		if k, err = tok.CreateRootKey(); err != nil {
			t.Fatal(err)
		}
	})
	tok := softToken(t, dir)
	if _, err := tok.CreateRootKey(); fault.KindOf(err) != fault.NotReady {
		t.Errorf("before login: %v", err)
	}
	if err := tok.Login(pin("password")); err != nil {
		t.Fatal(err)
	}
	again, err := tok.OpenMaster(ids, false)
	if err != nil || !bytes.Equal(again.WrapKCV, first.WrapKCV) || !bytes.Equal(again.SealKCV, first.SealKCV) || !bytes.Equal(again.PublicKey, first.PublicKey) {
		t.Fatalf("%+v %v", again, err)
	}
	if _, err := tok.Wrap(k.Blob, []byte("dek"), nil); err != nil {
		t.Error(err)
	}
	cmd := exec.Command("pkcs11-tool", "--module", module, "--login", "--pin", "password", "--token-label", "kms", "-O")
	out, err := cmd.CombinedOutput() // SOFTHSM2_CONF is in the environment
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// The token lists its objects in no fixed order, the public key of msign
	// among them: only it may be readable.
	safe := map[string]int{}
	for _, part := range regexp.MustCompile(`(?m)^(Public|Private|Secret) Key Object`).Split(string(out), -1)[1:] {
		for _, name := range []string{"mkek", "mseal", "msign"} {
			if strings.Contains(part, "kms:test:"+name+":v1") && strings.Contains(part, "sensitive, always sensitive, never extractable, local") {
				safe[name]++
			}
		}
	}
	if safe["mkek"] != 1 || safe["mseal"] != 1 || safe["msign"] != 1 {
		t.Errorf("%v in\n%s", safe, out)
	}
}

func TestMasterKeysOfAnotherStoreAreNotMade(t *testing.T) {
	tok := softToken(t, t.TempDir())
	if err := tok.Login(pin("password")); err != nil {
		t.Fatal(err)
	}
	if _, err := tok.OpenMaster(ids, false); fault.KindOf(err) != fault.NotFound || fault.HintOf(err) == "" {
		t.Errorf("%v", err)
	}
}

func TestABlobOfAnotherMasterIsRefused(t *testing.T) {
	var k hsm.NewKey
	t.Run("other", func(t *testing.T) {
		var err error
		if k, err = openToken(t, t.TempDir()).CreateRootKey(); err != nil {
			t.Fatal(err)
		}
	})
	tok := openToken(t, t.TempDir())
	for name, blob := range map[string][]byte{"other": k.Blob, "empty": nil, "short": k.Blob[:10], "other form": append([]byte{9}, k.Blob[1:]...)} {
		if _, err := tok.Wrap(blob, []byte("x"), nil); fault.KindOf(err) != fault.BadContent {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAWrongPINIsTriedOnce(t *testing.T) {
	tok := softToken(t, t.TempDir())
	if err := tok.Login(pin("wrong")); fault.KindOf(err) != fault.Denied || fault.HintOf(err) == "" {
		t.Fatalf("%v", err)
	}
	if info, err := tok.Info(); err != nil || !info.PINCountLow || info.LoggedIn {
		t.Errorf("%+v %v", info, err)
	}
	if err := tok.Login(pin("wrong")); fault.KindOf(err) != fault.Denied {
		t.Errorf("%v", err)
	}
	if err := tok.Login(pin("password")); err != nil {
		t.Errorf("another password is another secret: %v", err)
	}
}

func TestNoLibraryNoToken(t *testing.T) {
	if _, err := token.Open(token.Config{Module: "/nowhere/lib.so", Label: "kms"}); fault.KindOf(err) != fault.NotFound || fault.ObjectOf(err) != "/nowhere/lib.so" {
		t.Errorf("%v", err)
	}
	softToken(t, t.TempDir())
	no := uint64(5)
	for _, c := range []token.Config{{Module: module, Label: "other"}, {Module: module, Serial: "1"}, {Module: module, Slot: &no}} {
		if _, err := token.Open(c); fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), `"kms"`) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// TestRootKeysCostTheTokenNothing: thousands of them are made, brought in and
// used. The token keeps not one object more, and beside it, in the session,
// only as many as the cache does.
func TestRootKeysCostTheTokenNothing(t *testing.T) {
	dir := t.TempDir()
	tok := openToken(t, dir)
	count := func() (objects, files, cached int) {
		t.Helper()
		objects, cached, err := tok.Objects()
		if err != nil {
			t.Fatal(err)
		}
		all, err := filepath.Glob(filepath.Join(dir, "tokens", "*", "*.object"))
		if err != nil {
			t.Fatal(err)
		}
		return objects, len(all), cached
	}
	objects, files, _ := count()
	for i := range 3000 {
		bring := tok.CreateRootKey
		if i%3 == 0 {
			bring = func() (hsm.NewKey, error) { return tok.ImportRootKey(pin(fmt.Sprintf("%032d", i))) }
		}
		k, err := bring()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tok.Wrap(k.Blob, []byte("dek"), nil); err != nil {
			t.Fatalf("key %d: %v", i, err)
		}
	}
	if o, f, cached := count(); o != objects || f != files || objects == 0 || cached > token.CacheSize {
		t.Errorf("%d objects in %d files, %d in %d before; %d cached", o, f, objects, files, cached)
	}
}

func TestCacheUnderPressure(t *testing.T) {
	tok := openToken(t, t.TempDir())
	var blobs [][]byte
	for range 20 {
		k, err := tok.CreateRootKey()
		if err != nil {
			t.Fatal(err)
		}
		blobs = append(blobs, k.Blob)
	}
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 40 {
				blob := blobs[(i*7+g)%len(blobs)]
				text := []byte(fmt.Sprint(g, i))
				c, err := tok.Wrap(blob, text, nil)
				if err != nil {
					t.Error(err)
					return
				}
				if i%5 == 0 {
					tok.Evict(blob)
				}
				if got, err := tok.Unwrap(blob, c, nil); err != nil || !bytes.Equal(got, text) {
					t.Errorf("%q %v", got, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestAFolderThatSoftHSMCannotRead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a=b")
	if err := token.MakeSoftToken(dir, module, "kms", pin("password")); fault.KindOf(err) != fault.Usage || fault.HintOf(err) == "" {
		t.Errorf("%v", err)
	}
}
