package token

import (
	"bytes"
	"crypto/aes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// bringIn takes material into the token: in the clear where it takes it so,
// else wrapped under a key that lives as long as this call does.
func (t *Token) bringIn(s pkcs11.SessionHandle, a *abilities, value []byte, typ uint, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	if a.importable {
		return t.bring(s, value, typ, tpl)
	}
	if !a.unwrapImport {
		return 0, fault.Newf(fault.NotReady, "bring a key into", t.module, "the token takes none, neither in the clear nor by C_UnwrapKey").
			WithHint("see what it can do with `kmsctl hsm probe`")
	}
	return t.bringWrapped(s, a, value, typ, tpl)
}

// known brings material in that this process knows.
func (t *Token) known(material secret.Value) arriving {
	return func(s pkcs11.SessionHandle, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
		a, _, err := t.open()
		if err != nil {
			return 0, err
		}
		return t.bringIn(s, a, material.Reveal(), pkcs11.CKK_AES, tpl)
	}
}

// bringWrapped wraps material by the token's own AES-ECB under a key of the
// token, which then unwraps it. Whether the right key arrived is asked of the
// key itself.
func (t *Token) bringWrapped(s pkcs11.SessionHandle, a *abilities, value []byte, typ uint, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	kek, err := t.generate(s, pkcs11.CKM_AES_KEY_GEN, pkcs11.CKK_AES, append(t.guarded(false, false), purpose(pkcs11.CKA_ENCRYPT, pkcs11.CKA_UNWRAP)...))
	if err != nil {
		return 0, err
	}
	defer t.destroy(s, kek)
	iv := make([]byte, ivOf(a.way))
	if _, err := rand.Read(iv); err != nil {
		return 0, err
	}
	text := judgeWrap(a.way.form, &ecbBlock{t: t, s: s, k: kek}, value, iv)[len(iv):]
	tpl = unwrapTemplate(tpl, typ)
	if a.unwrapLen {
		tpl = append(tpl, attr(pkcs11.CKA_VALUE_LEN, len(value)))
	}
	h, err := t.unwrapBare(s, pkcs11.NewMechanism(a.way.mechanism, iv), kek, text, tpl)
	if err != nil {
		return 0, t.device("bring a key into", err)
	}
	if same, err := t.holds(s, a, h, value, typ); err != nil || !same {
		t.destroy(s, h)
		return 0, fault.Newf(fault.NotReady, "bring a key into", t.module, "another key arrived (%v)", err)
	}
	return h, nil
}

// unwrapBare is C_UnwrapKey, for a key that comes from outside. Some tokens let
// what is unwrapped leave again, and bear no word about it.
func (t *Token) unwrapBare(s pkcs11.SessionHandle, m *pkcs11.Mechanism, kek pkcs11.ObjectHandle, text []byte, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	unwrap := func(tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
		t.objects.Lock()
		defer t.objects.Unlock()
		return t.ctx.UnwrapKey(s, []*pkcs11.Mechanism{m}, kek, text, tpl)
	}
	tpl = without(tpl, pkcs11.CKA_MODIFIABLE) // it may have to be tightened
	h, err := unwrap(tpl)
	if leaves(tpl) && is(err, pkcs11.CKR_ATTRIBUTE_READ_ONLY) {
		h, err = unwrap(without(tpl, pkcs11.CKA_EXTRACTABLE))
	}
	if err != nil {
		return 0, err
	}
	if err := t.tighten(s, h, leaves(tpl)); err != nil {
		t.destroy(s, h)
		return 0, err
	}
	return h, nil
}

func without(tpl []*pkcs11.Attribute, typ uint) []*pkcs11.Attribute {
	return slices.DeleteFunc(slices.Clone(tpl), func(a *pkcs11.Attribute) bool { return a.Type == typ })
}

// holds says whether a key in the token is this one.
func (t *Token) holds(s pkcs11.SessionHandle, a *abilities, h pkcs11.ObjectHandle, value []byte, typ uint) (bool, error) {
	if typ != pkcs11.CKK_AES {
		got, err := t.shim.sign(s, h, a.mac.sign, sample)
		want := hmac.New(sha256.New, value)
		want.Write(sample)
		return hmac.Equal(got, want.Sum(nil)), err
	}
	got, err := t.checkValue(s, h)
	if err != nil {
		return false, err
	}
	block, err := aes.NewCipher(value)
	if err != nil {
		return false, err
	}
	want := make([]byte, blockLen)
	block.Encrypt(want, checkText)
	return bytes.Equal(got, checkOf(checkECB, want)), nil
}

// byUnwrap finds out whether material can come in by C_UnwrapKey, which may be
// the only way that a token leaves open.
func (x *explorer) byUnwrap() error {
	if x.a.way.form == 0 || x.a.importable && !x.all {
		return nil
	}
	const name = "C_UnwrapKey, wrapped by this process under a key of the token"
	value := make([]byte, 32)
	if _, err := rand.Read(value); err != nil {
		return err
	}
	h, err := x.bringWrapped(x.s, x.a, value, pkcs11.CKK_AES, x.sessionTemplate(false))
	if err != nil {
		x.a.report.Imports = append(x.a.report.Imports, fails(name, err))
		return gone(err)
	}
	x.destroy(x.s, h)
	x.a.unwrapImport = true
	x.a.report.Imports = append(x.a.report.Imports, works(name, "a known AES key came in by "+x.a.way.name))
	return nil
}

// ImportSent brings in material that was sent under an import pair, once the
// sender has proven to hold it. With place, a CKA_ID, the key stays in the
// token. Where the token itself opens what was sent, this process never sees
// the material.
func (t *Token) ImportSent(p hsm.ImportPair, aad []byte, m hsm.Sent, place []byte) (out hsm.NewKey, bits int, err error) {
	a, _, err := t.open()
	if err != nil {
		return out, 0, err
	}
	material, arrive, err := t.arrival(a, p, aad, m)
	if err != nil {
		return out, 0, err
	}
	defer clear(material)
	bits = 8 * len(material)
	if err := t.with(func(s pkcs11.SessionHandle) error {
		h, err := arrive(s, t.sessionTemplate(false))
		if err != nil {
			return err
		}
		defer t.destroy(s, h)
		if material == nil {
			if bits, err = t.bits(s, h); err != nil {
				return err
			}
		}
		b := &ecbBlock{t: t, s: s, k: h}
		if err = m.Prove(b); b.err != nil { // its answers were no answers
			return t.device("encrypt on", b.err)
		}
		return err
	}); err != nil {
		return out, 0, err
	}
	if place != nil {
		out, err = t.place(place, arrive, t.besideMaterial)
		return out, bits, err
	}
	out, err = t.newRoot(arrive, t.besideMaterial)
	return out, bits, err
}

// arriving makes an AES key with these attributes.
type arriving func(s pkcs11.SessionHandle, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error)

// standing makes the MAC key that stands beside an AES key.
type standing func(s pkcs11.SessionHandle, a *abilities, h pkcs11.ObjectHandle, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error)

// bits tells the length of a key.
func (t *Token) bits(s pkcs11.SessionHandle, h pkcs11.ObjectHandle) (int, error) {
	v, err := t.ctx.GetAttributeValue(s, h, []*pkcs11.Attribute{attr(pkcs11.CKA_VALUE_LEN, nil)})
	if err != nil {
		return 0, t.device("read attributes on", err)
	}
	return 8 * int(ulong(v[0].Value)), nil
}

// macSeed is what a key of imported material encrypts to give its MAC key, so
// that the same material opens the same ciphertexts wherever and in whatever
// way it was imported. Ciphertexts under the key begin with random IVs: it
// meets these blocks nowhere else.
var macSeed = []byte("kmsctl mac key 1kmsctl mac key 2")

// besideMaterial makes the MAC key that belongs to imported material.
func (t *Token) besideMaterial(s pkcs11.SessionHandle, a *abilities, h pkcs11.ObjectHandle, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	value, _, err := t.shim.crypt(false, s, h, pkcs11.CKM_AES_ECB, nil, macSeed)
	if err != nil {
		return 0, t.device("encrypt on", err)
	}
	defer clear(value)
	if len(value) != macLen {
		return 0, t.device("encrypt on", errors.New("an answer of another length"))
	}
	return t.bringIn(s, a, value, a.mac.typ, tpl)
}

// besideNew makes the MAC key of a root key that was born in the token.
func (t *Token) besideNew(s pkcs11.SessionHandle, a *abilities, _ pkcs11.ObjectHandle, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	return t.generate(s, a.mac.generate, a.mac.typ, tpl)
}
