package kms_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"slices"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// fakeToken behaves as a connector does, with Go's AES. It is here to force
// faults; the real connector over SoftHSM is met by the tests of serve.
type fakeToken struct {
	pin, want string
	serial    string
	master    [32]byte
	keys      map[string]bool // master keys by id
	loggedIn  bool
	logins    int
	countLow  bool
	deviceErr error
}

func newToken(pin, want string) *fakeToken {
	t := &fakeToken{pin: pin, want: want, serial: "s1", keys: map[string]bool{}}
	_, _ = rand.Read(t.master[:])
	return t
}

func gcm(key []byte) cipher.AEAD {
	b, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	g, err := cipher.NewGCM(b)
	if err != nil {
		panic(err)
	}
	return g
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}

func (f *fakeToken) Describe(context.Context) (hsm.TokenInfo, error) {
	return hsm.TokenInfo{Label: "fake", Serial: f.serial, LoggedIn: f.loggedIn, PINCountLow: f.countLow}, nil
}

func (f *fakeToken) Fingerprint(_ context.Context, salt []byte) ([]byte, error) {
	h := sha256.Sum256(append(slices.Clone(salt), f.pin...))
	return h[:], nil
}

func (f *fakeToken) Login(context.Context) error {
	if f.deviceErr != nil {
		return f.deviceErr
	}
	f.logins++
	if f.pin != f.want {
		f.countLow = true
		return fault.Newf(fault.Denied, "log in", "fake", "CKR_PIN_INCORRECT")
	}
	f.loggedIn, f.countLow = true, false
	return nil
}

func (f *fakeToken) OpenMaster(_ context.Context, ids hsm.MasterIDs, create bool) (hsm.Master, error) {
	id := string(ids.Wrap)
	if !f.keys[id] && !create {
		return hsm.Master{}, fault.Newf(fault.NotFound, "find master key", "fake", "no such object")
	}
	f.keys[id] = true
	kcv := sha256.Sum256(f.master[:])
	return hsm.Master{WrapKCV: kcv[:3], SealKCV: kcv[3:6], Suite: hsm.SuiteGCM}, nil
}

func (f *fakeToken) Seal(_ context.Context, plain, aad []byte) ([]byte, error) {
	iv := random(12)
	return gcm(f.master[:]).Seal(iv, iv, plain, aad), nil
}

func (f *fakeToken) SealRandom(ctx context.Context, n int, aad []byte) ([]byte, error) {
	return f.Seal(ctx, random(n), aad)
}

func (f *fakeToken) Unseal(_ context.Context, b, aad []byte) ([]byte, error) {
	if len(b) < 12 {
		return nil, fault.New(fault.BadContent, "unseal", "", errors.New("short"))
	}
	out, err := gcm(f.master[:]).Open(nil, b[:12], b[12:], aad)
	if err != nil {
		return nil, fault.New(fault.BadContent, "unseal", "", err)
	}
	return out, nil
}

func (f *fakeToken) CreateRootKey(ctx context.Context) (hsm.NewKey, error) {
	return f.ImportRootKey(ctx, secret.New(random(32)))
}

func (f *fakeToken) ImportRootKey(ctx context.Context, m secret.Value) (hsm.NewKey, error) {
	b, err := f.Seal(ctx, m.Reveal(), []byte("root"))
	return hsm.NewKey{Blob: b}, err
}

func (f *fakeToken) Wrap(ctx context.Context, blob, plain, aad []byte) (hsm.Sealed, error) {
	k, err := f.Unseal(ctx, blob, []byte("root"))
	if err != nil {
		return hsm.Sealed{}, err
	}
	iv := random(12)
	return hsm.Sealed{Suite: hsm.SuiteGCM, IV: iv, Ciphertext: gcm(k).Seal(nil, iv, plain, aad)}, nil
}

func (f *fakeToken) WrapNew(ctx context.Context, blob []byte, n int, aad []byte) ([]byte, hsm.Sealed, error) {
	p := random(n)
	s, err := f.Wrap(ctx, blob, p, aad)
	return bytes.Clone(p), s, err
}

func (f *fakeToken) Unwrap(ctx context.Context, blob []byte, s hsm.Sealed, aad []byte) ([]byte, error) {
	if f.deviceErr != nil {
		return nil, f.deviceErr
	}
	k, err := f.Unseal(ctx, blob, []byte("root"))
	if err != nil {
		return nil, err
	}
	out, err := gcm(k).Open(nil, s.IV, s.Ciphertext, aad)
	if err != nil {
		return nil, fault.New(fault.BadContent, "unwrap", "", err)
	}
	return out, nil
}
