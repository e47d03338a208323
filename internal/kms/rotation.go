package kms

import (
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
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// Changing the master keys takes no key away and no call waits for it. New
// ones are made beside the old, in every token of the group; the installation
// then names them as those that make what is new, and the old as others that
// still open. From then on nothing comes into the store that an old version
// made (Masters), so each record is taken over in its own time, inside the
// token, and a scan that finds none left has found all. Only then are the old
// ones destroyed, if that was asked for. The job lies in the store, one worker
// at a time holds it, and each step can be done again: any process may be
// killed and another goes on.
//
// The key that authenticates records and the seed of the access tokens' keys
// stay what they are, sealed anew: they are random, and never left their seal
// but into memory.

// MasterToken is what a member of the group does for a change of master keys.
type MasterToken interface {
	OpenMaster(ctx context.Context, ids hsm.MasterIDs, create bool) (hsm.Master, error)
	DestroyMaster(ctx context.Context, ids hsm.MasterIDs) error
}

// Rewrapper takes over what older versions of the master keys made.
type Rewrapper interface {
	Rewrap(ctx context.Context, blob []byte) (hsm.NewKey, error)
	Reseal(ctx context.Context, sealed, aad []byte) ([]byte, error)
}

// Rotation changes the master keys of an open KMS.
type Rotation struct {
	Store   ClearStore
	Plain   Plain
	HSM     Mover
	Next    NextToken            // to which keys can move; nil: there is none
	Tokens  func() []MasterToken // every member of the group that makes what is new
	Masters *Masters
	Uses    *Uses
	Name    string // of this process, for the others
	Now     func() time.Time
	// Note writes down what was done.
	Note func(ctx context.Context, action, by, detail string) error
	kick chan struct{}
}

const (
	rotationPath = "master/rotation"
	leaseLife    = 30 * time.Second
	// settle is how long an old version is kept after nothing names it: a view
	// of the store that is older than a second serves nobody, and twice that
	// is for the call itself.
	settle = 3 * time.Second
	glance = 32 // records between two looks at whether to go on
)

// rotationRecord is the job, the last one that there was.
type rotationRecord struct {
	kmsapi.MasterRotation
	IDs    hsm.MasterIDs `json:"ids"`              // of the version that it brings
	Doomed []otherMaster `json:"doomed,omitempty"` // the installation names them no more
	Until  time.Time     `json:"until"`            // the worker's lease
}

var errHandedOver = errors.New("the rotation was stopped, or another process works on it")

// NewRotation completes a Rotation.
func NewRotation(r Rotation) *Rotation {
	r.kick = make(chan struct{}, 1)
	return &r
}

// Status tells which versions there are, and how the last change stands.
func (r *Rotation) Status(ctx context.Context) (kmsapi.MasterStatus, error) {
	var in install
	if _, err := r.Plain.Get(ctx, "install", &in); err != nil {
		return kmsapi.MasterStatus{}, err
	}
	out := kmsapi.MasterStatus{Installation: in.ID, Token: in.Serial, Version: in.version(), Older: []uint16{}}
	for _, o := range in.Others {
		out.Older = append(out.Older, o.Version)
	}
	job, _, err := r.job(ctx)
	if err == nil && job.State != "" {
		out.Rotation = &job.MasterRotation
	}
	return out, err
}

func (r *Rotation) job(ctx context.Context) (job rotationRecord, rev int64, err error) {
	rev, err = r.Store.Get(ctx, rotationPath, &job)
	if errors.Is(err, record.ErrNotFound) {
		err = nil
	}
	return job, rev, err
}

// Start begins a change of the master keys, goes on with one that was stopped,
// and leaves one alone that runs. began is true for the first.
func (r *Rotation) Start(ctx context.Context, by string, in kmsapi.MasterRotationRequest) (began bool, err error) {
	job, rev, err := r.job(ctx)
	if err != nil {
		return false, err
	}
	if job.To != nil && job.State != kmsapi.RotationDone {
		return false, fault.Newf(fault.Conflict, "rotate", "the master keys", "the keys are on their way to token %q: finish that first, with migrate", job.To.Label)
	}
	if job.State == kmsapi.RotationRunning && (job.DestroyOld || !in.DestroyOld) {
		return false, nil
	}
	job.DestroyOld = job.DestroyOld && job.State != kmsapi.RotationDone || in.DestroyOld
	if job.State == "" || job.State == kmsapi.RotationDone {
		if job, err = r.plan(ctx, job, by); err != nil {
			return false, err
		}
		began = true
	}
	job.State, job.Fault = kmsapi.RotationRunning, ""
	if err := conflict(r.Store.Commit(ctx, record.Change{Path: rotationPath, Value: job, Rev: rev})); err != nil {
		return false, err
	}
	r.wake()
	return began, nil
}

func (r *Rotation) wake() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// plan is a new job. The ids are written down before the keys are made, so
// that a run that is killed in between makes no second set.
func (r *Rotation) plan(ctx context.Context, last rotationRecord, by string) (rotationRecord, error) {
	var in install
	if _, err := r.Plain.Get(ctx, "install", &in); err != nil {
		return last, err
	}
	version := max(in.version(), last.Version) + 1 // a restored store may name older ones than were there
	if version == 0 {
		return last, fault.Newf(fault.Conflict, "rotate master keys of", in.ID, "there are no more versions")
	}
	b := make([]byte, 2*16)
	if _, err := rand.Read(b); err != nil {
		return last, err
	}
	job := rotationRecord{IDs: hsm.MasterIDs{Install: in.ID, Wrap: b[:16], Seal: b[16:], Sign: in.IDs.Sign}, Doomed: last.Doomed}
	job.MasterRotation = kmsapi.MasterRotation{Version: version, DestroyOld: last.DestroyOld, By: by, Began: r.stamp()}
	return job, nil
}

func (r *Rotation) stamp() time.Time { return r.Now().UTC().Truncate(time.Second) }

// Stop lets a change rest where it is; Start goes on with it.
func (r *Rotation) Stop(ctx context.Context) (stopped bool, err error) {
	for {
		job, rev, err := r.job(ctx)
		if err != nil || job.State != kmsapi.RotationRunning {
			return false, err
		}
		job.State, job.Until = kmsapi.RotationStopped, time.Time{}
		err = r.Store.Commit(ctx, record.Change{Path: rotationPath, Value: job, Rev: rev})
		if !errors.Is(err, record.ErrConflict) {
			return err == nil, err
		}
	}
}

// Kicked wakes who works when a change was started in this process.
func (r *Rotation) Kicked() <-chan struct{} { return r.kick }

// Work does what is to be done, if anything is and nobody else does it. First
// it follows what another process did: one that nobody asks for anything would
// not notice that an HSM is needed no more.
func (r *Rotation) Work(ctx context.Context) error {
	if err := r.Masters.Follow(ctx); err != nil {
		return err
	}
	job, _, err := r.job(ctx)
	if err != nil || job.State != kmsapi.RotationRunning || job.Worker != r.Name && r.Now().Before(job.Until) {
		return err
	}
	err = r.work(ctx)
	switch {
	case errors.Is(err, errHandedOver):
		return nil
	case err != nil && ctx.Err() == nil: // it is tried again at the next turn
		return errors.Join(err, r.update(ctx, func(j *rotationRecord) { j.Fault, j.Until = err.Error(), time.Time{} }))
	}
	return err
}

func (r *Rotation) work(ctx context.Context) error {
	var job rotationRecord
	if err := r.update(ctx, func(j *rotationRecord) { j.Worker = r.Name; job = *j }); err != nil {
		return err
	}
	bring := r.bring
	if job.To != nil {
		bring = r.bringNext
	}
	if err := bring(ctx, job); err != nil {
		return err
	}
	if err := r.resealSecrets(ctx); err != nil {
		return err
	}
	if err := r.takeOver(ctx, job.Version); err != nil {
		return err
	}
	action, detail := "kmsctl.master.rotated", fmt.Sprintf("version %d", job.Version)
	if job, _, err := r.job(ctx); err != nil { // what is to go, and to stay, may have been said meanwhile
		return err
	} else if job.To != nil {
		action, detail = "kmsctl.master.migrated", fmt.Sprintf("%s, token %s", detail, job.To.Serial)
		if err := r.leave(ctx, job); err != nil {
			return err
		}
	} else if job.DestroyOld {
		if err := r.destroyOld(ctx); err != nil {
			return err
		}
	}
	if err := r.Note(ctx, action, job.By, detail); err != nil {
		return err
	}
	return r.update(ctx, func(j *rotationRecord) {
		ended := r.stamp()
		j.State, j.Ended, j.Left, j.Until = kmsapi.RotationDone, &ended, 0, time.Time{}
	})
}

// update changes the job that this process works on, and keeps its lease.
func (r *Rotation) update(ctx context.Context, f func(*rotationRecord)) error {
	for {
		job, rev, err := r.job(ctx)
		if err != nil {
			return err
		}
		if job.State != kmsapi.RotationRunning || job.Worker != r.Name && r.Now().Before(job.Until) {
			return errHandedOver
		}
		job.Until, job.Fault = r.Now().Add(leaseLife), ""
		f(&job)
		err = r.Store.Commit(ctx, record.Change{Path: rotationPath, Value: job, Rev: rev})
		if !errors.Is(err, record.ErrConflict) {
			return err
		}
	}
}

// bring makes the new master keys in every token, then makes them those of the
// installation.
func (r *Rotation) bring(ctx context.Context, job rotationRecord) error {
	var in install
	rev, err := r.Plain.Get(ctx, "install", &in)
	if err != nil || in.version() >= job.Version {
		return err
	}
	ids := job.IDs
	ids.Version, ids.Spare = job.Version, true
	var made hsm.Master
	for i, t := range r.Tokens() {
		m, err := t.OpenMaster(ctx, ids, i == 0)
		if i > 0 && fault.KindOf(err) == fault.NotFound {
			return fault.New(fault.NotReady, "rotate master keys of", in.ID, err).
				WithHint("not every token of the group holds the new master keys: copy them as the HSM's maker says; the rotation then goes on by itself")
		}
		if err == nil && i > 0 {
			err = sameMaster(made, m, fmt.Sprintf("number %d of the group", i+1))
		}
		if err != nil {
			return err
		}
		made = m
	}
	if hsm.SameKey(made.WrapKCV, in.Master.WrapKCV) {
		return fault.Newf(fault.BadContent, "rotate master keys of", in.ID, "the token gave the same keys again")
	}
	in.Others = append(in.Others, otherMaster{Version: in.version(), IDs: in.IDs, Master: *in.Master})
	in.Version, in.IDs, in.Master = job.Version, job.IDs, &made
	if _, err := r.Plain.Put(ctx, "install", in, rev); err != nil {
		return conflict(err)
	}
	return nil
}

// resealSecrets takes the installation's own secrets over.
func (r *Rotation) resealSecrets(ctx context.Context) error {
	if err := r.Masters.Follow(ctx); err != nil {
		return err
	}
	var in install
	rev, err := r.Plain.Get(ctx, "install", &in)
	if err != nil {
		return err
	}
	changed := false
	for what, sealed := range map[string]*[]byte{"record": &in.RecordKey, "token": &in.TokenKey} {
		if hsm.VersionOf(nil, *sealed) == in.version() {
			continue
		}
		if *sealed, err = r.HSM.Reseal(ctx, *sealed, purpose(in.ID, what)); err != nil {
			return err
		}
		changed = true
	}
	if !changed {
		return nil
	}
	if _, err = r.Plain.Put(ctx, "install", in, rev); err != nil {
		return conflict(err)
	}
	return r.Masters.Follow(ctx)
}

// held is what the master keys made, in whatever record it lies.
type held struct {
	Blob    []byte `json:"blob"`
	Sealed  []byte `json:"sealed"`
	Private []byte `json:"private"`
	Version *held  `json:"version"`
}

func (h *held) older(version uint16) bool {
	v := max(hsm.VersionOf(h.Blob, h.Sealed), hsm.VersionOf(nil, h.Private))
	return v != 0 && v != version || h.Version != nil && h.Version.older(version)
}

// older lists the records that hold something of another version.
func (r *Rotation) older(ctx context.Context, version uint16) (paths []string, err error) {
	err = r.Store.Dump(ctx, func(int64) error { return nil }, func(raw record.Raw) error {
		dir, _, _ := strings.Cut(raw.Path, "/")
		if !slices.Contains([]string{"keys", "versions", strings.TrimSuffix(importTokenDir, "/")}, dir) {
			return nil
		}
		var h held
		if err := json.Unmarshal(record.Body(raw.Value), &h); err != nil {
			return fault.New(fault.BadContent, "read record", raw.Path, err)
		}
		if h.older(version) {
			paths = append(paths, raw.Path)
		}
		return nil
	})
	return paths, err
}

// takeOver takes every record over. What changes meanwhile is found by the
// next scan.
func (r *Rotation) takeOver(ctx context.Context, version uint16) error {
	for {
		paths, err := r.older(ctx, version)
		if err != nil || len(paths) == 0 {
			return err
		}
		left := len(paths)
		for some := range slices.Chunk(paths, glance) {
			done := 0
			for _, p := range some {
				ok, err := r.takeOne(ctx, p)
				if err != nil {
					return err
				}
				if ok {
					done++
				}
			}
			left -= len(some)
			if err := r.update(ctx, func(j *rotationRecord) { j.Done += done; j.Left = left }); err != nil {
				return err
			}
		}
	}
}

// takeOne takes one record over; ok is false when it was changed meanwhile.
func (r *Rotation) takeOne(ctx context.Context, path string) (ok bool, err error) {
	dir, rest, _ := strings.Cut(path, "/")
	parts := strings.Split(rest, "/")
	var v any
	var rev int64
	switch dir {
	case "keys":
		k := &keyRecord{}
		v = k
		if rev, err = r.Store.Get(ctx, path, k); err == nil {
			err = r.takeVersion(ctx, &k.Version, k.Instance, k.ID)
		}
	case "versions":
		old := &versionRecord{}
		v = old
		if rev, err = r.Store.Get(ctx, path, old); err == nil {
			err = r.takeVersion(ctx, old, parts[0], parts[1])
		}
	default:
		t := &tokenRecord{}
		v = t
		if rev, err = r.Store.Get(ctx, path, t); err == nil {
			t.Private, err = r.reseal(ctx, t.Private, tokenAAD(parts[0], t.ID))
		}
	}
	if err == nil {
		err = r.Store.Commit(ctx, record.Change{Path: path, Value: v, Rev: rev})
	}
	if errors.Is(err, record.ErrNotFound) || errors.Is(err, record.ErrConflict) {
		return false, nil
	}
	return err == nil, err
}

// reseal seals by the master keys of today, and counts it.
func (r *Rotation) reseal(ctx context.Context, sealed, aad []byte) ([]byte, error) {
	if err := r.Uses.take(ctx, masterKey(r.Masters.epoch().Version)); err != nil {
		return nil, err
	}
	return r.HSM.Reseal(ctx, sealed, aad)
}

func (r *Rotation) takeVersion(ctx context.Context, v *versionRecord, instance, key string) (err error) {
	if v.Sealed != nil {
		v.Sealed, err = r.reseal(ctx, v.Sealed, sealAAD(instance, key, v.ID))
		return err
	}
	made, err := r.HSM.Rewrap(ctx, v.Blob)
	if err != nil {
		return err
	}
	if len(v.KCV) > 0 && !hsm.SameKey(v.KCV, made.KCV) {
		return fault.Newf(fault.BadContent, "rewrap key", key, "version %s came out as another key", v.ID).WithHint("nothing was changed: the token is not to be trusted")
	}
	v.Blob = made.Blob
	return nil
}

// destroyOld destroys every other version. They are written down in the job
// before the installation forgets them, and forgotten there when they are gone.
func (r *Rotation) destroyOld(ctx context.Context) error {
	var in install
	rev, err := r.Plain.Get(ctx, "install", &in)
	if err != nil {
		return err
	}
	var doomed []otherMaster
	err = r.update(ctx, func(j *rotationRecord) {
		for _, o := range in.Others {
			if !slices.ContainsFunc(j.Doomed, func(d otherMaster) bool { return d.Version == o.Version }) {
				j.Doomed = append(j.Doomed, o)
			}
		}
		doomed = j.Doomed
	})
	if err != nil {
		return err
	}
	if len(in.Others) > 0 {
		in.Others = nil
		if _, err := r.Plain.Put(ctx, "install", in, rev); err != nil {
			return conflict(err)
		}
		if err := r.Masters.Follow(ctx); err != nil {
			return err
		}
	}
	select { // a call under way may still have what an older view of the store named
	case <-time.After(settle):
	case <-ctx.Done():
		return ctx.Err()
	}
	for _, o := range doomed {
		ids := o.IDs
		ids.Version = o.Version
		for _, t := range r.Tokens() {
			if err := t.DestroyMaster(ctx, ids); err != nil {
				return err
			}
		}
		if err := r.Note(ctx, "kmsctl.master.destroyed", "rotation", fmt.Sprintf("version %d", o.Version)); err != nil {
			return err
		}
	}
	return r.update(ctx, func(j *rotationRecord) { j.Doomed = nil })
}
