// Package token works on one PKCS#11 token: it finds it, logs in once, makes
// or finds the master keys, and does with root keys what the KMS asks. It is
// the only place that knows PKCS#11 handles and the PIN. It needs cgo.
package token

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/miekg/pkcs11"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// Config says which token. At most one of Label, Serial and Slot is set.
type Config struct {
	Module   string
	Label    string
	Serial   string
	Slot     *uint64
	Sessions int // at most so many at once; 0 means 8
}

// Token is an open token. Safe for concurrent use.
type Token struct {
	ctx    *pkcs11.Ctx
	module string
	slot   uint
	pool   chan pkcs11.SessionHandle
	login  pkcs11.SessionHandle // keeps the login alive: closing the last session logs out

	mu      sync.Mutex
	refused error // a PIN error: no later login touches the token
	logged  bool
	master  *masterKeys
	cache   *cache
}

type masterKeys struct {
	ids              hsm.MasterIDs
	wrap, seal, sign pkcs11.ObjectHandle
	info             hsm.Master
}

// Numbers of PKCS#11 3.0 that the binding lacks.
const ckmAESKeyWrap = 0x2109

// DefaultSessions is how many sessions a token gets that is not told otherwise.
const DefaultSessions = 8

const (
	cacheSize = 256
	tagBits   = 128
	ivLen     = 12
)

// Open loads the module and finds the token. It does not log in.
func Open(c Config) (*Token, error) {
	if _, err := os.Stat(c.Module); err != nil {
		return nil, fault.New(fault.NotFound, "load PKCS#11 library", c.Module, err).
			WithHint("install the HSM vendor's client (for SoftHSM: Debian package softhsm2), or give the library's path with --module")
	}
	ctx := pkcs11.New(c.Module)
	if ctx == nil {
		return nil, fault.Newf(fault.NotFound, "load PKCS#11 library", c.Module, "it is no PKCS#11 library, or one of its own libraries is missing").
			WithHint("see what is missing with: ldd %s", c.Module)
	}
	if err := ctx.Initialize(); err != nil && !is(err, pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED) {
		ctx.Destroy()
		return nil, fault.New(fault.Unreachable, "initialise PKCS#11 library", c.Module, err).
			WithHint("check the library's own configuration; for SoftHSM, SOFTHSM2_CONF and its token folder")
	}
	t := &Token{ctx: ctx, module: c.Module, cache: newCache(cacheSize)}
	slot, err := t.find(c)
	if err != nil {
		t.Close()
		return nil, err
	}
	t.slot = slot
	n := c.Sessions
	if n <= 0 {
		n = DefaultSessions
	}
	t.pool = make(chan pkcs11.SessionHandle, n)
	for range n {
		t.pool <- 0 // opened when first needed
	}
	return t, nil
}

// Close logs out and unloads the module.
func (t *Token) Close() {
	if t.pool != nil {
		_ = t.ctx.CloseAllSessions(t.slot) // what fails here ends with the process
	}
	_ = t.ctx.Finalize()
	t.ctx.Destroy()
}

func is(err error, codes ...uint) bool {
	var e pkcs11.Error
	return errors.As(err, &e) && slices.Contains(codes, uint(e))
}

func trim(s string) string { return strings.TrimRight(s, " \x00") }

// find picks the slot by label, serial or number. Slots move, so the number
// counts only where it was asked for.
func (t *Token) find(c Config) (uint, error) {
	slots, err := t.ctx.GetSlotList(true)
	if err != nil {
		return 0, fault.New(fault.Unreachable, "list the slots of", t.module, err)
	}
	var hits []uint
	var seen []string
	for _, s := range slots {
		ti, err := t.ctx.GetTokenInfo(s)
		if err != nil || ti.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue
		}
		label, serial := trim(ti.Label), trim(ti.SerialNumber)
		seen = append(seen, fmt.Sprintf("%q (serial %s, slot %d)", label, serial, s))
		if (c.Slot == nil || *c.Slot == uint64(s)) && (c.Label == "" || c.Label == label) && (c.Serial == "" || c.Serial == serial) {
			hits = append(hits, s)
		}
	}
	want := c.Label + c.Serial
	if c.Slot != nil {
		want = fmt.Sprintf("slot %d", *c.Slot)
	}
	if len(hits) == 1 {
		return hits[0], nil
	}
	there := "none"
	if len(seen) > 0 {
		there = strings.Join(seen, ", ")
	}
	if len(hits) == 0 {
		return 0, fault.Newf(fault.NotFound, "find token", want, "no such token; there are: %s", there).WithHint("choose with --token-label, --token-serial or --slot")
	}
	return 0, fault.Newf(fault.Conflict, "find token", want, "%d tokens fit; there are: %s", len(hits), there).WithHint("choose one with --token-serial")
}

// Info describes the token as it is now.
func (t *Token) Info() (hsm.TokenInfo, error) {
	ti, err := t.ctx.GetTokenInfo(t.slot)
	if err != nil {
		return hsm.TokenInfo{}, t.device("describe token", err)
	}
	lib, err := t.ctx.GetInfo()
	if err != nil {
		return hsm.TokenInfo{}, t.device("describe library", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return hsm.TokenInfo{Module: t.module, Library: fmt.Sprintf("%s %d.%d", trim(lib.LibraryDescription), lib.LibraryVersion.Major, lib.LibraryVersion.Minor),
		Slot: uint64(t.slot), Label: trim(ti.Label), Serial: trim(ti.SerialNumber), Manufacturer: trim(ti.ManufacturerID), Model: trim(ti.Model),
		Firmware:    fmt.Sprintf("%d.%d", ti.FirmwareVersion.Major, ti.FirmwareVersion.Minor),
		PINCountLow: ti.Flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0, PINFinalTry: ti.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0,
		PINLocked: ti.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0, LoggedIn: t.logged}, nil
}

// Login logs in, once. After a PIN error every later call is refused without
// touching the token: a few wrong PINs lock a partition for good.
func (t *Token) Login(pin secret.Value) error {
	info, err := t.Info()
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.logged:
		return nil
	case t.refused != nil:
		return t.refused
	case info.PINLocked:
		return fault.Newf(fault.Denied, "log in to token", info.Label, "its PIN is locked").WithHint("unlock it with the HSM's own tools")
	case info.PINFinalTry:
		return fault.Newf(fault.Denied, "log in to token", info.Label, "one try is left; it is not spent here").WithHint("log in once with the HSM's own tools, which resets the counter")
	}
	s, err := t.ctx.OpenSession(t.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return t.device("open session on", err)
	}
	err = t.ctx.Login(s, pkcs11.CKU_USER, string(pin.Reveal()))
	if err == nil || is(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN) {
		t.login, t.logged = s, true
		return nil
	}
	_ = t.ctx.CloseSession(s)
	if is(err, pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_LOCKED, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE) {
		t.refused = fault.New(fault.Denied, "log in to token", info.Label, err).
			WithHint("correct hsm-pass in hsm-secret; this password is not tried again")
		return t.refused
	}
	return t.device("log in to", err)
}

// Lost says that the device, the login or the library's state is gone: only
// Close and a new Open bring it back, and no handle outlives that.
func Lost(err error) bool {
	return is(err, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED,
		pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_SLOT_ID_INVALID, pkcs11.CKR_HOST_MEMORY,
		pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_USER_NOT_LOGGED_IN)
}

// CKR names the token's own answer in err, or is "".
func CKR(err error) string {
	var e pkcs11.Error
	if !errors.As(err, &e) {
		return ""
	}
	return e.Error()
}

// device gives an error of the token its kind.
func (t *Token) device(op string, err error) error {
	kind := fault.Other
	if Lost(err) {
		kind = fault.Unreachable
	}
	return fault.New(kind, op, t.module, err).WithHint("look at the HSM and its client's log")
}

// ErrNotOpen says that Login or OpenMaster must come first.
var ErrNotOpen = fault.Newf(fault.NotReady, "use the token", "", "it is not logged in, or its master keys are not open")

// with lends a session of the pool to f. A session that went stale is opened
// anew, and f tried once more.
func (t *Token) with(f func(s pkcs11.SessionHandle) error) error {
	s := <-t.pool
	defer func() { t.pool <- s }()
	for try := 0; ; try++ {
		if s == 0 {
			var err error
			if s, err = t.ctx.OpenSession(t.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION); err != nil {
				s = 0
				return t.device("open session on", err)
			}
		}
		err := f(s)
		if !is(err, pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED) || try > 0 {
			return err
		}
		s = 0
	}
}

func attr(typ uint, v any) *pkcs11.Attribute { return pkcs11.NewAttribute(typ, v) }

// label is the name of a master key: clear looks for this prefix and no other.
func label(install, what string) string { return "kms:" + install + ":" + what + ":v1" }

// OpenMaster finds the master keys by their ids, or makes those that are
// missing when create is set. Their attributes are read back: a token that
// made a key readable is refused.
func (t *Token) OpenMaster(ids hsm.MasterIDs, create bool) (hsm.Master, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.logged {
		return hsm.Master{}, ErrNotOpen
	}
	if t.master != nil && bytes.Equal(t.master.ids.Wrap, ids.Wrap) {
		return t.master.info, nil
	}
	m := &masterKeys{ids: ids}
	err := t.with(func(s pkcs11.SessionHandle) (err error) {
		if m.wrap, err = t.secretKey(s, ids.Wrap, label(ids.Install, "mkek"), create, pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP); err != nil {
			return err
		}
		if m.seal, err = t.secretKey(s, ids.Seal, label(ids.Install, "mseal"), create, pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT); err != nil {
			return err
		}
		var pub []byte
		if m.sign, pub, err = t.signKey(s, ids.Sign, label(ids.Install, "msign"), create); err != nil {
			return err
		}
		m.info = hsm.Master{PublicKey: pub, Suite: hsm.SuiteGCM, WrapWay: "CKM_AES_KEY_WRAP (RFC 3394)", Notes: []string{}}
		if err := t.selfTest(s); err != nil {
			return err
		}
		if m.info.WrapKCV, err = t.wrapKCV(s, m.wrap); err != nil {
			return err
		}
		m.info.SealKCV, err = t.sealKCV(s, m.seal)
		return err
	})
	if err != nil {
		return hsm.Master{}, err
	}
	t.master = m
	return m.info, nil
}

func (t *Token) findOne(s pkcs11.SessionHandle, class uint, id []byte) (pkcs11.ObjectHandle, error) {
	if err := t.ctx.FindObjectsInit(s, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, class), attr(pkcs11.CKA_ID, id)}); err != nil {
		return 0, t.device("search", err)
	}
	hs, _, err := t.ctx.FindObjects(s, 16)
	if ferr := t.ctx.FindObjectsFinal(s); err == nil {
		err = ferr
	}
	if err != nil {
		return 0, t.device("search", err)
	}
	slices.Sort(hs)
	hs = slices.Compact(hs) // some tokens name an object twice
	if len(hs) > 1 {
		return 0, fault.Newf(fault.Conflict, "find master key", hex.EncodeToString(id), "%d objects have this id", len(hs))
	}
	if len(hs) == 0 {
		return 0, nil
	}
	return hs[0], nil
}

func missing(id []byte) error {
	return fault.Newf(fault.NotFound, "find master key", hex.EncodeToString(id), "the token does not hold it").
		WithHint("is this the token that the store was made with? restore the token, or the store that belongs to it")
}

// secretKey finds or makes an AES-256 master key that may do just two things.
func (t *Token) secretKey(s pkcs11.SessionHandle, id []byte, name string, create bool, may ...uint) (pkcs11.ObjectHandle, error) {
	h, err := t.findOne(s, pkcs11.CKO_SECRET_KEY, id)
	if err != nil {
		return 0, err
	}
	if h == 0 {
		if !create {
			return 0, missing(id)
		}
		tpl := []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), attr(pkcs11.CKA_VALUE_LEN, 32),
			attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_PRIVATE, true), attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, false),
			attr(pkcs11.CKA_MODIFIABLE, false), attr(pkcs11.CKA_ID, id), attr(pkcs11.CKA_LABEL, name)}
		for _, a := range []uint{pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT, pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP, pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY} {
			tpl = append(tpl, attr(a, slices.Contains(may, a)))
		}
		if h, err = t.ctx.GenerateKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, tpl); err != nil {
			return 0, t.device("make master key "+name+" on", err)
		}
	}
	return h, t.checkMaster(s, h, name)
}

// checkMaster refuses a master key that could be read or was not born here.
func (t *Token) checkMaster(s pkcs11.SessionHandle, h pkcs11.ObjectHandle, name string) error {
	for a, want := range map[uint]bool{pkcs11.CKA_SENSITIVE: true, pkcs11.CKA_ALWAYS_SENSITIVE: true, pkcs11.CKA_EXTRACTABLE: false,
		pkcs11.CKA_NEVER_EXTRACTABLE: true, pkcs11.CKA_LOCAL: true} {
		got, err := t.flag(s, h, a)
		if err != nil {
			return err
		}
		if got != want {
			return fault.Newf(fault.BadContent, "check master key", name, "attribute 0x%x is %v, must be %v", a, got, want).
				WithHint("the token does not protect its keys as asked; do not use it")
		}
	}
	return nil
}

func (t *Token) flag(s pkcs11.SessionHandle, h pkcs11.ObjectHandle, a uint) (bool, error) {
	v, err := t.ctx.GetAttributeValue(s, h, []*pkcs11.Attribute{attr(a, nil)})
	if err != nil {
		return false, t.device("read attributes on", err)
	}
	return len(v[0].Value) > 0 && v[0].Value[0] != 0, nil
}

var oidP256 = asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7}

// signKey finds or makes the P-256 pair that signs the audit log's heads.
func (t *Token) signKey(s pkcs11.SessionHandle, id []byte, name string, create bool) (pkcs11.ObjectHandle, []byte, error) {
	priv, err := t.findOne(s, pkcs11.CKO_PRIVATE_KEY, id)
	if err != nil {
		return 0, nil, err
	}
	pub, err := t.findOne(s, pkcs11.CKO_PUBLIC_KEY, id)
	if err != nil {
		return 0, nil, err
	}
	if priv == 0 || pub == 0 {
		if !create {
			return 0, nil, missing(id)
		}
		params, err := asn1.Marshal(oidP256)
		if err != nil {
			return 0, nil, err
		}
		pubTpl := []*pkcs11.Attribute{attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC), attr(pkcs11.CKA_EC_PARAMS, params), attr(pkcs11.CKA_TOKEN, true),
			attr(pkcs11.CKA_VERIFY, true), attr(pkcs11.CKA_ENCRYPT, false), attr(pkcs11.CKA_WRAP, false), attr(pkcs11.CKA_ID, id), attr(pkcs11.CKA_LABEL, name)}
		privTpl := []*pkcs11.Attribute{attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC), attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_PRIVATE, true),
			attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, false), attr(pkcs11.CKA_SIGN, true), attr(pkcs11.CKA_DECRYPT, false),
			attr(pkcs11.CKA_UNWRAP, false), attr(pkcs11.CKA_ID, id), attr(pkcs11.CKA_LABEL, name)}
		if pub, priv, err = t.ctx.GenerateKeyPair(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)}, pubTpl, privTpl); err != nil {
			return 0, nil, t.device("make signing key on", err)
		}
	}
	if err := t.checkMaster(s, priv, name); err != nil {
		return 0, nil, err
	}
	v, err := t.ctx.GetAttributeValue(s, pub, []*pkcs11.Attribute{attr(pkcs11.CKA_EC_POINT, nil)})
	if err != nil {
		return 0, nil, t.device("read public key on", err)
	}
	der, err := pkix(v[0].Value)
	return priv, der, err
}

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

// wrapKCV recognises a key that may only wrap: the first bytes of the hash of
// a fixed key wrapped under it (RFC 3394 is deterministic).
func (t *Token) wrapKCV(s pkcs11.SessionHandle, kek pkcs11.ObjectHandle) ([]byte, error) {
	fixed, err := t.sessionKey(s, make([]byte, 32), true)
	if err != nil {
		return nil, err
	}
	defer t.destroy(s, fixed)
	b, err := t.ctx.WrapKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmAESKeyWrap, nil)}, kek, fixed)
	if err != nil {
		return nil, t.device("wrap by AES key wrap on", err)
	}
	sum := sha256.Sum256(b)
	return sum[:3], nil
}

// sealKCV recognises a key that may encrypt: the first bytes of the hash of
// the zero block under AES-ECB.
func (t *Token) sealKCV(s pkcs11.SessionHandle, k pkcs11.ObjectHandle) ([]byte, error) {
	if err := t.ctx.EncryptInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_ECB, nil)}, k); err != nil {
		return nil, t.device("encrypt on", err)
	}
	b, err := t.ctx.Encrypt(s, make([]byte, 16))
	if err != nil {
		return nil, t.device("encrypt on", err)
	}
	sum := sha256.Sum256(b)
	return sum[:3], nil
}

// sessionKey brings material into the token as a session object that may
// encrypt, and be wrapped when extractable.
func (t *Token) sessionKey(s pkcs11.SessionHandle, material []byte, extractable bool) (pkcs11.ObjectHandle, error) {
	tpl := append(dekTemplate(extractable), attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), attr(pkcs11.CKA_VALUE, material))
	h, err := t.ctx.CreateObject(s, tpl)
	if err != nil {
		return 0, t.device("bring a key into", err)
	}
	return h, nil
}

// dekTemplate is what a root key may do while it is in the token.
func dekTemplate(extractable bool) []*pkcs11.Attribute {
	return []*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_PRIVATE, true), attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, extractable),
		attr(pkcs11.CKA_ENCRYPT, true), attr(pkcs11.CKA_DECRYPT, true), attr(pkcs11.CKA_WRAP, false), attr(pkcs11.CKA_UNWRAP, false),
		attr(pkcs11.CKA_SIGN, false), attr(pkcs11.CKA_VERIFY, false)}
}

func (t *Token) destroy(s pkcs11.SessionHandle, h pkcs11.ObjectHandle) {
	_ = t.ctx.DestroyObject(s, h) // a session object dies with its session at the latest
}

// selfTest proves suite 1 on this token, with Go's own AES as the judge: what
// the token encrypts with our IV, Go opens, and the other way round. A token
// that makes its own IV, or none, is refused rather than guessed at.
func (t *Token) selfTest(s pkcs11.SessionHandle) error {
	no := func(why string, err error) error {
		return fault.Newf(fault.NotReady, "test AES-GCM on", t.module, "%s: %v", why, err).WithHint("this token needs a cipher suite that is not built yet; send us the output of its mechanism list")
	}
	key, plain, aad := make([]byte, 32), []byte("kmsctl self-test"), []byte("aad")
	if _, err := rand.Read(key); err != nil {
		return err
	}
	h, err := t.sessionKey(s, key, false)
	if err != nil {
		return err
	}
	defer t.destroy(s, h)
	block, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	judge, err := cipher.NewGCM(block)
	if err != nil {
		return err
	}
	a, err := t.encrypt(s, h, plain, aad)
	if err != nil {
		return no("encrypt", err)
	}
	b, err := t.encrypt(s, h, plain, aad)
	if err != nil {
		return no("encrypt again", err)
	}
	if bytes.Equal(a.IV, b.IV) || bytes.Equal(a.Ciphertext, b.Ciphertext) || bytes.Equal(a.IV, make([]byte, ivLen)) {
		return no("two encryptions", errors.New("IV or ciphertext repeats"))
	}
	full := append([]byte{hsm.SuiteGCM}, aad...)
	if got, err := judge.Open(nil, a.IV, a.Ciphertext, full); err != nil || !bytes.Equal(got, plain) {
		return no("open with another AES", errors.New("not the same GCM"))
	}
	if got, err := t.decrypt(s, h, hsm.Sealed{Suite: hsm.SuiteGCM, IV: b.IV, Ciphertext: judge.Seal(nil, b.IV, plain, full)}, aad); err != nil || !bytes.Equal(got, plain) {
		return no("open what another AES made", fmt.Errorf("not the same GCM (%w)", err))
	}
	a.Ciphertext[0] ^= 1
	if _, err := t.decrypt(s, h, a, aad); fault.KindOf(err) != fault.BadContent {
		return no("open a changed ciphertext", fmt.Errorf("it was not refused (%w)", err))
	}
	return nil
}

// encrypt is suite 1. The token's random generator makes the IV.
func (t *Token) encrypt(s pkcs11.SessionHandle, k pkcs11.ObjectHandle, plain, aad []byte) (hsm.Sealed, error) {
	iv, err := t.ctx.GenerateRandom(s, ivLen)
	if err != nil {
		return hsm.Sealed{}, t.raw("make random bytes on", err)
	}
	p := pkcs11.NewGCMParams(iv, append([]byte{hsm.SuiteGCM}, aad...), tagBits)
	defer p.Free()
	if err := t.ctx.EncryptInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, p)}, k); err != nil {
		return hsm.Sealed{}, t.raw("encrypt on", err)
	}
	out, err := t.ctx.Encrypt(s, plain)
	if err != nil {
		return hsm.Sealed{}, t.raw("encrypt on", err)
	}
	if used := p.IV(); !bytes.Equal(used, iv) || len(out) != len(plain)+tagBits/8 {
		return hsm.Sealed{}, fault.Newf(fault.NotReady, "encrypt on", t.module, "the token did not take the IV that it was given")
	}
	return hsm.Sealed{Suite: hsm.SuiteGCM, IV: iv, Ciphertext: out}, nil
}

// decrypt is suite 1. Whatever the token says of the data is the caller's
// error: SoftHSM answers a changed ciphertext with CKR_GENERAL_ERROR.
func (t *Token) decrypt(s pkcs11.SessionHandle, k pkcs11.ObjectHandle, c hsm.Sealed, aad []byte) ([]byte, error) {
	if c.Suite != hsm.SuiteGCM || len(c.IV) != ivLen || len(c.Ciphertext) < tagBits/8 {
		return nil, errBad
	}
	p := pkcs11.NewGCMParams(c.IV, append([]byte{c.Suite}, aad...), tagBits)
	defer p.Free()
	if err := t.ctx.DecryptInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, p)}, k); err != nil {
		return nil, t.raw("decrypt on", err)
	}
	out, err := t.ctx.Decrypt(s, c.Ciphertext)
	if is(err, pkcs11.CKR_ENCRYPTED_DATA_INVALID, pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_DATA_INVALID, ckrAEADFailed) {
		return nil, errBad
	}
	if err != nil {
		return nil, t.raw("decrypt on", err)
	}
	return out, nil
}

const ckrAEADFailed = 0x400 // CKR_AEAD_DECRYPT_FAILED, PKCS#11 3.0

var errBad = fault.Newf(fault.BadContent, "decrypt", "", "the ciphertext does not open")

// raw keeps stale handles recognisable for with, and gives all else a kind.
func (t *Token) raw(op string, err error) error {
	if is(err, pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED) {
		return err
	}
	return t.device(op, err)
}

// Random gives n bytes of the token's generator.
func (t *Token) Random(n int) (out []byte, err error) {
	err = t.with(func(s pkcs11.SessionHandle) error {
		if out, err = t.ctx.GenerateRandom(s, n); err != nil {
			return t.raw("make random bytes on", err)
		}
		return nil
	})
	return out, err
}

func (t *Token) open() (*masterKeys, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.master == nil {
		return nil, ErrNotOpen
	}
	return t.master, nil
}

// CreateRootKey makes an AES-256 key in the token and wraps it out under the
// master key. The key itself is destroyed again: Wrap and Unwrap bring it back
// as a key that cannot be read or wrapped.
func (t *Token) CreateRootKey() (hsm.NewKey, error) {
	return t.newRoot(func(s pkcs11.SessionHandle) (pkcs11.ObjectHandle, error) {
		tpl := append(dekTemplate(true), attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), attr(pkcs11.CKA_VALUE_LEN, 32))
		h, err := t.ctx.GenerateKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, tpl)
		if err != nil {
			return 0, t.raw("make a root key on", err)
		}
		return h, nil
	})
}

// ImportRootKey does the same with material of 16, 24 or 32 bytes.
func (t *Token) ImportRootKey(material secret.Value) (hsm.NewKey, error) {
	if n := len(material.Reveal()); n != 16 && n != 24 && n != 32 {
		return hsm.NewKey{}, fault.Newf(fault.Usage, "import root key", "", "%d bytes are no AES key", n)
	}
	return t.newRoot(func(s pkcs11.SessionHandle) (pkcs11.ObjectHandle, error) {
		return t.sessionKey(s, material.Reveal(), true)
	})
}

// blobHead begins a wrapped root key: format 1, wrapped by RFC 3394, under
// version 1 of the master key.
var blobHead = []byte{1, 1, 0, 1}

func (t *Token) newRoot(makeKey func(pkcs11.SessionHandle) (pkcs11.ObjectHandle, error)) (out hsm.NewKey, err error) {
	m, err := t.open()
	if err != nil {
		return out, err
	}
	err = t.with(func(s pkcs11.SessionHandle) error {
		h, err := makeKey(s)
		if err != nil {
			return err
		}
		defer t.destroy(s, h)
		if sensitive, err := t.flag(s, h, pkcs11.CKA_SENSITIVE); err != nil || !sensitive {
			return fault.Newf(fault.BadContent, "make a root key on", t.module, "the token left it readable (%v)", err)
		}
		b, err := t.ctx.WrapKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmAESKeyWrap, nil)}, m.wrap, h)
		if err != nil {
			return t.raw("wrap a root key on", err)
		}
		kcv, err := t.sealKCV(s, h)
		out = hsm.NewKey{Blob: append(bytes.Clone(blobHead), b...), KCV: kcv}
		return err
	})
	return out, err
}

// use brings a root key back into the token, from the cache where it can.
func (t *Token) use(blob []byte, f func(s pkcs11.SessionHandle, k pkcs11.ObjectHandle) error) error {
	m, err := t.open()
	if err != nil {
		return err
	}
	if len(blob) < len(blobHead)+24 || !bytes.Equal(blob[:len(blobHead)], blobHead) {
		return fault.Newf(fault.BadContent, "open root key", "", "its form is unknown")
	}
	return t.with(func(s pkcs11.SessionHandle) error {
		k, err := t.cache.get(sha256.Sum256(blob), func() (pkcs11.ObjectHandle, error) { return t.unwrap(m, blob[len(blobHead):]) }, t.forget)
		if err != nil {
			return err
		}
		defer t.cache.release(k, t.forget)
		err = f(s, k.handle)
		if is(err, pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
			t.cache.drop(k) // the next call brings it back
			return t.device("use a root key on", err)
		}
		return err
	})
}

// unwrap makes the session object in the session that holds the login, which
// lives as long as the cache does.
func (t *Token) unwrap(m *masterKeys, wrapped []byte) (pkcs11.ObjectHandle, error) {
	tpl := append(dekTemplate(false), attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES))
	t.mu.Lock()
	defer t.mu.Unlock()
	h, err := t.ctx.UnwrapKey(t.login, []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmAESKeyWrap, nil)}, m.wrap, wrapped, tpl)
	if Lost(err) && !is(err, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED) { // SoftHSM's answer to a foreign blob
		return 0, t.device("open root key on", err)
	}
	if err != nil {
		return 0, fault.New(fault.BadContent, "open root key on", t.module, err).WithHint("the store was changed, or belongs to another master key")
	}
	// Some tokens ignore what they were asked: read back, else refuse.
	sensitive, err := t.flag(t.login, h, pkcs11.CKA_SENSITIVE)
	if err == nil && sensitive {
		var readable bool
		if readable, err = t.flag(t.login, h, pkcs11.CKA_EXTRACTABLE); err == nil && !readable {
			return h, nil
		}
	}
	t.destroy(t.login, h)
	return 0, fault.Newf(fault.NotReady, "open root key on", t.module, "the token left the key readable (%v)", err)
}

func (t *Token) forget(h pkcs11.ObjectHandle) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.destroy(t.login, h)
}

// Wrap encrypts plain under the root key in blob.
func (t *Token) Wrap(blob, plain, aad []byte) (out hsm.Sealed, err error) {
	err = t.use(blob, func(s pkcs11.SessionHandle, k pkcs11.ObjectHandle) error {
		out, err = t.encrypt(s, k, plain, aad)
		return err
	})
	return out, err
}

// Unwrap opens what Wrap made.
func (t *Token) Unwrap(blob []byte, c hsm.Sealed, aad []byte) (out []byte, err error) {
	err = t.use(blob, func(s pkcs11.SessionHandle, k pkcs11.ObjectHandle) error {
		out, err = t.decrypt(s, k, c, aad)
		return err
	})
	return out, err
}

// Evict forgets a root key that was brought back.
func (t *Token) Evict(blob []byte) { t.cache.evict(sha256.Sum256(blob), t.forget) }

// Seal encrypts under the sealing key: suite, length of the IV, IV, ciphertext.
func (t *Token) Seal(plain, aad []byte) (out []byte, err error) {
	m, err := t.open()
	if err != nil {
		return nil, err
	}
	err = t.with(func(s pkcs11.SessionHandle) error {
		c, err := t.encrypt(s, m.seal, plain, aad)
		out = append(append([]byte{c.Suite, byte(len(c.IV))}, c.IV...), c.Ciphertext...)
		return err
	})
	return out, err
}

// Unseal opens what Seal made.
func (t *Token) Unseal(b, aad []byte) (out []byte, err error) {
	m, err := t.open()
	if err != nil {
		return nil, err
	}
	if len(b) < 2 || len(b) < 2+int(b[1])+tagBits/8 {
		return nil, errBad
	}
	n := 2 + int(b[1])
	err = t.with(func(s pkcs11.SessionHandle) error {
		out, err = t.decrypt(s, m.seal, hsm.Sealed{Suite: b[0], IV: b[2:n], Ciphertext: b[n:]}, aad)
		return err
	})
	return out, err
}

// Sign gives the ECDSA signature (ASN.1 DER) of message's SHA-256.
func (t *Token) Sign(message []byte) (out []byte, err error) {
	m, err := t.open()
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(message)
	err = t.with(func(s pkcs11.SessionHandle) error {
		if err := t.ctx.SignInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}, m.sign); err != nil {
			return t.raw("sign on", err)
		}
		rs, err := t.ctx.Sign(s, sum[:])
		if err != nil {
			return t.raw("sign on", err)
		}
		// PKCS#11 gives r and s side by side (2.40, 2.3.1).
		half := len(rs) / 2
		out, err = asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(rs[:half]), new(big.Int).SetBytes(rs[half:])})
		return err
	})
	return out, err
}

// MakeSoftToken makes a SoftHSM token with this label in dir when there is
// none, and points SoftHSM at dir. The security officer's PIN is random and
// thrown away: nobody needs it again.
func MakeSoftToken(dir, module, name string, pin secret.Value) error {
	tokens := filepath.Join(dir, "tokens")
	if err := os.MkdirAll(tokens, 0o700); err != nil {
		return fault.New(fault.Other, "make folder", tokens, err)
	}
	conf := filepath.Join(dir, "softhsm2.conf")
	text := fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n", tokens)
	if have, err := os.ReadFile(conf); err != nil || string(have) != text {
		if err := os.WriteFile(conf+".new", []byte(text), 0o600); err != nil {
			return fault.New(fault.Other, "write", conf, err)
		}
		if err := os.Rename(conf+".new", conf); err != nil {
			return fault.New(fault.Other, "write", conf, err)
		}
	}
	if err := os.Setenv("SOFTHSM2_CONF", conf); err != nil {
		return err
	}
	if _, err := os.Stat(module); errors.Is(err, fs.ErrNotExist) {
		return nil // Open says it better
	}
	ctx := pkcs11.New(module)
	if ctx == nil {
		return nil // Open says it better
	}
	defer ctx.Destroy()
	if err := ctx.Initialize(); err != nil {
		return fault.New(fault.Unreachable, "initialise SoftHSM in", dir, err)
	}
	defer func() { _ = ctx.Finalize() }() // a token made here is seen by others only after it
	return initSoft(ctx, name, pin)
}

func initSoft(ctx *pkcs11.Ctx, name string, pin secret.Value) error {
	slots, err := ctx.GetSlotList(true)
	if err != nil {
		return fault.New(fault.Unreachable, "list SoftHSM's slots", "", err)
	}
	free := -1
	for _, s := range slots {
		ti, err := ctx.GetTokenInfo(s)
		if err != nil {
			return fault.New(fault.Unreachable, "read SoftHSM's token", "", err)
		}
		switch {
		case trim(ti.Label) == name && ti.Flags&pkcs11.CKF_USER_PIN_INITIALIZED != 0:
			return nil
		case trim(ti.Label) == name, ti.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0:
			free = int(s)
		}
		if trim(ti.Label) == name {
			break // a run that was killed between the two steps below left it; it holds nothing yet
		}
	}
	if free < 0 {
		return fault.Newf(fault.NotFound, "make token", name, "SoftHSM offers no free slot")
	}
	// SoftHSM asks the old security officer's PIN to initialise a token again,
	// so a half-made token is left alone and a new one made beside it.
	for _, s := range slots {
		if ti, err := ctx.GetTokenInfo(s); err == nil && ti.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			free = int(s)
		}
	}
	so := make([]byte, 16)
	if _, err := rand.Read(so); err != nil {
		return err
	}
	soPIN := hex.EncodeToString(so)
	if err := ctx.InitToken(uint(free), soPIN, name); err != nil {
		return fault.New(fault.Unreachable, "make token", name, err)
	}
	h, err := ctx.OpenSession(uint(free), pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return fault.New(fault.Unreachable, "open token", name, err)
	}
	defer func() { _ = ctx.CloseSession(h) }()
	if err := ctx.Login(h, pkcs11.CKU_SO, soPIN); err != nil {
		return fault.New(fault.Unreachable, "open token as security officer", name, err)
	}
	if err := ctx.InitPIN(h, string(pin.Reveal())); err != nil {
		return fault.New(fault.Usage, "set the PIN of token", name, err).WithHint("SoftHSM takes 4 to 255 characters")
	}
	return ctx.Logout(h)
}
