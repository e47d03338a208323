package token

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" //nolint:gosec // OAEP over SHA-1 is part of IBM's API, and all that some tokens know; it is not weak there
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"math/big"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// pairName is in the labels of the private halves of import pairs.
const pairName = "import"

// pairBits is what IBM's API gives; tests make smaller ones.
var pairBits = 4096

const testBits = 2048

// oaepWay says how a token opens what was sent by RSA-OAEP.
type oaepWay int

const (
	oaepUnknown oaepWay = iota
	oaepNone            // not at all: the private half is sealed, and opens in this process
	oaepUnwrap          // by C_UnwrapKey: nobody sees the material
	oaepRaw             // by C_Decrypt without padding, which this process takes off
)

// oaepHash is one of the hashes that OAEP may go by.
type oaepHash struct {
	name      string
	hash, mgf uint
	std       crypto.Hash
	new       func() hash.Hash
}

var oaepHashes = []oaepHash{
	{"SHA-256", pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, crypto.SHA256, sha256.New},
	{"SHA-1", pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1, crypto.SHA1, sha1.New},
}

func hashOf(m hsm.Sent) oaepHash {
	if m.SHA1 {
		return oaepHashes[1]
	}
	return oaepHashes[0]
}

func (h oaepHash) mechanism() *pkcs11.Mechanism {
	return pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_OAEP, pkcs11.NewOAEPParams(h.hash, h.mgf, pkcs11.CKZ_DATA_SPECIFIED, nil))
}

// oaep finds out how the token opens what is sent by RSA-OAEP.
func (x *explorer) oaep() error {
	x.a.oaep = oaepNone
	if !x.a.has(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN) {
		x.a.report.Imports = append(x.a.report.Imports, hsm.Finding{Name: "RSA-OAEP under a pair of the token", Why: notListed})
		return nil
	}
	for _, way := range []oaepWay{oaepUnwrap, oaepRaw} {
		pub, priv, key, err := x.rsaPair(x.s, testBits, way, nil)
		if err != nil {
			x.a.report.Imports = append(x.a.report.Imports, fails("make an RSA pair", err))
			return gone(err)
		}
		x.destroy(x.s, pub)
		all := true
		for _, h := range oaepHashes {
			f, err := x.tryOAEP(way, priv, key, h)
			if err != nil {
				return err
			}
			x.a.report.Imports = append(x.a.report.Imports, f)
			all = all && f.Works && f.Why == cameIn
		}
		x.destroy(x.s, priv)
		if all && x.a.oaep == oaepNone {
			x.a.oaep = way
		}
	}
	return nil
}

func (x *explorer) tryOAEP(way oaepWay, priv pkcs11.ObjectHandle, key *rsa.PublicKey, h oaepHash) (hsm.Finding, error) {
	name, mechanism := "C_UnwrapKey, RSA-OAEP with "+h.name, uint(pkcs11.CKM_RSA_PKCS_OAEP)
	if way == oaepRaw {
		name, mechanism = "C_Decrypt by RSA, OAEP with "+h.name+" taken off in the connector", pkcs11.CKM_RSA_X_509
	}
	if !x.a.has(mechanism) {
		return hsm.Finding{Name: name, Why: notListed}, nil
	}
	err := x.proveOAEP(way, priv, key, h)
	if errors.Is(err, errLength) {
		return works(name, errLength.Error()), nil
	}
	if err != nil {
		return fails(name, err), gone(err)
	}
	return works(name, cameIn), nil
}

const cameIn = "a known AES key came in"

// errLength is of a token that unwraps, but of no use for keys that may have
// each of three lengths, of which the API tells one.
var errLength = errors.New(cameIn + ", and the token does not tell how long it is")

func (x *explorer) proveOAEP(way oaepWay, priv pkcs11.ObjectHandle, key *rsa.PublicKey, h oaepHash) error {
	value := make([]byte, 32)
	if _, err := rand.Read(value); err != nil {
		return err
	}
	text, err := rsa.EncryptOAEP(h.new(), rand.Reader, key, value, nil)
	if err != nil {
		return err
	}
	if way == oaepRaw {
		got, err := x.openRaw(x.s, priv, h, text)
		if err == nil && subtle.ConstantTimeCompare(got, value) != 1 {
			err = errors.New("another key came in")
		}
		return err
	}
	got, err := x.unwrapSent(x.s, x.a, priv, h, text, x.sessionTemplate(false))
	if err != nil {
		return err
	}
	defer x.destroy(x.s, got)
	same, err := x.holds(x.s, x.a, got, value, pkcs11.CKK_AES)
	if err == nil && !same {
		err = errors.New("another key came in")
	}
	if err != nil {
		return err
	}
	if n, err := x.bits(x.s, got); err != nil || n != 8*len(value) {
		return errLength
	}
	return nil
}

// rsaPair makes a pair whose private half does one thing. The public half is
// a session object; the caller destroys it.
func (t *Token) rsaPair(s pkcs11.SessionHandle, bits int, way oaepWay, private []*pkcs11.Attribute) (pub, priv pkcs11.ObjectHandle, key *rsa.PublicKey, err error) {
	opposite := map[oaepWay]uint{oaepUnwrap: pkcs11.CKA_WRAP, oaepRaw: pkcs11.CKA_ENCRYPT}[way]
	tpl := append(t.guarded(false, false), attr(pkcs11.CKA_UNWRAP, way == oaepUnwrap), attr(pkcs11.CKA_DECRYPT, way == oaepRaw), attr(pkcs11.CKA_SIGN, false))
	// Not under the lock of the other objects: it takes seconds.
	t.pairing.Lock()
	pub, priv, err = t.ctx.GenerateKeyPair(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil)},
		[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_MODULUS_BITS, bits), attr(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}), attr(opposite, true)},
		override(append(tpl, private...)))
	t.pairing.Unlock()
	if err != nil {
		return 0, 0, nil, err
	}
	v, err := t.ctx.GetAttributeValue(s, pub, []*pkcs11.Attribute{attr(pkcs11.CKA_MODULUS, nil), attr(pkcs11.CKA_PUBLIC_EXPONENT, nil)})
	if err != nil {
		t.destroy(s, pub)
		t.destroy(s, priv)
		return 0, 0, nil, err
	}
	return pub, priv, &rsa.PublicKey{N: new(big.Int).SetBytes(v[0].Value), E: int(new(big.Int).SetBytes(v[1].Value).Int64())}, nil
}

// oaepWay finds out once how this token opens what is sent. A test pair is
// dear, so that not every start pays for it.
func (t *Token) oaepWay() (oaepWay, error) {
	t.opening.Lock()
	defer t.opening.Unlock()
	a, err := t.abilities()
	if err != nil || a.oaep != oaepUnknown {
		return a.oaep, err
	}
	probe := *a // the others go on reading theirs
	if err := t.with(func(s pkcs11.SessionHandle) error { return (&explorer{Token: t, s: s, a: &probe}).oaep() }); err != nil {
		return 0, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.can = &probe
	return probe.oaep, nil
}

// NewImportPair makes an RSA pair by which material travels. The token keeps
// the private half as an object with the CKA_ID that the caller chose. Without
// one, or on a token that cannot, it is sealed with the additional data.
func (t *Token) NewImportPair(id, aad []byte) (p hsm.ImportPair, err error) {
	a, m, err := t.open()
	if err != nil {
		return p, err
	}
	way := oaepNone
	if len(id) > 0 && !a.readOnly {
		if way, err = t.oaepWay(); err != nil {
			return p, err
		}
	}
	if way == oaepNone {
		return t.sealedPair(aad)
	}
	p.Held = hsm.PairBlob(id)
	if _, ok := hsm.ParsePair(p.Held); !ok {
		return p, fault.Usagef("a CKA_ID of %d bytes", len(id))
	}
	if err := t.destroyPair(id); err != nil { // of a call that is repeated
		return p, err
	}
	err = t.with(func(s pkcs11.SessionHandle) error {
		pub, priv, key, err := t.rsaPair(s, pairBits, way, []*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_ID, id), attr(pkcs11.CKA_LABEL, label(m.ids.Install, pairName, hsm.FirstMaster))})
		if err != nil {
			return placedError(t.device("make an import pair on", err))
		}
		t.destroy(s, pub)
		if err := t.checkHeld(s, m, priv, pairName); err != nil {
			t.destroy(s, priv)
			return err
		}
		p.Public, err = x509.MarshalPKIXPublicKey(key)
		return err
	})
	if k := fault.KindOf(err); k == fault.Denied || k == fault.NotReady { // no room, or not allowed
		return t.sealedPair(aad)
	}
	return p, err
}

func (t *Token) sealedPair(aad []byte) (p hsm.ImportPair, err error) {
	key, err := rsa.GenerateKey(rand.Reader, pairBits)
	if err != nil {
		return p, err
	}
	if p.Public, err = x509.MarshalPKIXPublicKey(&key.PublicKey); err != nil {
		return p, err
	}
	der := x509.MarshalPKCS1PrivateKey(key)
	defer clear(der)
	p.Sealed, err = t.Seal(der, aad)
	return p, err
}

// arrival opens what was sent, and gives what makes a key of it. The caller
// clears the material, which is nil where the token alone sees it.
func (t *Token) arrival(a *abilities, p hsm.ImportPair, aad []byte, m hsm.Sent) (material []byte, arrive arriving, err error) {
	h := hashOf(m)
	if id, held := hsm.ParsePair(p.Held); held {
		unwraps := false
		if err = t.with(func(s pkcs11.SessionHandle) error {
			priv, err := t.findPair(s, id)
			if err != nil {
				return err
			}
			if unwraps, err = t.flag(s, priv, pkcs11.CKA_UNWRAP); err != nil || unwraps {
				return err
			}
			material, err = t.openRaw(s, priv, h, m.Material)
			return err
		}); err != nil {
			return nil, nil, err
		}
		if unwraps {
			return nil, func(s pkcs11.SessionHandle, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
				priv, err := t.findPair(s, id)
				if err != nil {
					return 0, err
				}
				return t.unwrapSent(s, a, priv, h, m.Material, tpl)
			}, nil
		}
	} else if material, err = t.openSealed(p.Sealed, aad, h, m.Material); err != nil {
		return nil, nil, err
	}
	if n := len(material); n != 16 && n != 24 && n != 32 {
		clear(material)
		return nil, nil, hsm.ErrMaterial
	}
	return material, t.known(secret.New(material)), nil
}

func (t *Token) openSealed(sealed, aad []byte, h oaepHash, text []byte) ([]byte, error) {
	der, err := t.Unseal(sealed, aad)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	key, err := x509.ParsePKCS1PrivateKey(der)
	if err != nil {
		return nil, fault.New(fault.BadContent, "open import pair", "", err)
	}
	out, err := key.Decrypt(nil, text, &rsa.OAEPOptions{Hash: h.std, MGFHash: h.std})
	if err != nil {
		return nil, hsm.ErrMaterial
	}
	return out, nil
}

// unwrapSent lets the token open what was sent. Some tokens want to know how
// long the key is.
func (t *Token) unwrapSent(s pkcs11.SessionHandle, a *abilities, priv pkcs11.ObjectHandle, h oaepHash, text []byte, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	if len(text) == 0 { // the binding does not bear it
		return 0, hsm.ErrMaterial
	}
	k, last := sized(a, unwrapTemplate(tpl, pkcs11.CKK_AES), []int{32, 24, 16}, func(tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
		return t.unwrapBare(s, h.mechanism(), priv, text, tpl)
	})
	if last == nil {
		return k, nil
	}
	if CKR(last) == "" || gone(last) != nil || stale(last) || is(last, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_TEMPLATE_INCOMPLETE,
		pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_ATTRIBUTE_READ_ONLY,
		pkcs11.CKR_TOKEN_WRITE_PROTECTED, pkcs11.CKR_SESSION_READ_ONLY, pkcs11.CKR_FUNCTION_NOT_SUPPORTED, pkcs11.CKR_FUNCTION_REJECTED, ckrActionProhibited) {
		return 0, placedError(t.device("open what was sent on", last))
	}
	return 0, fmt.Errorf("%w: %s", hsm.ErrMaterial, CKR(last)) // %s: it is the sender's fault, and not the token's
}

// openRaw lets the token do RSA, and takes the padding off.
func (t *Token) openRaw(s pkcs11.SessionHandle, priv pkcs11.ObjectHandle, h oaepHash, text []byte) ([]byte, error) {
	v, err := t.ctx.GetAttributeValue(s, priv, []*pkcs11.Attribute{attr(pkcs11.CKA_MODULUS, nil)})
	if err != nil {
		return nil, t.device("read attributes on", err)
	}
	size := (new(big.Int).SetBytes(v[0].Value).BitLen() + 7) / 8
	if len(text) != size {
		return nil, hsm.ErrMaterial
	}
	out, p, err := t.shim.crypt(true, s, priv, pkcs11.CKM_RSA_X_509, nil, text)
	switch {
	case err != nil && (p < begun || gone(err) != nil || stale(err)):
		return nil, t.device("open what was sent on", err)
	case err != nil || len(out) > size:
		return nil, hsm.ErrMaterial
	}
	padded := make([]byte, size) // some tokens leave zeros in front away
	copy(padded[size-len(out):], out)
	clear(out)
	defer clear(padded)
	return openOAEP(h.new, padded)
}

// openOAEP takes off the padding of RFC 8017, 7.1.2, step 3, with an empty
// label. How long it takes does not tell which of its checks failed.
func openOAEP(newHash func() hash.Hash, em []byte) ([]byte, error) {
	h := newHash()
	n := h.Size()
	if len(em) < 2*n+2 {
		return nil, hsm.ErrMaterial
	}
	none := h.Sum(nil) // the hash of the empty label
	seed, db := em[1:1+n], em[1+n:]
	mask(newHash, seed, db)
	mask(newHash, db, seed)
	good := subtle.ConstantTimeByteEq(em[0], 0) & subtle.ConstantTimeCompare(db[:n], none)
	at, looking := 0, 1
	for i, b := range db[n:] {
		one, zero := subtle.ConstantTimeByteEq(b, 1), subtle.ConstantTimeByteEq(b, 0)
		at = subtle.ConstantTimeSelect(looking&one, i, at)
		good &^= looking &^ one &^ zero // only zeros come before the one
		looking &^= one
	}
	if good&^looking != 1 {
		return nil, hsm.ErrMaterial
	}
	return slices.Clone(db[n+at+1:]), nil
}

// mask is out xor MGF1(seed), RFC 8017, B.2.1.
func mask(newHash func() hash.Hash, out, seed []byte) {
	for i, done := uint32(0), 0; done < len(out); i++ {
		h := newHash()
		h.Write(seed)
		h.Write(binary.BigEndian.AppendUint32(nil, i))
		done += subtle.XORBytes(out[done:], out[done:], h.Sum(nil))
	}
}

func (t *Token) findPair(s pkcs11.SessionHandle, id []byte) (pkcs11.ObjectHandle, error) {
	_, m, err := t.open()
	if err != nil {
		return 0, err
	}
	hs, err := t.findAll(s, pkcs11.CKO_PRIVATE_KEY, id)
	if err != nil {
		return 0, err
	}
	if len(hs) == 0 {
		return 0, fault.Newf(fault.NotFound, "open import pair on", t.module, "the token does not hold it any more").WithHint("make a new import token")
	}
	return hs[0], t.checkHeld(s, m, hs[0], pairName) // two handles are two names: ids are random
}

func (t *Token) destroyPair(id []byte) error {
	_, m, err := t.open()
	if err != nil {
		return err
	}
	return t.with(func(s pkcs11.SessionHandle) error { return t.destroyHeld(s, m, pkcs11.CKO_PRIVATE_KEY, id, pairName) })
}

// ulong reads a CK_ULONG that the token wrote.
func ulong(b []byte) uint64 {
	if len(b) != 8 {
		return 0
	}
	return binary.NativeEndian.Uint64(b)
}
