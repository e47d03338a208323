package pack_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"aead.dev/minisign"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/pack"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

// keyPair writes a minisign key pair.
func keyPair(t *testing.T) (public, secret string) {
	t.Helper()
	pub, priv, err := minisign.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := priv.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	ptext, err := pub.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	return file(t, ptext), file(t, text)
}

func file(t *testing.T, b []byte) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(p, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestSign signs an archive, and believes only that key over that index. (Keys
// behind a password cost a gibibyte and seconds each: the scripts have them.)
func TestSign(t *testing.T) {
	public, key := keyPair(t)
	other, plain := keyPair(t)
	if pack.Encrypted(plain) || pack.Encrypted("nowhere") {
		t.Error("a key needs a password that has none")
	}
	p := &pack.Repack{Limits: archive.DefaultLimits, Temp: t.TempDir(), Level: 1}
	defer p.Close()
	b, err := p.Build(t.Context(), open(t, testkit.Archives()["good"]))
	if err != nil {
		t.Fatal(err)
	}
	unsigned := write(t, b)
	if b.Sign, err = pack.Signer(key, nil); err != nil {
		t.Fatal(err)
	}
	signed := write(t, b)
	if !bytes.Equal(signed, write(t, b)) {
		t.Error("signed twice, it is another archive")
	}
	if err := pack.CheckSignature(open(t, signed), public); err != nil {
		t.Error(err)
	}
	if b.Sign, err = pack.Signer(plain, nil); err != nil {
		t.Fatal(err)
	}
	byOther := write(t, b)
	if err := pack.CheckSignature(open(t, byOther), other); err != nil {
		t.Error(err)
	}
	for name, bad := range map[string]struct {
		archive []byte
		key     string
		kind    fault.Kind
	}{
		"not signed":       {unsigned, public, fault.BadContent},
		"by another":       {byOther, public, fault.BadContent},
		"of another maker": {testkit.Archives()["good"], public, fault.BadContent},
		"no key":           {signed, "nowhere", fault.NotFound},
		"no key at all":    {signed, file(t, []byte("text")), fault.BadContent},
		"a secret key":     {signed, plain, fault.BadContent},
	} {
		if err := pack.CheckSignature(open(t, bad.archive), bad.key); fault.KindOf(err) != bad.kind || fault.HintOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, kind := range map[string]fault.Kind{"nowhere": fault.NotFound, public: fault.BadContent} {
		if _, err := pack.Signer(name, nil); fault.KindOf(err) != kind || fault.HintOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}
