package token

import (
	"crypto/rsa"
	"crypto/x509"
	"math/big"

	"github.com/miekg/pkcs11"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
)

// A root key passes from one token to another by RSA-OAEP: the other one made
// the pair, holds its private half, and unwraps by it; this one wraps under
// the public half. So nobody sees the key between the two, and no AES wrap is
// needed that both know. What is carried is authenticated by the check value
// and by who may ask: see server.Config.GivesKeys.

// carryBits is the length of the pair; a shorter one is not wrapped under.
var carryBits = 3072

// carrying is the pair under which keys come in. It is gone with the token's
// session, and made anew.
type carrying struct {
	private pkcs11.ObjectHandle
	public  []byte
}

// CarryKey gives the public half under which keys come in, in PKIX DER.
func (t *Token) CarryKey() ([]byte, error) {
	t.opening.Lock()
	defer t.opening.Unlock()
	a, err := t.abilities()
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	have := t.carrying.public
	t.mu.Unlock()
	if have != nil {
		return have, nil
	}
	if !a.has(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN) || !a.has(pkcs11.CKM_RSA_PKCS_OAEP) {
		return nil, fault.Newf(fault.NotReady, "take keys into", t.module, "the token does not list RSA-OAEP, by which keys come from another token")
	}
	// In a session of its own: the pair lives as long, and the others are busy.
	s, err := t.ctx.OpenSession(t.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return nil, t.device("open a session on", err)
	}
	made, err := t.makeCarrying(s)
	if err != nil {
		_ = t.ctx.CloseSession(s)
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.carrying = made
	return made.public, nil
}

func (t *Token) makeCarrying(s pkcs11.SessionHandle) (c carrying, err error) {
	pub, priv, key, err := t.rsaPair(s, carryBits, oaepUnwrap, nil)
	if err != nil {
		return c, t.device("make a pair on", err)
	}
	t.destroy(s, pub)
	if err := t.tighten(s, priv, false); err != nil {
		return c, err
	}
	c.private = priv
	c.public, err = x509.MarshalPKIXPublicKey(key)
	return c, err
}

// GiveKey wraps the root key of a blob under another token's public key.
func (t *Token) GiveKey(blob, public []byte, sha1 bool) (out hsm.Carried, err error) {
	parsed, err := x509.ParsePKIXPublicKey(public)
	if err != nil {
		return out, fault.New(fault.Usage, "give a root key from", t.module, err)
	}
	key, ok := parsed.(*rsa.PublicKey)
	if !ok || key.N.BitLen() < carryBits {
		return out, fault.Newf(fault.Usage, "give a root key from", t.module, "it is no RSA key of %d bits", carryBits)
	}
	b, err := parseBlob(blob)
	if err != nil {
		return out, err
	}
	a, m, err := t.openOld(b.version)
	if err != nil {
		return out, err
	}
	w, err := t.wayBack(a, b)
	if err != nil {
		return out, err
	}
	err = t.with(func(s pkcs11.SessionHandle) error {
		kek, err := t.bringPublic(s, key)
		if err != nil {
			return err
		}
		defer t.destroy(s, kek)
		k, err := t.bringBack(s, a, m, w, b, true)
		if err != nil {
			return err
		}
		defer t.forget(k)
		out.SHA1 = sha1
		for _, h := range []pkcs11.ObjectHandle{k.enc, k.mac} {
			if h == 0 {
				continue
			}
			p, err := t.ctx.WrapKey(s, []*pkcs11.Mechanism{hashOf(hsm.Sent{SHA1: sha1}).mechanism()}, kek, h)
			if err != nil {
				return t.device("wrap a key by RSA-OAEP on", err)
			}
			out.Parts = append(out.Parts, p)
		}
		out.KCV, err = t.checkValue(s, k.enc)
		return err
	})
	return out, err
}

// bringPublic makes a session object that only wraps.
func (t *Token) bringPublic(s pkcs11.SessionHandle, key *rsa.PublicKey) (pkcs11.ObjectHandle, error) {
	t.objects.Lock()
	defer t.objects.Unlock()
	h, err := t.ctx.CreateObject(s, []*pkcs11.Attribute{
		attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA), attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_WRAP, true),
		attr(pkcs11.CKA_ENCRYPT, false), attr(pkcs11.CKA_VERIFY, false),
		attr(pkcs11.CKA_MODULUS, key.N.Bytes()), attr(pkcs11.CKA_PUBLIC_EXPONENT, big.NewInt(int64(key.E)).Bytes())})
	if err != nil {
		return 0, t.device("bring a public key into", err)
	}
	return h, nil
}

// TakeKey unwraps what another token gave, checks that it is the same key, and
// wraps it out under the master key of this one.
func (t *Token) TakeKey(c hsm.Carried, public []byte) (out hsm.NewKey, err error) {
	a, m, err := t.open()
	if err != nil {
		return out, err
	}
	t.mu.Lock()
	pair := t.carrying
	t.mu.Unlock()
	switch {
	case pair.public == nil || string(pair.public) != string(public):
		return out, fault.Newf(fault.NotFound, "take a key into", t.module, "the pair under which it was wrapped is gone").WithHint("it is carried once more")
	case len(c.Parts) == 0 || len(c.Parts) > 2:
		return out, fault.Usagef("%d parts are no root key", len(c.Parts))
	case len(c.Parts) == 2 && a.mac.sign == 0:
		return out, fault.Newf(fault.NotReady, "take a key into", t.module, "the token has no HMAC-SHA-256, which the key's ciphertexts need")
	}
	err = t.with(func(s pkcs11.SessionHandle) error {
		var k keyPair
		defer func() { t.dropTaken(s, k) }()
		if k.enc, err = t.takeOne(s, a, pair, c, 0, pkcs11.CKK_AES, t.sessionTemplate(true)); err != nil {
			return err
		}
		kcv, err := t.checkValue(s, k.enc)
		if err != nil {
			return err
		}
		if len(c.KCV) > 0 && !hsm.SameKey(kcv, c.KCV) {
			return fault.Newf(fault.BadContent, "take a key into", t.module, "another key came in than was given")
		}
		if len(c.Parts) == 2 {
			if k.mac, err = t.takeOne(s, a, pair, c, 1, a.mac.typ, macTemplate(t.sessionTemplate(true))); err != nil {
				return err
			}
		}
		parts, err := t.wrapPair(s, a, m, k)
		out = hsm.NewKey{Blob: makeBlob(a.way.form, m.ids.Version, parts...), KCV: kcv}
		return err
	})
	return out, err
}

func (t *Token) takeOne(s pkcs11.SessionHandle, a *abilities, pair carrying, c hsm.Carried, part int, typ uint, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	if len(c.Parts[part]) == 0 { // the binding does not bear it
		return 0, hsm.ErrMaterial
	}
	h, err := sized(a, unwrapTemplate(tpl, typ), []int{32, 24, 16}, func(tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
		return t.unwrapBare(s, hashOf(hsm.Sent{SHA1: c.SHA1}).mechanism(), pair.private, c.Parts[part], tpl)
	})
	if err != nil {
		return 0, t.device("unwrap a key by RSA-OAEP on", err)
	}
	return h, nil
}

// wrapPair wraps a key and what stands beside it under the master key.
func (t *Token) wrapPair(s pkcs11.SessionHandle, a *abilities, m *masterKeys, k keyPair) (parts [][]byte, err error) {
	for _, h := range []pkcs11.ObjectHandle{k.enc, k.mac} {
		if h == 0 {
			continue
		}
		p, err := t.wrapKey(s, a.way, a.mac, m.wrap, h)
		if err != nil {
			return nil, err
		}
		parts = append(parts, p)
	}
	return parts, nil
}

func (t *Token) dropTaken(s pkcs11.SessionHandle, k keyPair) {
	for _, h := range []pkcs11.ObjectHandle{k.enc, k.mac} {
		if h != 0 {
			t.destroy(s, h)
		}
	}
}
