package kms

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// Clearing an installation takes two halves. While the KMS serves, Clearing
// shows what would go, makes a confirmation, and takes it once: it writes down
// in the store that the store comes to its end, with a proof that the token
// sealed. Then everybody who works on the store stops. FinishClear does the
// rest before a KMS opens: it destroys what is on the token, then resets the
// store in one transaction. So a crash anywhere leaves either a KMS that was
// not touched, or one that the next opening finishes and nobody serves before.

// ClearStore is what Clearing needs of a store.
type ClearStore interface {
	Get(ctx context.Context, path string, v any) (rev int64, err error)
	Commit(ctx context.Context, changes ...record.Change) error
	Dump(ctx context.Context, begin func(rev int64) error, each func(record.Raw) error) error
}

// Inventory lists and clears what installations left on a token.
type Inventory interface {
	Installations(ctx context.Context) ([]hsm.Installation, error)
	Clear(ctx context.Context, install string, proof *hsm.Proof) (objects int, err error)
}

// Clearing plans and begins the clearing of an open KMS.
type Clearing struct {
	Store  ClearStore
	Plain  Plain
	Sealer Sealer
	Tokens []Inventory // every member of the group
	Opened Opened
	Now    func() time.Time
	// Moving: there are two tokens, and Tokens are one of them.
	Moving bool
}

const (
	confirmationPath = "clear/confirmation"
	confirmationLife = 10 * time.Minute
	clearedName      = "cleared" // plain; outlives the store's reset
)

// confirmation is one permission to clear: for one installation on one token,
// by the one who asked for it, under the name that is shown to be typed.
type confirmation struct {
	Hash    []byte    `json:"hash"`
	Install string    `json:"install"`
	Serial  string    `json:"serial"`
	Name    string    `json:"name"`
	By      string    `json:"by"`
	Expires time.Time `json:"expires"`
}

// clearMark is the record that ends the store.
type clearMark struct {
	Install string    `json:"install"`
	Serial  string    `json:"serial"`
	By      string    `json:"by"`
	At      time.Time `json:"at"`
	Proof   []byte    `json:"proof"`
}

// aad binds the proof to everything that is in the mark.
func (m clearMark) aad() []byte {
	return purpose(m.Install, "clear\x00"+m.Serial+"\x00"+m.By+"\x00"+m.At.Format(time.RFC3339))
}

// Plan says what clearing would take away. It changes nothing.
func (c *Clearing) Plan(ctx context.Context) (kmsapi.ClearPlan, error) {
	p := kmsapi.ClearPlan{Installation: c.Opened.Install, TokenLabel: c.Opened.Token.Label, TokenSerial: c.Opened.Token.Serial, Objects: []string{}, Others: []kmsapi.ClearTarget{}}
	found, err := c.Tokens[0].Installations(ctx)
	if err != nil {
		return p, err
	}
	for _, i := range found {
		if i.ID == p.Installation {
			p.Objects = i.Objects
		} else {
			p.Others = append(p.Others, kmsapi.ClearTarget{Installation: i.ID, Objects: i.Objects})
		}
	}
	if p.Cleared, err = c.cleared(ctx); err != nil {
		return p, err
	}
	return p, c.Store.Dump(ctx, func(int64) error { return nil }, func(r record.Raw) error { return count(&p, r) })
}

func (c *Clearing) cleared(ctx context.Context) (*kmsapi.Cleared, error) {
	var last kmsapi.Cleared
	_, err := c.Plain.Get(ctx, clearedName, &last)
	if errors.Is(err, record.ErrNotFound) {
		return nil, nil
	}
	return &last, err
}

func count(p *kmsapi.ClearPlan, r record.Raw) error {
	var v struct {
		Kind  string `json:"kind"`
		Admin bool   `json:"admin"`
	}
	dir, _, _ := strings.Cut(r.Path, "/")
	if dir == "iam" {
		dir = strings.Join(strings.SplitN(r.Path, "/", 3)[:2], "/")
	}
	if dir == "keys" || dir == "iam/apikeys" {
		if err := json.Unmarshal(record.Body(r.Value), &v); err != nil {
			return fault.New(fault.BadContent, "read record", r.Path, err)
		}
	}
	switch {
	case dir == "instances":
		p.Instances++
	case dir == "keys" && v.Kind == kindRoot:
		p.RootKeys++
	case dir == "keys":
		p.StandardKeys++
	case dir == "iam/serviceids":
		p.ServiceIDs++
	case dir == "iam/apikeys" && !v.Admin:
		p.APIKeys++
	case dir == "iam/policies":
		p.Policies++
	}
	return nil
}

// Confirm gives the plan with a confirmation for it. There is one at a time:
// an older one counts no more. Where nothing would go there is none.
func (c *Clearing) Confirm(ctx context.Context, by string, in kmsapi.ClearRequest) (kmsapi.ClearPlan, error) {
	p, err := c.Plan(ctx)
	if err != nil {
		return p, err
	}
	if c.Moving {
		return p, fault.Newf(fault.Conflict, "clear installation", c.target(in), "two tokens are configured, and keys can be in both: serve with one")
	}
	if in.Name == "" {
		return p, invalid("name", "the release's name, or the installation's id")
	}
	target := c.target(in)
	switch {
	case target != c.Opened.Install && !slices.ContainsFunc(p.Others, func(o kmsapi.ClearTarget) bool { return o.Installation == target }):
		return p, fault.Newf(fault.NotFound, "clear installation", target, "the token holds nothing of it")
	case target == c.Opened.Install && p.Empty():
		return p, nil
	}
	secret := make([]byte, 16)
	if _, err := rand.Read(secret); err != nil {
		return p, err
	}
	p.Confirmation = hex.EncodeToString(secret)
	hash, ends := sha256.Sum256([]byte(p.Confirmation)), c.stamp().Add(confirmationLife)
	p.Expires = &ends
	var old confirmation
	rev, err := c.Store.Get(ctx, confirmationPath, &old)
	if err != nil && !errors.Is(err, record.ErrNotFound) {
		return p, err
	}
	return p, c.Store.Commit(ctx, record.Change{Path: confirmationPath, Rev: rev,
		Value: confirmation{Hash: hash[:], Install: target, Serial: p.TokenSerial, Name: in.Name, By: by, Expires: ends}})
}

func (c *Clearing) target(in kmsapi.ClearRequest) string {
	if in.Installation == "" {
		return c.Opened.Install
	}
	return in.Installation
}

func (c *Clearing) stamp() time.Time { return c.Now().UTC().Truncate(time.Second) }

// Begin takes a confirmation, which is then gone. Of the KMS's own
// installation it begins the clearing, and the store has ended when it
// returns; objects of another one are destroyed at once, and counted. note
// writes down who clears what before anything happens.
func (c *Clearing) Begin(ctx context.Context, by string, in kmsapi.ClearRequest, note func(target, serial string) error) (kmsapi.Cleared, error) {
	target, now := c.target(in), c.stamp()
	out := kmsapi.Cleared{At: now, By: by, Installation: target, TokenLabel: c.Opened.Token.Label, TokenSerial: c.Opened.Token.Serial}
	rev, err := c.confirmed(ctx, by, in)
	if err != nil {
		return out, err
	}
	if err := note(target, out.TokenSerial); err != nil {
		return out, err
	}
	if target == c.Opened.Install {
		return out, c.end(ctx, rev, clearMark{Install: target, Serial: out.TokenSerial, By: by, At: now})
	}
	if err := c.Store.Commit(ctx, record.Change{Path: confirmationPath, Rev: rev}); err != nil {
		return out, used(err)
	}
	for _, t := range c.Tokens {
		n, err := t.Clear(ctx, target, nil)
		out.Objects += n
		if err != nil {
			return out, err
		}
	}
	return out, nil
}

// confirmed gives the revision of the confirmation that fits the request.
func (c *Clearing) confirmed(ctx context.Context, by string, in kmsapi.ClearRequest) (int64, error) {
	var have confirmation
	rev, err := c.Store.Get(ctx, confirmationPath, &have)
	if err != nil {
		return 0, used(err)
	}
	hash := sha256.Sum256([]byte(in.Confirmation))
	switch {
	case subtle.ConstantTimeCompare(hash[:], have.Hash) != 1, have.By != by, have.Install != c.target(in), have.Serial != c.Opened.Token.Serial, have.Name != in.Name:
		return 0, fault.Newf(fault.Conflict, "clear installation", c.target(in), "the confirmation is for something else, or a newer one was made")
	case !c.Now().Before(have.Expires):
		return 0, fault.Newf(fault.Conflict, "clear installation", have.Install, "the confirmation ran out at %s", have.Expires.Format(time.RFC3339))
	}
	return rev, nil
}

// used says what a confirmation that is not there any more means.
func used(err error) error {
	if errors.Is(err, record.ErrNotFound) || errors.Is(err, record.ErrConflict) {
		return fault.Newf(fault.Conflict, "clear installation", "", "there is no such confirmation: it counts once")
	}
	return err
}

// end takes the confirmation and ends the store, in one transaction.
func (c *Clearing) end(ctx context.Context, rev int64, m clearMark) (err error) {
	if m.Proof, err = c.Sealer.Seal(ctx, []byte("clear"), m.aad()); err != nil {
		return err
	}
	return used(c.Store.Commit(ctx, record.Change{Path: confirmationPath, Rev: rev}, record.Change{Path: record.EndPath, Value: m}))
}

// Settle notes, for a KMS in which nobody keeps anything, that a clearing was
// asked for and there was nothing to clear, so that the same request does not
// count later. It gives what was noted, now or before.
func (c *Clearing) Settle(ctx context.Context, by string) (kmsapi.Cleared, error) {
	p, err := c.Plan(ctx)
	switch {
	case err != nil:
		return kmsapi.Cleared{}, err
	case p.Cleared != nil:
		return *p.Cleared, nil
	case !p.Empty():
		return kmsapi.Cleared{}, fault.Newf(fault.Conflict, "settle clearing", p.Installation, "there are data in it")
	}
	out := kmsapi.Cleared{At: c.stamp(), By: by, Installation: p.Installation, TokenLabel: p.TokenLabel, TokenSerial: p.TokenSerial, Nothing: true}
	_, err = c.Plain.Put(ctx, clearedName, out, 0)
	if errors.Is(err, record.ErrConflict) { // another was first
		_, err = c.Plain.Get(ctx, clearedName, &out)
	}
	return out, err
}

// EndingStore is the part of the store that is there before the HSM is open.
type EndingStore interface {
	Plain
	Ending(ctx context.Context, v any) (rev int64, err error)
	Reset(ctx context.Context, rev int64, cleared any) error
}

// ClearToken is a token before it is opened, whose objects can be cleared.
type ClearToken interface {
	Token
	Inventory
}

// FinishClear finishes a clearing that was begun; nil when none was. It must
// run before the KMS opens. Any number of processes may run it at once, and
// again after a crash.
func FinishClear[T ClearToken](ctx context.Context, s EndingStore, members []T, now func() time.Time) (*kmsapi.Cleared, error) {
	var m clearMark
	rev, err := s.Ending(ctx, &m)
	if errors.Is(err, record.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if ours, err := belongs(ctx, s, m); err != nil || !ours {
		return nil, err
	}
	out := &kmsapi.Cleared{At: m.At, By: m.By, Installation: m.Install, TokenSerial: m.Serial}
	for _, t := range members {
		if err := clearMember(ctx, s, t, m, now, out); err != nil {
			return nil, err
		}
	}
	err = s.Reset(ctx, rev, out)
	if errors.Is(err, record.ErrConflict) { // another process was first, and says so
		return nil, nil
	}
	return out, err
}

// belongs says whether the mark is still there, and refuses one that is not of
// this store's installation.
func belongs(ctx context.Context, s EndingStore, m clearMark) (bool, error) {
	var in install
	if _, err := s.Get(ctx, "install", &in); err != nil && !errors.Is(err, record.ErrNotFound) {
		return false, err
	}
	if in.ID == m.Install && len(m.Proof) > 0 {
		return true, nil
	}
	var again clearMark
	if _, err := s.Ending(ctx, &again); errors.Is(err, record.ErrNotFound) {
		return false, nil // another process finished it at this moment
	}
	return false, fault.Newf(fault.BadContent, "finish the clearing of", m.Install, "the store is of installation %q", in.ID).
		WithHint("somebody wrote to the store: compare with a backup; nothing was destroyed")
}

func clearMember(ctx context.Context, s Plain, t ClearToken, m clearMark, now func() time.Time, out *kmsapi.Cleared) error {
	info, err := t.Describe(ctx)
	if err != nil {
		return err
	}
	if info.Serial != m.Serial {
		return fault.Newf(fault.NotReady, "finish the clearing of", m.Install, "it is to be cleared on the token with serial number %q, and this is %q", m.Serial, info.Serial).
			WithHint("connect the token that was to be cleared: the clearing goes on by itself")
	}
	if !info.LoggedIn {
		if err := login(ctx, s, t, info, now); err != nil {
			return err
		}
	}
	n, err := t.Clear(ctx, m.Install, &hsm.Proof{Sealed: m.Proof, AAD: m.aad()})
	out.TokenLabel, out.Objects = info.Label, out.Objects+n
	return err
}
