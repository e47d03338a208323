package token

import (
	"bytes"
	"crypto/hmac"
	"encoding/binary"

	"github.com/miekg/pkcs11"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
)

// keyPair is what a cipher suite works with: an AES key, and for suite 3 a
// MAC key of its own.
type keyPair struct {
	enc, mac pkcs11.ObjectHandle
	placed   bool // token objects, which outlive the cache
}

// ivRule says who makes the IV of AES-GCM on this token.
type ivRule int

const (
	ivNone     ivRule = iota // GCM does not work here
	ivOurs                   // the token takes the one that its generator gave us
	ivWritten                // it writes its own over twelve zeros
	ivAppended               // it appends its own to the output
)

const (
	tagLen   = 16
	ivLen    = 12
	blockLen = 16
	macLen   = 32
)

var errBad = fault.Newf(fault.BadContent, "decrypt", "", "the ciphertext does not open")

func errSuite(suite uint8) error {
	return fault.Newf(fault.NotReady, "use the token", "", "it cannot do cipher suite %d", suite).
		WithHint("see what it can do with `kmsctl hsm probe`")
}

// bound is what GCM authenticates besides the text: the suite too, so that a
// ciphertext cannot be presented as one of another suite.
func bound(suite uint8, aad []byte) []byte {
	return append([]byte{suite}, aad...)
}

// encrypt makes a ciphertext of the suite that the self-test chose.
func (t *Token) encrypt(s pkcs11.SessionHandle, a *abilities, k keyPair, plain, aad []byte) (hsm.Sealed, error) {
	switch a.suite {
	case hsm.SuiteGCM:
		return t.gcmOurs(s, a, k.enc, plain, aad)
	case hsm.SuiteGCMToken:
		return t.gcmToken(s, a, k.enc, plain, aad)
	case hsm.SuiteCBCHMAC:
		return t.cbcMAC(s, a, k, plain, aad)
	}
	return hsm.Sealed{}, errSuite(a.suite)
}

func (t *Token) gcmOurs(s pkcs11.SessionHandle, a *abilities, k pkcs11.ObjectHandle, plain, aad []byte) (hsm.Sealed, error) {
	iv := make([]byte, ivLen)
	out, p, err := t.shim.gcm(false, true, s, k, a.gcm, iv, bound(hsm.SuiteGCM, aad), plain)
	if err != nil {
		return hsm.Sealed{}, t.device("encrypt on", err)
	}
	if p == changedIV || len(out) != len(plain)+tagLen || zero(iv) {
		return hsm.Sealed{}, fault.Newf(fault.NotReady, "encrypt on", t.module, "the token did not take the IV that it was given")
	}
	return hsm.Sealed{Suite: hsm.SuiteGCM, IV: iv, Ciphertext: out}, nil
}

// gcmToken takes the IV from where this token puts it: in the place of twelve
// zeros, or behind the output. Where neither happened, the token used what it
// was given, and zeros would be the same IV for every text: refused.
func (t *Token) gcmToken(s pkcs11.SessionHandle, a *abilities, k pkcs11.ObjectHandle, plain, aad []byte) (hsm.Sealed, error) {
	iv, n := make([]byte, ivLen), len(plain)+tagLen
	out, p, err := t.shim.gcm(false, a.iv == ivAppended, s, k, a.gcm, iv, bound(hsm.SuiteGCMToken, aad), plain)
	if err != nil {
		return hsm.Sealed{}, t.device("encrypt on", err)
	}
	switch {
	case a.iv == ivWritten && p == changedIV && len(out) == n:
	case a.iv == ivAppended && len(out) >= n+ivLen:
		out, iv = out[:n], out[n:]
	default:
		return hsm.Sealed{}, fault.Newf(fault.NotReady, "encrypt on", t.module, "the token made no IV of its own")
	}
	if zero(iv) {
		return hsm.Sealed{}, fault.Newf(fault.NotReady, "encrypt on", t.module, "the token's IV is zero")
	}
	return hsm.Sealed{Suite: hsm.SuiteGCMToken, IV: iv, Ciphertext: out}, nil
}

func zero(b []byte) bool { return bytes.Equal(b, make([]byte, len(b))) }

// cbcMAC encrypts, then authenticates: the MAC covers suite, additional data,
// IV and ciphertext, each where its length leaves no doubt.
func (t *Token) cbcMAC(s pkcs11.SessionHandle, a *abilities, k keyPair, plain, aad []byte) (hsm.Sealed, error) {
	if k.mac == 0 {
		return hsm.Sealed{}, fault.Newf(fault.NotReady, "encrypt on", t.module, "this key has no MAC key, which suite 3 needs").WithHint("rotate the key")
	}
	iv, err := t.ctx.GenerateRandom(s, blockLen)
	if err != nil {
		return hsm.Sealed{}, t.device("make random bytes on", err)
	}
	out, _, err := t.shim.crypt(false, s, k.enc, pkcs11.CKM_AES_CBC_PAD, bytes.Clone(iv), plain)
	if err != nil {
		return hsm.Sealed{}, t.device("encrypt on", err)
	}
	tag, err := t.shim.sign(s, k.mac, a.mac.sign, macText(hsm.SuiteCBCHMAC, aad, iv, out))
	if err != nil {
		return hsm.Sealed{}, t.device("authenticate on", err)
	}
	if len(tag) != macLen {
		return hsm.Sealed{}, fault.Newf(fault.NotReady, "authenticate on", t.module, "a MAC of %d bytes", len(tag))
	}
	return hsm.Sealed{Suite: hsm.SuiteCBCHMAC, IV: iv, Ciphertext: append(out, tag...)}, nil
}

func macText(suite uint8, aad, iv, ct []byte) []byte {
	out := binary.BigEndian.AppendUint64([]byte{suite}, uint64(len(aad)))
	return append(append(append(out, aad...), iv...), ct...)
}

// decrypt opens a ciphertext of any suite that this token can do.
func (t *Token) decrypt(s pkcs11.SessionHandle, a *abilities, k keyPair, c hsm.Sealed, aad []byte) ([]byte, error) {
	switch {
	case !c.Plausible():
		return nil, errBad
	case c.Suite == hsm.SuiteCBCHMAC:
		return t.openCBC(s, a, k, c, aad)
	case a.iv == ivNone:
		return nil, errSuite(c.Suite)
	case c.Suite == hsm.SuiteGCM && len(c.IV) != ivLen, len(c.IV) < ivLen:
		return nil, errBad
	}
	out, p, err := t.shim.gcm(true, false, s, k.enc, a.gcm, bytes.Clone(c.IV), bound(c.Suite, aad), c.Ciphertext)
	if err != nil {
		return nil, t.opened(s, k, p, err)
	}
	return out, nil
}

func (t *Token) openCBC(s pkcs11.SessionHandle, a *abilities, k keyPair, c hsm.Sealed, aad []byte) ([]byte, error) {
	n := len(c.Ciphertext) - macLen
	if len(c.IV) != blockLen || n < blockLen || n%blockLen != 0 {
		return nil, errBad
	}
	if a.mac.sign == 0 {
		return nil, errSuite(c.Suite)
	}
	if k.mac == 0 {
		return nil, errBad
	}
	tag, err := t.shim.sign(s, k.mac, a.mac.sign, macText(c.Suite, aad, c.IV, c.Ciphertext[:n]))
	if err != nil {
		return nil, t.device("authenticate on", err)
	}
	if !hmac.Equal(tag, c.Ciphertext[n:]) {
		return nil, errBad
	}
	out, p, err := t.shim.crypt(true, s, k.enc, pkcs11.CKM_AES_CBC_PAD, bytes.Clone(c.IV), c.Ciphertext[:n])
	if err != nil {
		return nil, t.opened(s, k, p, err)
	}
	return out, nil
}

const ckrAEADFailed = 0x42 // CKR_AEAD_DECRYPT_FAILED, PKCS#11 3.0

// opened tells whether a failed decryption is the data's fault or the token's.
// SoftHSM answers a changed ciphertext with CKR_GENERAL_ERROR, as others
// answer a broken line: a token that still encrypts is well. It is asked for
// something that needs no IV, since whoever sends changed ciphertexts would
// spend the encryptions that GCM allows under the key.
func (t *Token) opened(s pkcs11.SessionHandle, k keyPair, p progress, err error) error {
	if p < begun {
		return t.device("decrypt on", err)
	}
	if is(err, pkcs11.CKR_ENCRYPTED_DATA_INVALID, pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE, pkcs11.CKR_DATA_INVALID, pkcs11.CKR_DATA_LEN_RANGE,
		pkcs11.CKR_SIGNATURE_INVALID, ckrAEADFailed) {
		return errBad
	}
	if is(err, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_ARGUMENTS_BAD, pkcs11.CKR_MECHANISM_PARAM_INVALID) {
		if _, werr := t.checkValue(s, k.enc); werr == nil {
			return errBad
		}
	}
	return t.device("decrypt on", err)
}
