// Package token works on one PKCS#11 token: it finds it, logs in once, finds
// out by trying what it can do, makes or finds the master keys, and does with
// root keys what the KMS asks. It is the only place that knows PKCS#11
// handles and the PIN. It needs cgo.
package token

import (
	"cmp"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"math"
	"os"
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
	Sessions int // at most so many at once, and no more than the token allows; 0 means DefaultSessions
}

// Token is an open token. Safe for concurrent use. What it learnt and holds
// is true for this opening only: after Lost, Close it and Open another.
type Token struct {
	ctx     *pkcs11.Ctx
	shim    shim
	module  string
	slot    uint
	noLogin bool // the token needs none, and keeps no private objects
	pool    chan pkcs11.SessionHandle
	login   pkcs11.SessionHandle // keeps the login alive: closing the last session logs out

	objects sync.Mutex // one at a time makes, finds or destroys objects: some libraries mix them up
	opening sync.Mutex // one at a time opens the master keys
	pairing sync.Mutex // one at a time makes an RSA pair, which takes long

	mu      sync.Mutex
	refused map[[32]byte]error // PINs, by a keyed hash, that the token did not take
	logged  bool
	can     *abilities
	master  *masterKeys // makes what is new
	masters map[uint16]*masterKeys
	cache   *cache
	tidying sync.WaitGroup
	rest    func() // ends the tidying

	carrying carrying // of keys from another token
}

// DefaultSessions is how many sessions a token gets that is not told otherwise.
const DefaultSessions = 8

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
	t := &Token{ctx: ctx, shim: newShim(c.Module), module: c.Module, cache: newCache(cacheSize, cacheTime), refused: map[[32]byte]error{}, masters: map[uint16]*masterKeys{}, rest: func() {}}
	slot, err := t.find(c)
	if err != nil {
		t.Close()
		return nil, err
	}
	t.slot = slot
	n, err := t.bound(cmp.Or(max(c.Sessions, 0), DefaultSessions))
	if err != nil {
		t.Close()
		return nil, err
	}
	t.pool = make(chan pkcs11.SessionHandle, n)
	for range cap(t.pool) {
		t.pool <- 0 // opened when first needed
	}
	stop := make(chan struct{})
	t.rest = sync.OnceFunc(func() { close(stop) })
	t.tidying.Go(func() { t.cache.tidy(stop, t.forget) })
	return t, nil
}

// ownSessions are those outside of the pool: of the login, and of the self-test.
const ownSessions = 2

// bound keeps the number of sessions within what the token allows, where it
// says so (PKCS#11 2.40, 3.2).
func (t *Token) bound(n int) (int, error) {
	ti, err := t.ctx.GetTokenInfo(t.slot)
	if err != nil {
		return 0, t.device("describe token", err)
	}
	for _, most := range []uint{ti.MaxSessionCount, ti.MaxRwSessionCount} {
		if most != pkcs11.CK_EFFECTIVELY_INFINITE && most != pkcs11.CK_UNAVAILABLE_INFORMATION {
			n = min(n, max(int(min(most, math.MaxInt32))-ownSessions, 1))
		}
	}
	return n, nil
}

// Close logs out and finalises the module.
func (t *Token) Close() {
	t.rest()
	t.tidying.Wait()
	if t.pool != nil {
		_ = t.ctx.CloseAllSessions(t.slot) // what fails here ends with C_Finalize
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
	var ready, half []uint
	var seen []string
	for _, s := range slots {
		ti, err := t.ctx.GetTokenInfo(s)
		if err != nil || ti.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue
		}
		label, serial := trim(ti.Label), trim(ti.SerialNumber)
		seen = append(seen, fmt.Sprintf("%q (serial %s, slot %d)", label, serial, s))
		if (c.Slot != nil && *c.Slot != uint64(s)) || (c.Label != "" && c.Label != label) || (c.Serial != "" && c.Serial != serial) {
			continue
		}
		// A token that wants a login and has no user PIN was never finished; it
		// counts only when nothing else fits.
		if ti.Flags&pkcs11.CKF_LOGIN_REQUIRED != 0 && ti.Flags&pkcs11.CKF_USER_PIN_INITIALIZED == 0 {
			half = append(half, s)
		} else {
			ready = append(ready, s)
		}
	}
	if len(ready) == 0 {
		ready = half
	}
	want := c.Label + c.Serial
	if c.Slot != nil {
		want = fmt.Sprintf("slot %d", *c.Slot)
	}
	if len(ready) == 1 {
		return ready[0], nil
	}
	there := "none"
	if len(seen) > 0 {
		there = strings.Join(seen, ", ")
	}
	if len(ready) == 0 {
		// An HSM that is away shows no token either: who waits tries again.
		return 0, fault.Newf(fault.NotFound, "find token", want, "no such token; there are: %s", there).WithHint("choose with --token-label, --token-serial or --slot")
	}
	return 0, fault.Newf(fault.Conflict, "find token", want, "%d tokens fit; there are: %s", len(ready), there).WithHint("choose one with --token-serial")
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

// pinKey keys the hashes of refused PINs; it dies with the process.
var pinKey = sync.OnceValue(func() []byte {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails, since Go 1.24
	return b
})

func pinMark(pin secret.Value) (out [32]byte) {
	h := hmac.New(sha256.New, pinKey())
	h.Write(pin.Reveal())
	h.Sum(out[:0])
	return out
}

// Login logs in, once with each PIN: after a PIN error the same PIN is refused
// without touching the token, since a few wrong ones lock a partition for
// good. The PIN is handed over from its own buffer; the caller zeroes it.
func (t *Token) Login(pin secret.Value) error {
	t.mu.Lock()
	logged, refused := t.logged, t.refused[pinMark(pin)]
	t.mu.Unlock()
	if logged {
		return nil
	}
	if refused != nil {
		return refused
	}
	ti, err := t.ctx.GetTokenInfo(t.slot)
	if err != nil {
		return t.device("describe token", err)
	}
	label := trim(ti.Label)
	switch {
	case ti.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return fault.Newf(fault.Denied, "log in to token", label, "its PIN is locked").WithHint("unlock it with the HSM's own tools")
	case ti.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return fault.Newf(fault.Denied, "log in to token", label, "one try is left; it is not spent here").WithHint("log in once with the HSM's own tools, which resets the counter")
	}
	s, err := t.ctx.OpenSession(t.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return t.device("open session on", err)
	}
	noLogin := ti.Flags&pkcs11.CKF_LOGIN_REQUIRED == 0
	if !noLogin {
		err = t.shim.login(s, pin.Reveal())
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err == nil || is(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN) {
		t.login, t.logged, t.noLogin = s, true, noLogin
		return nil
	}
	_ = t.ctx.CloseSession(s)
	if is(err, pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_LOCKED, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE) {
		err := fault.New(fault.Denied, "log in to token", label, err).WithHint("correct hsm-pass in hsm-secret; this password is not tried again")
		t.refused[pinMark(pin)] = err
		return err
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

// stale are the answers after which a session is of no use, and the token may
// be well.
func stale(err error) bool {
	return is(err, pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_OPERATION_ACTIVE, pkcs11.CKR_OPERATION_NOT_INITIALIZED)
}

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
		if stale(err) || is(err, pkcs11.CKR_BUFFER_TOO_SMALL) { // the latter leaves an operation behind
			_ = t.ctx.CloseSession(s)
			s = 0
		}
		if !stale(err) || try > 0 {
			return err
		}
	}
}

// Random gives n bytes of the token's generator.
func (t *Token) Random(n int) (out []byte, err error) {
	err = t.with(func(s pkcs11.SessionHandle) error {
		if out, err = t.ctx.GenerateRandom(s, n); err != nil {
			return t.device("make random bytes on", err)
		}
		return nil
	})
	return out, err
}

func attr(typ uint, v any) *pkcs11.Attribute { return pkcs11.NewAttribute(typ, v) }

func (t *Token) flag(s pkcs11.SessionHandle, h pkcs11.ObjectHandle, a uint) (bool, error) {
	got, err := t.shim.flags(s, h, a)
	if err != nil {
		return false, t.device("read attributes on", err)
	}
	return got[0], nil
}

func (t *Token) destroy(s pkcs11.SessionHandle, h pkcs11.ObjectHandle) {
	t.objects.Lock()
	defer t.objects.Unlock()
	_ = t.ctx.DestroyObject(s, h) // a session object dies with its session at the latest
}
