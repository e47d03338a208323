package token

import (
	"crypto/sha256"
	"errors"

	"github.com/miekg/pkcs11"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// placedName is in the labels of root keys that stay in the token.
const placedName = "root"

// CreatePlacedKey makes an AES-256 key that stays in the token, found by the
// CKA_ID that the caller chose. One that is there already is taken: the call
// can be repeated.
func (t *Token) CreatePlacedKey(id []byte) (hsm.NewKey, error) {
	return t.place(id, func(s pkcs11.SessionHandle, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
		return t.generate(s, pkcs11.CKM_AES_KEY_GEN, pkcs11.CKK_AES, tpl)
	}, t.besideNew)
}

// ImportPlacedKey does the same with material.
func (t *Token) ImportPlacedKey(id []byte, material secret.Value) (hsm.NewKey, error) {
	if err := checkMaterial(material); err != nil {
		return hsm.NewKey{}, err
	}
	return t.place(id, t.known(material), t.besideMaterial)
}

func (t *Token) place(id []byte, makeKey arriving, makeMAC standing) (out hsm.NewKey, err error) {
	a, m, err := t.open()
	if err != nil {
		return out, err
	}
	blob := hsm.PlacedBlob(id, a.suite == hsm.SuiteCBCHMAC)
	if !hsm.InToken(blob) {
		return out, fault.Usagef("a CKA_ID of %d bytes", len(id))
	}
	if a.readOnly {
		return out, forbidden(errors.New("it is write-protected"))
	}
	err = t.with(func(s pkcs11.SessionHandle) error {
		tpl := func(id []byte) []*pkcs11.Attribute {
			return append(append(t.guarded(true, false), attr(pkcs11.CKA_MODIFIABLE, false), attr(pkcs11.CKA_ID, id), attr(pkcs11.CKA_LABEL, label(m.ids.Install, placedName, hsm.FirstMaster))),
				purpose(pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT)...)
		}
		h, err := t.placeOne(s, a, m, id, false, func() (pkcs11.ObjectHandle, error) { return makeKey(s, tpl(id)) })
		if err != nil {
			return err
		}
		if a.suite == hsm.SuiteCBCHMAC {
			if _, err := t.placeOne(s, a, m, beside(id), true, func() (pkcs11.ObjectHandle, error) { return makeMAC(s, a, h, macTemplate(tpl(beside(id)))) }); err != nil {
				t.destroy(s, h)
				return err
			}
		}
		kcv, err := t.checkValue(s, h)
		out = hsm.NewKey{Blob: blob, KCV: kcv}
		return err
	})
	return out, err
}

// placeOne finds an object, or makes it; one that the token made readable is
// destroyed again.
func (t *Token) placeOne(s pkcs11.SessionHandle, a *abilities, m *masterKeys, id []byte, isMAC bool, makeIt func() (pkcs11.ObjectHandle, error)) (pkcs11.ObjectHandle, error) {
	h, err := t.findPlaced(s, a, m, id, isMAC)
	if err == nil || fault.KindOf(err) != fault.NotFound {
		return h, err
	}
	if h, err = makeIt(); err != nil {
		return 0, placedError(err)
	}
	if err := t.checkHeld(s, m, h, placedName); err != nil {
		t.destroy(s, h)
		return 0, err
	}
	return h, nil
}

// placedError tells a token that will not keep a key from one that is lost.
func placedError(err error) error {
	switch {
	case is(err, pkcs11.CKR_DEVICE_MEMORY):
		return fault.New(fault.NotReady, "keep a root key in the token", "", errors.New("it is full ("+CKR(err)+")")).
			WithHint("purge keys that are not needed, or use an instance with placement %s", hsm.PlacementWrapped)
	case is(err, pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_TOKEN_WRITE_PROTECTED, pkcs11.CKR_SESSION_READ_ONLY,
		pkcs11.CKR_FUNCTION_NOT_SUPPORTED, pkcs11.CKR_FUNCTION_REJECTED, ckrActionProhibited):
		return forbidden(errors.New(CKR(err)))
	}
	return err
}

const ckrActionProhibited = 0x1B // CKR_ACTION_PROHIBITED, PKCS#11 2.40

func forbidden(why error) error {
	return fault.New(fault.Denied, "keep a root key in the token", "", errors.Join(errors.New("the token's profile forbids it"), why)).
		WithHint("see `kmsctl hsm probe`, or use an instance with placement %s", hsm.PlacementWrapped)
}

// findPlaced finds an object that stays in the token. It must be ours, by its
// label, and still as it was made: a reference that was changed could name a
// master key.
func (t *Token) findPlaced(s pkcs11.SessionHandle, a *abilities, m *masterKeys, id []byte, isMAC bool) (pkcs11.ObjectHandle, error) {
	h, err := t.findOne(s, pkcs11.CKO_SECRET_KEY, id, func(x, y pkcs11.ObjectHandle) (bool, error) { return t.alike(s, a, isMAC, x, y) })
	if err != nil {
		return 0, err
	}
	if h == 0 {
		return 0, fault.Newf(fault.NotFound, "open root key on", t.module, "the token does not hold it any more").
			WithHint("keys that stay in the token are in no backup of kmsctl: restore the token by its vendor's means")
	}
	return h, t.checkHeld(s, m, h, placedName)
}

// checkHeld refuses an object of another name, and one that could be read.
func (t *Token) checkHeld(s pkcs11.SessionHandle, m *masterKeys, h pkcs11.ObjectHandle, name string) error {
	v, err := t.ctx.GetAttributeValue(s, h, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, nil)})
	if err != nil {
		return t.device("read attributes on", err)
	}
	if string(v[0].Value) != label(m.ids.Install, name, hsm.FirstMaster) {
		return fault.Newf(fault.BadContent, "open "+name+" key on", t.module, "the object that is named is none of them").WithHint("the store was changed")
	}
	for _, c := range []struct {
		attr uint
		want bool
	}{{pkcs11.CKA_SENSITIVE, true}, {pkcs11.CKA_EXTRACTABLE, false}} {
		if got, err := t.flag(s, h, c.attr); err != nil || got != c.want {
			return fault.Newf(fault.NotReady, "keep a key on", t.module, "attribute 0x%x is %v, must be %v (%v)", c.attr, got, c.want, err).
				WithHint("the token does not protect its keys as asked; do not use it")
		}
	}
	return nil
}

// usePlaced is use for a key that stays in the token.
func (t *Token) usePlaced(blob []byte, f func(s pkcs11.SessionHandle, a *abilities, k keyPair) error) error {
	a, m, err := t.open()
	if err != nil {
		return err
	}
	id, mac := hsm.ParsePlaced(blob)
	return t.cached(blob, a, func(s pkcs11.SessionHandle) (k keyPair, err error) {
		k.placed = true
		if k.enc, err = t.findPlaced(s, a, m, id, false); err == nil && mac {
			k.mac, err = t.findPlaced(s, a, m, beside(id), true)
		}
		return k, err
	}, f)
}

// Destroy makes an end of a root key: of one that stays in the token there is
// nothing left, of a wrapped one the token keeps no copy. What is gone already
// is no error.
func (t *Token) Destroy(blob []byte) error {
	if id, ok := hsm.ParsePair(blob); ok {
		return t.destroyPair(id)
	}
	t.Evict(blob)
	if !hsm.InToken(blob) {
		return nil
	}
	_, m, err := t.open()
	if err != nil {
		return err
	}
	id, mac := hsm.ParsePlaced(blob)
	ids := [][]byte{id}
	if mac {
		ids = append(ids, beside(id))
	}
	return t.with(func(s pkcs11.SessionHandle) error {
		for _, id := range ids {
			if err := t.destroyHeld(s, m, pkcs11.CKO_SECRET_KEY, id, placedName); err != nil {
				return err
			}
		}
		return nil
	})
}

// destroyHeld destroys what has this id and this name.
func (t *Token) destroyHeld(s pkcs11.SessionHandle, m *masterKeys, class uint, id []byte, name string) error {
	hs, err := t.findAll(s, class, id)
	if err != nil {
		return err
	}
	for _, h := range hs {
		if err := t.checkHeld(s, m, h, name); err != nil {
			if is(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
				continue // a second name of what went already
			}
			return err
		}
		t.objects.Lock()
		err := t.ctx.DestroyObject(s, h)
		t.objects.Unlock()
		if err != nil && !is(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
			return t.device("destroy a key on", err)
		}
	}
	if hs, err = t.findAll(s, class, id); err == nil && len(hs) > 0 {
		err = fault.Newf(fault.NotReady, "destroy a key on", t.module, "the token says that it did, and still holds it").WithHint("destroy it with the HSM's own tools")
	}
	return err
}

// cached lends the key of a blob, brought by bring when it is not there. A
// handle that the token no longer knows is brought once more.
func (t *Token) cached(blob []byte, a *abilities, bring func(s pkcs11.SessionHandle) (keyPair, error), f func(s pkcs11.SessionHandle, a *abilities, k keyPair) error) error {
	return t.with(func(s pkcs11.SessionHandle) error {
		for try := 0; ; try++ {
			k, err := t.cache.get(sha256.Sum256(blob), func() (keyPair, error) { return bring(s) }, t.forget)
			if err != nil {
				return err
			}
			err = f(s, a, k.keys)
			unknown := is(err, pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_OBJECT_HANDLE_INVALID)
			if unknown {
				t.cache.drop(k)
			}
			t.cache.release(k, t.forget)
			if !unknown || try > 0 {
				return err
			}
		}
	})
}
