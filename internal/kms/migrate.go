package kms

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// Moving to another token is a change of the master keys whose new ones are
// made in that token, and nowhere else. So a blob's version says which of the
// two tokens opens it, the old one goes on to serve what was not taken over
// yet, and a job that was killed goes on where it was. One transaction makes
// the new token that of the installation, with the secrets that a start needs
// sealed by it; one at the end lets go of the old one. Nothing is destroyed.
//
// It cannot be turned back once it began. So it is rehearsed before: keys of
// every length are made, carried and used as clients' would be.

// NextToken is the token to which the installation can move.
type NextToken interface {
	Token
	Wrap(ctx context.Context, blob, plaintext, aad []byte) (hsm.Sealed, error)
	Unwrap(ctx context.Context, blob []byte, s hsm.Sealed, aad []byte) ([]byte, error)
}

// Mover is the HSM with both tokens.
type Mover interface {
	Rewrapper
	Sealer
	CreateRootKey(ctx context.Context) (hsm.NewKey, error)
	ImportRootKey(ctx context.Context, material secret.Value) (hsm.NewKey, error)
	Wrap(ctx context.Context, blob, plaintext, aad []byte) (hsm.Sealed, error)
	// Carry takes the root key of a blob over to the master keys that are open
	// in the next token.
	Carry(ctx context.Context, blob []byte) (hsm.NewKey, error)
}

// Standing says where the master keys of an installation are.
type Standing struct {
	Serial    string   // of the token that makes what is new; empty: there is no installation yet
	Since     uint16   // the first version that is in it
	Version   uint16   // the newest
	Left      []string // serial numbers of other tokens, which hold older versions
	PublicKey []byte   // of the key that signs
}

// Stands reads it.
func Stands(ctx context.Context, p Plain) (Standing, error) {
	var in install
	if _, err := p.Get(ctx, "install", &in); err != nil {
		if errors.Is(err, record.ErrNotFound) {
			err = nil
		}
		return Standing{Version: hsm.FirstMaster}, err // the one with which it will begin
	}
	s := Standing{Serial: in.Serial, Since: hsm.FirstMaster, Version: in.version()}
	for _, o := range in.Others {
		if o.in(in.Serial, in.Serial) {
			continue
		}
		s.Since = max(s.Since, o.Version+1)
		if !slices.Contains(s.Left, o.Serial) {
			s.Left = append(s.Left, o.Serial)
		}
	}
	if in.Master != nil {
		s.PublicKey = in.Master.PublicKey
	}
	return s, nil
}

// Attend logs in to one of two tokens and opens those master keys of the
// installation that it holds, which may be none. It gives no secrets.
func Attend(ctx context.Context, p Plain, t Token, now func() time.Time) (Opened, error) {
	info, err := t.Describe(ctx)
	if err == nil && !info.LoggedIn {
		err = login(ctx, p, t, info, now)
	}
	if err != nil {
		return Opened{}, err
	}
	for {
		var in, again install
		rev, err := p.Get(ctx, "install", &in)
		if err != nil {
			return Opened{}, err
		}
		m, err := in.open(ctx, t, info)
		if err != nil {
			return Opened{}, err
		}
		if after, err := p.Get(ctx, "install", &again); err != nil || after == rev {
			return Opened{Install: in.ID, Token: info, Master: m, Epoch: Epoch{Rev: rev, Version: in.version()}}, err
		}
	}
}

// Migrate begins to move all keys to the next token, goes on with a move that
// was stopped, and leaves one alone that runs or is over. began is true for
// the first. What stands in the way is said before anything is changed.
func (r *Rotation) Migrate(ctx context.Context, by string, q kmsapi.MigrationRequest) (began bool, err error) {
	if r.Next == nil {
		return false, fault.Newf(fault.Conflict, "move the keys to", "another token", "no second token is configured: serve with --to-secret and --to-values, which name the new HSM, or give a release the block migration.hsm")
	}
	job, rev, err := r.job(ctx)
	if err != nil {
		return false, err
	}
	var in install
	if _, err := r.Plain.Get(ctx, "install", &in); err != nil {
		return false, err
	}
	if _, err := Attend(ctx, r.Plain, r.Next, r.Now); err != nil {
		return false, refuseMove("the new token does not open", "", err)
	}
	info, err := r.Next.Describe(ctx)
	open := job.State == kmsapi.RotationRunning || job.State == kmsapi.RotationStopped
	switch {
	case err != nil:
		return false, err
	case open && job.To == nil:
		return false, fault.Newf(fault.Conflict, "move the keys to token", info.Label, "a change of the master keys is not finished: start it again with rotate-master")
	case open && job.To.Serial != info.Serial && in.version() >= job.Version:
		return false, fault.Newf(fault.Conflict, "move the keys to token", info.Label, "they are on their way to token %q", job.To.Label)
	case !open && in.Serial == info.Serial:
		return false, nil // it is over
	case job.State == kmsapi.RotationRunning && (job.LeavePlaced || !q.LeavePlaced):
		return false, nil
	}
	if !open || job.To.Serial != info.Serial {
		if job, err = r.planMove(job, in, by, info); err != nil {
			return false, err
		}
		began = true
	}
	if job.LeavePlaced = job.LeavePlaced || q.LeavePlaced; !job.LeavePlaced {
		if err := r.refusePlaced(ctx, func(context.Context, []byte) (bool, error) { return true, nil }); err != nil {
			return false, err
		}
	}
	if in.version() < job.Version {
		// The ids first, so that a run that is killed makes no second set.
		job.State = kmsapi.RotationStopped
		if rev, err = r.put(ctx, job, rev); err != nil {
			return false, err
		}
		if err := r.rehearse(ctx, job, in); err != nil {
			return false, err
		}
	}
	job.State, job.Fault = kmsapi.RotationRunning, ""
	if _, err := r.put(ctx, job, rev); err != nil {
		return false, err
	}
	r.wake()
	return began, nil
}

// put stores the job, and gives its revision.
func (r *Rotation) put(ctx context.Context, job rotationRecord, rev int64) (int64, error) {
	if err := conflict(r.Store.Commit(ctx, record.Change{Path: rotationPath, Value: job, Rev: rev})); err != nil {
		return 0, err
	}
	_, rev, err := r.job(ctx)
	return rev, err
}

func (r *Rotation) planMove(last rotationRecord, in install, by string, info hsm.TokenInfo) (rotationRecord, error) {
	version := max(in.version(), last.Version) + 1
	if version == 0 {
		return last, fault.Newf(fault.Conflict, "move the keys of", in.ID, "there are no more versions")
	}
	if len(last.Doomed) > 0 {
		return last, fault.Newf(fault.Conflict, "move the keys of", in.ID, "older master keys are still to be destroyed: start rotate-master again")
	}
	b := make([]byte, 3*16)
	if _, err := rand.Read(b); err != nil {
		return last, err
	}
	job := rotationRecord{IDs: hsm.MasterIDs{Install: in.ID, Wrap: b[:16], Seal: b[16:32], Sign: b[32:]}}
	job.MasterRotation = kmsapi.MasterRotation{Version: version, By: by, Began: r.stamp(), To: &kmsapi.MasterToken{Label: info.Label, Serial: info.Serial}}
	return job, nil
}

// openNext opens the new master keys in the next token, or makes them.
func (r *Rotation) openNext(ctx context.Context, job rotationRecord) (hsm.Master, error) {
	if r.Next == nil {
		return hsm.Master{}, fault.Newf(fault.NotReady, "move the keys to token", job.To.Label, "it is not configured").WithHint("serve with --to-secret and --to-values again (a release: with migration.hsm), until the move is over")
	}
	if _, err := Attend(ctx, r.Plain, r.Next, r.Now); err != nil {
		return hsm.Master{}, err
	}
	info, err := r.Next.Describe(ctx)
	if err == nil && info.Serial != job.To.Serial {
		err = fault.Newf(fault.BadContent, "move the keys to token", job.To.Label, "its serial number was %q, and now it is %q", job.To.Serial, info.Serial)
	}
	if err != nil {
		return hsm.Master{}, err
	}
	ids := job.IDs
	ids.Version = job.Version
	made, err := r.Next.OpenMaster(ctx, ids, true)
	r.Uses.Saw(made.Suite)
	return made, err
}

// sealNext seals by the new master keys, and counts it.
func (r *Rotation) sealNext(ctx context.Context, job rotationRecord, text, aad []byte) ([]byte, error) {
	if err := r.Uses.take(ctx, masterKey(job.Version)); err != nil {
		return nil, err
	}
	return r.Next.Seal(ctx, text, aad)
}

// rehearse makes keys as clients have them, carries them, and opens on the next
// token what was wrapped on this one. They are in no record, and in no token
// after that.
func (r *Rotation) rehearse(ctx context.Context, job rotationRecord, in install) error {
	no := func(err error) error {
		return refuseMove("the rehearsal failed, and no key was moved", job.To.Label, err)
	}
	made, err := r.openNext(ctx, job)
	if err != nil {
		return no(err)
	}
	if in.Master != nil && hsm.SameKey(made.WrapKCV, in.Master.WrapKCV) {
		return no(errors.New("both tokens hold the same master key: it is one token"))
	}
	for _, bytesLong := range []int{0, 16, 24, 32} {
		if err := r.rehearseKey(ctx, bytesLong); err != nil {
			return no(err)
		}
	}
	sealed, err := r.sealNext(ctx, job, []byte("rehearsal"), in.IDs.Wrap)
	if err == nil {
		_, err = r.Next.Unseal(ctx, sealed, in.IDs.Wrap)
	}
	if err != nil {
		return no(err)
	}
	return nil
}

// refuseMove says why a move does not begin. What may pass by itself stays what
// it is.
func refuseMove(lead, token string, err error) error {
	if k := fault.KindOf(err); k == fault.Unreachable || k == fault.Stopped {
		return err
	}
	return fault.New(fault.Conflict, "move the keys to token", token, fmt.Errorf("%s: %w", lead, err))
}

// rehearseKey takes one key through; 0 is one that is born in the token.
func (r *Rotation) rehearseKey(ctx context.Context, bytesLong int) error {
	text := make([]byte, 32)
	if _, err := rand.Read(text); err != nil {
		return err
	}
	k, err := r.HSM.CreateRootKey(ctx)
	if bytesLong > 0 {
		k, err = r.HSM.ImportRootKey(ctx, secret.New(text[:bytesLong]))
		if fault.KindOf(err) == fault.NotReady {
			return nil // the token takes no keys, so there are none of this length
		}
	}
	if err != nil {
		return err
	}
	old, err := r.HSM.Wrap(ctx, k.Blob, text, []byte("rehearsal"))
	if err != nil {
		return err
	}
	moved, err := r.HSM.Carry(ctx, k.Blob)
	if err != nil {
		return err
	}
	if !hsm.SameKey(k.KCV, moved.KCV) {
		return errors.New("another key came out")
	}
	if err := r.opensNext(ctx, moved.Blob, old, text); err != nil {
		return err
	}
	renewed, err := r.Next.Wrap(ctx, moved.Blob, text, []byte("rehearsal"))
	if err != nil {
		return err
	}
	return r.opensNext(ctx, moved.Blob, renewed, text)
}

func (r *Rotation) opensNext(ctx context.Context, blob []byte, s hsm.Sealed, text []byte) error {
	got, err := r.Next.Unwrap(ctx, blob, s, []byte("rehearsal"))
	if err == nil && !bytes.Equal(got, text) {
		err = errors.New("another text came out")
	}
	if err != nil {
		return fmt.Errorf("the new token does not open a ciphertext of suite %d: %w", s.Suite, err)
	}
	return nil
}

// bringNext makes the next token that of the installation.
func (r *Rotation) bringNext(ctx context.Context, job rotationRecord) error {
	var in install
	rev, err := r.Plain.Get(ctx, "install", &in)
	if err != nil || in.version() >= job.Version {
		return err
	}
	made, err := r.openNext(ctx, job)
	if err != nil {
		return err
	}
	for what, sealed := range map[string]*[]byte{"record": &in.RecordKey, "token": &in.TokenKey} {
		text, err := r.HSM.Unseal(ctx, *sealed, purpose(in.ID, what))
		if err != nil {
			return err
		}
		*sealed, err = r.sealNext(ctx, job, text, purpose(in.ID, what))
		clear(text)
		if err != nil {
			return err
		}
	}
	in.Others = append(in.Others, otherMaster{Version: in.version(), IDs: in.IDs, Master: *in.Master})
	for i := range in.Others {
		in.Others[i].Serial = in.Serial
	}
	in.Version, in.IDs, in.Master, in.Serial = job.Version, job.IDs, &made, job.To.Serial
	if _, err := r.Plain.Put(ctx, "install", in, rev); err != nil {
		return conflict(err)
	}
	return r.Masters.Follow(ctx)
}

// leave lets go of the old token: nothing names its master keys any more. Keys
// that stay in it are left only where that was asked for.
func (r *Rotation) leave(ctx context.Context, job rotationRecord) error {
	if !job.LeavePlaced {
		if err := r.refusePlaced(ctx, r.behind); err != nil { // it was made just before the move began
			return err
		}
	}
	var in install
	rev, err := r.Plain.Get(ctx, "install", &in)
	if err != nil {
		return err
	}
	in.Others = slices.DeleteFunc(in.Others, func(o otherMaster) bool { return !o.in(in.Serial, in.Serial) })
	if _, err := r.Plain.Put(ctx, "install", in, rev); err != nil {
		return conflict(err)
	}
	return r.Masters.Follow(ctx)
}

// behind says whether a key that stays in a token is not in the next one.
func (r *Rotation) behind(ctx context.Context, blob []byte) (bool, error) {
	_, err := r.Next.Wrap(ctx, blob, []byte("where are you?"), nil)
	if fault.KindOf(err) == fault.NotFound {
		return true, nil
	}
	return false, err
}

const placedNamed = 10 // keys that a refusal names; it counts the others

// refusePlaced refuses to go on while there are keys that stay in the old token.
func (r *Rotation) refusePlaced(ctx context.Context, old func(ctx context.Context, blob []byte) (bool, error)) error {
	var found []string
	err := r.Store.Dump(ctx, func(int64) error { return nil }, func(raw record.Raw) error {
		dir, rest, _ := strings.Cut(raw.Path, "/")
		if dir != "keys" && dir != "versions" {
			return nil
		}
		var k naming
		if err := json.Unmarshal(record.Body(raw.Value), &k); err != nil {
			return fault.New(fault.BadContent, "read record", raw.Path, err)
		}
		blob := k.blob()
		if !hsm.InToken(blob) {
			return nil
		}
		is, err := old(ctx, blob)
		if parts := strings.Split(rest, "/"); is && len(parts) > 1 && !slices.Contains(found, parts[1]) {
			found = append(found, parts[1])
		}
		return err
	})
	if err != nil || len(found) == 0 {
		return err
	}
	slices.Sort(found)
	names := strings.Join(found[:min(len(found), placedNamed)], ", ")
	if more := len(found) - placedNamed; more > 0 {
		names += fmt.Sprintf(" and %d more", more)
	}
	return fault.Newf(fault.Conflict, "move the keys to", "another token", "%d of them stay in the token by their instance's placement, and cannot leave it: %s", len(found), names)
}
