package token

import (
	"bytes"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"math/big"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
)

type masterKeys struct {
	ids        hsm.MasterIDs
	wrap, seal keyPair
	sign       signKey
	info       hsm.Master
}

// label is the name of a master key: clear looks for this prefix and no other.
func label(install, what string, version uint16) string {
	return fmt.Sprintf("%s%s:%s:v%d", labelRoot, install, what, version)
}

// OpenMaster finds out what the token can do, then finds the master keys of a
// version by their ids, or makes those that are missing when create is set.
// Their attributes are read back: a token that made a key readable is refused.
// The version opened last that is no spare one makes what is new.
func (t *Token) OpenMaster(ids hsm.MasterIDs, create bool) (hsm.Master, error) {
	t.opening.Lock()
	defer t.opening.Unlock()
	if ids.Version == 0 {
		ids.Version = hsm.FirstMaster
	}
	a, err := t.abilities()
	if err != nil {
		return hsm.Master{}, err
	}
	t.mu.Lock()
	held := t.masters[ids.Version]
	t.mu.Unlock()
	m := held
	if held == nil || !bytes.Equal(held.ids.Wrap, ids.Wrap) {
		m = &masterKeys{ids: ids}
		if err := t.with(func(s pkcs11.SessionHandle) error { return t.findMaster(s, a, m, create) }); err != nil {
			return hsm.Master{}, err
		}
	}
	if held != nil && m != held { // that installation was cleared by another process
		t.leave()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.masters[ids.Version] = m
	if !ids.Spare {
		t.master = m
	}
	return m.info, nil
}

// leave forgets an installation.
func (t *Token) leave() {
	t.mu.Lock()
	t.master, t.masters = nil, map[uint16]*masterKeys{}
	t.mu.Unlock()
	t.cache.empty(t.forget)
}

// DestroyMaster destroys the master keys of a version that makes nothing any
// more: what they made is lost. The key that signs the audit log stays.
func (t *Token) DestroyMaster(ids hsm.MasterIDs) error {
	t.opening.Lock()
	defer t.opening.Unlock()
	t.mu.Lock()
	m, now := t.masters[ids.Version], t.master
	t.mu.Unlock()
	if now == nil {
		return ErrNotOpen
	}
	if now.ids.Version == ids.Version || bytes.Equal(now.ids.Wrap, ids.Wrap) || bytes.Equal(now.ids.Seal, ids.Seal) {
		return fault.Newf(fault.Conflict, "destroy master keys, version", fmt.Sprint(ids.Version), "they are in use")
	}
	if m != nil && !bytes.Equal(m.ids.Wrap, ids.Wrap) {
		return fault.Newf(fault.Conflict, "destroy master keys, version", fmt.Sprint(ids.Version), "the token holds others under this version")
	}
	err := t.with(func(s pkcs11.SessionHandle) error {
		for _, id := range [][]byte{ids.Wrap, beside(ids.Wrap), ids.Seal, beside(ids.Seal)} {
			hs, err := t.findAll(s, pkcs11.CKO_SECRET_KEY, id)
			if err != nil {
				return err
			}
			for _, h := range hs {
				t.objects.Lock()
				err := t.ctx.DestroyObject(s, h)
				t.objects.Unlock()
				if err != nil && !is(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) { // named twice
					return t.device("destroy a key on", err)
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	t.mu.Lock()
	delete(t.masters, ids.Version)
	t.mu.Unlock()
	t.cache.empty(t.forget)
	return nil
}

// abilities are what the token can do, found out once. The caller holds
// opening.
func (t *Token) abilities() (*abilities, error) {
	t.mu.Lock()
	logged, a := t.logged, t.can
	t.mu.Unlock()
	if !logged {
		return nil, ErrNotOpen
	}
	if a != nil {
		return a, nil
	}
	a, err := t.explore(false)
	if err != nil {
		return nil, err
	}
	if err := a.usable(t.module); err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.can = a
	return a, nil
}

func (t *Token) findMaster(s pkcs11.SessionHandle, a *abilities, m *masterKeys, create bool) (err error) {
	name := func(what string) string { return label(m.ids.Install, what, m.ids.Version) }
	if m.wrap.enc, err = t.secretKey(s, a, m.ids.Wrap, name("mkek"), create, pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP); err != nil {
		return err
	}
	if m.seal.enc, err = t.secretKey(s, a, m.ids.Seal, name("mseal"), create, pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT); err != nil {
		return err
	}
	// The MAC keys are there where this token needs them, and their ids follow
	// from those of the keys that they stand beside.
	if a.way.form == formCBC {
		if m.wrap.mac, err = t.secretKey(s, a, beside(m.ids.Wrap), name("mmac"), create, pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY); err != nil {
			return err
		}
	}
	if a.suite == hsm.SuiteCBCHMAC {
		if m.seal.mac, err = t.secretKey(s, a, beside(m.ids.Seal), name("smac"), create, pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY); err != nil {
			return err
		}
	}
	m.info = hsm.Master{Suite: a.suite, WrapWay: a.way.name, Notes: a.report.Notes}
	if m.sign, err = t.signKey(s, a, m.ids.Sign, label(m.ids.Install, "msign", hsm.FirstMaster), create); err != nil {
		return err
	}
	if m.info.PublicKey = m.sign.public; m.sign.signer.keyType != pkcs11.CKK_EC {
		m.info.Notes = append(slices.Clone(m.info.Notes), "the token has no elliptic curves: the audit log is signed by "+m.sign.signer.name)
	}
	if m.info.WrapKCV, err = t.wrapCheckValue(s, a, m.wrap); err != nil {
		return err
	}
	m.info.SealKCV, err = t.checkValue(s, m.seal.enc)
	return err
}

// beside gives the CKA_ID of the MAC key of a master key.
func beside(id []byte) []byte {
	sum := sha256.Sum256(append([]byte("kmsctl mac key\x00"), id...))
	return sum[:16]
}

// findAll gives the handles of the objects with an id. Some tokens name an
// object twice.
func (t *Token) findAll(s pkcs11.SessionHandle, class uint, id []byte) ([]pkcs11.ObjectHandle, error) {
	t.objects.Lock()
	defer t.objects.Unlock()
	if err := t.ctx.FindObjectsInit(s, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, class), attr(pkcs11.CKA_ID, id)}); err != nil {
		return nil, t.device("search", err)
	}
	hs, _, err := t.ctx.FindObjects(s, 16)
	if ferr := t.ctx.FindObjectsFinal(s); err == nil {
		err = ferr
	}
	if err != nil {
		return nil, t.device("search", err)
	}
	slices.Sort(hs)
	return slices.Compact(hs), nil
}

// findOne finds the object with an id, 0 when there is none. Two handles are
// taken for one object when same says that they do the same.
func (t *Token) findOne(s pkcs11.SessionHandle, class uint, id []byte, same func(a, b pkcs11.ObjectHandle) (bool, error)) (pkcs11.ObjectHandle, error) {
	hs, err := t.findAll(s, class, id)
	if err != nil || len(hs) == 0 {
		return 0, err
	}
	for _, other := range hs[1:] {
		if ok, err := same(hs[0], other); err != nil || !ok {
			return 0, fault.Newf(fault.Conflict, "find master key", hex.EncodeToString(id), "%d different objects have this id (%v)", len(hs), err)
		}
	}
	return hs[0], nil
}

// missing names the key by its label, which has the version.
func missing(name string) error {
	return fault.Newf(fault.NotFound, "find master key", name, "the token does not hold it").
		WithHint("is this the token that the store was made with? restore the token, or the store that belongs to it")
}

// secretKey finds or makes a master key that may do just two things: an AES
// key, or a MAC key when these are to sign and to verify.
func (t *Token) secretKey(s pkcs11.SessionHandle, a *abilities, id []byte, name string, create bool, may ...uint) (pkcs11.ObjectHandle, error) {
	isMAC := slices.Contains(may, pkcs11.CKA_SIGN)
	h, err := t.findOne(s, pkcs11.CKO_SECRET_KEY, id, func(x, y pkcs11.ObjectHandle) (bool, error) { return t.alike(s, a, isMAC, x, y) })
	if err != nil {
		return 0, err
	}
	if h == 0 {
		if !create {
			return 0, missing(name)
		}
		tpl := append(t.guarded(true, false), attr(pkcs11.CKA_MODIFIABLE, false), attr(pkcs11.CKA_ID, id), attr(pkcs11.CKA_LABEL, name))
		tpl = append(tpl, purpose(may...)...)
		mech, typ := uint(pkcs11.CKM_AES_KEY_GEN), uint(pkcs11.CKK_AES)
		if isMAC {
			mech, typ = a.mac.generate, a.mac.typ
		}
		if h, err = t.generate(s, mech, typ, tpl); err != nil {
			return 0, err
		}
	}
	return h, t.checkMaster(s, h, name)
}

// alike compares what two handles do. Keys that may only wrap or sign are
// compared by that.
func (t *Token) alike(s pkcs11.SessionHandle, a *abilities, isMAC bool, x, y pkcs11.ObjectHandle) (bool, error) {
	show := func(h pkcs11.ObjectHandle) ([]byte, error) {
		if isMAC {
			return t.shim.sign(s, h, a.mac.sign, sample)
		}
		if b, err := t.checkValue(s, h); err == nil {
			return b, nil
		}
		return t.wrapCheckValue(s, a, keyPair{enc: h})
	}
	vx, err := show(x)
	if err != nil {
		return false, err
	}
	vy, err := show(y)
	return len(vx) > 0 && bytes.Equal(vx, vy), err
}

// checkMaster refuses a master key that could be read or was not born here.
// CKA_LOCAL and CKA_ALWAYS_SENSITIVE are not asked: tokens lie about them.
func (t *Token) checkMaster(s pkcs11.SessionHandle, h pkcs11.ObjectHandle, name string) error {
	for _, c := range []struct {
		attr uint
		want bool
	}{{pkcs11.CKA_SENSITIVE, true}, {pkcs11.CKA_EXTRACTABLE, false}, {pkcs11.CKA_NEVER_EXTRACTABLE, true}} {
		got, err := t.flag(s, h, c.attr)
		if err != nil {
			return err
		}
		if got != c.want {
			return fault.Newf(fault.BadContent, "check master key", name, "attribute 0x%x is %v, must be %v", c.attr, got, c.want).
				WithHint("the token does not protect its keys as asked; do not use it")
		}
	}
	return nil
}

// signer is how the audit log's heads are signed: by ECDSA on P-256, or by RSA
// where the token has no elliptic curves.
type signer struct {
	name      string
	generate  uint
	keyType   uint
	mechanism uint
}

var signers = []signer{
	{"ECDSA on P-256", pkcs11.CKM_EC_KEY_PAIR_GEN, pkcs11.CKK_EC, pkcs11.CKM_ECDSA},
	{"RSA-3072, PKCS #1 v1.5 with SHA-256", pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, pkcs11.CKK_RSA, pkcs11.CKM_RSA_PKCS},
}

func (a *abilities) signer() (signer, error) {
	for _, g := range signers {
		if a.has(g.generate) && a.has(g.mechanism) {
			return g, nil
		}
	}
	return signer{}, fault.Newf(fault.NotReady, "make signing key", "", "the token can sign neither by ECDSA nor by RSA")
}

// signKey finds or makes the pair that signs the audit log's heads.
func (t *Token) signKey(s pkcs11.SessionHandle, a *abilities, id []byte, name string, create bool) (k signKey, err error) {
	privs, err := t.findAll(s, pkcs11.CKO_PRIVATE_KEY, id)
	if err != nil {
		return k, err
	}
	pubs, err := t.findAll(s, pkcs11.CKO_PUBLIC_KEY, id)
	if err != nil {
		return k, err
	}
	if len(privs) == 0 || len(pubs) == 0 {
		if !create {
			return k, missing(name)
		}
		for _, h := range append(privs, pubs...) { // half a pair, of a run that was killed
			t.destroy(s, h)
		}
		pub, priv, err := t.makeSignKey(s, a, id, name)
		if err != nil {
			return k, err
		}
		privs, pubs = []pkcs11.ObjectHandle{priv}, []pkcs11.ObjectHandle{pub}
	}
	k.handle = privs[0]
	if k.public, k.signer, err = t.publicKey(s, pubs); err != nil {
		return k, err
	}
	return k, t.checkMaster(s, k.handle, name)
}

// signKey is the pair in use.
type signKey struct {
	handle pkcs11.ObjectHandle
	public []byte // PKIX DER
	signer signer
}

func (t *Token) makeSignKey(s pkcs11.SessionHandle, a *abilities, id []byte, name string) (pub, priv pkcs11.ObjectHandle, err error) {
	g, err := a.signer()
	if err != nil {
		return 0, 0, err
	}
	named := []*pkcs11.Attribute{attr(pkcs11.CKA_KEY_TYPE, g.keyType), attr(pkcs11.CKA_ID, id), attr(pkcs11.CKA_LABEL, name)}
	pubTpl := append(slices.Clone(named), attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_VERIFY, true), attr(pkcs11.CKA_ENCRYPT, false), attr(pkcs11.CKA_WRAP, false))
	if g.keyType == pkcs11.CKK_EC {
		params, err := asn1.Marshal(oidP256)
		if err != nil {
			return 0, 0, err
		}
		pubTpl = append(pubTpl, attr(pkcs11.CKA_EC_PARAMS, params))
	} else {
		pubTpl = append(pubTpl, attr(pkcs11.CKA_MODULUS_BITS, 3072), attr(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}))
	}
	privTpl := append(append(t.guarded(true, false), named...), attr(pkcs11.CKA_SIGN, true), attr(pkcs11.CKA_DECRYPT, false), attr(pkcs11.CKA_UNWRAP, false))
	t.objects.Lock()
	defer t.objects.Unlock()
	pub, priv, err = t.ctx.GenerateKeyPair(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(g.generate, nil)}, pubTpl, privTpl)
	if err != nil {
		return 0, 0, t.device("make signing key on", err)
	}
	return pub, priv, nil
}

// publicKey reads the public key; two handles must show the same one.
func (t *Token) publicKey(s pkcs11.SessionHandle, hs []pkcs11.ObjectHandle) (der []byte, g signer, err error) {
	for i, h := range hs {
		b, bg, err := t.readPublic(s, h)
		if err != nil {
			return nil, g, err
		}
		if i > 0 && !bytes.Equal(b, der) {
			return nil, g, fault.Newf(fault.Conflict, "read public key on", t.module, "two different keys have one id")
		}
		der, g = b, bg
	}
	return der, g, nil
}

func (t *Token) readPublic(s pkcs11.SessionHandle, h pkcs11.ObjectHandle) ([]byte, signer, error) {
	if v, err := t.ctx.GetAttributeValue(s, h, []*pkcs11.Attribute{attr(pkcs11.CKA_EC_POINT, nil)}); err == nil && len(v[0].Value) > 0 {
		der, err := pkix(v[0].Value)
		return der, signers[0], err
	}
	v, err := t.ctx.GetAttributeValue(s, h, []*pkcs11.Attribute{attr(pkcs11.CKA_MODULUS, nil), attr(pkcs11.CKA_PUBLIC_EXPONENT, nil)})
	if err != nil {
		return nil, signer{}, t.device("read public key on", err)
	}
	der, err := x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: new(big.Int).SetBytes(v[0].Value), E: int(new(big.Int).SetBytes(v[1].Value).Int64())})
	return der, signers[1], err
}

// sha256Info begins the DigestInfo of a SHA-256 hash (RFC 8017, 9.2, note 1).
var sha256Info = []byte{0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20}

// Sign signs message's SHA-256: by ECDSA in ASN.1 DER, or by RSA.
func (t *Token) Sign(message []byte) (out []byte, err error) {
	_, m, err := t.open()
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(message)
	text := sum[:]
	if m.sign.signer.mechanism == pkcs11.CKM_RSA_PKCS {
		text = append(slices.Clone(sha256Info), text...)
	}
	err = t.with(func(s pkcs11.SessionHandle) error {
		if out, err = t.shim.sign(s, m.sign.handle, m.sign.signer.mechanism, text); err != nil {
			return t.device("sign on", err)
		}
		return nil
	})
	if err != nil || m.sign.signer.mechanism == pkcs11.CKM_RSA_PKCS {
		return out, err
	}
	// PKCS#11 gives r and s side by side (2.40, 2.3.1).
	half := len(out) / 2
	return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(out[:half]), new(big.Int).SetBytes(out[half:])})
}

var oidP256 = asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7}

// pkix makes a PKIX public key of CKA_EC_POINT, which holds the point in a DER
// octet string (PKCS#11 2.40, 2.3.3), or bare in some tokens.
func pkix(point []byte) ([]byte, error) {
	var inner []byte
	if rest, err := asn1.Unmarshal(point, &inner); err == nil && len(rest) == 0 {
		point = inner
	}
	type algorithm struct{ Algorithm, Parameters asn1.ObjectIdentifier }
	der, err := asn1.Marshal(struct {
		Algorithm algorithm
		Key       asn1.BitString
	}{algorithm{asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}, oidP256}, asn1.BitString{Bytes: point, BitLength: 8 * len(point)}})
	if err != nil {
		return nil, err
	}
	if _, err := x509.ParsePKIXPublicKey(der); err != nil {
		return nil, fault.New(fault.BadContent, "read public key", "", err)
	}
	return der, nil
}

// Methods of check values; see hsm.SameKey.
const (
	checkKW  = 1
	checkKWP = 2
	checkCBC = 3
	checkECB = 4
)

func checkOf(method byte, b []byte) []byte {
	sum := sha256.Sum256(b)
	return append([]byte{method}, sum[:3]...)
}

// wrapCheckValue recognises a key that may only wrap: by what a fixed key
// looks like wrapped under it, in each form that the token knows. A token
// that takes no known key shows none.
func (t *Token) wrapCheckValue(s pkcs11.SessionHandle, a *abilities, kek keyPair) (out []byte, err error) {
	if !a.importable {
		return nil, nil
	}
	fixed, err := t.bring(s, make([]byte, 32), pkcs11.CKK_AES, t.sessionTemplate(true))
	if err != nil {
		return nil, err
	}
	defer t.destroy(s, fixed)
	for _, f := range []form{formKW, formKWP, formCBC} {
		w, ok := a.forms[f]
		if !ok {
			continue
		}
		// A fixed IV is safe for this fixed text.
		b, err := t.ctx.WrapKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(w.mechanism, make([]byte, blockLen)[:ivOf(w)])}, kek.enc, fixed)
		if err != nil {
			return nil, t.device("wrap a key on", err)
		}
		out = append(out, checkOf([]byte{0, checkKW, checkKWP, checkCBC}[f], b)...)
	}
	return out, nil
}

// checkText is encrypted to recognise a key. It is not the zero block, whose
// encryption is the secret of GCM's tag.
var checkText = []byte("kmsctl check 001")

// checkValue recognises a key that may encrypt.
func (t *Token) checkValue(s pkcs11.SessionHandle, k pkcs11.ObjectHandle) ([]byte, error) {
	b, _, err := t.shim.crypt(false, s, k, pkcs11.CKM_AES_ECB, nil, checkText)
	if err != nil {
		return nil, t.device("encrypt on", err)
	}
	return checkOf(checkECB, b), nil
}
