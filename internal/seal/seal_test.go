package seal_test

import (
	"bytes"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/kmsctl/kmsctl/internal/seal"
	"github.com/kmsctl/kmsctl/internal/secret"
)

var clearText = []byte("hsm-pass: canary\n")

func TestPassphrase(t *testing.T) {
	pass := secret.New([]byte("correct horse"))
	b, err := seal.Seal(clearText, nil, pass)
	if err != nil {
		t.Fatal(err)
	}
	if !seal.Is(b) || !seal.ByPassphrase(b) || bytes.Contains(b, []byte("canary")) {
		t.Errorf("not sealed: %s", b)
	}
	got, err := seal.Open(b, nil, pass)
	if err != nil || !bytes.Equal(got, clearText) {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := seal.Open(b, nil, secret.New([]byte("wrong"))); err == nil || !strings.Contains(err.Error(), "does not fit") {
		t.Errorf("%v", err)
	}
	if _, err := seal.Open(b, nil, secret.Value{}); err == nil {
		t.Error("opened with nothing")
	}
	if _, err := seal.Open(b[:len(b)-60], nil, pass); err == nil {
		t.Error("opened a cut file")
	}
}

func TestRecipient(t *testing.T) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	b, err := seal.Seal(clearText, []string{id.Recipient().String()}, secret.Value{})
	if err != nil {
		t.Fatal(err)
	}
	if seal.ByPassphrase(b) {
		t.Error("taken for one with a passphrase")
	}
	// age's own code reads it.
	got, err := seal.Open(b, []byte("# made today\n"+id.String()+"\n"), secret.Value{})
	if err != nil || !bytes.Equal(got, clearText) {
		t.Errorf("%q, %v", got, err)
	}
	other, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := seal.Open(b, []byte(other.String()), secret.Value{}); err == nil || !strings.Contains(err.Error(), "does not fit") {
		t.Errorf("%v", err)
	}
	if _, err := seal.Open(b, []byte("canary"), secret.Value{}); err == nil || strings.Contains(err.Error(), "canary") {
		t.Errorf("%v", err)
	}
	if err := seal.CheckRecipient("age1nonsense"); err == nil {
		t.Error("took a broken recipient")
	}
	if _, err := seal.Seal(clearText, nil, secret.Value{}); err == nil {
		t.Error("sealed to nobody")
	}
	if seal.Is(clearText) {
		t.Error("clear text taken for sealed")
	}
}
