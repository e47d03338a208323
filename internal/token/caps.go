package token

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
)

// abilities are what the self-test found out about this token.
type abilities struct {
	mechanisms []uint
	suite      uint8
	gcm        uint // the number by which this token knows AES-GCM
	iv         ivRule
	mac        macKind
	way        way
	forms      map[form]way // how to open each form
	unwrapLen  bool         // C_UnwrapKey wants CKA_VALUE_LEN
	importable bool         // C_CreateObject takes secret keys
	// unwrapImport: material comes in by C_UnwrapKey under a key of the token
	unwrapImport bool
	oaep         oaepWay
	readOnly     bool // the token keeps no new objects
	report       hsm.Capabilities
}

// macKind is how a token makes and uses HMAC-SHA-256 keys.
type macKind struct {
	name          string
	generate, typ uint
	sign          uint
}

var macKinds = []macKind{
	{"CKM_GENERIC_SECRET_KEY_GEN and CKM_SHA256_HMAC", pkcs11.CKM_GENERIC_SECRET_KEY_GEN, pkcs11.CKK_GENERIC_SECRET, pkcs11.CKM_SHA256_HMAC},
	{"CKM_NC_SHA256_HMAC_KEY_GEN and CKM_SHA256_HMAC", ckmNCMac, pkcs11.CKK_SHA256_HMAC, pkcs11.CKM_SHA256_HMAC},
}

func (a *abilities) has(m uint) bool { return slices.Contains(a.mechanisms, m) }

// works and fails note a finding.
func works(name, why string) hsm.Finding { return hsm.Finding{Name: name, Works: true, Why: why} }

func fails(name string, err error) hsm.Finding {
	why := err.Error()
	if c := CKR(err); c != "" {
		why = c
	} else if f := new(fault.Error); errors.As(err, &f) && f.Err != nil {
		why = f.Err.Error()
	}
	return hsm.Finding{Name: name, Why: why}
}

const notListed = "the token does not list the mechanism"

// explore finds out by trying what the token can do, with Go's own AES as the
// judge. Without all it stops at the first suite and the first way to wrap
// that are proven; with all it tries everything, for the report.
func (t *Token) explore(all bool) (*abilities, error) {
	list, err := t.ctx.GetMechanismList(t.slot)
	if err != nil {
		return nil, t.device("list the mechanisms of", err)
	}
	ti, err := t.ctx.GetTokenInfo(t.slot)
	if err != nil {
		return nil, t.device("describe token", err)
	}
	a := &abilities{forms: map[form]way{}, readOnly: ti.Flags&pkcs11.CKF_WRITE_PROTECTED != 0}
	for _, m := range list {
		a.mechanisms = append(a.mechanisms, m.Mechanism)
	}
	err = t.with(func(s pkcs11.SessionHandle) error {
		x := &explorer{Token: t, s: s, a: a, all: all}
		for _, step := range []func() error{x.imports, x.guards, x.suites, x.macs, x.wraps, x.unwraps, x.byUnwrap, x.sent} {
			if err := step(); err != nil {
				return err
			}
		}
		x.conclude()
		return nil
	})
	return a, err
}

// explorer holds what the steps of one exploration share. A step returns an
// error only when the token is lost; what does not work is a finding.
type explorer struct {
	*Token
	s   pkcs11.SessionHandle
	a   *abilities
	all bool
}

// gone lets a lost token through and holds back all other errors.
func gone(err error) error {
	if Lost(err) && !is(err, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_DEVICE_MEMORY) {
		return err
	}
	return nil
}

// testKey is a session key of the exploration, and a block cipher of the same
// key to judge it by: Go's own where we know the key, else the token's ECB.
type testKey struct {
	handle pkcs11.ObjectHandle
	value  []byte
	judge  cipher.Block
}

// aesKey brings a known key into the token, or makes one where the token
// takes none.
func (x *explorer) aesKey(extra ...*pkcs11.Attribute) (testKey, error) {
	tpl := append(x.sessionTemplate(false), extra...)
	if x.a.importable {
		k := testKey{value: make([]byte, 32)}
		if _, err := rand.Read(k.value); err != nil {
			return k, err
		}
		var err error
		if k.handle, err = x.bring(x.s, k.value, pkcs11.CKK_AES, tpl); err != nil {
			return k, err
		}
		k.judge, err = aes.NewCipher(k.value)
		return k, err
	}
	h, err := x.generate(x.s, pkcs11.CKM_AES_KEY_GEN, pkcs11.CKK_AES, tpl)
	return testKey{handle: h, judge: &ecbBlock{t: x.Token, s: x.s, k: h}}, err
}

// ecbBlock is a cipher.Block that asks the token; a failure shows as a wrong
// answer, which no comparison survives, and is kept.
type ecbBlock struct {
	t   *Token
	s   pkcs11.SessionHandle
	k   pkcs11.ObjectHandle
	err error
}

func (*ecbBlock) BlockSize() int { return blockLen }

func (b *ecbBlock) Encrypt(dst, src []byte) { b.crypt(false, dst, src) }
func (b *ecbBlock) Decrypt(dst, src []byte) { b.crypt(true, dst, src) }

func (b *ecbBlock) crypt(decrypt bool, dst, src []byte) {
	out, _, err := b.t.shim.crypt(decrypt, b.s, b.k, pkcs11.CKM_AES_ECB, nil, src[:blockLen])
	if err != nil || len(out) < blockLen {
		out, b.err = make([]byte, blockLen), errors.Join(b.err, err)
	}
	copy(dst, out[:blockLen])
}

// imports finds out whether the token takes keys in the clear.
func (x *explorer) imports() error {
	const name = "C_CreateObject"
	h, err := x.bring(x.s, make([]byte, 32), pkcs11.CKK_AES, x.sessionTemplate(false))
	if err != nil {
		x.a.report.Imports = append(x.a.report.Imports, fails(name, err))
		return gone(err)
	}
	x.a.importable = true
	x.destroy(x.s, h)
	x.a.report.Imports = append(x.a.report.Imports, works(name, "an AES key became a session object"))
	return nil
}

// sent finds out how keys come in that nobody may see on the way.
func (x *explorer) sent() error {
	if !x.all {
		return nil // when it is needed: it takes RSA pairs
	}
	return x.oaep()
}

// guards tries to get at a key against its attributes.
func (x *explorer) guards() error {
	h, err := x.generate(x.s, pkcs11.CKM_AES_KEY_GEN, pkcs11.CKK_AES, x.sessionTemplate(false))
	if err != nil {
		x.a.report.Guards = append(x.a.report.Guards, fails("make an AES key", err))
		return gone(err)
	}
	defer x.destroy(x.s, h)
	x.a.report.Guards = append(x.a.report.Guards, works("make an AES key", "C_GenerateKey"))
	refused := func(name string, broke bool, err error) {
		if broke {
			x.a.report.Guards = append(x.a.report.Guards, hsm.Finding{Name: name, Why: "it was allowed"})
			return
		}
		x.a.report.Guards = append(x.a.report.Guards, works(name, "refused: "+CKR(err)))
	}
	v, err := x.ctx.GetAttributeValue(x.s, h, []*pkcs11.Attribute{attr(pkcs11.CKA_VALUE, nil)})
	refused(guardRead, err == nil && len(v) > 0 && len(v[0].Value) > 0, err)
	err = x.ctx.SetAttributeValue(x.s, h, []*pkcs11.Attribute{attr(pkcs11.CKA_SENSITIVE, false)})
	still, ferr := x.flag(x.s, h, pkcs11.CKA_SENSITIVE)
	refused(guardSensitive, ferr != nil || !still, err)
	err = x.ctx.SetAttributeValue(x.s, h, []*pkcs11.Attribute{attr(pkcs11.CKA_EXTRACTABLE, true)})
	loose, ferr := x.flag(x.s, h, pkcs11.CKA_EXTRACTABLE)
	refused(guardExtractable, ferr != nil || loose, err)
	return gone(ferr)
}

const (
	guardRead        = "a sensitive key cannot be read"
	guardSensitive   = "a sensitive key stays so"
	guardExtractable = "a key that cannot be wrapped stays so"
	guardWrap        = "a key that is not extractable cannot be wrapped"
	guardUnwrap      = "an unwrapped key can be made not extractable"
)

// suites tries the cipher suites in the order in which they are wanted.
func (x *explorer) suites() error {
	steps := []func() (hsm.Finding, error){
		func() (hsm.Finding, error) {
			return x.gcmSuite(hsm.SuiteGCM, "1: AES-256-GCM, IV from the token's generator", ivOurs)
		},
		func() (hsm.Finding, error) {
			return x.gcmSuite(hsm.SuiteGCMToken, "2: AES-256-GCM, IV by the token", ivWritten, ivAppended)
		},
		x.cbcSuite,
	}
	for i, try := range steps {
		f, err := try()
		if err != nil {
			return err
		}
		x.a.report.Suites = append(x.a.report.Suites, f)
		if f.Works && x.a.suite == 0 {
			x.a.suite = uint8(i) + 1
			x.a.report.Suite = x.a.suite
		}
		if x.a.suite != 0 && !x.all {
			return nil
		}
	}
	return nil
}

// gcmSuite tries AES-GCM under each of the rules, by each of its numbers. The
// first rule that is proven is kept: it also says how to open.
func (x *explorer) gcmSuite(suite uint8, name string, rules ...ivRule) (hsm.Finding, error) {
	last := hsm.Finding{Name: name, Why: notListed}
	for _, m := range []uint{pkcs11.CKM_AES_GCM, ckmLunaGCM} {
		if !x.a.has(m) {
			continue
		}
		for _, rule := range rules {
			try := &abilities{suite: suite, gcm: m, iv: rule}
			why, err := x.proveGCM(try)
			if err == nil {
				if x.a.iv == ivNone {
					x.a.gcm, x.a.iv = m, rule
				}
				return works(name, why), nil
			}
			if gone(err) != nil {
				return last, err
			}
			last = fails(name, err)
		}
	}
	return last, nil
}

var sample = []byte("kmsctl self-test: a text of more than two blocks")

// proveGCM proves a rule: two encryptions differ, neither IV is zero, Go's GCM
// opens them, the token opens what Go made, another session opens too, and a
// changed text does not open.
func (x *explorer) proveGCM(a *abilities) (string, error) {
	k, err := x.aesKey()
	if err != nil {
		return "", err
	}
	defer x.destroy(x.s, k.handle)
	pair := keyPair{enc: k.handle}
	first, err := x.encrypt(x.s, a, pair, sample, []byte("aad"))
	if err != nil {
		return "", err
	}
	second, err := x.encrypt(x.s, a, pair, sample, []byte("aad"))
	if err != nil {
		return "", err
	}
	if bytes.Equal(first.IV, second.IV) || bytes.Equal(first.Ciphertext, second.Ciphertext) {
		return "", errors.New("two encryptions of one text are alike")
	}
	judge, err := cipher.NewGCMWithNonceSize(k.judge, len(first.IV))
	if err != nil {
		return "", err
	}
	full := bound(a.suite, []byte("aad"))
	if !bytes.Equal(judge.Seal(nil, first.IV, sample, full), first.Ciphertext) {
		return "", errors.New("another AES-GCM makes another ciphertext of the same IV")
	}
	iv := make([]byte, len(first.IV))
	if _, err := rand.Read(iv); err != nil {
		return "", err
	}
	if got, err := x.decrypt(x.s, a, pair, hsm.Sealed{Suite: a.suite, IV: iv, Ciphertext: judge.Seal(nil, iv, sample, full)}, []byte("aad")); err != nil || !bytes.Equal(got, sample) {
		return "", fmt.Errorf("it does not open what another AES-GCM made (%w)", err)
	}
	if err := x.opens(a, pair, second, first); err != nil {
		return "", err
	}
	return fmt.Sprintf("mechanism 0x%X, %s, %s", a.gcm, map[ivRule]string{ivOurs: "our 12-byte IV is taken", ivWritten: "12 zeros are replaced by an IV of the token",
		ivAppended: fmt.Sprintf("the token appends an IV of %d bytes", len(second.IV))}[a.iv], x.judgedBy(k)), nil
}

// opens proves that good opens in a second session, and that touched, changed
// by one bit, does not open.
func (x *explorer) opens(a *abilities, pair keyPair, good, touched hsm.Sealed) error {
	if err := x.otherSession(func(o pkcs11.SessionHandle) error {
		got, err := x.decrypt(o, a, pair, good, []byte("aad"))
		if err == nil && !bytes.Equal(got, sample) {
			err = errors.New("another text")
		}
		return err
	}); err != nil {
		return fmt.Errorf("it does not open in another session (%w)", err)
	}
	touched.Ciphertext[0] ^= 1
	if _, err := x.decrypt(x.s, a, pair, touched, []byte("aad")); fault.KindOf(err) != fault.BadContent {
		return fmt.Errorf("a changed ciphertext is not refused (%w)", err)
	}
	return nil
}

func (x *explorer) judgedBy(k testKey) string {
	if k.value != nil {
		return "equal to Go's AES with a known key"
	}
	return "equal to Go's modes over the token's own AES-ECB"
}

func (x *explorer) otherSession(f func(pkcs11.SessionHandle) error) error {
	o, err := x.ctx.OpenSession(x.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return err
	}
	defer func() { _ = x.ctx.CloseSession(o) }()
	return f(o)
}

// macs finds a kind of MAC key on every token: keys may have come from one that
// needs them.
func (x *explorer) macs() error { return gone(x.macKind()) }

// macKey finds a kind of MAC key that works and equals Go's HMAC.
func (x *explorer) macKind() error {
	if x.a.mac.sign != 0 {
		return nil
	}
	last := errors.New(notListed)
	for _, m := range macKinds {
		if !x.a.has(m.sign) || !x.a.has(m.generate) {
			continue
		}
		if last = x.proveMAC(m); last == nil {
			x.a.mac = m
			return nil
		}
		if gone(last) != nil {
			return last
		}
	}
	return last
}

func (x *explorer) proveMAC(m macKind) error {
	h, err := x.generate(x.s, m.generate, m.typ, macTemplate(x.sessionTemplate(false)))
	if err != nil {
		return err
	}
	x.destroy(x.s, h)
	if !x.a.importable {
		return nil // no key to judge by; that it is a MAC shows in the suite's own test
	}
	value := make([]byte, macLen)
	if _, err := rand.Read(value); err != nil {
		return err
	}
	if h, err = x.bring(x.s, value, m.typ, macTemplate(x.sessionTemplate(false))); err != nil {
		return err
	}
	defer x.destroy(x.s, h)
	got, err := x.shim.sign(x.s, h, m.sign, sample)
	if err != nil {
		return err
	}
	want := hmac.New(sha256.New, value)
	want.Write(sample)
	if !hmac.Equal(got, want.Sum(nil)) {
		return errors.New("another HMAC-SHA-256 makes another MAC")
	}
	return nil
}

// cbcSuite proves suite 3.
func (x *explorer) cbcSuite() (hsm.Finding, error) {
	const name = "3: AES-256-CBC with HMAC-SHA-256"
	if !x.a.has(pkcs11.CKM_AES_CBC_PAD) {
		return hsm.Finding{Name: name, Why: notListed}, nil
	}
	if err := x.macKind(); err != nil {
		return fails(name, err), gone(err)
	}
	why, err := x.proveCBC()
	if err != nil {
		return fails(name, err), gone(err)
	}
	return works(name, why), nil
}

func (x *explorer) proveCBC() (string, error) {
	k, err := x.aesKey()
	if err != nil {
		return "", err
	}
	defer x.destroy(x.s, k.handle)
	m, err := x.generate(x.s, x.a.mac.generate, x.a.mac.typ, macTemplate(x.sessionTemplate(false)))
	if err != nil {
		return "", err
	}
	defer x.destroy(x.s, m)
	pair, a := keyPair{enc: k.handle, mac: m}, &abilities{suite: hsm.SuiteCBCHMAC, mac: x.a.mac}
	first, err := x.encrypt(x.s, a, pair, sample, []byte("aad"))
	if err != nil {
		return "", err
	}
	second, err := x.encrypt(x.s, a, pair, sample, []byte("aad"))
	if err != nil {
		return "", err
	}
	if bytes.Equal(first.IV, second.IV) || zero(first.IV) {
		return "", errors.New("the token's generator repeats itself")
	}
	if ct := first.Ciphertext[:len(first.Ciphertext)-macLen]; !bytes.Equal(goCBC(k.judge, first.IV, sample), ct) {
		return "", errors.New("another AES-CBC makes another ciphertext of the same IV")
	}
	if err := x.opens(a, pair, second, first); err != nil {
		return "", err
	}
	return x.a.mac.name + ", " + x.judgedBy(k), nil
}

// wraps tries the ways to wrap in their order, and keeps one for each form.
func (x *explorer) wraps() error {
	for _, w := range ways {
		f := hsm.Finding{Name: w.name, Why: notListed}
		if x.a.has(w.mechanism) {
			why, err := x.proveWrap(w)
			if err != nil && gone(err) != nil {
				return err
			}
			if err != nil {
				f = fails(w.name, err)
			} else {
				f = works(w.name, why)
			}
		}
		x.a.report.WrapWays = append(x.a.report.WrapWays, f)
		if !f.Works {
			continue
		}
		if x.a.way.form == 0 {
			x.a.way, x.a.report.WrapWay = w, w.name
		}
		if _, have := x.a.forms[w.form]; !have {
			x.a.forms[w.form] = w
		}
	}
	return nil
}

// proveWrap wraps a known key, compares with Go, brings it back and checks
// what came back: the same key, and not readable.
func (x *explorer) proveWrap(w way) (string, error) {
	var mac pkcs11.ObjectHandle
	if w.form == formCBC {
		if err := x.macKind(); err != nil {
			return "", err
		}
		var err error
		if mac, err = x.generate(x.s, x.a.mac.generate, x.a.mac.typ, macTemplate(x.sessionTemplate(false))); err != nil {
			return "", err
		}
		defer x.destroy(x.s, mac)
	}
	kek, err := x.aesKey(purpose(pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP)...)
	if err != nil {
		return "", err
	}
	defer x.destroy(x.s, kek.handle)
	key, err := x.aesKey(attr(pkcs11.CKA_EXTRACTABLE, true))
	if err != nil {
		return "", err
	}
	defer x.destroy(x.s, key.handle)
	pair := keyPair{enc: kek.handle, mac: mac}
	b, err := x.wrapKey(x.s, w, x.a.mac, pair, key.handle)
	if err != nil {
		return "", err
	}
	why := "round trip; the token takes no known key to compare with"
	if kek.value != nil && key.value != nil {
		plain := b
		if w.form == formCBC {
			plain = b[:max(len(b)-macLen, 0)]
		}
		if !bytes.Equal(plain, judgeWrap(w.form, kek.judge, key.value, b)) {
			return "", errors.New("it is another algorithm under this number")
		}
		why = "equal to Go's own of a known key"
	} else if w.mechanism == ckmKWPad {
		return "", errors.New("it cannot be told which algorithm this number means: the token takes no known key")
	}
	h, err := x.backAgain(w, pair, b)
	if err != nil {
		return "", err
	}
	defer x.destroy(x.s, h)
	same, err := x.sameKey(key.handle, h)
	if err != nil || !same {
		return "", fmt.Errorf("another key came back (%w)", err)
	}
	return why, nil
}

// backAgain unwraps, and learns whether the token wants CKA_VALUE_LEN.
func (x *explorer) backAgain(w way, kek keyPair, b []byte) (pkcs11.ObjectHandle, error) {
	tpl := unwrapTemplate(x.sessionTemplate(false), pkcs11.CKK_AES)
	h, err := x.unwrapKey(x.s, x.s, w, x.a.mac, kek, b, tpl)
	if is(err, pkcs11.CKR_TEMPLATE_INCOMPLETE) {
		x.a.unwrapLen = true
		h, err = x.unwrapKey(x.s, x.s, w, x.a.mac, kek, b, append(tpl, attr(pkcs11.CKA_VALUE_LEN, 32)))
	}
	if err != nil {
		return 0, err
	}
	if err := x.tighten(x.s, h, false); err != nil {
		x.destroy(x.s, h)
		return 0, err
	}
	return h, nil
}

func (x *explorer) sameKey(a, b pkcs11.ObjectHandle) (bool, error) {
	va, err := x.checkValue(x.s, a)
	if err != nil {
		return false, err
	}
	vb, err := x.checkValue(x.s, b)
	return len(va) > 0 && bytes.Equal(va, vb), err
}

// unwraps tries to wrap a key that is not extractable.
func (x *explorer) unwraps() error {
	if x.a.way.form == 0 {
		return nil
	}
	x.a.report.Guards = append(x.a.report.Guards, works(guardUnwrap, "read back after C_UnwrapKey"))
	kek, err := x.aesKey(purpose(pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP)...)
	if err != nil {
		return gone(err)
	}
	defer x.destroy(x.s, kek.handle)
	key, err := x.aesKey()
	if err != nil {
		return gone(err)
	}
	defer x.destroy(x.s, key.handle)
	_, err = x.ctx.WrapKey(x.s, []*pkcs11.Mechanism{pkcs11.NewMechanism(x.a.way.mechanism, make([]byte, blockLen)[:ivOf(x.a.way)])}, kek.handle, key.handle)
	if err == nil {
		x.a.report.Guards = append(x.a.report.Guards, hsm.Finding{Name: guardWrap, Why: "it was allowed"})
		return nil
	}
	x.a.report.Guards = append(x.a.report.Guards, works(guardWrap, "refused: "+CKR(err)))
	return gone(err)
}

func ivOf(w way) int {
	if w.form == formCBC {
		return blockLen
	}
	return 0
}

// conclude draws what follows from the findings.
func (x *explorer) conclude() {
	r := &x.a.report
	r.Notes, r.Placements = []string{}, []string{}
	if g, err := x.a.signer(); err != nil {
		r.Sign = fails("sign the audit log", err)
	} else {
		r.Sign = works("sign the audit log", g.name+", listed")
	}
	if !x.a.guarded() {
		r.Notes = append(r.Notes, "the token does not hold its keys as their attributes say: do not use it")
		return
	}
	if r.Suite == 0 {
		r.Notes = append(r.Notes, "no cipher suite works: the token cannot be used")
		return
	}
	if r.WrapWay != "" {
		r.Placements = append(r.Placements, hsm.PlacementWrapped)
		r.Notes = append(r.Notes, "placement wrapped: who has both the token's PIN and the store can bring a root key back as one that is readable; a key that must never leave belongs into the token",
			"placement wrapped: the master key has no unwrap template (CKA_UNWRAP_TEMPLATE), since one that forbids this also forbids to rotate master keys, and to move keys between HSMs, within the token")
	}
	if x.a.readOnly {
		r.Notes = append(r.Notes, "the token is write-protected: no root key can stay in it")
	} else {
		r.Placements = append(r.Placements, hsm.PlacementToken)
	}
	if r.Suite == hsm.SuiteCBCHMAC {
		r.Notes = append(r.Notes, "suite 3: each root key has a MAC key of its own beside it")
	}
	if !x.a.importable && x.a.unwrapImport {
		r.Notes = append(r.Notes, "the token takes no key in the clear: imported ones are wrapped under a key of the token first")
	} else if !x.a.importable {
		r.Notes = append(r.Notes, "the token takes no key in the clear, nor one that this process wraps: root keys are imported by RSA-OAEP, or not at all")
	}
	switch x.a.oaep {
	case oaepUnwrap:
		r.Notes = append(r.Notes, "import tokens: the token opens what is sent, and no process of ours sees the material")
	case oaepRaw:
		r.Notes = append(r.Notes, "import tokens: the private key stays in the token, which cannot do OAEP as it is needed: the padding is taken off, and the material seen, in the connector")
	case oaepNone:
		r.Notes = append(r.Notes, "import tokens: the private key is sealed by the token, and opens in the connector")
	}
}

// guarded says whether the token kept what it was asked to keep.
func (a *abilities) guarded() bool {
	return len(a.report.Guards) > 0 && !slices.ContainsFunc(a.report.Guards, func(f hsm.Finding) bool { return !f.Works })
}

// usable refuses a token that cannot do what the KMS needs.
func (a *abilities) usable(module string) error {
	var why []string
	for _, f := range append(slices.Clone(a.report.Guards), a.report.Suites...) {
		if !f.Works {
			why = append(why, f.Name+": "+f.Why)
		}
	}
	detail := strings.Join(why, "; ")
	switch {
	case !a.guarded():
		return fault.Newf(fault.NotReady, "test the token of", module, "it does not hold its keys as asked (%s)", detail).WithHint("see `kmsctl hsm probe` for the whole report; do not use this token")
	case a.suite == 0:
		return fault.Newf(fault.NotReady, "test the token of", module, "no cipher suite works on it (%s)", detail).WithHint("send us the output of `kmsctl hsm probe -o json`")
	case a.way.form == 0:
		return fault.Newf(fault.NotReady, "test the token of", module, "it can wrap no key").WithHint("send us the output of `kmsctl hsm probe -o json`")
	}
	_, err := a.signer()
	return err
}
