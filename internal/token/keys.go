package token

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// guarded are the attributes that every key of ours has.
func (t *Token) guarded(onToken, extractable bool) []*pkcs11.Attribute {
	return []*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, onToken), attr(pkcs11.CKA_PRIVATE, !t.noLogin), attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, extractable)}
}

// purpose allows just what is listed.
func purpose(may ...uint) (out []*pkcs11.Attribute) {
	for _, a := range []uint{pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT, pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP, pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY} {
		out = append(out, attr(a, slices.Contains(may, a)))
	}
	return out
}

// sessionTemplate is what a root key may do while it is in the token.
func (t *Token) sessionTemplate(extractable bool) []*pkcs11.Attribute {
	return append(t.guarded(false, extractable), purpose(pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT)...)
}

// override makes later attributes of a template replace earlier ones.
func override(tpl []*pkcs11.Attribute) (out []*pkcs11.Attribute) {
	for i, a := range tpl {
		if !slices.ContainsFunc(tpl[i+1:], func(b *pkcs11.Attribute) bool { return a.Type == b.Type }) {
			out = append(out, a)
		}
	}
	return out
}

// macTemplate turns a key that encrypts into one that authenticates.
func macTemplate(tpl []*pkcs11.Attribute) []*pkcs11.Attribute {
	return append(tpl, purpose(pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY)...)
}

func unwrapTemplate(tpl []*pkcs11.Attribute, typ uint) []*pkcs11.Attribute {
	return override(append(tpl, attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, typ)))
}

// generate makes a secret key of 32 bytes.
func (t *Token) generate(s pkcs11.SessionHandle, mechanism, typ uint, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	tpl = append(unwrapTemplate(tpl, typ), attr(pkcs11.CKA_VALUE_LEN, 32))
	t.objects.Lock()
	defer t.objects.Unlock()
	h, err := t.ctx.GenerateKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(mechanism, nil)}, tpl)
	if err != nil {
		return 0, t.device("make a key on", err)
	}
	return h, nil
}

// bring takes key material into the token.
func (t *Token) bring(s pkcs11.SessionHandle, value []byte, typ uint, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	t.objects.Lock()
	defer t.objects.Unlock()
	h, err := t.ctx.CreateObject(s, append(unwrapTemplate(tpl, typ), attr(pkcs11.CKA_VALUE, value)))
	if err != nil {
		return 0, t.device("bring a key into", err)
	}
	return h, nil
}

// tighten makes sure that an unwrapped key cannot be read, and can be wrapped
// only when it is to leave again: some tokens ignore what they were asked at
// C_UnwrapKey.
func (t *Token) tighten(s pkcs11.SessionHandle, h pkcs11.ObjectHandle, leaves bool) error {
	got, err := t.shim.flags(s, h, pkcs11.CKA_SENSITIVE, pkcs11.CKA_EXTRACTABLE) // both at once: each root key that is brought back pays for it
	if err != nil {
		return t.device("read attributes on", err)
	}
	for i, c := range []struct {
		attr uint
		want bool
	}{{pkcs11.CKA_SENSITIVE, true}, {pkcs11.CKA_EXTRACTABLE, false}} {
		if got[i] == c.want || leaves && c.attr == pkcs11.CKA_EXTRACTABLE {
			continue
		}
		serr := t.ctx.SetAttributeValue(s, h, []*pkcs11.Attribute{attr(c.attr, c.want)})
		now, err := t.flag(s, h, c.attr)
		if err != nil {
			return err
		}
		if now != c.want {
			return fault.Newf(fault.NotReady, "open a key on", t.module, "the token leaves it readable: attribute 0x%x is %v (%v)", c.attr, now, serr).
				WithHint("the token does not protect its keys as asked; do not use it")
		}
	}
	return nil
}

// open gives what the calls on keys need.
func (t *Token) open() (*abilities, *masterKeys, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.master == nil {
		return nil, nil, ErrNotOpen
	}
	return t.can, t.master, nil
}

// openOld is open with the master keys of a version. One that is not held may
// have been made by another process: opening the master keys again finds it.
func (t *Token) openOld(version uint16) (*abilities, *masterKeys, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	m := t.masters[version]
	if t.master == nil || m == nil {
		return nil, nil, ErrNotOpen
	}
	return t.can, m, nil
}

// makeBlob puts a wrapped root key together: head, then the AES key and, where
// there is one, its MAC key, each with its length in 2 bytes.
func makeBlob(f form, version uint16, parts ...[]byte) []byte {
	out := hsm.BlobHead(uint8(f), version)
	for _, p := range parts {
		out = append(binary.BigEndian.AppendUint16(out, uint16(len(p))), p...)
	}
	return out
}

var errBlob = fault.Newf(fault.BadContent, "open root key", "", "its form is unknown").WithHint("the store was changed, or was written by a newer version")

// wrapped is a blob taken apart.
type wrapped struct {
	form     form
	version  uint16
	enc, mac []byte
}

func parseBlob(b []byte) (w wrapped, err error) {
	f, version, b, ok := hsm.ParseBlob(b)
	if !ok {
		return w, errBlob
	}
	var parts [][]byte
	for len(b) > 0 {
		if len(b) < 2 || len(b) < 2+int(binary.BigEndian.Uint16(b)) {
			return w, errBlob
		}
		n := 2 + int(binary.BigEndian.Uint16(b))
		parts, b = append(parts, b[2:n]), b[n:]
	}
	switch len(parts) {
	case 1:
		return wrapped{form(f), version, parts[0], nil}, nil
	case 2:
		return wrapped{form(f), version, parts[0], parts[1]}, nil
	}
	return w, errBlob
}

// CreateRootKey makes an AES-256 key in the token and wraps it out under the
// master key. The key itself is destroyed again: Wrap and Unwrap bring it back
// as a key that cannot be read or wrapped.
func (t *Token) CreateRootKey() (hsm.NewKey, error) {
	return t.newRoot(func(s pkcs11.SessionHandle, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
		return t.generate(s, pkcs11.CKM_AES_KEY_GEN, pkcs11.CKK_AES, tpl)
	}, t.besideNew)
}

// ImportRootKey does the same with material of 16, 24 or 32 bytes. Its MAC
// key, where there is one, follows from the material, so that the same
// material opens the same ciphertexts wherever it was imported.
func (t *Token) ImportRootKey(material secret.Value) (hsm.NewKey, error) {
	if err := checkMaterial(material); err != nil {
		return hsm.NewKey{}, err
	}
	return t.newRoot(t.known(material), t.besideMaterial)
}

func checkMaterial(m secret.Value) error {
	if n := len(m.Reveal()); n != 16 && n != 24 && n != 32 {
		return fault.Newf(fault.Usage, "import root key", "", "%d bytes are no AES key", n)
	}
	return nil
}

func (t *Token) newRoot(makeKey arriving, makeMAC standing) (out hsm.NewKey, err error) {
	a, m, err := t.open()
	if err != nil {
		return out, err
	}
	err = t.with(func(s pkcs11.SessionHandle) error {
		h, err := makeKey(s, t.sessionTemplate(true))
		if err != nil {
			return err
		}
		defer t.destroy(s, h)
		if sensitive, err := t.flag(s, h, pkcs11.CKA_SENSITIVE); err != nil || !sensitive {
			return fault.Newf(fault.BadContent, "make a root key on", t.module, "the token left it readable (%v)", err)
		}
		enc, err := t.wrapKey(s, a.way, a.mac, m.wrap, h)
		if err != nil {
			return err
		}
		parts := [][]byte{enc}
		if a.suite == hsm.SuiteCBCHMAC {
			mh, err := makeMAC(s, a, h, macTemplate(t.sessionTemplate(true)))
			if err != nil {
				return err
			}
			defer t.destroy(s, mh)
			mac, err := t.wrapKey(s, a.way, a.mac, m.wrap, mh)
			if err != nil {
				return err
			}
			parts = append(parts, mac)
		}
		kcv, err := t.checkValue(s, h)
		out = hsm.NewKey{Blob: makeBlob(a.way.form, m.ids.Version, parts...), KCV: kcv}
		return err
	})
	return out, err
}

// use lends the root key of a blob, from the cache where it can.
func (t *Token) use(blob []byte, f func(s pkcs11.SessionHandle, a *abilities, k keyPair) error) error {
	if hsm.InToken(blob) {
		return t.usePlaced(blob, f)
	}
	b, err := parseBlob(blob)
	if err != nil {
		return err
	}
	a, m, err := t.openOld(b.version)
	if err != nil {
		return err
	}
	w, err := t.wayBack(a, b)
	if err != nil {
		return err
	}
	return t.cached(blob, a, func(s pkcs11.SessionHandle) (keyPair, error) { return t.bringBack(s, a, m, w, b, false) }, f)
}

// wayBack is the mechanism that unwraps a blob here.
func (t *Token) wayBack(a *abilities, b wrapped) (way, error) {
	w, ok := a.forms[b.form]
	if !ok {
		return w, fault.Newf(fault.NotReady, "open root key on", t.module, "the token cannot unwrap form %d, by which the key was wrapped", b.form).
			WithHint("see what it can do with `kmsctl hsm probe`")
	}
	return w, nil
}

// bringBack makes the session objects in the session that holds the login,
// which lives as long as the cache does and does nothing else: a session
// bears one operation at a time. They may leave the token again, wrapped, only
// where a master key takes the place of another.
func (t *Token) bringBack(s pkcs11.SessionHandle, a *abilities, m *masterKeys, w way, b wrapped, leaves bool) (k keyPair, err error) {
	if k.enc, err = t.bringOne(s, a, m, w, b.enc, pkcs11.CKK_AES, t.sessionTemplate(leaves)); err != nil {
		return keyPair{}, err
	}
	if b.mac == nil {
		return k, nil
	}
	if k.mac, err = t.bringOne(s, a, m, w, b.mac, a.mac.typ, macTemplate(t.sessionTemplate(leaves))); err != nil {
		t.destroy(t.login, k.enc)
		return keyPair{}, err
	}
	return k, nil
}

func (t *Token) bringOne(s pkcs11.SessionHandle, a *abilities, m *masterKeys, w way, wrapped []byte, typ uint, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	h, err := sized(a, unwrapTemplate(tpl, typ), keyLens(w.form, wrapped), func(tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
		h, err := t.unwrapKey(s, t.login, w, a.mac, m.wrap, wrapped, tpl)
		if leaves(tpl) && is(err, pkcs11.CKR_ATTRIBUTE_READ_ONLY) { // openCryptoki: what is unwrapped may leave, unless it is asked not to
			unsaid := slices.DeleteFunc(slices.Clone(tpl), func(a *pkcs11.Attribute) bool { return a.Type == pkcs11.CKA_EXTRACTABLE })
			h, err = t.unwrapKey(s, t.login, w, a.mac, m.wrap, wrapped, unsaid)
		}
		return h, err
	})
	if errors.Is(err, errForeign) {
		return 0, fault.New(fault.BadContent, "open root key on", t.module, err).WithHint("the store was changed, or belongs to another master key")
	}
	if err != nil {
		return 0, err
	}
	if err := t.tighten(s, h, leaves(tpl)); err != nil {
		t.destroy(t.login, h)
		return 0, err
	}
	return h, nil
}

// leaves says whether a template lets its key be wrapped.
func leaves(tpl []*pkcs11.Attribute) bool {
	return slices.ContainsFunc(tpl, func(a *pkcs11.Attribute) bool { return a.Type == pkcs11.CKA_EXTRACTABLE && a.Value[0] != 0 })
}

// keyLens follow from the wrapped length: our keys are multiples of 8 bytes.
// The longer one comes first, which nothing can make of a shorter key.
func keyLens(f form, wrapped []byte) []int {
	if f != formCBC {
		return []int{len(wrapped) - 8}
	}
	n := len(wrapped) - blockLen - macLen // 1 to 16 bytes of it are padding
	return []int{n - 8, n - blockLen}
}

// sized unwraps, on a token that wants CKA_VALUE_LEN with each of the lengths
// that the key may have.
func sized(a *abilities, tpl []*pkcs11.Attribute, lengths []int, unwrap func([]*pkcs11.Attribute) (pkcs11.ObjectHandle, error)) (h pkcs11.ObjectHandle, err error) {
	if !a.unwrapLen {
		return unwrap(tpl)
	}
	for _, n := range lengths {
		if h, err = unwrap(append(slices.Clone(tpl), attr(pkcs11.CKA_VALUE_LEN, n))); err == nil || gone(err) != nil {
			break
		}
	}
	return h, err
}

func (t *Token) forget(k keyPair) {
	if k.placed {
		return
	}
	t.destroy(t.login, k.enc)
	if k.mac != 0 {
		t.destroy(t.login, k.mac)
	}
}

// Wrap encrypts plain under the root key in blob.
func (t *Token) Wrap(blob, plain, aad []byte) (out hsm.Sealed, err error) {
	err = t.use(blob, func(s pkcs11.SessionHandle, a *abilities, k keyPair) error {
		out, err = t.encrypt(s, a, k, plain, aad)
		return err
	})
	return out, err
}

// Unwrap opens what Wrap made.
func (t *Token) Unwrap(blob []byte, c hsm.Sealed, aad []byte) (out []byte, err error) {
	err = t.use(blob, func(s pkcs11.SessionHandle, a *abilities, k keyPair) error {
		out, err = t.decrypt(s, a, k, c, aad)
		return err
	})
	return out, err
}

// Evict forgets a root key that was brought back.
func (t *Token) Evict(blob []byte) { t.cache.evict(sha256.Sum256(blob), t.forget) }

// Rewrap takes the root key of a blob over to the master keys of today. The
// key does not leave the token but wrapped.
func (t *Token) Rewrap(blob []byte) (out hsm.NewKey, err error) {
	b, err := parseBlob(blob)
	if err != nil {
		return out, err
	}
	a, old, err := t.openOld(b.version)
	if err != nil {
		return out, err
	}
	_, m, err := t.open()
	if err != nil {
		return out, err
	}
	w, err := t.wayBack(a, b)
	if err != nil {
		return out, err
	}
	err = t.with(func(s pkcs11.SessionHandle) error {
		k, err := t.bringBack(s, a, old, w, b, true)
		if err != nil {
			return err
		}
		defer t.forget(k)
		parts, err := t.wrapPair(s, a, m, k)
		if err != nil {
			return err
		}
		kcv, err := t.checkValue(s, k.enc)
		out = hsm.NewKey{Blob: makeBlob(a.way.form, m.ids.Version, parts...), KCV: kcv}
		return err
	})
	return out, err
}

// Seal encrypts under the sealing key: head, suite, length of the IV, IV,
// ciphertext.
func (t *Token) Seal(plain, aad []byte) (out []byte, err error) {
	a, m, err := t.open()
	if err != nil {
		return nil, err
	}
	err = t.with(func(s pkcs11.SessionHandle) error {
		c, err := t.encrypt(s, a, m.seal, plain, aad)
		out = slices.Concat(hsm.SealHead(m.ids.Version), []byte{c.Suite, byte(len(c.IV))}, c.IV, c.Ciphertext)
		return err
	})
	return out, err
}

// Unseal opens what Seal made.
func (t *Token) Unseal(b, aad []byte) (out []byte, err error) {
	version, c, err := parseSealed(b)
	if err != nil {
		return nil, err
	}
	a, m, err := t.openOld(version)
	if err != nil {
		return nil, err
	}
	err = t.with(func(s pkcs11.SessionHandle) error {
		out, err = t.decrypt(s, a, m.seal, c, aad)
		return err
	})
	return out, err
}

// Reseal is Unseal and Seal in one, so that the text does not leave the
// connector.
func (t *Token) Reseal(b, aad []byte) ([]byte, error) {
	plain, err := t.Unseal(b, aad)
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	return t.Seal(plain, aad)
}

// parseSealed reads the form that Seal writes.
func parseSealed(b []byte) (version uint16, c hsm.Sealed, err error) {
	version, b = hsm.ParseSeal(b)
	if len(b) < 2 || len(b) < 2+int(b[1])+tagLen {
		return 0, c, errBad
	}
	n := 2 + int(b[1])
	return version, hsm.Sealed{Suite: b[0], IV: bytes.Clone(b[2:n]), Ciphertext: b[n:]}, nil
}
