// Package testkit has what tests of several packages share. Nothing else may
// import it.
package testkit

import (
	"bytes"
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"slices"
	"sync/atomic"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// Token behaves as a connector does, with Go's AES. It is here to force
// faults; the real connector over SoftHSM is met by the tests of serve. Its
// fields may be set between calls.
type Token struct {
	PIN, Want string // what is given at login, and what the token expects
	Serial    string
	Held      map[string][]byte // private halves of import pairs; nil: they are sealed
	LoggedIn  bool
	Logins    int
	CountLow  bool
	DeviceErr error
	Masters   map[string]bool // master keys by id
	Installed []hsm.Installation
	Calls     atomic.Int64 // operations on keys
	Hold      func()       // runs within each operation on keys

	master [32]byte
	sign   *ecdsa.PrivateKey
}

// NewToken makes a token that is given one PIN and expects another.
func NewToken(pin, want string) *Token {
	t := &Token{PIN: pin, Want: want, Serial: "s1", Masters: map[string]bool{}}
	copy(t.master[:], random(32))
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err) // no randomness: no test can go on
	}
	t.sign = k
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
	if _, err := rand.Read(b); err != nil {
		panic(err)
	}
	return b
}

// PublicKey is the key by which Sign's signatures verify, PKIX DER.
func (t *Token) PublicKey() []byte {
	b, err := x509.MarshalPKIXPublicKey(t.sign.Public())
	if err != nil {
		panic(err)
	}
	return b
}

// Sign signs the SHA-256 of a message.
func (t *Token) Sign(_ context.Context, message []byte) ([]byte, error) {
	sum := sha256.Sum256(message)
	return ecdsa.SignASN1(rand.Reader, t.sign, sum[:])
}

// Describe needs no login.
func (t *Token) Describe(context.Context) (hsm.TokenInfo, error) {
	return hsm.TokenInfo{Label: "fake", Serial: t.Serial, LoggedIn: t.LoggedIn, PINCountLow: t.CountLow}, nil
}

// Fingerprint tells one PIN from another.
func (t *Token) Fingerprint(_ context.Context, salt []byte) ([]byte, error) {
	h := sha256.Sum256(append(slices.Clone(salt), t.PIN...))
	return h[:], nil
}

// Login counts, and remembers a wrong PIN as a token does.
func (t *Token) Login(context.Context) error {
	if t.DeviceErr != nil {
		return t.DeviceErr
	}
	t.Logins++
	if t.PIN != t.Want {
		t.CountLow = true
		return fault.Newf(fault.Denied, "log in", "fake", "CKR_PIN_INCORRECT")
	}
	t.LoggedIn, t.CountLow = true, false
	return nil
}

// OpenMaster finds or makes the master keys.
func (t *Token) OpenMaster(_ context.Context, ids hsm.MasterIDs, create bool) (hsm.Master, error) {
	id := string(ids.Wrap)
	if !t.Masters[id] && !create {
		return hsm.Master{}, fault.Newf(fault.NotFound, "find master key", "fake", "no such object")
	}
	t.Masters[id] = true
	if !slices.ContainsFunc(t.Installed, func(i hsm.Installation) bool { return i.ID == ids.Install }) {
		t.Installed = append(t.Installed, hsm.Installation{ID: ids.Install, Objects: []string{"mkek:v1", "mseal:v1", "msign:v1"}})
	}
	kcv := sha256.Sum256(t.master[:])
	return hsm.Master{WrapKCV: kcv[:3], SealKCV: kcv[3:6], Suite: hsm.SuiteGCM, PublicKey: t.PublicKey()}, nil
}

// Installations lists who has master keys.
func (t *Token) Installations(context.Context) ([]hsm.Installation, error) {
	return slices.Clone(t.Installed), t.DeviceErr
}

// Clear forgets an installation, by its proof when one is given.
func (t *Token) Clear(ctx context.Context, install string, proof *hsm.Proof) (n int, err error) {
	if t.DeviceErr != nil {
		return 0, t.DeviceErr
	}
	i := slices.IndexFunc(t.Installed, func(i hsm.Installation) bool { return i.ID == install })
	if i < 0 {
		return 0, nil
	}
	if proof != nil {
		if _, err := t.Unseal(ctx, proof.Sealed, proof.AAD); err != nil {
			return 0, err
		}
	}
	n = len(t.Installed[i].Objects)
	t.Installed = slices.Delete(t.Installed, i, i+1)
	return n, nil
}

// Seal encrypts under the master key.
func (t *Token) Seal(_ context.Context, plain, aad []byte) ([]byte, error) {
	iv := random(12)
	return gcm(t.master[:]).Seal(iv, iv, plain, aad), nil
}

// SealRandom seals n random bytes.
func (t *Token) SealRandom(ctx context.Context, n int, aad []byte) ([]byte, error) {
	return t.Seal(ctx, random(n), aad)
}

// Unseal opens what Seal made.
func (t *Token) Unseal(_ context.Context, b, aad []byte) ([]byte, error) {
	if len(b) < 12 {
		return nil, fault.New(fault.BadContent, "unseal", "", errors.New("short"))
	}
	out, err := gcm(t.master[:]).Open(nil, b[:12], b[12:], aad)
	if err != nil {
		return nil, fault.New(fault.BadContent, "unseal", "", err)
	}
	return out, nil
}

func (t *Token) count() {
	t.Calls.Add(1)
	if t.Hold != nil {
		t.Hold()
	}
}

// CreateRootKey makes a key whose blob only this token opens.
func (t *Token) CreateRootKey(ctx context.Context) (hsm.NewKey, error) {
	return t.ImportRootKey(ctx, secret.New(random(32)))
}

// ImportRootKey brings material in.
func (t *Token) ImportRootKey(ctx context.Context, m secret.Value) (hsm.NewKey, error) {
	t.count()
	b, err := t.Seal(ctx, m.Reveal(), []byte("root"))
	return hsm.NewKey{Blob: b}, err
}

// CreatePlacedKey is CreateRootKey: this token has no objects.
func (t *Token) CreatePlacedKey(ctx context.Context, _ []byte) (hsm.NewKey, error) {
	return t.CreateRootKey(ctx)
}

// ImportPlacedKey is ImportRootKey.
func (t *Token) ImportPlacedKey(ctx context.Context, _ []byte, m secret.Value) (hsm.NewKey, error) {
	return t.ImportRootKey(ctx, m)
}

// NewImportPair makes a pair and seals its private half.
func (t *Token) NewImportPair(ctx context.Context, id, aad []byte) (p hsm.ImportPair, err error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return p, err
	}
	if p.Public, err = x509.MarshalPKIXPublicKey(&key.PublicKey); err != nil {
		return p, err
	}
	sealed, err := t.Seal(ctx, x509.MarshalPKCS1PrivateKey(key), aad)
	if t.Held == nil {
		p.Sealed = sealed
	} else {
		p.Held = hsm.PairBlob(id)
		t.Held[string(p.Held)] = sealed
	}
	return p, err
}

// ImportSent brings in what was sent under a pair.
func (t *Token) ImportSent(ctx context.Context, p hsm.ImportPair, aad []byte, m hsm.Sent, _ []byte) (none hsm.NewKey, bits int, err error) {
	der, err := t.Unseal(ctx, append(p.Sealed, t.Held[string(p.Held)]...), aad)
	if err != nil {
		return none, 0, err
	}
	key, err := x509.ParsePKCS1PrivateKey(der)
	if err != nil {
		return none, 0, err
	}
	h := crypto.SHA256
	if m.SHA1 {
		h = crypto.SHA1
	}
	material, err := key.Decrypt(nil, m.Material, &rsa.OAEPOptions{Hash: h, MGFHash: h})
	if err != nil {
		return none, 0, hsm.ErrMaterial
	}
	block, err := aes.NewCipher(material)
	if err != nil {
		return none, 0, hsm.ErrMaterial
	}
	if err := m.Prove(block); err != nil {
		return none, 0, err
	}
	k, err := t.ImportRootKey(ctx, secret.New(material))
	return k, 8 * len(material), err
}

// Wrap encrypts under the key of a blob.
func (t *Token) Wrap(ctx context.Context, blob, plain, aad []byte) (hsm.Sealed, error) {
	t.count()
	k, err := t.Unseal(ctx, blob, []byte("root"))
	if err != nil {
		return hsm.Sealed{}, err
	}
	iv := random(12)
	return hsm.Sealed{Suite: hsm.SuiteGCM, IV: iv, Ciphertext: gcm(k).Seal(nil, iv, plain, aad)}, nil
}

// WrapNew makes n random bytes and wraps them.
func (t *Token) WrapNew(ctx context.Context, blob []byte, n int, aad []byte) ([]byte, hsm.Sealed, error) {
	p := random(n)
	s, err := t.Wrap(ctx, blob, p, aad)
	return bytes.Clone(p), s, err
}

// Unwrap decrypts under the key of a blob.
func (t *Token) Unwrap(ctx context.Context, blob []byte, s hsm.Sealed, aad []byte) ([]byte, error) {
	t.count()
	if t.DeviceErr != nil {
		return nil, t.DeviceErr
	}
	k, err := t.Unseal(ctx, blob, []byte("root"))
	if err != nil {
		return nil, err
	}
	if s.Suite != hsm.SuiteGCM || len(s.IV) != 12 {
		return nil, fault.Newf(fault.BadContent, "unwrap", "", "CKR_MECHANISM_PARAM_INVALID")
	}
	out, err := gcm(k).Open(nil, s.IV, s.Ciphertext, aad)
	if err != nil {
		return nil, fault.New(fault.BadContent, "unwrap", "", err)
	}
	return out, nil
}

// Destroy forgets an import pair: of keys the token keeps none.
func (t *Token) Destroy(_ context.Context, blob []byte) error {
	delete(t.Held, string(blob))
	return nil
}
