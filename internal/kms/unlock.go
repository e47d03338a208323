package kms

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/record"
)

// Plain is the part of the store that is readable before the HSM is open.
type Plain interface {
	Get(ctx context.Context, name string, v any) (rev int64, err error)
	Put(ctx context.Context, name string, v any, rev int64) (newRev int64, err error)
}

// Token is an HSM before and while it is being opened.
type Token interface {
	Sealer
	Describe(ctx context.Context) (hsm.TokenInfo, error)
	Fingerprint(ctx context.Context, salt []byte) ([]byte, error)
	Login(ctx context.Context) error
	OpenMaster(ctx context.Context, ids hsm.MasterIDs, create bool) (hsm.Master, error)
}

// Opened is what an open HSM gives to the rest of the service.
type Opened struct {
	Install   string
	Token     hsm.TokenInfo
	Master    hsm.Master
	Epoch     Epoch
	RecordKey []byte // 32 bytes, authenticates records
	TokenKey  []byte // 32 bytes, seed of the keys that sign access tokens
}

// Zero overwrites the two keys.
func (o Opened) Zero() {
	clear(o.RecordKey)
	clear(o.TokenKey)
}

// install is the plain record of an installation. Its sealed secrets open
// with this installation's master key only, each for its own purpose.
type install struct {
	ID        string        `json:"id"`
	IDs       hsm.MasterIDs `json:"ids"`
	Serial    string        `json:"serial"`
	Master    *hsm.Master   `json:"master,omitempty"` // absent: the keys are being made
	RecordKey []byte        `json:"recordKey,omitempty"`
	TokenKey  []byte        `json:"tokenKey,omitempty"`
	// Version is that of IDs and Master; absent in the first installations.
	Version uint16 `json:"version,omitempty"`
	// Others open what they made, and make nothing: older versions, and one
	// that is about to follow.
	Others []otherMaster `json:"others,omitempty"`
}

// otherMaster is a version of the master keys besides the one that makes what
// is new.
type otherMaster struct {
	Version uint16        `json:"version"`
	IDs     hsm.MasterIDs `json:"ids"`
	Master  hsm.Master    `json:"master"`
	// Serial is that of the token from which keys move away; absent where all
	// versions are in one token.
	Serial string `json:"serial,omitempty"`
}

// Epoch is a state of the installation whose master keys the HSM has open.
type Epoch struct {
	Rev     int64  // of the installation's record
	Version uint16 // that makes what is new
}

func (in *install) version() uint16 { return max(in.Version, hsm.FirstMaster) }

// in says whether a version is in the token with this serial number.
func (o otherMaster) in(now, serial string) bool { return cmp.Or(o.Serial, now) == serial }

// open opens all versions that are in a token. The newest comes last, so that
// it makes what is new there. One that is not the store's is refused.
func (in *install) open(ctx context.Context, t Token, info hsm.TokenInfo) (m hsm.Master, err error) {
	var here []otherMaster
	for _, o := range in.Others {
		if o.in(in.Serial, info.Serial) {
			here = append(here, o)
		}
	}
	if in.Serial == info.Serial && in.Master != nil {
		here = append(here, otherMaster{Version: in.version(), IDs: in.IDs, Master: *in.Master})
	}
	for i, o := range here {
		o.IDs.Version, o.IDs.Spare = o.Version, i < len(here)-1
		m, err = t.OpenMaster(ctx, o.IDs, false)
		if err == nil {
			err = sameMaster(o.Master, m, info.Label)
		}
		if err != nil {
			return m, err
		}
	}
	if in.Serial == info.Serial && in.Master == nil {
		ids := in.IDs
		ids.Version = in.version()
		m, err = t.OpenMaster(ctx, ids, true)
	}
	return m, err
}

func sameMaster(want, have hsm.Master, label string) error {
	if hsm.SameKey(want.WrapKCV, have.WrapKCV) && hsm.SameKey(want.SealKCV, have.SealKCV) {
		return nil
	}
	return fault.Newf(fault.BadContent, "open master keys on token", label, "their check values are not those of this store").
		WithHint("this store belongs to another token or partition: check --token-label and the store")
}

// Unlock logs in and opens the master keys, or makes them in a store that has
// none. A token that does not hold the store's master keys is refused before
// anything is written.
func Unlock(ctx context.Context, p Plain, t Token, now func() time.Time) (Opened, error) {
	info, err := t.Describe(ctx)
	if err != nil {
		return Opened{}, err
	}
	if !info.LoggedIn {
		if err := login(ctx, p, t, info, now); err != nil {
			return Opened{}, err
		}
	}
	in, m, rev, err := openInstall(ctx, p, t, info)
	if err != nil {
		return Opened{}, err
	}
	o := Opened{Install: in.ID, Token: info, Master: m, Epoch: Epoch{Rev: rev, Version: in.version()}}
	if o.RecordKey, err = t.Unseal(ctx, in.RecordKey, purpose(in.ID, "record")); err != nil {
		return Opened{}, fault.New(fault.BadContent, "unseal the record key of", in.ID, err)
	}
	o.TokenKey, err = TokenKey(ctx, p, t)
	return o, err
}

// openInstall opens the master keys that the installation names, and looks
// again: another process may have changed them meanwhile.
func openInstall(ctx context.Context, p Plain, t Token, info hsm.TokenInfo) (*install, hsm.Master, int64, error) {
	for {
		in, rev, err := loadInstall(ctx, p, info)
		if err != nil {
			return nil, hsm.Master{}, 0, err
		}
		m, err := in.open(ctx, t, info)
		if err != nil {
			return nil, m, 0, err
		}
		if in.Master == nil {
			if err := finishInstall(ctx, p, t, in, rev, m); err != nil {
				return nil, m, 0, err
			}
			continue
		}
		var again install
		if now, err := p.Get(ctx, "install", &again); err != nil || now == rev {
			return in, m, rev, err
		}
	}
}

// TokenKey opens the seed of the keys that sign access tokens, once the HSM is
// unlocked.
func TokenKey(ctx context.Context, p Plain, e Sealer) ([]byte, error) {
	var in install
	if _, err := p.Get(ctx, "install", &in); err != nil {
		return nil, err
	}
	seed, err := e.Unseal(ctx, in.TokenKey, purpose(in.ID, "token"))
	if err != nil {
		return nil, fault.New(fault.BadContent, "unseal the token key of", in.ID, err)
	}
	return seed, nil
}

func purpose(install, what string) []byte {
	return []byte("kmsctl secret\x00" + install + "\x00" + what)
}

// loadInstall reads the installation, or writes a new one down before its keys
// are made, so that a run killed in between makes no second set.
func loadInstall(ctx context.Context, p Plain, info hsm.TokenInfo) (*install, int64, error) {
	var in install
	rev, err := p.Get(ctx, "install", &in)
	if err == nil {
		if in.Serial != info.Serial {
			return nil, 0, fault.Newf(fault.BadContent, "open token", info.Label, "its serial number is %q, this store belongs to %q", info.Serial, in.Serial).
				WithHint("check --token-label, --token-serial or --slot; nothing was written")
		}
		return &in, rev, nil
	}
	if !errors.Is(err, record.ErrNotFound) {
		return nil, 0, err
	}
	b := make([]byte, 4+3*16)
	if _, err := rand.Read(b); err != nil {
		return nil, 0, err
	}
	id := hex.EncodeToString(b[:4])
	in = install{ID: id, Serial: info.Serial, IDs: hsm.MasterIDs{Install: id, Wrap: b[4:20], Seal: b[20:36], Sign: b[36:52]}}
	rev, err = p.Put(ctx, "install", in, 0)
	if errors.Is(err, record.ErrConflict) { // another replica was first
		return loadInstall(ctx, p, info)
	}
	return &in, rev, err
}

func finishInstall(ctx context.Context, p Plain, t Token, in *install, rev int64, m hsm.Master) (err error) {
	if in.RecordKey, err = t.SealRandom(ctx, 32, purpose(in.ID, "record")); err != nil {
		return err
	}
	if in.TokenKey, err = t.SealRandom(ctx, 32, purpose(in.ID, "token")); err != nil {
		return err
	}
	in.Master = &m
	_, err = p.Put(ctx, "install", in, rev)
	if errors.Is(err, record.ErrConflict) { // another replica finished it: its secrets count
		_, err = p.Get(ctx, "install", in)
	}
	return err
}

// attempt is the ledger's line for a token, at logins/<serial>. A PIN is tried
// once: the attempt is written down before the login, and after a PIN error
// no process logs in until the fingerprint, and so the secret, has changed.
type attempt struct {
	Salt        []byte    `json:"salt"`
	Fingerprint []byte    `json:"fingerprint"`
	State       string    `json:"state"` // pending, good, refused
	Refusals    int       `json:"refusals"`
	At          time.Time `json:"at"`
}

const (
	pending = "pending"
	good    = "good"
	refused = "refused"
)

func login(ctx context.Context, p Plain, t Token, info hsm.TokenInfo, now func() time.Time) error {
	name := "logins/" + info.Serial
	var a attempt
	rev, err := p.Get(ctx, name, &a)
	if err != nil && !errors.Is(err, record.ErrNotFound) {
		return err
	}
	if err != nil {
		a.Salt = make([]byte, 16)
		if _, err := rand.Read(a.Salt); err != nil {
			return err
		}
	}
	print, err := t.Fingerprint(ctx, a.Salt)
	if err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(print, a.Fingerprint) == 1 {
		// An attempt whose end nobody saw counts as refused when the token
		// itself says that a wrong PIN was entered.
		if a.State == refused || (a.State == pending && info.PINCountLow) {
			return fault.Newf(fault.Denied, "log in to token", info.Label, "this password was refused before (%s, %d refused so far); it is not tried again", a.At.Format(time.RFC3339), a.Refusals).
				WithHint("correct hsm-pass in hsm-secret; another password is tried once")
		}
	}
	a.Fingerprint, a.State, a.At = print, pending, now().UTC().Truncate(time.Second)
	if rev, err = p.Put(ctx, name, a, rev); err != nil {
		if errors.Is(err, record.ErrConflict) {
			return fault.Newf(fault.Conflict, "log in to token", info.Label, "another process is logging in at this moment").WithHint("try again")
		}
		return err
	}
	loginErr := t.Login(ctx)
	switch {
	case loginErr == nil:
		a.State, a.Refusals = good, 0
	case fault.KindOf(loginErr) == fault.Denied:
		a.State = refused
		a.Refusals++
	default:
		return loginErr // the token did not answer: the attempt stays pending
	}
	if _, err := p.Put(ctx, name, a, rev); err != nil {
		return errors.Join(loginErr, fmt.Errorf("note the login's outcome: %w", err))
	}
	return loginErr
}
