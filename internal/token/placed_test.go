package token_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/token"
)

// placedKeys is the contract of keys that stay in the token.
func placedKeys(t *testing.T, tok *token.Token, ids hsm.MasterIDs) {
	t.Helper()
	objects := func() (n int) {
		t.Helper()
		all, err := tok.Installations()
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range all {
			if i.ID == ids.Install {
				n = len(i.Objects)
			}
		}
		return n
	}
	before := objects()
	id, other := []byte("placed-id-123456"), []byte("placed-id-654321")
	made, err := tok.CreatePlacedKey(id)
	if err != nil || !hsm.InToken(made.Blob) || len(made.KCV) == 0 {
		t.Fatalf("%+v %v", made, err)
	}
	one := objects() - before
	if again, err := tok.CreatePlacedKey(id); err != nil || !bytes.Equal(again.Blob, made.Blob) || !hsm.SameKey(again.KCV, made.KCV) || objects() != before+one {
		t.Errorf("a call that is repeated: %+v %v", again, err)
	}
	brought, err := tok.ImportPlacedKey(other, pin("0123456789abcdef"))
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := tok.ImportRootKey(pin("0123456789abcdef"))
	if err != nil || !hsm.SameKey(wrapped.KCV, brought.KCV) {
		t.Errorf("the same material is another key: %v", err)
	}
	c, err := tok.Wrap(brought.Blob, []byte("dek"), []byte("aad"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := tok.Unwrap(wrapped.Blob, c, []byte("aad")); err != nil || string(got) != "dek" {
		t.Errorf("%q %v", got, err)
	}
	c, err = tok.Wrap(made.Blob, []byte("dek"), nil)
	if err != nil {
		t.Fatal(err)
	}
	tok.Evict(made.Blob) // it leaves the cache, and stays
	if got, err := tok.Unwrap(made.Blob, c, nil); err != nil || string(got) != "dek" {
		t.Errorf("%q %v", got, err)
	}
	mac := made.Blob[1] == 1
	for name, b := range map[string][]byte{"the master key": ids.Wrap, "the sealing key": ids.Seal} {
		blob := hsm.PlacedBlob(b, mac)
		if _, err := tok.Wrap(blob, []byte("x"), nil); fault.KindOf(err) != fault.BadContent {
			t.Errorf("%s as a root key: %v", name, err)
		}
		if err := tok.Destroy(blob); fault.KindOf(err) != fault.BadContent {
			t.Errorf("%s is destroyed as a root key: %v", name, err)
		}
	}
	for range 2 { // the second time there is nothing to do
		for _, b := range [][]byte{made.Blob, brought.Blob, wrapped.Blob} {
			if err := tok.Destroy(b); err != nil {
				t.Error(err)
			}
		}
	}
	if n := objects(); n != before {
		t.Errorf("%d objects, %d before", n, before)
	}
	if _, err := tok.Unwrap(made.Blob, c, nil); fault.KindOf(err) != fault.NotFound || fault.HintOf(err) == "" {
		t.Errorf("a destroyed key: %v", err)
	}
	if _, err := tok.CreatePlacedKey([]byte("short")); fault.KindOf(err) != fault.Usage {
		t.Errorf("%v", err)
	}
}

// TestPlacedKeysOutliveTheProcess and are found by their ids alone.
func TestPlacedKeysOutliveTheProcess(t *testing.T) {
	dir, ids := t.TempDir(), newIDs()
	open := func() *token.Token {
		tok := softToken(t, dir)
		if err := tok.Login(pin("password")); err != nil {
			t.Fatal(err)
		}
		if _, err := tok.OpenMaster(ids, true); err != nil {
			t.Fatal(err)
		}
		return tok
	}
	tok := open()
	k, err := tok.CreatePlacedKey([]byte("placed-id-123456"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := tok.Wrap(k.Blob, []byte("dek"), nil)
	if err != nil {
		t.Fatal(err)
	}
	tok.Close()
	if got, err := open().Unwrap(k.Blob, c, nil); err != nil || string(got) != "dek" {
		t.Errorf("%q %v", got, err)
	}
}

// TestTokensThatKeepNoKeys: the refusal says why, the token is not taken for
// lost, and wrapped keys go on.
func TestTokensThatKeepNoKeys(t *testing.T) {
	for mode, want := range map[string]struct {
		kind fault.Kind
		why  string
	}{
		"token-full":           {fault.NotReady, "it is full (pkcs11: 0x31: CKR_DEVICE_MEMORY)"},
		"no-token-keys":        {fault.Denied, "the token's profile forbids it"},
		"no-token-keys no-gcm": {fault.Denied, "the token's profile forbids it"},
	} {
		t.Run(mode, func(t *testing.T) {
			_, others, _ := strings.Cut(mode, " ")
			tok, q := quirky(t, strings.Fields(others)...)
			if err := tok.Login(pin("password")); err != nil {
				t.Fatal(err)
			}
			if _, err := tok.OpenMaster(newIDs(), true); err != nil {
				t.Fatal(err)
			}
			q.Set(t, strings.Fields(mode)...)
			_, err := tok.CreatePlacedKey([]byte("placed-id-123456"))
			_, ierr := tok.ImportPlacedKey([]byte("placed-id-123456"), pin("0123456789abcdef"))
			for _, err := range []error{err, ierr} {
				if fault.KindOf(err) != want.kind || !strings.Contains(err.Error(), want.why) || fault.HintOf(err) == "" || token.Lost(err) {
					t.Errorf("%v", err)
				}
			}
			keysMadeHere(t, tok)
		})
	}
	tok, _ := quirky(t, "read-only")
	if err := tok.Login(pin("password")); err != nil {
		t.Fatal(err)
	}
	if _, err := tok.OpenMaster(newIDs(), true); err != nil {
		t.Fatal(err)
	}
	if _, err := tok.CreatePlacedKey([]byte("placed-id-123456")); fault.KindOf(err) != fault.Denied || !strings.Contains(err.Error(), "write-protected") {
		t.Errorf("%v", err)
	}
	if r, err := tok.Probe(); err != nil || len(r.Capabilities.Placements) != 1 || !r.Usable {
		t.Errorf("%v %v", r.Capabilities.Placements, err)
	}
}
