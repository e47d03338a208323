package token_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"hash"
	"math/big"
	"testing"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/token"
)

var nonce = []byte("a nonce, 16 byte")

// send encrypts material under a pair, and the nonce under the material.
func send(t *testing.T, public, material []byte, bySHA1 bool) hsm.Sent {
	t.Helper()
	pub, err := x509.ParsePKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	h := sha256.New()
	if bySHA1 {
		h = sha1.New()
	}
	m := hsm.Sent{SHA1: bySHA1, Want: nonce}
	if m.Material, err = rsa.EncryptOAEP(h, rand.Reader, pub.(*rsa.PublicKey), material, nil); err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(append(material, make([]byte, 32)...)[:max(len(material)/8*8, 16)])
	if err != nil {
		t.Fatal(err)
	}
	if bySHA1 {
		m.IV = make([]byte, 16)
		_, _ = rand.Read(m.IV)
		m.Nonce = append(bytes.Clone(nonce), bytes.Repeat([]byte{16}, 16)...)
		cipher.NewCBCEncrypter(block, m.IV).CryptBlocks(m.Nonce, m.Nonce)
		return m
	}
	g, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	m.IV = make([]byte, 12)
	_, _ = rand.Read(m.IV)
	m.Nonce = g.Seal(nil, m.IV, nonce, nil)
	return m
}

// sentKeys is the contract of material that travels encrypted.
func sentKeys(t *testing.T, tok *token.Token, id []byte) {
	t.Helper()
	aad := []byte("aad")
	p, err := tok.NewImportPair(id, aad)
	if err != nil || (id == nil) != (p.Held == nil) {
		t.Fatalf("held: %v, %v", p.Held != nil, err)
	}
	for _, bySHA1 := range []bool{false, true} {
		for _, size := range []int{16, 24, 32} {
			material := make([]byte, size)
			_, _ = rand.Read(material)
			got, bits, err := tok.ImportSent(p, aad, send(t, p.Public, material, bySHA1), nil)
			if err != nil || bits != 8*size {
				t.Fatalf("SHA-1 %v, %d bytes: %d bits, %v", bySHA1, size, bits, err)
			}
			sameMaterial(t, tok, got, material)
		}
		m := send(t, p.Public, []byte("0123456789abcdef"), bySHA1)
		refuse := func(name string, want error, change func(*hsm.Sent)) {
			bad := m
			bad.Material, bad.Nonce, bad.IV = bytes.Clone(m.Material), bytes.Clone(m.Nonce), bytes.Clone(m.IV)
			change(&bad)
			if _, _, err := tok.ImportSent(p, aad, bad, nil); !errors.Is(err, want) || token.Lost(err) {
				t.Errorf("SHA-1 %v, %s: %v", bySHA1, name, err)
			}
		}
		refuse("changed", hsm.ErrMaterial, func(m *hsm.Sent) { m.Material[len(m.Material)-1] ^= 1 })
		refuse("cut", hsm.ErrMaterial, func(m *hsm.Sent) { m.Material = m.Material[:len(m.Material)-1] })
		refuse("none", hsm.ErrMaterial, func(m *hsm.Sent) { m.Material = nil })
		refuse("beyond the modulus", hsm.ErrMaterial, func(m *hsm.Sent) { m.Material = bytes.Repeat([]byte{255}, len(m.Material)) })
		refuse("17 bytes", hsm.ErrMaterial, func(m *hsm.Sent) { *m = send(t, p.Public, []byte("0123456789abcdef0"), bySHA1) })
		refuse("another hash", hsm.ErrMaterial, func(m *hsm.Sent) { m.SHA1 = !m.SHA1 })
		refuse("another nonce", hsm.ErrNonce, func(m *hsm.Sent) { m.Want = []byte("another nonce") })
		refuse("a cut nonce", hsm.ErrSealedNonce, func(m *hsm.Sent) { m.Nonce = m.Nonce[1:] }) // a changed one may be well padded by CBC
		refuse("a short IV", hsm.ErrSealedNonce, func(m *hsm.Sent) { m.IV = m.IV[1:] })
		placed, bits, err := tok.ImportSent(p, aad, m, []byte("sent-and-placed-"))
		if err != nil || bits != 128 || !hsm.InToken(placed.Blob) {
			t.Fatalf("%+v %d %v", placed, bits, err)
		}
		sameMaterial(t, tok, placed, []byte("0123456789abcdef"))
		if err := tok.Destroy(placed.Blob); err != nil {
			t.Error(err)
		}
	}
	if id == nil {
		if _, _, err := tok.ImportSent(p, []byte("another"), send(t, p.Public, []byte("0123456789abcdef"), false), nil); fault.KindOf(err) != fault.BadContent {
			t.Errorf("under another instance: %v", err)
		}
		return
	}
	for range 2 { // the second time there is nothing to do
		if err := tok.Destroy(p.Held); err != nil {
			t.Error(err)
		}
	}
	if _, _, err := tok.ImportSent(p, aad, send(t, p.Public, []byte("0123456789abcdef"), false), nil); fault.KindOf(err) != fault.NotFound || fault.HintOf(err) == "" {
		t.Errorf("a pair that is gone: %v", err)
	}
}

// TestPairsThatAreSealed: the token keeps none, or cannot, or must not.
func TestPairsThatAreSealed(t *testing.T) {
	for mode, id := range map[string][]byte{"": nil, "no-import": nil, "read-only": []byte("pair-id-16-bytes"), "token-full": []byte("pair-id-16-bytes")} {
		t.Run("mode "+mode, func(t *testing.T) {
			tok, q := quirky(t)
			if err := tok.Login(pin("password")); err != nil {
				t.Fatal(err)
			}
			if mode != "token-full" { // there was room for the master keys
				q.Set(t, mode)
			}
			if _, err := tok.OpenMaster(newIDs(), true); err != nil {
				t.Fatal(err)
			}
			q.Set(t, mode)
			if p, err := tok.NewImportPair(id, nil); err != nil || p.Held != nil || p.Sealed == nil {
				t.Fatalf("held %v: %v", p.Held != nil, err)
			}
			if id == nil {
				sentKeys(t, tok, nil)
			}
		})
	}
}

// sameMaterial: what a key wraps, the same material imported in the clear opens.
func sameMaterial(t *testing.T, tok *token.Token, k hsm.NewKey, material []byte) {
	t.Helper()
	clear, err := tok.ImportRootKey(pin(string(material)))
	if err != nil {
		t.Fatal(err)
	}
	c, err := tok.Wrap(k.Blob, []byte("dek"), []byte("aad"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := tok.Unwrap(clear.Blob, c, []byte("aad")); err != nil || string(got) != "dek" || !hsm.SameKey(clear.KCV, k.KCV) {
		t.Errorf("%q %v", got, err)
	}
}

// TestOAEPIsTakenOff as Go does it, by every length of text and under every
// change of one byte.
func TestOAEPIsTakenOff(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range []func() hash.Hash{sha256.New, sha1.New} {
		for _, n := range []int{0, 1, 32, 256 - 2 - 2*h().Size()} {
			text := bytes.Repeat([]byte{1}, n) // ones, as the mark before it
			sealed, err := rsa.EncryptOAEP(h(), rand.Reader, &key.PublicKey, text, nil)
			if err != nil {
				t.Fatal(err)
			}
			em := new(big.Int).Exp(new(big.Int).SetBytes(sealed), key.D, key.N).FillBytes(make([]byte, 256))
			if got, err := token.OpenOAEP(h, bytes.Clone(em)); err != nil || !bytes.Equal(got, text) {
				t.Errorf("%d bytes: %x %v", n, got, err)
			}
			for i := range em {
				bad := bytes.Clone(em)
				bad[i] ^= 0x80
				if _, err := token.OpenOAEP(h, bad); !errors.Is(err, hsm.ErrMaterial) {
					t.Errorf("%d bytes, byte %d changed: %v", n, i, err)
				}
			}
			if _, err := token.OpenOAEP(h, em[:2*h().Size()+1]); !errors.Is(err, hsm.ErrMaterial) {
				t.Errorf("too short: %v", err)
			}
		}
	}
}
